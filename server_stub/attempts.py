"""Attempts in the database: what offers, polls and reports make of them (rules: ``truth``).

What every poll and report runs is made once, here: to build a statement costs more than to run it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Integer, bindparam, case, func, select, update

from . import devices, events, truth
from .offers import Tries
from .schema import attempts, job_nodes, reports
from .truth import Attempt

TRIES_WITHIN_S = 86400
LONGEST_S = 86400
"""An attempt that makes no step for so long has ended, though its board may go on asking."""

_BROKEN_OFF = ("interrupted", "timed_out")
_FIELDS = [field.name for field in dataclasses.fields(Attempt)]

_OF_BOARD = (
    select(attempts)
    .where(attempts.c.device_id == bindparam("board"))
    .order_by(attempts.c.id.desc())
    .limit(1)
)
_OF_BOARDS = select(attempts).where(
    attempts.c.id.in_(
        select(func.max(attempts.c.id))
        .where(attempts.c.device_id.in_(bindparam("boards", expanding=True)))
        .group_by(attempts.c.device_id)
    )
)
_NAMED = _OF_BOARD.where(attempts.c.attempt == bindparam("name"))
_broke_off = attempts.c.presumed & attempts.c.reason.in_(_BROKEN_OFF)
_set_aside = attempts.c.presumed & attempts.c.reason.in_(truth.SET_ASIDE)
_TRIES = (
    select(
        attempts.c.device_id,
        attempts.c.build,
        func.sum(case((_broke_off | _set_aside, 0), else_=1)),
        func.sum(case((_broke_off, 1), else_=0)),
    )
    .where(
        attempts.c.device_id.in_(bindparam("boards", expanding=True)),
        attempts.c.state.in_(truth.BAD),
        attempts.c.ended > bindparam("since"),
    )
    .group_by(attempts.c.device_id, attempts.c.build)
)
_ADD = attempts.insert().returning(*attempts.c)
_BY_ID = select(attempts).where(attempts.c.id == bindparam("row"))
_CHANGE = (
    update(attempts)
    .where(attempts.c.id == bindparam("row"), attempts.c.state == bindparam("seen"))
    .returning(*attempts.c)
)
_OLDER = (
    reports.c.device_id == bindparam("board"),
    reports.c.id
    < select(reports.c.id)
    .where(reports.c.device_id == bindparam("board"))
    .order_by(reports.c.id.desc())
    .offset(bindparam("kept", type_=Integer))
    .limit(1)
    .scalar_subquery(),
)
_KEEP = reports.delete().where(*_OLDER)
_KEEP_LOGS = update(reports).where(*_OLDER, reports.c.log.is_not(None)).values(log=None)
_SET_NODE = update(job_nodes).where(
    job_nodes.c.job_id == bindparam("job"), job_nodes.c.device_id == bindparam("board")
)


def latest(connection: Connection, device_id: str) -> Any:
    """The newest attempt of a board, or None."""
    return connection.execute(_OF_BOARD, {"board": device_id}).first()


def latest_of(connection: Connection, device_ids: Iterable[str]) -> dict[str, Any]:
    """The newest attempt of each of these boards that has had one."""
    rows = connection.execute(_OF_BOARDS, {"boards": list(device_ids)})
    return {row.device_id: row for row in rows}


def tries(
    connection: Connection, device_ids: Iterable[str], now: int
) -> dict[str, dict[str, Tries]]:
    """Attempts of the last day that went wrong: by board, then by build."""
    wanted = {"boards": list(device_ids), "since": now - TRIES_WITHIN_S}
    found: dict[str, dict[str, Tries]] = {}
    for device_id, build, *numbers in connection.execute(_TRIES, wanted):
        found.setdefault(device_id, {})[build] = Tries(*numbers)
    return found


def on_poll(connection: Connection, row: Any, device: Any, now: int) -> Any:
    """Book what a poll tells of the newest attempt; return it as it is now."""
    return save(connection, row, lambda attempt: poll_of(attempt, device, now))


def poll_of(attempt: Attempt, device: Any, now: int) -> Attempt:
    """What a poll of ``device`` makes of its newest attempt; none of one that may not update."""
    if device.enrolment != "accepted":
        return attempt
    return truth.after_poll(
        attempt, device.current_build, device.current_version, now, device.staged
    )


def on_offer(
    connection: Connection, device: Any, open_row: Any, offer: dict[str, Any], now: int
) -> None:
    """Book an offer; the same one again is the same attempt.

    What has begun stays with whoever began it, unless a rollout offers it: that must count it.
    """
    if open_row is not None and open_row.state in truth.OPEN:
        if open_row.build == offer["build"]:
            changed = {"waits_until": offer["waits_until"]}
            if open_row.state == "offered" or offer["rollout_id"] is not None:
                changed = offer
            if any(getattr(open_row, name) != value for name, value in changed.items()):
                named = {"row": open_row.id, "seen": open_row.state}
                connection.execute(_CHANGE, {**named, **changed})
            return
        save(connection, open_row, lambda a: truth.give_up(a, "superseded", now))
    connection.execute(_ADD, {**_blank(device, now), **offer})


def on_report(
    connection: Connection, device: Any, report: dict[str, Any], now: int
) -> tuple[str, Any]:
    """Book a report that was not known yet; return the attempt's state before, and it after."""
    row, new = _attempt_meant(connection, device, report, now)
    code = (report.get("error") or {}).get("code")

    def said(attempt: Attempt) -> Attempt:
        return truth.after_report(attempt, report["status"], now, code, report.get("bytes"))

    if row is None:
        before = new["state"]
        after = dataclasses.asdict(said(_attempt(new)))
        saved = connection.execute(_ADD, {**new, **after}).one()
    else:
        before = row.state
        saved = save(connection, row, said, new)
    if saved.job_id is not None:
        set_node(connection, saved.job_id, device.device_id, saved)
    return before, saved


def _attempt_meant(
    connection: Connection, device: Any, report: dict[str, Any], now: int
) -> tuple[Any, dict[str, Any]]:
    """Find the attempt a report speaks of: its row and what more is known of it now, or None and
    the values of a new one."""
    board, name = device.device_id, report["attempt"]
    row = latest(connection, board)
    if row is None or row.attempt != name:
        named = connection.execute(_NAMED, {"board": board, "name": name}).first()
        row = named or row
    if row is not None and row.attempt == name:
        return row, {}
    build = report.get("build") or ""
    origin: dict[str, Any] = {"origin": "board"}
    if row is not None and row.build == (build or row.build):
        if row.attempt is None and (row.state in truth.OPEN or row.presumed):
            return row, {"attempt": name}
        if row.state in truth.OPEN or (row.state == "failed" and row.presumed):
            # The board has begun anew, after a reset or a broken download.
            origin = _origin(row)
            save(connection, row, lambda a: truth.give_up(a, "interrupted", now))
    return None, {
        **_blank(device, now),
        **origin,
        "attempt": name,
        "build": build or (row.build if row is not None and origin["origin"] != "board" else ""),
        "version": report.get("version"),
    }


def time_out(connection: Connection, *where: Any, before: int, now: int) -> None:
    """Give up on the open attempts that fit ``where`` and have made no step since ``before``."""
    # A board that waits for its install window is not lost: it is expected then.
    waits = case((attempts.c.state == "staged", func.coalesce(attempts.c.waits_until, 0)), else_=0)
    late = attempts.c.updated < before, waits < before
    for row in connection.execute(
        select(attempts).where(attempts.c.state.in_(truth.OPEN), *late, *where)
    ).all():
        saved = save(connection, row, lambda a: truth.time_out(a, before, now))
        if saved.reason != "timed_out":  # only withdrawn, or another worker knows better
            continue
        if row.job_id is not None:
            set_node(connection, row.job_id, row.device_id, saved)
        status = {"status": saved.state, "status_version": saved.version}
        devices.change(connection, saved, status)
        tell(connection, saved, now)


def tell(connection: Connection, row: Any, now: int) -> None:
    """Tell the world outside how an attempt ended."""
    about = {
        "device_id": row.device_id,
        "version": row.version,
        "reason": row.reason,
        "rollout": row.rollout_id,
    }
    events.emit(connection, f"attempt.{row.state}", about, now)


def cancel(connection: Connection, *where: Any, now: int) -> None:
    """Withdraw offers that no board has taken up yet."""
    for row in connection.execute(
        select(attempts).where(attempts.c.state == "offered", *where)
    ).all():
        save(
            connection,
            row,
            lambda a: truth.give_up(a, "withdrawn", now) if a.state == "offered" else a,
        )


def let_go(connection: Connection, device_id: str, now: int) -> None:
    """End what a board is at that may no longer update: it takes no place, and counts nowhere."""
    for row in connection.execute(
        select(attempts).where(attempts.c.device_id == device_id, attempts.c.state.in_(truth.OPEN))
    ).all():
        save(connection, row, lambda a: truth.give_up(a, "withdrawn", now))


def history(connection: Connection, device_id: str, limit: int = 50) -> list[dict[str, Any]]:
    rows = connection.execute(
        select(attempts)
        .where(attempts.c.device_id == device_id)
        .order_by(attempts.c.id.desc())
        .limit(limit)
    )
    return [dict(row._mapping) for row in rows]


def keep_last(connection: Connection, device_id: str, count: int, logs: int) -> None:
    """Drop the oldest reports of a board beyond ``count``, and logs of those beyond ``logs``."""
    connection.execute(_KEEP, {"board": device_id, "kept": count - 1})
    connection.execute(_KEEP_LOGS, {"board": device_id, "kept": logs - 1})


_NODE_STATUS = {"confirmed": "completed", "failed": "failed", "rolledback": "failed"}


def set_node(connection: Connection, job_id: int, device_id: str, attempt: Any) -> None:
    """Show an attempt as the status of a job's node."""
    status = _NODE_STATUS.get(attempt.state, "in_progress")
    put_node(connection, job_id, device_id, status, attempt.reason, attempt.updated)


def put_node(
    connection: Connection, job_id: int, device_id: str, status: str, why: str | None, now: int
) -> None:
    """Write a node's status."""
    values = {"status": status, "error_message": why, "updated": now}
    connection.execute(_SET_NODE, {"job": job_id, "board": device_id, **values})


def as_attempt(row: Any) -> Attempt:
    """The rules' view of a row."""
    return Attempt(**{name: getattr(row, name) for name in _FIELDS})


def save(
    connection: Connection,
    row: Any,
    rule: Callable[[Attempt], Attempt],
    more: Mapping[str, Any] | None = None,
) -> Any:
    """Write what ``rule`` makes of an attempt, and ``more``; return the row as it is now.

    Where another worker has moved it on since ``row`` was read, the rule is asked anew.
    """
    while True:
        after = rule(as_attempt(row))
        changed = {n: getattr(after, n) for n in _FIELDS if getattr(after, n) != getattr(row, n)}
        changed |= more or {}
        if not changed:
            return row
        named = {"row": row.id, "seen": row.state}
        written = connection.execute(_CHANGE, {**named, **changed}).first()
        if written is not None:
            return written
        row = connection.execute(_BY_ID, {"row": row.id}).one()


def _attempt(values: Mapping[str, Any]) -> Attempt:
    return Attempt(**{name: values[name] for name in _FIELDS if name in values})


def _blank(device: Any, now: int) -> dict[str, Any]:
    return {
        "device_id": device.device_id,
        "from_build": device.current_build,
        "from_version": device.current_version,
        "state": "offered",
        "presumed": False,
        "said_confirmed": False,
        "offered": now,
        "updated": now,
    }


def _origin(row: Any) -> dict[str, Any]:
    return {"origin": row.origin, "rollout_id": row.rollout_id, "job_id": row.job_id}
