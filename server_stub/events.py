"""Events for the world outside: queued with the change they tell of, sent by the scheduler."""

import json
import secrets
from typing import Any

from sqlalchemy import Connection, select

from .schema import deliveries, webhooks


def emit(connection: Connection, name: str, data: dict[str, Any], now: int) -> None:
    """Queue an event for the webhooks that want it. ``*`` wants all, ``rollout.*`` a family."""
    for hook in connection.execute(select(webhooks)).all():
        family = name.partition(".")[0] + ".*"
        if not {"*", name, family} & set(hook.events):
            continue
        body = {"id": secrets.token_hex(8), "event": name, "at": now, "data": data}
        connection.execute(
            deliveries.insert().values(
                webhook_id=hook.id, body=json.dumps(body), tries=0, due=now, state="waiting"
            )
        )
