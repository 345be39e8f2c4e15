"""What schedules do when they are due: as people do it, by the same functions, and audited."""

import logging
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from . import api_firmware, api_rollouts, audit, backup, schedules
from .audit import SELF
from .http import Note, Parts, audited

log = logging.getLogger("twinslot.server")


def run(parts: Parts, data: Path, schedule_id: int, now: int) -> None:
    """Do a schedule's action, unless somebody has, and write down what came of it.

    Args:
        data: the private folder, for backups.
    """
    row = parts.store.write(lambda c: schedules.take(c, schedule_id, now))
    if row is None:
        return
    try:
        result = _do(parts, data, row)
    except Exception as exc:
        result = f"failed: {getattr(exc, 'detail', None) or exc}"
    parts.store.write(lambda c: schedules.ran(c, schedule_id, result))
    log.info("schedule", extra={"fields": {"schedule": schedule_id, "result": result}})


def _do(parts: Parts, data: Path, row: Any) -> str:
    what = row.action["do"]
    if what == "backup":
        made = str(backup.make(data, Path(row.action["to"])))
        parts.store.write(lambda c: audit.note(c, SELF, "backup", made))
        return made
    if what == "gc":
        found = parts.store.write(
            lambda c: audited(
                c, SELF, "firmware.gc", lambda _, note: api_firmware.collect_one(note, parts)
            )
        )
        return f"removed {found['removed']} payloads"
    verb = what.partition("_")[0]
    rollout_id = row.action["rollout"]

    def act(connection: Connection, note: Note) -> dict[str, Any]:
        why = f"by schedule {row.name}"
        return api_rollouts.act_one(connection, note, rollout_id, verb, why)

    shown = parts.store.write(lambda c: audited(c, SELF, f"rollout.{verb}", act))
    return f"rollout {rollout_id} is {shown['state']}"
