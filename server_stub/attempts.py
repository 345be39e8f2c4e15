"""Attempts in the database: what offers, polls and reports make of them (rules: ``truth``)."""

import dataclasses
from typing import Any

from sqlalchemy import Connection, func, select, update

from . import truth
from .schema import attempts, job_nodes, reports
from .truth import Attempt

TRIES = 3
TRIES_WITHIN_S = 86400
_NOT_THE_BUILDS_FAULT = ("superseded", "interrupted", "timed_out")
_FIELDS = [field.name for field in dataclasses.fields(Attempt)]


def latest(connection: Connection, device_id: str) -> Any:
    """The newest attempt of a board, or None."""
    return connection.execute(
        select(attempts)
        .where(attempts.c.device_id == device_id)
        .order_by(attempts.c.id.desc())
        .limit(1)
    ).first()


def tries(connection: Connection, device_id: str, now: int) -> dict[str, int]:
    """Attempts of the last day that went wrong, by build."""
    rows = connection.execute(
        select(attempts.c.build, func.count())
        .where(
            attempts.c.device_id == device_id,
            attempts.c.state.in_(truth.BAD),
            attempts.c.ended > now - TRIES_WITHIN_S,
            func.coalesce(attempts.c.reason, "").not_in(_NOT_THE_BUILDS_FAULT),
        )
        .group_by(attempts.c.build)
    )
    return dict(rows.all())


def on_poll(connection: Connection, row: Any, device: Any, now: int) -> Any:
    """Book what a poll tells of the newest attempt; return it as it is now."""
    return save(connection, row, poll_of(row, device, now))


def poll_of(row: Any, device: Any, now: int) -> Attempt:
    """What a poll of ``device`` makes of its newest attempt."""
    return truth.after_poll(
        as_attempt(row), device.current_build, device.current_version, now, device.staged
    )


def on_offer(
    connection: Connection, device: Any, open_row: Any, offer: dict[str, Any], now: int
) -> None:
    """Book an offer; the same one again is the same attempt."""
    if open_row is not None and open_row.state in truth.OPEN:
        if open_row.build == offer["build"]:
            changed = {"waits_until": offer["waits_until"]}
            if open_row.state == "offered" and _origin(open_row) != _origin_of(offer):
                changed = offer
            if any(getattr(open_row, name) != value for name, value in changed.items()):
                connection.execute(
                    update(attempts).where(attempts.c.id == open_row.id).values(**changed)
                )
            return
        save(connection, open_row, truth.give_up(as_attempt(open_row), "superseded", now))
    connection.execute(
        attempts.insert().values(
            **_blank(device.device_id, now),
            from_build=device.current_build,
            from_version=device.current_version,
            **offer,
        )
    )


def on_report(
    connection: Connection, device: Any, report: dict[str, Any], now: int
) -> tuple[Any, Any]:
    """Book a report that was not known yet; return the attempt before and after."""
    row = _attempt_meant(connection, device, report, now)
    error = report.get("error") or {}
    after = truth.after_report(
        as_attempt(row), report["status"], now, error.get("code"), report.get("bytes")
    )
    saved = save(connection, row, after)
    if row.job_id is not None:
        set_node(connection, row.job_id, device.device_id, saved)
    return row, saved


def _attempt_meant(connection: Connection, device: Any, report: dict[str, Any], now: int) -> Any:
    named = connection.execute(
        select(attempts)
        .where(attempts.c.device_id == device.device_id, attempts.c.attempt == report["attempt"])
        .order_by(attempts.c.id.desc())
        .limit(1)
    ).first()
    if named is not None:
        return named
    row = latest(connection, device.device_id)
    build = report.get("build") or ""
    origin: dict[str, Any] = {"origin": "board"}
    if row is not None and row.build == (build or row.build):
        if row.attempt is None and (row.state in truth.OPEN or row.presumed):
            connection.execute(
                update(attempts).where(attempts.c.id == row.id).values(attempt=report["attempt"])
            )
            return row
        if row.state in truth.OPEN or (row.state == "failed" and row.presumed):
            # The board has begun anew, after a reset or a broken download.
            origin = _origin(row)
            save(connection, row, truth.give_up(as_attempt(row), "interrupted", now))
    new = connection.execute(
        attempts.insert()
        .values(
            **_blank(device.device_id, now),
            **origin,
            attempt=report["attempt"],
            build=build or (row.build if row is not None and origin["origin"] != "board" else ""),
            version=report.get("version"),
            from_build=device.current_build,
            from_version=device.current_version,
        )
        .returning(attempts.c.id)
    ).scalar_one()
    return connection.execute(select(attempts).where(attempts.c.id == new)).one()


def time_out(connection: Connection, *where: Any, now: int) -> None:
    """Give up on the open attempts that fit ``where``."""
    for row in connection.execute(
        select(attempts).where(attempts.c.state.in_(truth.OPEN), *where)
    ).all():
        saved = save(connection, row, truth.give_up(as_attempt(row), "timed_out", now))
        if row.job_id is not None:
            set_node(connection, row.job_id, row.device_id, saved)


def cancel(connection: Connection, *where: Any, now: int) -> None:
    """Withdraw offers that no board has taken up yet."""
    for row in connection.execute(
        select(attempts).where(attempts.c.state == "offered", *where)
    ).all():
        save(connection, row, truth.give_up(as_attempt(row), "withdrawn", now))


def history(connection: Connection, device_id: str, limit: int = 50) -> list[dict[str, Any]]:
    rows = connection.execute(
        select(attempts)
        .where(attempts.c.device_id == device_id)
        .order_by(attempts.c.id.desc())
        .limit(limit)
    )
    return [dict(row._mapping) for row in rows]


def keep_last(connection: Connection, device_id: str, count: int) -> None:
    """Drop the oldest reports of a board beyond ``count``."""
    oldest = (
        select(reports.c.id)
        .where(reports.c.device_id == device_id)
        .order_by(reports.c.id.desc())
        .offset(count - 1)
        .limit(1)
        .scalar_subquery()
    )
    connection.execute(
        reports.delete().where(reports.c.device_id == device_id, reports.c.id < oldest)
    )


_NODE_STATUS = {"confirmed": "completed", "failed": "failed", "rolledback": "failed"}


def set_node(connection: Connection, job_id: int, device_id: str, attempt: Any) -> None:
    """Show an attempt as the status of a job's node."""
    connection.execute(
        update(job_nodes)
        .where(job_nodes.c.job_id == job_id, job_nodes.c.device_id == device_id)
        .values(
            status=_NODE_STATUS.get(attempt.state, "in_progress"),
            error_message=attempt.reason,
            updated=attempt.updated,
        )
    )


def as_attempt(row: Any) -> Attempt:
    """The rules' view of a row."""
    return Attempt(**{name: getattr(row, name) for name in _FIELDS})


def save(connection: Connection, row: Any, after: Attempt) -> Any:
    changed = {n: getattr(after, n) for n in _FIELDS if getattr(after, n) != getattr(row, n)}
    if not changed:
        return row
    connection.execute(update(attempts).where(attempts.c.id == row.id).values(**changed))
    return connection.execute(select(attempts).where(attempts.c.id == row.id)).one()


def _blank(device_id: str, now: int) -> dict[str, Any]:
    return {
        "device_id": device_id,
        "state": "offered",
        "presumed": False,
        "said_confirmed": False,
        "offered": now,
        "updated": now,
    }


def _origin(row: Any) -> dict[str, Any]:
    return {"origin": row.origin, "rollout_id": row.rollout_id, "job_id": row.job_id}


def _origin_of(offer: dict[str, Any]) -> dict[str, Any]:
    return {name: offer.get(name) for name in ("origin", "rollout_id", "job_id")}
