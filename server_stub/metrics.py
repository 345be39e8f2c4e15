"""Prometheus' text format of what matters: boards by state, rollouts, and this worker's work.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import time
from typing import Any

from sqlalchemy import Connection, func, select

from .desk import Desk
from .schema import attempts, deliveries, devices, rollouts

_STARTED = time.time()


def text(connection: Connection, desk: Desk) -> str:
    """All metrics; counters are this process's since it started."""
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
    put("polls_total", "counter", "Polls answered.", [({}, desk.polls)])
    put("polls_remembered_total", "counter", "Of these, from memory.", [({}, desk.remembered)])
    put("reports_total", "counter", "Reports taken.", [({}, desk.reports)])
    put("sent_bytes_total", "counter", "Bytes of payloads sent.", [({}, desk.bytes_sent)])
    put("start_time_seconds", "gauge", "When this process started.", [({}, int(_STARTED))])
    return "\n".join(lines) + "\n"


def _escaped(value: Any) -> str:
    text_ = "" if value is None else str(value)
    return text_.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
