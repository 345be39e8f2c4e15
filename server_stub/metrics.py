"""Prometheus' text format of what matters: boards by state, rollouts, and each worker's work.

Whichever worker answers a scrape tells of all of them: of itself as it is, of the others as they
last wrote it down. Counters are a worker's since it started; sum them up over ``worker``.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import os
import socket
import time
from typing import Any

from sqlalchemy import Connection, func, select

from .desk import Desk
from .schema import attempts, counters, deliveries, devices, rollouts
from .store import Store, insert

_STARTED = int(time.time())
_KEPT_S = 86400  # of a worker that is no more
_COUNTED = {
    "polls": ("polls_total", "counter", "Polls answered."),
    "remembered": ("polls_remembered_total", "counter", "Of these, from memory."),
    "sent_away": ("polls_sent_away_total", "counter", "Of these, told to ask again: overload."),
    "reports": ("reports_total", "counter", "Reports taken."),
    "bytes_sent": ("sent_bytes_total", "counter", "Bytes of payloads sent."),
    "started": ("start_time_seconds", "gauge", "When this worker started."),
}


def counted(desk: Desk) -> dict[str, int | str]:
    """This worker's name and what it has done."""
    return {
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "started": _STARTED,
        "polls": desk.polls,
        "remembered": desk.remembered,
        "sent_away": desk.sent_away,
        "reports": desk.reports,
        "bytes_sent": desk.bytes_sent,
    }


class Writer:
    """Writes down what this worker has done, where there is something new."""

    def __init__(self, store: Store, desk: Desk):
        self._store = store
        self._desk = desk
        self._written: dict[str, int | str] = {}

    def flush(self) -> None:
        found = counted(self._desk)
        if found != self._written:
            self._store.write(lambda connection: _keep(connection, found, int(time.time())))
            self._written = found


def _keep(connection: Connection, found: dict[str, int | str], now: int) -> None:
    values = {**found, "written": now}
    connection.execute(
        insert(connection, counters)
        .values(values)
        .on_conflict_do_update(index_elements=["worker"], set_=values)
    )
    connection.execute(counters.delete().where(counters.c.written < now - _KEPT_S))


def _all_counted(connection: Connection, desk: Desk) -> list[dict[str, Any]]:
    mine = counted(desk)
    others = (
        select(counters).where(counters.c.worker != mine["worker"]).order_by(counters.c.worker)
    )
    return [mine, *(dict(row._mapping) for row in connection.execute(others))]


def text(connection: Connection, desk: Desk) -> str:
    """All metrics."""
    now = int(time.time())
    lines: list[str] = []

    def put(name: str, kind: str, what: str, values: list[tuple[dict[str, Any], float]]) -> None:
        lines.extend((f"# HELP twinslot_{name} {what}", f"# TYPE twinslot_{name} {kind}"))
        for labels, value in values:
            inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
            lines.append(
                f"twinslot_{name}{{{inner}}} {value}" if inner else f"twinslot_{name} {value}"
            )

    def grouped(column: Any, label: str) -> list[tuple[dict[str, Any], float]]:
        rows = connection.execute(select(column, func.count()).group_by(column).order_by(column))
        return [({label: value}, number) for value, number in rows]

    put("devices", "gauge", "Boards by enrolment.", grouped(devices.c.enrolment, "enrolment"))
    put(
        "devices_version",
        "gauge",
        "Boards by the version they run.",
        grouped(devices.c.current_version, "version"),
    )
    for label, seconds in (("hour", 3600), ("day", 86400)):
        count = connection.execute(
            select(func.count()).select_from(devices).where(devices.c.last_seen > now - seconds)
        ).scalar_one()
        put(f"devices_seen_{label}", "gauge", f"Boards seen within an {label}.", [({}, count)])
    put("attempts", "gauge", "Attempts by state.", grouped(attempts.c.state, "state"))
    put("rollouts", "gauge", "Rollouts by state.", grouped(rollouts.c.state, "state"))
    put("webhooks", "gauge", "Deliveries by state.", grouped(deliveries.c.state, "state"))
    workers = _all_counted(connection, desk)
    for column, (name, kind, what) in _COUNTED.items():
        put(name, kind, what, [({"worker": one["worker"]}, one[column]) for one in workers])
    return "\n".join(lines) + "\n"


def _escaped(value: Any) -> str:
    text_ = "" if value is None else str(value)
    return text_.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
