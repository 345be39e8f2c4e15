"""Routes about boards: registry, labels, explain, import, export, audit."""

import time
from typing import Annotated, Any, Literal, get_args

from fastapi import Depends, FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, func, select

from . import api_rollouts, attempts, audit, devices, exports, filters, imports
from .audit import Who
from .http import Note, Parts, change, date, json_body, with_dates
from .messages import DeviceId, Id, Name, Status, Text
from .problems import Problem
from .schema import devices as device_table
from .schema import reports
from .schema import rollouts as rollout_table
from .store import bump

IMPORT = "/api/v1/devices/import"
ACCEPT = "/api/v1/devices/accept"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChangeDevice(_Body):
    """``PATCH /api/v1/devices/{id}``; null removes a pin or a label."""

    enrolment: Literal["pending", "accepted"] | None = None
    pin: Text | None = None
    labels: dict[str, str | None] = {}


class _Like(_Body):
    label: Annotated[str, Field(max_length=130)] = ""
    product: Text = ""
    hardware: Text = ""
    version: Text = ""
    q: Text = ""


class AcceptDevices(_Like):
    """``POST /api/v1/devices/accept``: those that wait of the boards named, or of those that are
    like this, or of all."""

    devices: Annotated[list[DeviceId], Field(max_length=10_000)] | None = None
    all: bool = False


class Search(_Like):
    """``PUT /api/v1/filters/{name}``: what devices have in common; an empty member is any."""

    status: Literal["", *get_args(Status)] = ""
    enrolment: Literal["", "pending", "accepted", "decommissioned"] = ""


class DescribeLabel(_Body):
    description: str


def detail(connection: Connection, parts: Parts, device_id: str) -> dict[str, Any]:
    """One board with all that is known of it."""
    row = devices.public(devices.get(connection, device_id))
    row["tags"] = devices.labels_of(connection, device_id)
    said = connection.execute(
        select(reports).where(reports.c.device_id == device_id).order_by(reports.c.id)
    )
    row["history"] = [
        {k: v for k, v in r._mapping.items() if k not in ("id", "device_id")} for r in said
    ]
    row["attempts"] = attempts.history(connection, device_id)
    return with_dates(row)


def glance(connection: Connection) -> dict[str, Any]:
    """The fleet in a few numbers, each of one counting query, and the rollouts under way."""
    now = int(time.time())

    def grouped(column: Any) -> list[dict[str, Any]]:
        rows = connection.execute(
            select(column, func.count())
            .where(device_table.c.enrolment == "accepted")
            .group_by(column)
            .order_by(func.count().desc())
            .limit(12)
        )
        return [{"value": value, "boards": number} for value, number in rows]

    all_ = select(func.count()).select_from(device_table)
    active = connection.scalars(
        select(rollout_table.c.id)
        .where(rollout_table.c.state.in_(("pilot", "expand", "paused")))
        .order_by(rollout_table.c.id.desc())
        .limit(10)
    ).all()
    return {
        "total": connection.execute(all_).scalar_one(),
        "seen": connection.execute(
            all_.where(device_table.c.last_seen > now - 86400)
        ).scalar_one(),
        "pending": connection.execute(
            all_.where(device_table.c.enrolment == "pending")
        ).scalar_one(),
        "versions": grouped(device_table.c.current_version),
        "statuses": grouped(device_table.c.status),
        "rollouts": [api_rollouts.shown(connection, number) for number in active],
    }


def add_routes(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.get("/api/v1/fleet", dependencies=[viewer])
    async def fleet() -> dict:
        return await parts.store.aread(glance)

    @app.get("/api/v1/devices", dependencies=[viewer])
    async def list_devices(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str, Query(max_length=64)] = "",
        q: Annotated[str, Query(max_length=64)] = "",
        label: Annotated[str, Query(max_length=130)] = "",
        product: Annotated[str, Query(max_length=64)] = "",
        status: Annotated[str, Query(max_length=16)] = "",
        hardware: Annotated[str, Query(max_length=64)] = "",
        version: Annotated[str, Query(max_length=64)] = "",
        enrolment: Annotated[str, Query(max_length=16)] = "",
        filter: Annotated[str, Query(max_length=64)] = "",
    ) -> dict:
        given = {
            "q": q,
            "label": label,
            "product": product,
            "hardware": hardware,
            "status": status,
            "version": version,
            "enrolment": enrolment,
        }

        def read(connection: Connection) -> list[dict[str, Any]]:
            saved = filters.get(connection, filter) if filter else {}
            wanted = saved | {name: value for name, value in given.items() if value}
            return devices.listing(connection, after, limit, wanted)

        rows = await parts.store.aread(read)
        following = rows[-1]["device_id"] if len(rows) == limit else None
        return {"devices": [with_dates(row) for row in rows], "next": following}

    @app.post(IMPORT)
    async def import_devices(who: Annotated[Who, operator], request: Request) -> dict:
        text = (await request.body()).decode("utf-8-sig", "replace")

        return await change(
            parts, who, "device.import", lambda c, note: import_all(c, note, parts, text)
        )

    @app.post(ACCEPT)
    async def accept_devices(
        who: Annotated[Who, operator],
        wanted: Annotated[AcceptDevices, Depends(json_body(AcceptDevices))],
    ) -> dict:
        return await change(
            parts, who, "device.accept", lambda c, note: accept_all(c, note, wanted)
        )

    @app.get("/api/v1/devices/{device_id}", dependencies=[viewer])
    async def device(device_id: DeviceId) -> dict:
        return await parts.store.aread(lambda c: detail(c, parts, device_id))

    @app.get("/api/v1/devices/{device_id}/explain", dependencies=[viewer])
    async def explain(device_id: DeviceId) -> dict:
        now = int(time.time())
        return await parts.store.aread(lambda c: parts.desk.explain(c, device_id, now))

    @app.patch("/api/v1/devices/{device_id}")
    async def change_device(
        device_id: DeviceId,
        who: Annotated[Who, operator],
        wanted: Annotated[ChangeDevice, Depends(json_body(ChangeDevice))],
    ) -> dict:
        def work(connection: Connection, note: Note) -> dict:
            change_one(connection, note, device_id, wanted.model_dump(exclude_unset=True))
            return detail(connection, parts, device_id)

        return await change(parts, who, "device.change", work)

    @app.delete("/api/v1/devices/{device_id}")
    async def decommission(device_id: DeviceId, who: Annotated[Who, operator]) -> dict:
        def work(connection: Connection, note: Note) -> dict:
            decommission_one(connection, note, device_id)
            return detail(connection, parts, device_id)

        return await change(parts, who, "device.decommission", work)

    @app.post("/api/v1/devices/{device_id}/token")
    async def new_token(device_id: DeviceId, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts, who, "device.token", lambda c, note: new_token_one(c, note, device_id)
        )

    @app.get("/api/v1/labels", dependencies=[viewer])
    async def labels() -> dict:
        return {"labels": await parts.store.aread(devices.label_table)}

    @app.put("/api/v1/labels/{key}")
    async def describe_label(
        key: Name,
        who: Annotated[Who, operator],
        wanted: Annotated[DescribeLabel, Depends(json_body(DescribeLabel))],
    ) -> dict:
        return await change(
            parts,
            who,
            "label.describe",
            lambda c, note: describe_label_one(c, note, key, wanted.description[:500]),
        )

    @app.get("/api/v1/filters", dependencies=[viewer])
    async def list_filters() -> dict:
        return {"filters": await parts.store.aread(filters.listing)}

    @app.put("/api/v1/filters/{name}")
    async def save_filter(
        name: Name,
        who: Annotated[Who, operator],
        wanted: Annotated[Search, Depends(json_body(Search))],
    ) -> dict:
        return await change(
            parts, who, "filter.save", lambda c, note: save_filter_one(c, note, name, wanted)
        )

    @app.delete("/api/v1/filters/{name}")
    async def remove_filter(name: Name, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts, who, "filter.remove", lambda c, note: remove_filter_one(c, note, name)
        )

    @app.get("/api/v1/audit", dependencies=[viewer])
    async def read_audit(
        before: Id | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict:
        rows = await parts.store.aread(lambda c: audit.listing(c, limit, before))
        return {"audit": [{**row, "at": date(row["at"])} for row in rows]}

    @app.get("/api/v1/export/{what}", dependencies=[viewer])
    async def export(
        what: Literal["devices", "attempts", "downloads", "audit"],
        format: Literal["csv", "json"] = "json",
    ) -> Response:
        return await exports.respond(parts.store, what, format)


def import_all(connection: Connection, note: Note, parts: Parts, text: str) -> dict[str, Any]:
    """Register the boards of a CSV file; the answer holds their new tokens, this once."""
    found = imports.import_csv(connection, text, int(time.time()), parts.limits.devices)
    after = {"new": found.new, "changed": found.after}
    note("devices", {"new": [], "changed": found.before}, after)
    return {"imported": found.boards, "new": len(found.new), "tokens": found.tokens}


def accept_all(connection: Connection, note: Note, wanted: AcceptDevices) -> dict[str, Any]:
    """Accept many boards at once; which they were is in the audit log.

    Raises:
        Problem: 404; 422 where it is not said which.
    """
    like = wanted.model_dump(exclude={"devices", "all"})
    if wanted.devices is None and not wanted.all and not any(like.values()):
        raise Problem(
            422, "malformed", 'which boards? expected devices, what they are like, or "all": true'
        )
    found = devices.accept(connection, wanted.devices, like)
    note("devices", None, {"enrolment": "accepted", "devices": found})
    return {"accepted": len(found)}


def decommission_one(connection: Connection, note: Note, device_id: str) -> None:
    """Retire a board."""
    before = devices.get(connection, device_id)
    devices.decommission(connection, device_id)
    attempts.let_go(connection, device_id, int(time.time()))
    note(device_id, {"enrolment": before.enrolment}, {"enrolment": "decommissioned"})


def new_token_one(connection: Connection, note: Note, device_id: str) -> dict[str, str]:
    """Give a board a token of its own, shown this once."""
    devices.get(connection, device_id)
    token = devices.new_token(connection, device_id)
    note(device_id)
    return {"device_id": device_id, "token": token}


def describe_label_one(
    connection: Connection, note: Note, key: str, description: str
) -> dict[str, str]:
    """Say what a label is for."""
    devices.describe_label(connection, key, description)
    note(key, None, {"description": description})
    return {"key": key, "description": description}


def save_filter_one(
    connection: Connection, note: Note, name: str, wanted: Search
) -> dict[str, Any]:
    """Give a search a name, or that name another search."""
    query = wanted.model_dump(exclude_defaults=True)
    before = filters.save(connection, name, query)
    note(name, before, query)
    return filters.shown(connection, name, query)


def remove_filter_one(connection: Connection, note: Note, name: str) -> dict[str, Any]:
    """Raises Problem 404."""
    before = filters.get(connection, name)
    filters.remove(connection, name)
    note(name, before, {})
    return {"removed": name}


def change_one(connection: Connection, note: Note, device_id: str, wanted: dict[str, Any]) -> None:
    """Change a board by an operator's word; each member is optional."""
    row = devices.get(connection, device_id)
    tags = wanted.pop("labels", {})
    before: dict[str, Any] = {name: getattr(row, name) for name in wanted}
    old_tags = devices.labels_of(connection, device_id)
    if wanted.get("enrolment") is None:
        wanted.pop("enrolment", None)
    if wanted:
        connection.execute(
            devices.devices.update().where(devices.devices.c.device_id == device_id).values(wanted)
        )
        bump(connection)
    if wanted.get("enrolment", "accepted") != "accepted":
        attempts.let_go(connection, device_id, int(time.time()))
    if tags:
        devices.set_labels(connection, device_id, tags)
    note(
        device_id,
        {**before, **{f"label {key}": old_tags.get(key) for key in tags}},
        {**wanted, **{f"label {key}": value for key, value in tags.items()}},
    )
