"""Routes about rollouts, maintenance windows and schedules."""

import dataclasses
import time
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query
from pydantic import BaseModel, ConfigDict, Field, create_model
from sqlalchemy import Connection, select

from . import audience, releases, rollouts, schedules, sendback, tally
from .audit import Who
from .http import Note, Parts, change, json_body, seconds, with_dates
from .messages import Id, LabelText, Name, Text
from .problems import Problem
from .schema import windows as window_table
from .stages import Policy
from .store import bump
from .windows import Window

Verb = Literal["start", "pause", "resume", "abort", "expand"]
_DONE = {
    "start": "started",
    "pause": "paused",
    "resume": "resumed",
    "abort": "aborted",
    "expand": "next stage opened",
}
Day = Annotated[int, Field(ge=0, le=6)]
Clock = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", examples=["22:00"])]
Labels = Annotated[list[LabelText], Field(max_length=16)]
_Kind = Literal["percent", "count", "label"]
Stage = Annotated[dict[_Kind, float | int | str], Field(min_length=1, max_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


DEFAULT_STAGES: list[Stage] = [{"percent": p} for p in (1, 5, 10, 25, 50, 100)]


class NewRollout(_Body):
    """``POST /api/v1/rollouts``"""

    firmware_id: Id | None = None
    product: Name | None = None
    version: Text | None = None
    name: Annotated[str, Field(max_length=100)] = ""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=100)] = DEFAULT_STAGES
    target: dict[Literal["label"], Labels] = {}
    policy: Policy = Policy()
    starts_at: Text | None = None
    seed: Annotated[str, Field(max_length=64)] | None = None
    start: bool = False


class Why(_Body):
    why: Annotated[str, Field(max_length=300)] = ""


class SendBack(_Body):
    version: Text
    start: bool = True


PolicyChange = create_model(
    "PolicyChange",
    __base__=_Body,
    **{field.name: (field.type, None) for field in dataclasses.fields(Policy)},  # type: ignore
)
"""Some members of ``stages.Policy``."""


class ChangeRollout(_Body):
    """``PATCH /api/v1/rollouts/{id}``; an empty list of labels means every board."""

    target: dict[Literal["label"], Labels] | None = None
    policy: PolicyChange | None = None  # type: ignore


class NewWindow(_Body):
    """``POST /api/v1/windows``; days: 0 is Monday."""

    label: LabelText | Literal["*"] = "*"
    kind: Literal["download", "install"] = "install"
    zone: Text = "UTC"
    days: Annotated[list[Day], Field(min_length=1, max_length=7)] = [0, 1, 2, 3, 4, 5, 6]
    start: Clock
    end: Clock


class Action(_Body):
    """What a schedule does; a ``backup`` stands in ``schedules.yaml`` only."""

    do: Literal["start_rollout", "pause_rollout", "resume_rollout", "expand_rollout", "gc"]
    rollout: Id | None = None


class NewSchedule(_Body):
    """``POST /api/v1/schedules``; ``action`` as in ``{"do": "start_rollout", "rollout": 3}``."""

    name: Name
    cron: Annotated[Text, Field(examples=["0 9 * * mon"])]
    zone: Text = "UTC"
    action: Action


def shown(connection: Connection, rollout_id: int) -> dict[str, Any]:
    """A rollout with its counts, as the API and the page show it."""
    row = rollouts.get(connection, rollout_id)
    now = int(time.time())
    counts = tally.counts(connection, row, now)
    public = {k: v for k, v in row._mapping.items() if k not in ("path", "hardware", "build")}
    public["counts"] = {
        "members": counts.members,
        "confirmed": counts.confirmed,
        "failed": counts.failed,
        "rolledback": counts.rolledback,
        "in_flight": counts.in_flight,
        "waiting": counts.waiting,
    }
    public["promotes"] = rollouts.promotes(row)
    if row.state == "draft":
        public["preview"] = audience.preview(connection, row)
    return with_dates(public)


def listing(connection: Connection, limit: int, before: int | None) -> list[dict[str, Any]]:
    """The newest rollouts, or those before one."""
    return [shown(connection, n) for n in rollouts.numbers(connection, limit, before)]


def create_one(connection: Connection, note: Note, wanted: dict[str, Any]) -> int:
    """Make a rollout of a request's body."""
    if wanted.get("firmware_id") is not None:
        release = releases.get(connection, wanted["firmware_id"])
    elif wanted.get("product") and wanted.get("version"):
        release = releases.by_version(connection, wanted["product"], wanted["version"])
    else:
        raise Problem(422, "malformed", "expected firmware_id, or product and version")
    wanted = {**wanted, "name": wanted["name"] or f"{release.product} {release.version}"}
    if wanted.get("starts_at"):
        wanted["starts_at"] = seconds(wanted["starts_at"])
    now = int(time.time())
    rollout_id = rollouts.create(connection, wanted, release, now)
    usual = dataclasses.asdict(Policy())
    policy = {name: value for name, value in wanted["policy"].items() if value != usual[name]}
    if wanted.get("start"):
        rollouts.act(connection, rollout_id, "start", "", now)
    note(
        f"rollout {rollout_id}",
        None,
        {
            "version": release.version,
            "stages": wanted["stages"],
            **policy,
            "state": rollouts.get(connection, rollout_id).state,
        },
    )
    return rollout_id


def act_one(
    connection: Connection, note: Note, rollout_id: int, action: str, why: str
) -> dict[str, Any]:
    """Do one of the actions on a rollout; start, pause and so on."""
    now = int(time.time())
    before = rollouts.get(connection, rollout_id)
    row = rollouts.act(connection, rollout_id, action, why or f"{_DONE[action]} by hand", now)
    note(f"rollout {rollout_id}", {"state": before.state}, {"state": row.state, "why": why})
    return shown(connection, rollout_id)


def back_one(
    connection: Connection, note: Note, rollout_id: int, wanted: SendBack
) -> dict[str, Any]:
    """Make the rollout that sends everyone back; it starts at once unless told otherwise.

    A channel that has offered the release would offer it to them again: then it is blocked.
    """
    row = rollouts.get(connection, rollout_id)
    release = releases.by_version(connection, row.product, wanted.version)
    now = int(time.time())
    new = sendback.back(connection, rollout_id, release, now)
    made: dict[str, Any] = {"back": new, "version": release.version}
    left = releases.get(connection, row.release_id)
    if left.channels and left.blocked is None:
        made["blocked"] = f"its boards are sent back by rollout {new}"
        left = releases.change(connection, left.id, {"blocked": made["blocked"]})
        made |= rollouts.pause_blocked(connection, left, now)
    if wanted.start:
        rollouts.act(connection, new, "start", "", now)
    after = {"state": rollouts.get(connection, rollout_id).state}
    note(f"rollout {rollout_id}", {"state": row.state}, {**after, **made})
    return shown(connection, new)


def change_one(
    connection: Connection, note: Note, rollout_id: int, wanted: ChangeRollout
) -> dict[str, Any]:
    """Mean other boards from now on (from ``ring=pilot`` to ``ring=home``, or to all), or be more
    or less careful."""
    before = rollouts.get(connection, rollout_id)
    now = int(time.time())
    if wanted.policy is not None:
        changed = wanted.policy.model_dump(exclude_unset=True)
        rollouts.change_policy(connection, rollout_id, changed, now)
    if wanted.target is not None:
        label = wanted.target.get("label")
        rollouts.retarget(connection, rollout_id, {"label": label} if label else {}, now)
    after = rollouts.get(connection, rollout_id)
    note(
        f"rollout {rollout_id}",
        {"target": before.target, **before.policy},
        {"target": after.target, **after.policy},
    )
    return shown(connection, rollout_id)


def create_window_one(connection: Connection, note: Note, wanted: NewWindow) -> dict[str, Any]:
    """Make a maintenance window."""
    values = wanted.model_dump()
    Window(**{**values, "days": tuple(wanted.days)})
    number = connection.execute(
        window_table.insert().values(**values).returning(window_table.c.id)
    ).scalar_one()
    bump(connection)
    note(f"window {number}", None, values)
    return {"id": number, **values}


def remove_window_one(connection: Connection, note: Note, window_id: int) -> dict[str, Any]:
    """Raises Problem 404."""
    gone = connection.execute(window_table.delete().where(window_table.c.id == window_id)).rowcount
    if not gone:
        raise Problem(404, "no_window", f"no window {window_id}")
    bump(connection)
    note(f"window {window_id}")
    return {"removed": window_id}


def create_schedule_one(connection: Connection, note: Note, wanted: NewSchedule) -> dict[str, Any]:
    """Make or replace the schedule of a name."""
    values = wanted.model_dump(exclude_none=True)
    number = schedules.put(connection, values, "api", int(time.time()))
    note(f"schedule {wanted.name}", None, values)
    return {"id": number, **values}


def remove_schedule_one(connection: Connection, note: Note, schedule_id: int) -> dict[str, Any]:
    """Raises Problem 404."""
    name = schedules.remove(connection, schedule_id)
    note(f"schedule {name}")
    return {"removed": schedule_id}


def add_routes(app: FastAPI, parts: Parts) -> None:
    _add_rollouts(app, parts)
    _add_windows(app, parts)
    _add_schedules(app, parts)


def _add_rollouts(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.get("/api/v1/rollouts", dependencies=[viewer])
    async def list_rollouts(
        before: Id | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> dict:
        return {"rollouts": await parts.store.aread(lambda c: listing(c, limit, before))}

    @app.post("/api/v1/rollouts", status_code=201)
    async def create_rollout(
        who: Annotated[Who, operator],
        wanted: Annotated[NewRollout, Depends(json_body(NewRollout))],
    ) -> dict:
        def work(connection: Connection, note: Note) -> dict:
            return shown(connection, create_one(connection, note, wanted.model_dump()))

        return await change(parts, who, "rollout.create", work)

    @app.get("/api/v1/rollouts/{rollout_id}", dependencies=[viewer])
    async def get_rollout(rollout_id: Id) -> dict:
        return await parts.store.aread(lambda c: shown(c, rollout_id))

    @app.patch("/api/v1/rollouts/{rollout_id}")
    async def change_rollout(
        rollout_id: Id,
        who: Annotated[Who, operator],
        wanted: Annotated[ChangeRollout, Depends(json_body(ChangeRollout))],
    ) -> dict:
        return await change(
            parts, who, "rollout.change", lambda c, note: change_one(c, note, rollout_id, wanted)
        )

    @app.post("/api/v1/rollouts/{rollout_id}/back")
    async def send_back(
        rollout_id: Id,
        who: Annotated[Who, operator],
        wanted: Annotated[SendBack, Depends(json_body(SendBack))],
    ) -> dict:
        return await change(
            parts,
            who,
            "rollout.back",
            lambda c, note: back_one(c, note, rollout_id, wanted),
        )

    @app.post("/api/v1/rollouts/{rollout_id}/{action}")
    async def act(
        rollout_id: Id,
        action: Verb,
        who: Annotated[Who, operator],
        wanted: Annotated[Why, Depends(json_body(Why))],
    ) -> dict:
        return await change(
            parts,
            who,
            f"rollout.{action}",
            lambda c, note: act_one(c, note, rollout_id, action, wanted.why),
        )


def _add_windows(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.get("/api/v1/windows", dependencies=[viewer])
    async def list_windows() -> dict:
        rows = await parts.store.aread(
            lambda c: c.execute(select(window_table).order_by(window_table.c.id)).all()
        )
        return {"windows": [dict(row._mapping) for row in rows]}

    @app.post("/api/v1/windows", status_code=201)
    async def create_window(
        who: Annotated[Who, operator],
        wanted: Annotated[NewWindow, Depends(json_body(NewWindow))],
    ) -> dict:
        return await change(
            parts, who, "window.create", lambda c, note: create_window_one(c, note, wanted)
        )

    @app.delete("/api/v1/windows/{window_id}")
    async def remove_window(window_id: Id, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts, who, "window.remove", lambda c, note: remove_window_one(c, note, window_id)
        )


def _add_schedules(app: FastAPI, parts: Parts) -> None:
    viewer = Depends(parts.people.need("viewer"))
    operator = Depends(parts.people.need("operator"))

    @app.get("/api/v1/schedules", dependencies=[viewer])
    async def list_schedules() -> dict:
        rows = await parts.store.aread(schedules.listing)
        return {"schedules": [with_dates(row) for row in rows]}

    @app.post("/api/v1/schedules", status_code=201)
    async def create_schedule(
        who: Annotated[Who, operator],
        wanted: Annotated[NewSchedule, Depends(json_body(NewSchedule))],
    ) -> dict:
        return await change(
            parts, who, "schedule.create", lambda c, note: create_schedule_one(c, note, wanted)
        )

    @app.delete("/api/v1/schedules/{schedule_id}")
    async def remove_schedule(schedule_id: Id, who: Annotated[Who, operator]) -> dict:
        return await change(
            parts,
            who,
            "schedule.remove",
            lambda c, note: remove_schedule_one(c, note, schedule_id),
        )
