"""The application: the boards' two routes, the published tree, and what the other modules add.

POST /api/v1/check-update     board            is there a release for this board?
POST /api/v1/report-status    board            what became of it
GET  /{product}/...           nobody's         the published tree, as any web server has it
"""

import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from sqlalchemy import Connection

from . import (
    api_admin,
    api_firmware,
    api_fleet,
    api_rollouts,
    devices,
    openapi,
    page,
    page_forms,
    policy,
    tree,
)
from .auth import Boards, refused
from .http import (
    Parts,
    add_handlers,
    allowed_methods,
    json_body,
    note_event,
    problem_response,
)
from .limits import Limits
from .messages import CheckUpdate, ReportStatus
from .presign import presigned
from .problems import Problem
from .tree import etag_matches
from .wire import Gate, overloaded

__all__ = ["Parts", "create_app"]

URL_MAX = 512
"""Characters of a URL that a board takes (``twinslot.url``)."""


def create_app(parts: Parts) -> FastAPI:
    """Build the ASGI application."""
    app = FastAPI(
        title="Twinslot", docs_url=None, redoc_url=None, openapi_url="/api/v1/openapi.json"
    )
    app.add_middleware(
        Gate,
        limits=parts.limits,
        large={
            "/api/v1/report-status": parts.limits.report_bytes,
            api_firmware.UPLOAD: parts.settings.firmware_bytes * 4,
            page_forms.UPLOAD: parts.settings.firmware_bytes * 4,
            api_fleet.IMPORT: 4 << 20,
            api_fleet.ACCEPT: 1 << 20,
            page_forms.IMPORT: 4 << 20,
        },
    )
    add_handlers(app, parts.limits, page.refusal(parts))
    _add_device_routes(app, parts)
    for module in (api_fleet, api_firmware, api_rollouts, api_admin, page):
        module.add_routes(app, parts)
    _add_tree(app, parts)
    app.openapi = functools.cache(lambda: openapi.describe(app))
    return app


class _Plain(APIRoute):
    """A route that gets the request as it is: to solve a route's dependencies for each request
    takes the framework longer than the answer."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        return self.endpoint


def _add_device_routes(app: FastAPI, parts: Parts) -> None:
    board = Boards(parts.store, parts.device_token)
    read_ask, read_report = json_body(CheckUpdate), json_body(ReportStatus)
    done = b'{"ok":true}'

    async def check_update(request: Request) -> Response:
        token = await board(request)
        ask = await read_ask(request)
        address = request.client.host if request.client else None
        answer = await parts.desk.poll(ask, token, address)
        headers = {"ETag": answer.etag}
        if etag_matches(request.headers.get("if-none-match", ""), answer.etag):
            return Response(status_code=304, headers=headers)
        return Response(answer.body, 200, headers, "application/json")

    async def report_status(request: Request) -> Response:
        token = await board(request)
        report = await read_report(request)
        new = await parts.desk.report(report, token)
        note_event(
            "reported",
            device=report.device_id,
            attempt=report.attempt,
            version=report.version,
            status=report.status,
            error=report.error.code if report.error else None,
            repeated=not new,
        )
        return Response(done, media_type="application/json")

    for path, endpoint in (("check-update", check_update), ("report-status", report_status)):
        app.router.add_api_route(
            f"/api/v1/{path}", endpoint, methods=["POST"], route_class_override=_Plain
        )


def _add_tree(app: FastAPI, parts: Parts) -> None:
    downloads = _Places(parts.limits.downloads)
    may_fetch = _Fetchers(parts)

    @app.api_route("/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def published(name: str, request: Request) -> Response:
        if parts.settings.downloads == "token":
            await may_fetch(request)
        file = await run_in_threadpool(parts.site.find, name)
        if file is not None and parts.site.is_pointer(name):
            seen = file
            file = await parts.store.aread(lambda c: parts.desk.pointer(c, name, seen))
        if file is None:
            if set(allowed_methods(request)) - {"GET", "HEAD"}:
                raise HTTPException(405)
            raise Problem(404, "not_found", "nothing is published under this name")
        if file.content is None and (elsewhere := _elsewhere(parts, request.method, name)):
            return RedirectResponse(elsewhere, 302, {"Cache-Control": "no-store"})
        response = tree.respond(request, file)
        if isinstance(response, tree.Slice):
            return _InPlace(response, downloads, parts, name)
        return response


def _elsewhere(parts: Parts, method: str, name: str) -> str | None:
    """Where a payload is fetched, if not here. No token goes there: the release vouches for it."""
    settings = parts.settings
    if settings.payload_url is None:
        return None
    url = f"{settings.payload_url}/{name}"
    if signing := settings.payload_signing:
        url = presigned(
            url,
            signing.region,
            signing.key_id,
            signing.secret,
            signing.valid_s,
            time.time(),
            method,
        )
    if len(url) > URL_MAX:
        note_event("payload served here", name=name, why=f"its URL has {len(url)} characters")
        return None
    return url


class _Fetchers:
    """Who may download where the tree is not public: accepted boards, and people.

    Who comes with the fleet's token does not say which board it is: where that one would be enough
    to register and be accepted, it is enough to download.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._boards = Boards(parts.store, parts.device_token)

    async def __call__(self, request: Request) -> None:
        if await self._parts.people.find(request) is not None:
            return
        digest = await self._boards(request)
        if not await self._parts.store.aread(lambda c: self._is_accepted(c, digest)):
            raise refused()

    def _is_accepted(self, connection: Connection, digest: str | None) -> bool:
        if digest is None:
            settings = policy.in_force(connection, self._parts.settings)
            return settings.enrolment.default == "accepted"
        board = devices.of_token(connection, digest)
        return board is not None and board.enrolment == "accepted"


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

    def __init__(self, inner: tree.Slice, places: _Places, parts: Parts, name: str):
        super().__init__()
        self._inner = inner
        self._places = places
        self._parts = parts
        self._name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        limits: Limits = self._parts.limits
        with self._places.taken() as ok:
            if not ok:
                await problem_response(overloaded(limits))(scope, receive, send)
                return
            try:
                await self._inner(scope, receive, send)
            finally:
                client = scope.get("client")
                self._parts.desk.downloaded(
                    self._name,
                    client[0] if client else None,
                    self._inner.offset,
                    self._inner.sent,
                    self._inner.complete,
                )
