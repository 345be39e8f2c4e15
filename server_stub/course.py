"""What time makes of rollouts: they start, move on, pause and end by what has happened."""

from typing import Any

from sqlalchemy import Connection, select, update

from . import attempts as tries
from . import events, rollouts, stages, tally, truth
from .problems import Problem
from .schema import attempts, devices, releases
from .schema import rollouts as table


def due(connection: Connection) -> list[int]:
    """The rollouts a tick has to look at."""
    return list(
        connection.scalars(
            select(table.c.id)
            .where(
                table.c.state.in_(stages.ACTIVE)
                | ((table.c.state == "draft") & table.c.starts_at.is_not(None))
            )
            .order_by(table.c.id)
        )
    )


def tick(connection: Connection, rollout_id: int, now: int) -> tuple[str, str]:
    """Move one rollout on by what has happened; return (action, why)."""
    row = rollouts.get(connection, rollout_id, lock=True)
    if row.state == "draft":
        if row.starts_at is None or row.starts_at > now:
            return "hold", row.why
        try:
            rollouts.act(connection, rollout_id, "start", "its time has come", now)
        except Problem as exc:  # not to be tried again and again: a person starts it
            why = f"not started at its time: {exc.detail}"
            rollouts.set_(connection, row, now, starts_at=None, why=why)
            events.emit(connection, "rollout.refused", {"rollout": rollout_id, "why": why}, now)
            return "refused", why
        return "advance", "started at its time"
    if row.state not in stages.ACTIVE:
        return "hold", row.why
    policy = stages.policy_of(row)
    _time_out(connection, row, now)
    progress = tally.progress(connection, row, now)
    if row.passed_at is not None and not stages.enough(progress.counts, policy):
        # By newcomers, or a board that went back.
        rollouts.set_(connection, row, now, passed_at=None)
    verdict = stages.judge(progress, policy, now)
    if verdict.action == "pause":
        rollouts.stop(connection, row, "paused", verdict.why, now)
    elif verdict.action == "passed":
        rollouts.set_(connection, row, now, passed_at=now, why=verdict.why)
    elif verdict.action == "advance":
        rollouts.enter(connection, row, row.stage + 1, now)
    elif verdict.action == "complete":
        rollouts.set_(connection, row, now, state="complete", why=verdict.why)
        connection.execute(
            update(releases).where(releases.c.id == row.release_id).values(stable=True)
        )
    elif verdict.why != row.why:
        connection.execute(update(table).where(table.c.id == rollout_id).values(why=verdict.why))
    if verdict.action in ("pause", "advance", "complete"):
        rollouts.tell(connection, rollouts.get(connection, rollout_id), now)
    return verdict.action, verdict.why


def _time_out(connection: Connection, row: Any, now: int) -> None:
    """Give up on boards of a rollout that are silent, and on attempts that never end."""
    mine = attempts.c.rollout_id == row.id
    lost = now - stages.policy_of(row).timeout_s
    silent = attempts.c.device_id.in_(
        select(devices.c.device_id).where(devices.c.last_seen < lost)
    )
    tries.time_out(connection, mine, silent, before=lost, now=now)
    tries.time_out(connection, mine, before=min(lost, now - tries.LONGEST_S), now=now)


def time_out_others(connection: Connection, now: int) -> None:
    """Give up on attempts that no running rollout looks after."""
    left = select(attempts.c.rollout_id).where(attempts.c.state.in_(truth.OPEN)).distinct()
    for rollout_id in connection.scalars(
        select(table.c.id).where(table.c.id.in_(left), table.c.state.not_in(stages.ACTIVE))
    ).all():
        _time_out(connection, rollouts.get(connection, rollout_id), now)
    without = attempts.c.rollout_id.is_(None)
    tries.time_out(connection, without, before=now - tries.LONGEST_S, now=now)
