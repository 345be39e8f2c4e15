"""Events for the world outside: queued with the change they tell of, sent by the scheduler."""

import json
import secrets
from typing import Any

from sqlalchemy import Connection, select

from .schema import deliveries, webhooks


def emit(connection: Connection, name: str, data: dict[str, Any], now: int) -> None:
    """Queue an event for the webhooks that want it. ``*`` wants all, ``rollout.*`` a family."""
    emit_all(connection, name, [data], now)


def emit_all(connection: Connection, name: str, all_data: list[dict[str, Any]], now: int) -> None:
    """Queue an event for each of ``all_data``, with two statements at most."""
    wanted = {"*", name, name.partition(".")[0] + ".*"}
    new = [
        {
            "webhook_id": hook.id,
            "body": json.dumps(body),
            "tries": 0,
            "due": now,
            "state": "waiting",
        }
        for hook in connection.execute(select(webhooks))
        if wanted & set(hook.events)
        for data in all_data
        for body in ({"id": secrets.token_hex(8), "event": name, "at": now, "data": data},)
    ]
    if new:
        connection.execute(deliveries.insert(), new)
