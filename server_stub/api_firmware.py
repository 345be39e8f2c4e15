"""Routes about firmware and update jobs; paths and members are those of the mesh gateways."""

import logging
import time
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.datastructures import UploadFile

from . import audience, audit, jobs, releases, rollouts, uploads
from .audit import Who
from .auth import GATEWAY
from .http import Note, Parts, change, checked, form_of, json_body, with_dates
from .messages import DeviceId, Id, LabelText, Name, Text
from .problems import Problem

UPLOAD = "/api/v1/firmware/upload"
MAX_FILES = 17  # the signed release and its payloads
Notes = Annotated[str, Field(max_length=2048)]

log = logging.getLogger("twinslot.server")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChangeFirmware(_Body):
    """``PATCH /api/v1/firmware/{id}``; ``blocked`` is a reason, null unblocks."""

    pilot_ready: bool | None = None
    stable: bool | None = None
    blocked: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    notes: Notes | None = None


class _UploadFields(_Body):
    channel: Name = "stable"
    notes: Notes | None = None


class Promote(_Body):
    channel: Name


class Target(_Body):
    nodes: list[DeviceId] | None = None
    node_type: Text | None = None
    label: Annotated[list[LabelText], Field(max_length=16)] = []


class NewUpdate(_Body):
    """``POST /api/v1/ota/updates``"""

    firmware_id: Id | None = None
    product: Name | None = None
    version: Text | None = None
    target: Target = Target()
    force_update: bool = False
    part_size: Annotated[int, Field(ge=64, le=65536)] = jobs.PART_BYTES


class NodeProgress(_Body):
    """``POST /api/v1/ota/updates/{id}/progress``, from a gateway for one of its nodes."""

    node_id: DeviceId
    current_part: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    total_parts: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    status: Literal["in_progress", "completed", "failed"] = "in_progress"
    error_message: Annotated[str, Field(max_length=500)] | None = None


def add_routes(app: FastAPI, parts: Parts) -> None:
    _add_firmware(app, parts)
    _add_updates(app, parts)


def _add_firmware(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.post(UPLOAD, status_code=201)
    async def upload(who: Annotated[Who, operator], request: Request, response: Response) -> dict:
        """Multipart: ``release`` (the signed file), ``file`` (each payload), ``channel``,
        ``notes``."""
        async with form_of(request, max_files=MAX_FILES) as form:
            row, new = await upload_one(parts, who, form)
        response.status_code = 201 if new else 200
        return with_dates(row)

    @app.get("/api/v1/firmware", dependencies=[viewer])
    async def list_firmware(product: Annotated[str, Query(max_length=64)] = "") -> dict:
        rows = await parts.store.aread(lambda c: releases.listing(c, product or None))
        return {"firmware": [with_dates(row) for row in rows]}

    @app.get("/api/v1/firmware/{firmware_id}", dependencies=[viewer])
    async def firmware(firmware_id: Id) -> dict:
        row = await parts.store.aread(lambda c: releases.get(c, firmware_id))
        return with_dates(releases.public(row))

    @app.get("/api/v1/firmware/{firmware_id}/reach", dependencies=[viewer])
    async def reach(
        firmware_id: Id,
        channel: Annotated[str | None, Query(max_length=64)] = None,
        label: Annotated[list[str], Query(max_length=16)] = [],  # noqa: B006
    ) -> dict:
        """How many boards a promotion, a job or a rollout to all would move."""

        def work(connection: Connection) -> int:
            release = releases.get(connection, firmware_id)
            return audience.reach(connection, release, {"label": label}, channel)

        return {"devices": await parts.store.aread(work)}

    @app.get("/api/v1/firmware/{firmware_id}/download", dependencies=[viewer])
    async def download(firmware_id: Id) -> Response:
        row = await parts.store.aread(lambda c: releases.get(c, firmware_id))
        plain = [blob for blob in row.blobs if blob.endswith(".bin")] or row.blobs
        return RedirectResponse("/" + plain[0], 302)

    @app.patch("/api/v1/firmware/{firmware_id}")
    async def change_firmware(
        firmware_id: Id,
        who: Annotated[Who, operator],
        wanted: Annotated[ChangeFirmware, Depends(json_body(ChangeFirmware))],
    ) -> dict:
        values = wanted.model_dump(exclude_unset=True)
        return await change(
            parts,
            who,
            "firmware.change",
            lambda c, note: with_dates(change_one(c, note, firmware_id, values)),
        )

    @app.post("/api/v1/firmware/{firmware_id}/promote")
    async def promote(
        firmware_id: Id,
        who: Annotated[Who, operator],
        wanted: Annotated[Promote, Depends(json_body(Promote))],
    ) -> dict:
        return await change(
            parts,
            who,
            "firmware.promote",
            lambda c, note: promote_one(c, note, parts, firmware_id, wanted.channel),
        )

    @app.delete("/api/v1/firmware/{firmware_id}")
    async def remove(firmware_id: Id, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts, who, "firmware.remove", lambda c, note: remove_one(c, note, parts, firmware_id)
        )

    @app.post("/api/v1/firmware/gc")
    async def collect(who: Annotated[Who, operator]) -> dict:
        return await change(parts, who, "firmware.gc", lambda _, note: collect_one(note, parts))


async def upload_one(parts: Parts, who: Who, form: Any) -> tuple[dict, bool]:
    """Judge and store an upload; return the release, and whether it is new.

    Raises:
        Problem: refused, and why.
    """
    token, files = await run_in_threadpool(_read_form, form)
    sent = checked(_UploadFields, {n: form[n] for n in ("channel", "notes") if form.get(n)})
    release = await run_in_threadpool(uploads.verify, parts.site, token)
    bases = await parts.store.aread(lambda c: releases.plain_images(c, parts.site, release))
    found = await run_in_threadpool(
        uploads.judge, parts.site, release, files, parts.settings.firmware_bytes, bases.get
    )
    name = await run_in_threadpool(releases.store_files, parts.site, release, token, found)

    def work(connection: Connection, note: Note) -> tuple[dict, bool]:
        row, new = releases.add(connection, parts.site, name, release, sent.channel, sent.notes)
        note(f"{row.product} {row.version}", None, {"sha256": row.sha256, "new": new})
        return releases.public(row), new

    return await change(parts, who, "firmware.upload", work)


def change_one(
    connection: Connection, note: Note, firmware_id: int, values: dict[str, Any]
) -> dict[str, Any]:
    """Set flags; blocking a release pauses its rollouts in the same moment."""
    before = releases.get(connection, firmware_id)
    values = {k: v for k, v in values.items() if v is not None or k == "blocked"}
    if not values:
        raise Problem(422, "malformed", "nothing to change")
    row = releases.change(connection, firmware_id, values)
    old = {name: getattr(before, name) for name in values}
    after: dict[str, Any] = {name: getattr(row, name) for name in values}
    after |= rollouts.pause_blocked(connection, row, int(time.time()))
    note(f"{row.product} {row.version}", old, after)
    return releases.public(row)


def promote_one(
    connection: Connection, note: Note, parts: Parts, firmware_id: int, channel: str
) -> dict[str, Any]:
    """Make a channel offer a release."""
    row = releases.get(connection, firmware_id)
    if row.blocked is not None:
        raise Problem(409, "blocked", f"release {row.version} is blocked: {row.blocked}")
    if not row.stable:
        raise Problem(409, "not_stable", f"release {row.version} is not marked stable")
    before = releases.promote(connection, parts.site, row, channel)
    after = {"release": row.path.partition("/")[2]}
    note(f"{row.product}/{channel}", {"release": before.get("release")}, after)
    return {"product": row.product, "channel": channel, **after}


def remove_one(
    connection: Connection, note: Note, parts: Parts, firmware_id: int
) -> dict[str, Any]:
    """Remove a release that nothing needs."""
    row = releases.remove(connection, parts.site, firmware_id)
    note(f"{row.product} {row.version}")
    return {"removed": firmware_id}


def collect_one(note: Note, parts: Parts) -> dict[str, int]:
    """Remove the payloads that no release names."""
    found = releases.collect(parts.site, time.time())
    note("payloads", None, found)
    return found


def create_update_one(connection: Connection, note: Note, wanted: NewUpdate) -> dict[str, Any]:
    """Make an update job of a request's body."""
    if wanted.firmware_id is not None:
        row = releases.get(connection, wanted.firmware_id)
    elif wanted.product and wanted.version:
        row = releases.by_version(connection, wanted.product, wanted.version)
    else:
        raise Problem(422, "malformed", "expected firmware_id, or product and version")
    target = wanted.target.model_dump(exclude_none=True)
    now = int(time.time())
    job_id = jobs.create(connection, row, target, wanted.force_update, wanted.part_size, now)
    note(f"update {job_id}", None, {"version": row.version, "target": target})
    return jobs.get(connection, job_id)


def cancel_update_one(connection: Connection, note: Note, update_id: int) -> dict[str, Any]:
    """End a job; nodes under way finish."""
    before = jobs.get(connection, update_id)
    after = jobs.cancel(connection, update_id, int(time.time()))
    note(f"update {update_id}", {"status": before["status"]}, {"status": "cancelled"})
    return after


def _gateway(who: Who) -> str | None:
    """The gateway that asks, or None for a person."""
    return who.name if who.role == GATEWAY else None


def _read_form(form: Any) -> tuple[bytes, dict[str, BinaryIO]]:
    signed = form.get("release")
    if not isinstance(signed, UploadFile):
        raise Problem(422, "malformed", "release: expected the signed release as a file")
    token = signed.file.read(65537)
    if len(token) > 65536:
        raise Problem(413, "too_large", "release: at most 64 KiB")
    files: dict[str, BinaryIO] = {}
    for upload in form.getlist("file"):
        if not isinstance(upload, UploadFile):
            raise Problem(422, "malformed", "file: expected a file")
        files[releases.hash_of(upload.file)] = upload.file
    return token.strip(), files


def _add_updates(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.post("/api/v1/ota/updates", status_code=201)
    async def create_update(
        who: Annotated[Who, operator],
        wanted: Annotated[NewUpdate, Depends(json_body(NewUpdate))],
    ) -> dict:
        return await change(
            parts,
            who,
            "update.create",
            lambda c, note: with_dates(create_update_one(c, note, wanted)),
        )

    @app.get("/api/v1/ota/updates", dependencies=[viewer])
    async def list_updates(
        status: Literal["pending", "in_progress", "completed", "failed", "cancelled"]
        | None = None,
    ) -> dict:
        rows = await parts.store.aread(lambda c: jobs.listing(c, status))
        return {"updates": [with_dates(row) for row in rows]}

    @app.get("/api/v1/ota/updates/pending")
    async def pending_updates(
        who: Annotated[Who, Depends(parts.people.need_or_gateway("viewer"))],
        gateway: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict:
        gateway = _gateway(who) or gateway
        now = int(time.time())
        rows = await parts.store.aread(lambda c: jobs.pending(c, gateway, now))
        return {"updates": [with_dates(row) for row in rows]}

    @app.get("/api/v1/ota/updates/{update_id}", dependencies=[viewer])
    async def get_update(update_id: Id) -> dict:
        return with_dates(await parts.store.aread(lambda c: jobs.get(c, update_id)))

    @app.delete("/api/v1/ota/updates/{update_id}")
    async def cancel_update(update_id: Id, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts,
            who,
            "update.cancel",
            lambda c, note: with_dates(cancel_update_one(c, note, update_id)),
        )

    @app.post("/api/v1/ota/updates/{update_id}/progress")
    async def progress(
        update_id: Id,
        who: Annotated[Who, Depends(parts.people.need_or_gateway("operator"))],
        wanted: Annotated[NodeProgress, Depends(json_body(NodeProgress))],
    ) -> dict:
        def work(connection: Connection) -> dict:
            report = wanted.model_dump()
            now = int(time.time())
            done = jobs.progress(connection, update_id, report, now, _gateway(who))
            if done["status"] != done.pop("was"):  # parts are too many for a log that is kept
                audit.note(connection, who, "update.progress", f"update {update_id}", None, report)
            return done

        return await parts.store.awrite(work)
