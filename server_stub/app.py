"""The routes: each authenticates, parses, asks, answers.

POST /api/v1/check-update     device token     is there a release for this board?
POST /api/v1/report-status    device token     what became of it
GET  /api/v1/devices          operator token   the registry, ?limit=100&after=<device id>
GET  /api/v1/devices/{id}     operator token   one board and its history
GET  /{product}/...           nobody's         the published tree, as any web server has it
"""

import contextlib
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DatabaseError
from starlette.exceptions import HTTPException

from . import offers, tree
from .limits import Limits
from .messages import CheckUpdate, ReportStatus
from .problems import Problem
from .site import ChannelError, Site
from .store import Store, StoreError
from .tokens import Token
from .wire import Gate, overloaded

log = logging.getLogger("twinslot.server")

Parsed = TypeVar("Parsed", bound=BaseModel)


@dataclass(frozen=True)
class Parts:
    """What the routes work with."""

    site: Site
    store: Store
    device_token: Token
    operator_token: Token
    limits: Limits
    poll_s: int = offers.DEFAULT_POLL_S


def create_app(parts: Parts) -> FastAPI:
    """Build the ASGI application."""
    app = FastAPI(
        title="Twinslot", docs_url=None, redoc_url=None, openapi_url="/api/v1/openapi.json"
    )
    app.add_middleware(Gate, limits=parts.limits)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _query_problem)
    app.add_exception_handler(StoreError, _store_problem(parts.limits))
    app.add_exception_handler(DatabaseError, _store_problem(parts.limits))
    app.add_exception_handler(Exception, _bug)
    _add_device_routes(app, parts)
    _add_operator_routes(app, parts)
    _add_tree(app, parts)
    return app


def _add_device_routes(app: FastAPI, parts: Parts) -> None:
    device = Depends(_bearer(parts.device_token))

    @app.post(
        "/api/v1/check-update", dependencies=[device], openapi_extra=_body_schema(CheckUpdate)
    )
    def check_update(request: Annotated[CheckUpdate, Depends(_json(CheckUpdate))]) -> dict:
        return _check_update(parts, request)

    @app.post(
        "/api/v1/report-status", dependencies=[device], openapi_extra=_body_schema(ReportStatus)
    )
    def report_status(report: Annotated[ReportStatus, Depends(_json(ReportStatus))]) -> dict:
        return _report_status(parts, report)


def _check_update(parts: Parts, request: CheckUpdate) -> dict:
    parts.store.seen(request.device_id, request.model_dump(exclude={"device_id"}))
    answer: dict[str, Any] = {"update_available": False, "poll": parts.poll_s}
    if keyring := parts.site.keyring(request.product):
        answer["keyring"] = keyring
    try:
        channel = parts.site.channel(request.product, request.channel)
    except ChannelError as exc:
        log.warning("no offer", extra={"fields": {"reason": exc.code, "why": str(exc)}})
        return {**answer, "reason": exc.code}
    board = offers.Board(
        request.device_id,
        request.product,
        request.hardware,
        request.current_version,
        request.current_build,
        request.chip_id,
    )
    offer = offers.decide(board, channel, int(time.time()))
    _note("checked", device=request.device_id, version=offer.version, reason=offer.reason)
    if channel.poll is not None:
        answer["poll"] = channel.poll
    if offer.release is None:
        return {**answer, "reason": offer.reason}
    answer |= {"update_available": True, "release": f"/{offer.release}"}
    if channel.rollout is not None:
        answer["rollout"] = channel.rollout
    return answer


def _report_status(parts: Parts, report: ReportStatus) -> dict:
    kept = report.model_dump(exclude={"device_id", "current_version", "current_build"})
    running = {"current_version": report.current_version, "current_build": report.current_build}
    new = parts.store.report(report.device_id, kept, running)
    _note(
        "reported",
        device=report.device_id,
        attempt=report.attempt,
        version=report.version,
        status=report.status,
        error=report.error.code if report.error else None,
        repeated=not new,
    )
    return {"ok": True}


def _add_operator_routes(app: FastAPI, parts: Parts) -> None:
    operator = Depends(_bearer(parts.operator_token))

    @app.get("/api/v1/devices", dependencies=[operator])
    def devices(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str, Query(max_length=64)] = "",
    ) -> dict:
        rows = parts.store.devices(after, limit)
        following = rows[-1]["device_id"] if len(rows) == limit else None
        return {"devices": [_with_dates(row) for row in rows], "next": following}

    @app.get("/api/v1/devices/{device_id}", dependencies=[operator])
    def device(device_id: str) -> dict:
        row = parts.store.device(device_id)
        if row is None:
            raise Problem(404, "no_device", f"no device {device_id[:64]!r}")
        row["history"] = [_with_dates(report) for report in row["history"]]
        return _with_dates(row)


def _add_tree(app: FastAPI, parts: Parts) -> None:
    downloads = _Places(parts.limits.downloads)

    @app.api_route("/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def published(name: str, request: Request) -> Response:
        file = await run_in_threadpool(parts.site.find, name)
        if file is None:
            raise Problem(404, "not_found", "nothing is published under this name")
        response = tree.respond(request, file)
        if isinstance(response, tree.Slice):
            return _InPlace(response, downloads, parts.limits)
        return response


class _Places:
    """A counter of free places; one event loop, so no lock."""

    def __init__(self, free: int):
        self.free = free

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """Yield whether there was a place; give it back at the end."""
        ok = self.free > 0
        self.free -= ok
        try:
            yield ok
        finally:
            self.free += ok


class _InPlace(Response):
    """Send ``inner`` while a download place is free, else say when to come back."""

    def __init__(self, inner: Response, places: _Places, limits: Limits):
        super().__init__()
        self._inner = inner
        self._places = places
        self._limits = limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._places.taken() as ok:
            response = self._inner if ok else _problem_response(overloaded(self._limits))
            await response(scope, receive, send)


def _bearer(token: Token) -> Callable[[Request], Awaitable[None]]:
    """Make a dependency that lets only the holder of ``token`` pass."""

    async def check(request: Request) -> None:
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.matches(presented.strip()):
            raise Problem(
                401,
                "unauthorized",
                "this needs a valid bearer token of the right role",
                {"WWW-Authenticate": "Bearer"},
            )

    return check


def _json(model: type[Parsed]) -> Callable[[Request], Awaitable[Parsed]]:
    """Make a dependency that parses the body; dependencies run in order, so after the token."""

    async def parse(request: Request) -> Parsed:
        body = await request.body()
        try:
            return model.model_validate_json(body)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise Problem(422, "malformed", f"{where}: {first['msg']}") from None

    return parse


def _body_schema(model: type[BaseModel]) -> dict:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _with_dates(row: dict[str, Any]) -> dict[str, Any]:
    """Show the stored seconds as RFC 3339."""
    return {
        name: dt.datetime.fromtimestamp(value, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if name in ("first_seen", "last_seen", "received")
        else value
        for name, value in row.items()
    }


def _note(event: str, **fields: Any) -> None:
    log.info(event, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


def _problem_response(problem: Problem) -> JSONResponse:
    return JSONResponse(
        problem.body(),
        problem.status_code,
        dict(problem.headers or {}),
        media_type="application/problem+json",
    )


async def _http_problem(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if not isinstance(exc, Problem):  # the framework's own: no such route, no such method
        code = {404: "not_found", 405: "method"}.get(exc.status_code, "request")
        exc = Problem(exc.status_code, code, str(exc.detail), exc.headers)
    client = request.client.host if request.client else None
    _note("refused", code=exc.code, path=request.url.path[:200], client=client, why=exc.detail)
    return _problem_response(exc)


async def _query_problem(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _problem_response(Problem(422, "malformed", f"{where}: {first['msg']}"))


def _store_problem(limits: Limits) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(_request: Request, exc: Exception) -> Response:
        log.error("store", extra={"fields": {"why": str(getattr(exc, "orig", exc))}})
        busy = overloaded(limits)
        return _problem_response(
            Problem(503, "storage", "the registry can't take this now", busy.headers)
        )

    return handle


async def _bug(_request: Request, _exc: Exception) -> Response:
    # The traceback goes to the log (uvicorn writes it), never to the client.
    return _problem_response(Problem(500, "internal", "the server failed; its log says why"))
