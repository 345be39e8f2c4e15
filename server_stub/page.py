"""The page: log-in and what there is to see; made on the server, no build step.

Everything lies below ``/-/``, a name no product can have. The page shows what the API answers, by
the same functions; its forms are in ``page_forms``.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from sqlalchemy import Connection, select

from . import (
    api_admin,
    api_fleet,
    api_rollouts,
    audience,
    audit,
    auth,
    devices,
    filters,
    jobs,
    page_forms,
    releases,
    rollouts,
    schedules,
    stages,
    webhooks,
)
from .audit import Who
from .http import Note, Parts, change, form_of
from .messages import Id
from .page_base import HERE, Away, Guard, Renderer, headers, same_page
from .problems import Problem
from .schema import attempts, downloads, users, windows

PROXY_HEADER = "X-Twinslot-Proxy"
_EVENT_S = 1.0
_PAGE = 100  # devices
_ROLLOUTS = 20  # each counts its boards
_NOBODY = Who("nobody", "none")
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def add_routes(app: FastAPI, parts: Parts) -> None:
    render = Renderer()
    guard = Guard(parts)

    async def away(_request: Request, _exc: Exception) -> Response:
        return RedirectResponse("/-/login", 303)

    app.add_exception_handler(Away, away)
    _add_login(app, parts, render, guard)
    _add_views(app, parts, render, guard)
    page_forms.add_routes(app, parts, render, guard)
    _add_events(app, parts, guard)


def refusal(parts: Parts) -> Callable[[Request, Problem], Awaitable[Response]]:
    """Make what says on a page, in the frame that its reader has, why something was not done."""
    render = Renderer()
    guard = Guard(parts)

    async def show(request: Request, problem: Problem) -> Response:
        try:
            session = await guard(request)
        except Exception:  # nobody's, or the database is what has failed
            session = None
        return render.refusal(session, problem)

    return show


def _add_login(app: FastAPI, parts: Parts, render: Renderer, guard: Guard) -> None:
    throttle = auth.Throttle()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/-/", 303)

    @app.get("/-/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        path = HERE / "static" / name
        if path.suffix not in _TYPES or path.parent != HERE / "static" or not path.is_file():
            raise Problem(404, "not_found", "no such file")
        kept = {**headers(), "Cache-Control": "max-age=3600"}
        return Response(path.read_bytes(), 200, kept, _TYPES[path.suffix])

    def refused(vouched: Who | None, status: int, why: str) -> Response:
        return render("login.html", None, status, vouched=vouched, error=why)

    async def enter(request: Request, who: Who) -> Response:
        def work(connection: Connection, note: Note) -> str:
            note(who.name)
            return auth.open_session(connection, who, int(time.time()))

        value = await change(parts, who, "login", work)
        response = RedirectResponse("/-/", 303)
        response.set_cookie(
            auth.COOKIE,
            value,
            max_age=auth.SESSION_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @app.get("/-/login", include_in_schema=False)
    async def login_form(request: Request) -> Response:
        vouched = await _vouched_for(parts, request)
        return render("login.html", None, vouched=vouched, error=None)

    @app.post("/-/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        async with form_of(request) as form:
            name, password = str(form.get("name", ""))[:64], str(form.get("password", ""))[:300]
            vouching = "vouched" in form
        vouched = await _vouched_for(parts, request)
        if vouched and vouching:
            return await enter(request, vouched)
        address = request.client.host if request.client else "?"
        try:
            throttle.check(f"name {name}", f"address {address}")
        except Problem as exc:
            return refused(vouched, 429, exc.detail)
        who = await _known(parts, name, password)
        if who is None:
            throttle.failed(f"name {name}", f"address {address}")
            tried = _tried(name, address)
            await change(parts, _NOBODY, "login.failed", lambda _, note: note(*tried))
            return refused(vouched, 401, "Wrong name or password.")
        return await enter(request, who)

    @app.post("/-/logout", include_in_schema=False)
    async def logout(request: Request) -> Response:
        session = await guard(request)
        async with form_of(request) as form:
            same_page(session, form)
        value = request.cookies.get(auth.COOKIE, "")

        def work(connection: Connection, note: Note) -> None:
            auth.close_session(connection, value)
            note(session.name)

        await change(parts, Who(session.name, session.role), "logout", work)
        response = RedirectResponse("/-/login", 303)
        response.delete_cookie(auth.COOKIE)
        return response


def _tried(name: str, address: str) -> tuple[str, None, dict[str, str]]:
    """What is noted of a log-in that failed: a name that anybody may have sent, and from where."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown, None, {"address": address}


async def _known(parts: Parts, name: str, password: str) -> Who | None:
    """A user by password; the operator token opens the page too, whatever the name."""
    if parts.operator_token.matches(password):
        return Who("operator-token", "admin")
    row = await parts.store.aread(
        lambda c: c.execute(select(users).where(users.c.name == name)).first()
    )
    stored = row.password if row else None
    ok = await asyncio.to_thread(auth.password_matches, password, stored)
    return Who(row.name, row.role) if ok and row else None


async def _vouched_for(parts: Parts, request: Request) -> Who | None:
    """The user whom the configured proxy has logged in; it proves itself by a shared secret.

    Only for a session of the page, whose forms have its token: a header that a browser's every
    request carries must not be what a change is allowed by.
    """
    proxy = parts.settings.proxy_login
    if proxy is None:
        return None
    names, secrets = request.headers.getlist(proxy.header), request.headers.getlist(PROXY_HEADER)
    if len(names) != 1 or len(secrets) != 1:
        return None
    if not hmac.compare_digest(secrets[0].encode(), proxy.secret.encode()):
        return None
    row = await parts.store.aread(
        lambda c: c.execute(select(users).where(users.c.name == names[0])).first()
    )
    return Who(row.name, row.role) if row else None


def _add_views(app: FastAPI, parts: Parts, render: Renderer, guard: Guard) -> None:
    session = Depends(guard)

    def view(path: str, template: str, read: Callable[..., dict[str, Any]]) -> None:
        async def show(request: Request, me: Annotated[Any, session]) -> Response:
            values = await parts.store.aread(lambda c: read(c, **request.path_params))
            return render(template, me, **values)

        app.get(path, include_in_schema=False)(show)

    view("/-/", "home.html", api_fleet.glance)
    view("/-/devices/{device_id}", "device.html", _device(parts))
    view("/-/releases", "releases.html", _releases)
    view("/-/rollouts/{number:int}", "rollout.html", _rollout)
    view("/-/updates", "updates.html", _updates)
    view("/-/updates/{number:int}", "update.html", lambda c, number: {"job": jobs.get(c, number)})
    view("/-/rules", "rules.html", _rules(parts))
    view("/-/logs", "logs.html", _logs)

    @app.get("/-/people", include_in_schema=False)
    async def people(request: Request) -> Response:
        me = await guard.role(request, "admin")
        values = await parts.store.aread(
            lambda c: {"users": auth.list_users(c), "webhooks": webhooks.listing(c)}
        )
        return render("people.html", me, **values)

    @app.get("/-/rollouts", include_in_schema=False)
    async def list_rollouts(me: Annotated[Any, session], before: Id | None = None) -> Response:
        values = await parts.store.aread(lambda c: _rollouts(c, before))
        return render("rollouts.html", me, **values)

    @app.get("/-/devices", include_in_schema=False)
    async def list_devices(
        me: Annotated[Any, session],
        q: Annotated[str, Query(max_length=64)] = "",
        label: Annotated[str, Query(max_length=130)] = "",
        status: Annotated[str, Query(max_length=16)] = "",
        product: Annotated[str, Query(max_length=64)] = "",
        hardware: Annotated[str, Query(max_length=64)] = "",
        version: Annotated[str, Query(max_length=64)] = "",
        enrolment: Annotated[str, Query(max_length=16)] = "",
        after: Annotated[str, Query(max_length=64)] = "",
    ) -> Response:
        wanted = {
            "q": q,
            "label": label,
            "status": status,
            "product": product,
            "hardware": hardware,
            "version": version,
            "enrolment": enrolment,
        }

        def read(connection: Connection) -> dict[str, Any]:
            rows = devices.listing(connection, after, _PAGE, wanted)
            return {
                "rows": rows,
                "total": devices.count(connection, wanted),
                "saved": filters.saved(connection),
                "next": rows[-1]["device_id"] if len(rows) == _PAGE else None,
            }

        values = await parts.store.aread(read)
        asked = {name: value for name, value in wanted.items() if value}
        return render("devices.html", me, filters=wanted, asked=asked, **values)


def _device(parts: Parts) -> Callable[..., dict[str, Any]]:
    def read(connection: Connection, device_id: str) -> dict[str, Any]:
        return {
            "device": api_fleet.detail(connection, parts, device_id),
            "told": parts.desk.explain(connection, device_id, int(time.time())),
            "meanings": devices.label_meanings(connection),
        }

    return read


def _releases(connection: Connection) -> dict[str, Any]:
    rows = releases.listing(connection)
    reach = {
        row["id"]: audience.reach(
            connection, releases.get(connection, row["id"]), {}, row["channel"]
        )
        for row in rows
        if row["stable"] and row["blocked"] is None
    }
    return {"rows": rows, "reach": reach}


def _ready(connection: Connection) -> list[dict[str, Any]]:
    """The releases that may be rolled out."""
    return [
        row
        for row in releases.listing(connection)
        if (row["pilot_ready"] or row["stable"]) and row["blocked"] is None
    ]


def _rollouts(connection: Connection, before: int | None) -> dict[str, Any]:
    rows = api_rollouts.listing(connection, _ROLLOUTS, before)
    return {
        "rows": rows,
        "next": rows[-1]["id"] if len(rows) == _ROLLOUTS else None,
        "ready": _ready(connection),
        "policy": asdict(stages.Policy()),
    }


def _rollout(connection: Connection, number: int) -> dict[str, Any]:
    rollout = api_rollouts.shown(connection, number)
    older = [
        row["version"]
        for row in releases.listing(connection, rollout["product"])
        if row["downgrade"] and row["blocked"] is None and row["version"] != rollout["version"]
    ]
    return {"rollout": rollout, "older": older}


def _updates(connection: Connection) -> dict[str, Any]:
    return {"rows": jobs.listing(connection), "ready": releases.listing(connection)}


def _rules(parts: Parts) -> Callable[..., dict[str, Any]]:
    def read(connection: Connection) -> dict[str, Any]:
        found = connection.execute(select(windows).order_by(windows.c.id))
        return {
            "labels": devices.label_table(connection),
            "windows": [dict(row._mapping) for row in found],
            "schedules": schedules.listing(connection),
            "actions": [name for name in schedules.ACTIONS if name != "backup"],
            "settings": api_admin.shown_settings(connection, parts),
        }

    return read


def _logs(connection: Connection) -> dict[str, Any]:
    def newest(table: Any) -> list[dict[str, Any]]:
        rows = connection.execute(select(table).order_by(table.c.id.desc()).limit(50))
        return [dict(row._mapping) for row in rows]

    return {
        "audit": audit.listing(connection, 50),
        "downloads": newest(downloads),
        "attempts": newest(attempts),
    }


async def _still(guard: Guard, request: Request) -> bool:
    """False once the session has ended: a stream must not outlive it."""
    try:
        await guard(request)
    except Away:
        return False
    return True


def _add_events(app: FastAPI, parts: Parts, guard: Guard) -> None:
    @app.get("/-/events/{number:int}", include_in_schema=False)
    async def events(number: int, request: Request) -> Response:
        await guard(request)
        await parts.store.aread(lambda c: rollouts.get(c, number))

        async def stream() -> AsyncIterator[str]:
            before = ""
            while not await request.is_disconnected() and await _still(guard, request):
                found = await parts.store.aread(lambda c: api_rollouts.shown(c, number))
                text = json.dumps({k: found[k] for k in ("state", "stage", "why", "counts")})
                yield f"data: {text}\n\n" if text != before else ": still here\n\n"
                before = text
                await asyncio.sleep(_EVENT_S)

        kept = {**headers(), "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), 200, kept, "text/event-stream")
