"""Routes for those who run the server: users, webhooks, health, metrics."""

import time
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from . import auth, metrics, policy, webhooks
from .audit import Who
from .http import Note, Parts, change, json_body, with_dates
from .messages import Id, Name
from .settings import Changes


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewUser(_Body):
    """``PUT /api/v1/users/{name}``; without a password the user can't log in on the page."""

    role: Literal["viewer", "operator", "admin"]
    password: Annotated[str, Field(max_length=200)] | None = None


class NewWebhook(_Body):
    url: Annotated[
        str, Field(max_length=500, pattern="^https?://", examples=["https://example.org/"])
    ]
    events: Annotated[list[str], Field(max_length=20)] = ["*"]


def set_user_one(connection: Connection, note: Note, name: str, wanted: NewUser) -> dict[str, Any]:
    """Make or change a user; the answer holds the new API token, this once."""
    made = auth.set_user(connection, name, wanted.role, wanted.password, int(time.time()))
    note(name, None, {"role": wanted.role, "password": wanted.password})
    return made


def remove_user_one(connection: Connection, note: Note, name: str) -> dict[str, Any]:
    """Raises Problem 404."""
    auth.remove_user(connection, name)
    note(name)
    return {"removed": name}


def create_webhook_one(connection: Connection, note: Note, wanted: NewWebhook) -> dict[str, Any]:
    """Tell somebody of events; the answer holds the secret, this once."""
    made = webhooks.create(connection, wanted.url, wanted.events, int(time.time()))
    note(f"webhook {made['id']}", None, {"url": wanted.url, "events": wanted.events})
    return made


def remove_webhook_one(connection: Connection, note: Note, webhook_id: int) -> dict[str, Any]:
    """Raises Problem 404."""
    webhooks.remove(connection, webhook_id)
    note(f"webhook {webhook_id}")
    return {"removed": webhook_id}


def shown_settings(connection: Connection, parts: Parts) -> dict[str, Any]:
    """How boards are treated, and which of it was set in place of the configuration's."""
    in_force = policy.in_force(connection, parts.settings)
    return {**in_force.public(), "set": sorted(policy.changes(connection))}


def change_settings_one(
    connection: Connection, note: Note, parts: Parts, wanted: Changes
) -> dict[str, Any]:
    """Set how boards are treated, or go back to the configuration."""
    before = shown_settings(connection, parts)
    policy.change(connection, wanted)
    after = shown_settings(connection, parts)
    names = wanted.model_fields_set
    note("settings", {n: before[n] for n in names}, {n: after[n] for n in names})
    return after


def add_routes(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    admin = Depends(parts.people.need("admin"))

    @app.get("/api/v1/users", dependencies=[admin])
    async def list_users() -> dict:
        rows = await parts.store.aread(auth.list_users)
        return {"users": [with_dates(row) for row in rows]}

    @app.put("/api/v1/users/{name}")
    async def set_user(
        name: Name,
        who: Annotated[Who, admin],
        wanted: Annotated[NewUser, Depends(json_body(NewUser))],
    ) -> dict:
        return await change(
            parts, who, "user.set", lambda c, note: set_user_one(c, note, name, wanted)
        )

    @app.delete("/api/v1/users/{name}")
    async def remove_user(name: Name, who: Annotated[Who, admin]) -> dict:
        return await change(
            parts, who, "user.remove", lambda c, note: remove_user_one(c, note, name)
        )

    @app.get("/api/v1/webhooks", dependencies=[admin])
    async def list_webhooks() -> dict:
        rows = await parts.store.aread(webhooks.listing)
        return {"webhooks": [with_dates(row) for row in rows]}

    @app.post("/api/v1/webhooks", status_code=201)
    async def create_webhook(
        who: Annotated[Who, admin],
        wanted: Annotated[NewWebhook, Depends(json_body(NewWebhook))],
    ) -> dict:
        return await change(
            parts, who, "webhook.create", lambda c, note: create_webhook_one(c, note, wanted)
        )

    @app.delete("/api/v1/webhooks/{webhook_id}")
    async def remove_webhook(webhook_id: Id, who: Annotated[Who, admin]) -> dict:
        return await change(
            parts, who, "webhook.remove", lambda c, note: remove_webhook_one(c, note, webhook_id)
        )

    @app.get("/api/v1/settings", dependencies=[viewer])
    async def read_settings() -> dict:
        """What is configured and set, as far as it concerns boards."""
        return await parts.store.aread(lambda c: shown_settings(c, parts))

    @app.patch("/api/v1/settings")
    async def change_settings(
        who: Annotated[Who, admin],
        wanted: Annotated[Changes, Depends(json_body(Changes))],
    ) -> dict:
        return await change(
            parts,
            who,
            "settings.change",
            lambda c, note: change_settings_one(c, note, parts, wanted),
        )

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict:
        await parts.store.aread(lambda c: c.exec_driver_sql("SELECT 1").scalar())
        return {"ok": True}

    @app.get("/metrics", dependencies=[viewer], include_in_schema=False)
    async def read_metrics() -> Response:
        text = await parts.store.aread(lambda c: metrics.text(c, parts.desk))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
