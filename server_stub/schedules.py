"""Schedules: a cron expression in a time zone, and one of a few actions.

From ``schedules.yaml`` (the file is the truth for those it names) and from the API. A moment is
due until somebody has taken it, and only one takes it: none is lost because the server was away
for a while, or another worker leads now, and none is done twice.
"""

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from apscheduler.triggers.base import BaseTrigger
from sqlalchemy import Connection, delete, select, update

from . import audit, cron
from .problems import Problem
from .schema import schedules

ACTIONS = {
    "start_rollout": {"rollout"},
    "pause_rollout": {"rollout"},
    "resume_rollout": {"rollout"},
    "expand_rollout": {"rollout"},
    "gc": set(),
    "backup": {"to"},  # in the file only: no request names a path
}


_SAID = ("cron", "zone", "action")

LATE_S = 3600
"""A moment that was missed is made up for within this time, and dropped after it."""


class ScheduleError(Exception):
    """A schedule file that can't be used."""


def check(wanted: Mapping[str, Any]) -> BaseTrigger:
    """Return the trigger of a schedule.

    Raises:
        ValueError: cron, zone or action can't be.
    """
    action = wanted["action"]
    needs = ACTIONS.get(str(action.get("do")))
    if needs is None:
        raise ValueError(f"do {action.get('do')!r}: expected one of {', '.join(ACTIONS)}")
    if set(action) != {"do", *needs}:
        raise ValueError(
            f"action {action['do']}: expected {', '.join(sorted(needs)) or 'no more'}"
        )
    trigger = cron.trigger(wanted["cron"], wanted["zone"])
    if trigger.get_next_fire_time(None, dt.datetime.now(dt.UTC)) is None:
        # To find that out takes longer than all else, and ``due`` would at every look.
        raise ValueError(f"cron {wanted['cron']!r}: no day is like that")
    return trigger


def put(connection: Connection, wanted: Mapping[str, Any], source: str, now: int) -> int:
    """Make or replace the schedule of a name."""
    check(wanted)
    connection.execute(delete(schedules).where(schedules.c.name == wanted["name"]))
    values = {name: wanted[name] for name in ("name", *_SAID)}
    return connection.execute(
        schedules.insert().values(**values, source=source, created=now).returning(schedules.c.id)
    ).scalar_one()


def remove(connection: Connection, schedule_id: int) -> str:
    """Raises Problem 404."""
    row = connection.execute(select(schedules).where(schedules.c.id == schedule_id)).first()
    if row is None:
        raise Problem(404, "no_schedule", f"no schedule {schedule_id}")
    connection.execute(delete(schedules).where(schedules.c.id == schedule_id))
    return row.name


def listing(connection: Connection) -> list[dict[str, Any]]:
    rows = connection.execute(select(schedules).order_by(schedules.c.id))
    return [dict(row._mapping) for row in rows]


def due(connection: Connection, now: int) -> list[int]:
    """The schedules that have a moment nobody has taken."""
    rows = connection.execute(select(schedules).order_by(schedules.c.id))
    return [row.id for row in rows if _is_due(row, now)]


def _is_due(row: Any, now: int) -> bool:
    since = max(row.last_run or 0, row.created, now - LATE_S)
    after = dt.datetime.fromtimestamp(since + 1, dt.UTC)
    moment = cron.trigger(row.cron, row.zone).get_next_fire_time(None, after)
    return moment is not None and moment.timestamp() <= now


def take(connection: Connection, schedule_id: int, now: int) -> Any:
    """Take what is due of a schedule, all moments at once; its row, or None: another has."""
    query = select(schedules).where(schedules.c.id == schedule_id).with_for_update()
    row = connection.execute(query).first()
    if row is None or not _is_due(row, now):
        return None
    _change(connection, schedule_id, last_run=now, last_result="begun")
    return row


def ran(connection: Connection, schedule_id: int, result: str) -> None:
    """Write down what came of it."""
    _change(connection, schedule_id, last_result=result[:300])


def _change(connection: Connection, schedule_id: int, **values: Any) -> None:
    connection.execute(update(schedules).where(schedules.c.id == schedule_id).values(values))


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read ``schedules.yaml``: a list of name, cron, zone, action.

    Raises:
        ScheduleError: which entry, and why.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8")) or []
    except yaml.YAMLError as exc:
        raise ScheduleError(f"{path}: not YAML: {' '.join(str(exc).split())}") from None
    if not isinstance(found, list):
        raise ScheduleError(f"{path}: expected a list of schedules")
    for number, entry in enumerate(found, 1):
        where = f"{path}: schedule {number}"
        if not isinstance(entry, dict) or not set(entry) <= {"name", "cron", "zone", "action"}:
            raise ScheduleError(f"{where}: expected name, cron, zone, action")
        entry.setdefault("zone", "UTC")
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("action"), dict):
            raise ScheduleError(f"{where}: expected a name and an action")
        try:
            check(entry)
        except (ValueError, KeyError) as exc:
            raise ScheduleError(f"{where} {entry['name']!r}: {exc}") from None
    return found


def sync_file(connection: Connection, wanted: list[dict[str, Any]], now: int) -> None:
    """Make the database agree with the file; what that changes is in the audit log."""
    old = {
        row.name: row
        for row in connection.execute(select(schedules).where(schedules.c.source == "file"))
    }
    for name in set(old) - {entry["name"] for entry in wanted}:
        remove(connection, old[name].id)
        _note(connection, "remove", name, _said(old[name]), {})
    for entry in wanted:
        name = entry["name"]
        before = _said(old[name]) if name in old else {}
        after = {member: entry[member] for member in _SAID}
        if before != after:
            put(connection, entry, "file", now)
            _note(connection, "create", name, before, after)


def _said(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _SAID}


def _note(
    connection: Connection, what: str, name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    audit.note(connection, audit.DISK, f"schedule.{what}", f"schedule {name}", before, after)
