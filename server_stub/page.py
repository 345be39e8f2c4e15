"""The page: one dashboard, made on the server, a little plain JavaScript, no build step.

Everything lies below ``/-/``, a name no product can have. Who is logged in is a session in the
database, known by a cookie that scripts can't read and other sites can't send; every form carries
the session's CSRF token. The page does what the API does, by the same functions.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from sqlalchemy import Connection, func, select

from . import api_firmware, api_fleet, api_rollouts, audit, auth, devices, releases, rollouts
from .audit import Who
from .http import Note, Parts, change, date
from .problems import Problem
from .schema import attempts, downloads, reports, users
from .schema import devices as device_table
from .schema import rollouts as rollout_table

_HERE = Path(__file__).parent
_EVENT_S = 1.0
_PAGE = 100
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class _Renderer:
    """Templates with escaping on, and the headers every page carries."""

    def __init__(self) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["when"] = lambda s: (
            s if isinstance(s, str) else date(s) or "never"
        )
        self._environment.filters["ago"] = _ago
        self._environment.filters["pretty"] = lambda v: json.dumps(v, ensure_ascii=False)

    def __call__(self, name: str, session: Any, status: int = 200, **values: Any) -> Response:
        can = session is not None and auth.ROLES.index(session.role) >= 1
        text = self._environment.get_template(name).render(me=session, can=can, **values)
        return Response(text, status, headers(), "text/html; charset=utf-8")


def headers() -> dict[str, str]:
    return {
        "Content-Security-Policy": CSP,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _ago(seconds: float | None) -> str:
    if not seconds:
        return "never"
    left = int(time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if left >= size:
            return f"{left // size} {unit} ago"
    return "just now"


class _Away(Exception):
    """Nobody is logged in."""


def add_routes(app: FastAPI, parts: Parts) -> None:
    render = _Renderer()
    guard = _Guard(parts)

    async def away(_request: Request, _exc: Exception) -> Response:
        return RedirectResponse("/-/login", 303)

    app.add_exception_handler(_Away, away)
    _add_login(app, parts, render, guard)
    _add_views(app, parts, render, guard)
    _add_forms(app, parts, guard)
    _add_events(app, parts, guard)


class _Guard:
    """Finds the session of a request; checks the CSRF token and the role of a form."""

    def __init__(self, parts: Parts):
        self._parts = parts

    async def __call__(self, request: Request) -> Any:
        value = request.cookies.get(auth.COOKIE)
        session = await self._parts.store.aread(lambda c: auth.session(c, value, int(time.time())))
        if session is None:
            raise _Away
        return session

    async def form(self, request: Request) -> tuple[Who, dict[str, str]]:
        session = await self(request)
        form = {k: v for k, v in (await request.form()).items() if isinstance(v, str)}
        if not hmac.compare_digest(form.pop("csrf", ""), session.csrf):
            raise Problem(403, "csrf", "this form is not from this page: reload it")
        if auth.ROLES.index(session.role) < 1:
            raise Problem(403, "forbidden", "this needs the role operator")
        return Who(session.name, session.role), form


def _add_login(app: FastAPI, parts: Parts, render: _Renderer, guard: _Guard) -> None:
    throttle = auth.Throttle()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/-/", 303)

    @app.get("/-/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        path = _HERE / "static" / name
        if path.suffix not in _TYPES or path.parent != _HERE / "static" or not path.is_file():
            raise Problem(404, "not_found", "no such file")
        kept = {**headers(), "Cache-Control": "max-age=3600"}
        return Response(path.read_bytes(), 200, kept, _TYPES[path.suffix])

    @app.get("/-/login", include_in_schema=False)
    async def login_form() -> Response:
        return render("login.html", None, error=None)

    @app.post("/-/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        form = await request.form()
        name, password = str(form.get("name", ""))[:64], str(form.get("password", ""))[:300]
        address = request.client.host if request.client else "?"
        try:
            throttle.check(f"name {name}", f"address {address}")
        except Problem as exc:
            return render("login.html", None, 429, error=exc.detail)
        who = await _known(parts, name, password)
        if who is None:
            throttle.failed(f"name {name}", f"address {address}")
            return render("login.html", None, 401, error="Wrong name or password.")

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

    @app.post("/-/logout", include_in_schema=False)
    async def logout(request: Request) -> Response:
        session = await guard(request)
        form = await request.form()
        if not hmac.compare_digest(str(form.get("csrf", "")), session.csrf):
            raise Problem(403, "csrf", "this form is not from this page: reload it")
        value = request.cookies.get(auth.COOKIE, "")
        await parts.store.awrite(lambda c: auth.close_session(c, value))
        response = RedirectResponse("/-/login", 303)
        response.delete_cookie(auth.COOKIE)
        return response


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


def _add_views(app: FastAPI, parts: Parts, render: _Renderer, guard: _Guard) -> None:
    session = Depends(guard)

    def view(path: str, template: str, read: Callable[..., dict[str, Any]]) -> None:
        async def show(request: Request, me: Annotated[Any, session]) -> Response:
            values = await parts.store.aread(lambda c: read(c, **request.path_params))
            return render(template, me, **values)

        app.get(path, include_in_schema=False)(show)

    view("/-/", "home.html", glance)
    view("/-/devices/{device_id}", "device.html", _device(parts))
    view("/-/releases", "releases.html", lambda c: {"rows": releases.listing(c)})
    view("/-/rollouts", "rollouts.html", _rollouts)
    view(
        "/-/rollouts/{number:int}",
        "rollout.html",
        lambda c, number: {"rollout": api_rollouts.shown(c, number)},
    )
    view("/-/logs", "logs.html", _logs)

    @app.get("/-/devices", include_in_schema=False)
    async def list_devices(
        me: Annotated[Any, session],
        q: Annotated[str, Query(max_length=64)] = "",
        label: Annotated[str, Query(max_length=130)] = "",
        status: Annotated[str, Query(max_length=16)] = "",
        version: Annotated[str, Query(max_length=64)] = "",
        after: Annotated[str, Query(max_length=64)] = "",
    ) -> Response:
        filters = {"q": q, "label": label, "status": status, "current_version": version}

        def read(connection: Connection) -> dict[str, Any]:
            rows = devices.listing(connection, after, _PAGE, filters)
            return {
                "rows": rows,
                "total": devices.count(connection, filters),
                "next": rows[-1]["device_id"] if len(rows) == _PAGE else None,
            }

        values = await parts.store.aread(read)
        filters = {"q": q, "label": label, "status": status, "version": version}
        return render("devices.html", me, filters=filters, **values)


def glance(connection: Connection) -> dict[str, Any]:
    """The fleet in a few numbers; each is one counting query."""
    now = int(time.time())

    def grouped(column: Any) -> list[tuple[Any, int]]:
        rows = connection.execute(
            select(column, func.count())
            .where(device_table.c.enrolment == "accepted")
            .group_by(column)
            .order_by(func.count().desc())
            .limit(12)
        )
        return [(value, number) for value, number in rows]

    seen = select(func.count()).select_from(device_table)
    active = connection.scalars(
        select(rollout_table.c.id)
        .where(rollout_table.c.state.in_(("pilot", "expand", "paused")))
        .order_by(rollout_table.c.id.desc())
        .limit(10)
    ).all()
    return {
        "total": connection.execute(seen).scalar_one(),
        "seen": connection.execute(
            seen.where(device_table.c.last_seen > now - 86400)
        ).scalar_one(),
        "pending": connection.execute(
            seen.where(device_table.c.enrolment == "pending")
        ).scalar_one(),
        "versions": grouped(device_table.c.current_version),
        "statuses": grouped(device_table.c.status),
        "rollouts": [api_rollouts.shown(connection, number) for number in active],
    }


def _device(parts: Parts) -> Callable[..., dict[str, Any]]:
    def read(connection: Connection, device_id: str) -> dict[str, Any]:
        return {
            "device": api_fleet.detail(connection, parts, device_id),
            "told": parts.desk.explain(connection, device_id, int(time.time())),
        }

    return read


def _rollouts(connection: Connection) -> dict[str, Any]:
    ids = connection.scalars(
        select(rollout_table.c.id).order_by(rollout_table.c.id.desc()).limit(50)
    ).all()
    ready = [
        row
        for row in releases.listing(connection)
        if (row["pilot_ready"] or row["stable"]) and row["blocked"] is None
    ]
    return {"rows": [api_rollouts.shown(connection, n) for n in ids], "ready": ready}


def _logs(connection: Connection) -> dict[str, Any]:
    def newest(table: Any) -> list[dict[str, Any]]:
        rows = connection.execute(select(table).order_by(table.c.id.desc()).limit(50))
        return [dict(row._mapping) for row in rows]

    return {
        "audit": audit.listing(connection, 1 << 62, 50),
        "reports": newest(reports),
        "downloads": newest(downloads),
        "attempts": newest(attempts),
    }


def _add_forms(app: FastAPI, parts: Parts, guard: _Guard) -> None:
    def form(
        path: str,
        action: str,
        back: str,
        work: Callable[[Connection, Note, dict[str, str], dict[str, Any]], Any],
    ) -> None:
        async def handle(request: Request) -> Response:
            who, values = await guard.form(request)
            where = request.path_params
            name = action.format(**where)
            await change(parts, who, name, lambda c, note: work(c, note, values, where))
            return RedirectResponse(back.format(**where), 303)

        app.post(path, include_in_schema=False)(handle)

    form(
        "/-/devices/{device_id}",
        "device.change",
        "/-/devices/{device_id}",
        lambda c, note, values, at: api_fleet.change_one(
            c, note, at["device_id"], _device_change(values)
        ),
    )
    form(
        "/-/releases/{number:int}",
        "firmware.change",
        "/-/releases",
        lambda c, note, values, at: api_firmware.change_one(
            c, note, at["number"], _release_change(values)
        ),
    )
    form(
        "/-/rollouts",
        "rollout.create",
        "/-/rollouts",
        lambda c, note, values, _: api_rollouts.create_one(
            c,
            note,
            api_rollouts.NewRollout(
                firmware_id=int(values["firmware_id"]),
                name=values.get("name", "")[:100],
                start="start" in values,
            ).model_dump(),
        ),
    )
    form(
        "/-/rollouts/{number:int}/{action}",
        "rollout.{action}",
        "/-/rollouts/{number}",
        lambda c, note, values, at: _act(c, note, at, values.get("why", "")[:300]),
    )


def _act(connection: Connection, note: Note, at: dict[str, Any], why: str) -> None:
    if at["action"] not in rollouts.ACTIONS:
        raise Problem(404, "not_found", "no such action")
    api_rollouts.act_one(connection, note, at["number"], at["action"], why)


def _device_change(values: dict[str, str]) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if values.get("enrolment") in ("pending", "accepted"):
        wanted["enrolment"] = values["enrolment"]
    if "pin" in values:
        wanted["pin"] = values["pin"].strip()[:64] or None
    if key := values.get("key", "").strip():
        wanted["labels"] = {key: values.get("value", "").strip() or None}
    return wanted


def _release_change(values: dict[str, str]) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        name: values[name] == "yes" for name in releases.FLAGS if name in values
    }
    if "blocked" in values:
        wanted["blocked"] = values["blocked"].strip()[:300] or None
    return wanted


def _add_events(app: FastAPI, parts: Parts, guard: _Guard) -> None:
    @app.get("/-/events/{number:int}", include_in_schema=False)
    async def events(number: int, request: Request) -> Response:
        await guard(request)
        await parts.store.aread(lambda c: rollouts.get(c, number))

        async def stream() -> AsyncIterator[str]:
            before = ""
            while not await request.is_disconnected():
                found = await parts.store.aread(lambda c: api_rollouts.shown(c, number))
                text = json.dumps({k: found[k] for k in ("state", "stage", "why", "counts")})
                yield f"data: {text}\n\n" if text != before else ": still here\n\n"
                before = text
                await asyncio.sleep(_EVENT_S)

        kept = {**headers(), "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), 200, kept, "text/event-stream")
