"""Schedules: a cron expression in a time zone, and one of a few actions.

From ``schedules.yaml`` (the file is the truth for those it names) and from the API.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from apscheduler.triggers.base import BaseTrigger
from sqlalchemy import Connection, delete, select, update

from . import cron
from .problems import Problem
from .schema import schedules
from .store import bump

ACTIONS = {
    "start_rollout": {"rollout"},
    "pause_rollout": {"rollout"},
    "resume_rollout": {"rollout"},
    "expand_rollout": {"rollout"},
    "gc": set(),
    "backup": {"to"},  # in the file only: no request names a path
}


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
    return cron.trigger(wanted["cron"], wanted["zone"])


def put(connection: Connection, wanted: Mapping[str, Any], source: str) -> int:
    """Make or replace the schedule of a name."""
    check(wanted)
    connection.execute(delete(schedules).where(schedules.c.name == wanted["name"]))
    values = {k: wanted[k] for k in ("name", "cron", "zone", "action")}
    bump(connection)
    return connection.execute(
        schedules.insert().values(**values, source=source).returning(schedules.c.id)
    ).scalar_one()


def remove(connection: Connection, schedule_id: int) -> str:
    """Raises Problem 404."""
    row = connection.execute(select(schedules).where(schedules.c.id == schedule_id)).first()
    if row is None:
        raise Problem(404, "no_schedule", f"no schedule {schedule_id}")
    connection.execute(delete(schedules).where(schedules.c.id == schedule_id))
    bump(connection)
    return row.name


def listing(connection: Connection) -> list[dict[str, Any]]:
    rows = connection.execute(select(schedules).order_by(schedules.c.id))
    return [dict(row._mapping) for row in rows]


def ran(connection: Connection, schedule_id: int, at: int, result: str) -> None:
    connection.execute(
        update(schedules)
        .where(schedules.c.id == schedule_id)
        .values(last_run=at, last_result=result[:300])
    )


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


def sync_file(connection: Connection, wanted: list[dict[str, Any]]) -> None:
    """Make the database agree with the file."""
    old = {
        row.name: row
        for row in connection.execute(select(schedules).where(schedules.c.source == "file"))
    }
    for name in set(old) - {entry["name"] for entry in wanted}:
        remove(connection, old[name].id)
    for entry in wanted:
        row = old.get(entry["name"])
        if row is None or any(getattr(row, k) != entry[k] for k in ("cron", "zone", "action")):
            put(connection, entry, "file")
