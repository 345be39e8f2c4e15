"""How far a rollout is: its members by what became of them, as ``stages`` judges them."""

import dataclasses
from typing import Any

from sqlalchemy import Connection, case, func, select

from . import stages, truth
from .audience import free
from .schema import attempts, devices, members


def counts(connection: Connection, row: Any, now: int) -> stages.Counts:
    """Count the members by their newest attempt of this rollout.

    A board that is pinned to another version counts only once it has tried.
    """
    newest = (
        select(attempts.c.device_id, func.max(attempts.c.id).label("id"))
        .where(attempts.c.rollout_id == row.id)
        .group_by(attempts.c.device_id)
        .subquery()
    )
    # What was withdrawn, or gave way to an operator's other wish, says nothing of the build.
    set_aside = attempts.c.presumed & attempts.c.reason.in_(truth.SET_ASIDE)
    state = case((set_aside, None), else_=attempts.c.state)
    alive = devices.c.last_seen >= now - stages.policy_of(row).seen_within_s
    # A board that already runs the build needs no attempt.
    there = func.coalesce(devices.c.current_build == row.build, False)
    rows = connection.execute(
        select(state, alive, there, func.count())
        .select_from(members)
        .join(devices, devices.c.device_id == members.c.device_id)
        .outerjoin(newest, newest.c.device_id == members.c.device_id)
        .outerjoin(attempts, attempts.c.id == newest.c.id)
        .where(
            members.c.rollout_id == row.id,
            devices.c.enrolment == "accepted",
            free(row) | state.is_not(None),
        )
        .group_by(state, alive, there)
    )
    tally = {field.name: 0 for field in dataclasses.fields(stages.Counts)}
    for what, is_alive, is_there, count in rows:
        if what in truth.OPEN:
            tally["in_flight"] += count
        elif what in truth.ENDED:
            tally[what] += count
        elif is_there:
            tally["confirmed"] += count
        elif not is_alive:
            tally["asleep"] += count
            continue
        tally["members"] += count
    return stages.Counts(**tally)


def progress(connection: Connection, row: Any, now: int) -> stages.Progress:
    """Where a rollout stands now."""
    return stages.Progress(
        row.state,
        row.stage,
        len(row.stages),
        counts(connection, row, now),
        row.passed_at,
        row.gate_open,
        "percent" in row.stages[row.stage],
    )
