"""What all routes share: parsing after authentication, dates, refusals, audited changes."""

import datetime as dt
import errno
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from . import audit
from .audit import Who
from .auth import People
from .desk import Desk
from .limits import Limits
from .problems import Problem
from .settings import Settings
from .site import Site
from .store import Store, StoreError
from .tokens import Token
from .wire import overloaded

log = logging.getLogger("twinslot.server")

Parsed = TypeVar("Parsed", bound=BaseModel)
T = TypeVar("T")
Note = Callable[..., None]

TIMES = (
    "first_seen last_seen received offered updated ended polled_new created stage_started"
    " passed_at starts_at at expires last_run waits_until"
).split()


@dataclass(frozen=True)
class Parts:
    """What the routes work with."""

    site: Site
    store: Store
    device_token: Token
    operator_token: Token
    limits: Limits
    settings: Settings
    desk: Desk
    people: People


def json_body(model: type[Parsed]) -> Callable[[Request], Awaitable[Parsed]]:
    """Make a dependency that parses the body; dependencies run in order, so after the token."""

    async def parse(request: Request) -> Parsed:
        body = await request.body()
        try:
            return model.model_validate_json(body)
        except ValidationError as exc:
            raise _malformed(exc) from None

    return parse


@asynccontextmanager
async def form_of(
    request: Request, max_files: int = 0, max_fields: int = 8
) -> AsyncIterator[FormData]:
    """A request's form, its files open until the block ends.

    In UTF-8, as browsers send it: some of the encodings that Python knows make text of a body that
    can't be written down again, or fail in ways of their own.

    Raises:
        Problem: 400 for another charset; the framework's own 400 for what is no form.
    """
    charset = parse_options_header(request.headers.get("content-type"))[1].get(b"charset", b"")
    if charset.lower() not in (b"", b"utf-8"):
        raise Problem(400, "charset", f"a form in {charset[:32]!a}, expected utf-8")
    async with request.form(max_files=max_files, max_fields=max_fields) as form:
        yield form


def checked(model: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """Make ``model`` of a form's members, as of the API's JSON, or raise Problem 422."""
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as exc:
        raise _malformed(exc) from None


def _malformed(exc: ValidationError) -> Problem:
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return Problem(422, "malformed", f"{where}: {first['msg']}")


async def change(parts: Parts, who: Who, action: str, work: Callable[[Connection, Note], T]) -> T:
    """Run a change that must leave a line in the audit log, as ``audited``."""
    result = await parts.store.awrite(lambda c: audited(c, who, action, work))
    note_event("changed", action=action, who=who.name)
    return result


def audited(
    connection: Connection, who: Who, action: str, work: Callable[[Connection, Note], T]
) -> T:
    """Do ``work``, which must leave a line in the audit log.

    Args:
        work: gets the connection and ``note(target, before=None, after=None)``.
    """
    noted: list[str] = []

    def note(
        target: Any,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        audit.note(connection, who, action, str(target), before, after)
        noted.append(action)

    result = work(connection, note)
    if not noted:
        raise RuntimeError(f"{action} left no line in the audit log")
    return result


# ---- dates


def date(seconds: float | None) -> str | None:
    """RFC 3339 of stored seconds."""
    if not seconds:
        return None
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def with_dates(row: Mapping[str, Any]) -> dict[str, Any]:
    """Show the stored seconds as RFC 3339, at any depth."""
    return {name: _dated(name, value) for name, value in row.items()}


def _dated(name: str, value: Any) -> Any:
    if name in TIMES and type(value) in (int, float):
        return date(value)
    if isinstance(value, Mapping):
        return with_dates(value)
    if isinstance(value, list):
        return [with_dates(v) if isinstance(v, Mapping) else v for v in value]
    return value


def seconds(text: str) -> int:
    """Read an RFC 3339 date, or raise ValueError."""
    when = dt.datetime.fromisoformat(text)
    return int(when.replace(tzinfo=when.tzinfo or dt.UTC).timestamp())


# ---- refusals

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def note_event(event: str, **fields: Any) -> None:
    log.info(event, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


def problem_response(problem: Problem) -> JSONResponse:
    return JSONResponse(
        problem.body(),
        problem.status_code,
        dict(problem.headers or {}),
        media_type="application/problem+json",
    )


def add_handlers(
    app: FastAPI, limits: Limits, on_page: Callable[[Request, Problem], Awaitable[Response]]
) -> None:
    """Answer every refusal and failure: with problem+json, or below ``/-/`` by ``on_page``."""

    def answering(
        find: Callable[[Request, Exception], Problem],
    ) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(request: Request, exc: Exception) -> Response:
            problem = find(request, exc)
            if request.url.path.startswith("/-/"):
                return await on_page(request, problem)
            return problem_response(problem)

        return handle

    storage = _store_problem(limits)
    for kind, find in (
        (HTTPException, _http_problem),
        (RequestValidationError, _query_problem),
        (StoreError, storage),
        (DatabaseError, storage),
        (IntegrityError, _conflict_problem),
        # SQLite's driver says it of a number above 64 bits, PostgreSQL's of one above a column's.
        (OverflowError, _unfit_problem),
        (DataError, _unfit_problem),
        (ValueError, _value_problem),
        (OSError, _file_problem),
        (ClientDisconnect, _cut_problem),
        (Exception, _bug),
    ):
        app.add_exception_handler(kind, answering(find))


def allowed_methods(request: Request) -> list[str]:
    """The methods of all routes with this path; of the tree, which has every path, if no others.

    The framework names those of one route only.
    """
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            if not (found and route.path.startswith("/{")):
                found |= route.methods or set()
    return sorted(found)


def _http_problem(request: Request, exc: Exception) -> Problem:
    assert isinstance(exc, HTTPException)
    if not isinstance(exc, Problem):  # the framework's own: no such route, no such method
        code = {404: "not_found", 405: "method"}.get(exc.status_code, "request")
        headers = exc.headers
        if exc.status_code == 405:
            headers = {"Allow": ", ".join(allowed_methods(request))}
        exc = Problem(exc.status_code, code, str(exc.detail), headers)
    client = request.client.host if request.client else None
    note_event(
        "refused", code=exc.code, path=request.url.path[:200], client=client, why=exc.detail
    )
    return exc


def _query_problem(_request: Request, exc: Exception) -> Problem:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return Problem(422, "malformed", f"{where}: {first['msg']}")


def _value_problem(request: Request, exc: Exception) -> Problem:
    return _refused_value(exc) or _bug(request, exc)


def _refused_value(exc: Exception) -> Problem | None:
    """The pure rules refuse what can't be by ValueError, whose text is made for people."""
    if type(exc) is not ValueError and type(exc).__module__.partition(".")[0] != __package__:
        return None
    return Problem(422, "malformed", " ".join(str(exc).split())[:300])


def _store_problem(limits: Limits) -> Callable[[Request, Exception], Problem]:
    def handle(_request: Request, exc: Exception) -> Problem:
        log.error("store", extra={"fields": {"why": str(getattr(exc, "orig", exc))}})
        busy = overloaded(limits)
        return Problem(503, "storage", "the registry can't take this now", busy.headers)

    return handle


def _conflict_problem(_request: Request, _exc: Exception) -> Problem:
    detail = "something there has this name or token already"
    return Problem(409, "conflict", detail)


def _cut_problem(request: Request, _exc: Exception) -> Problem:
    """For the log: who would read the answer has gone."""
    return _http_problem(request, Problem(400, "cut", "the body ended before its length"))


def _file_problem(request: Request, exc: Exception) -> Problem:
    if getattr(exc, "errno", None) not in _NO_SPACE:
        return _bug(request, exc)
    log.error("no space", extra={"fields": {"why": str(exc)}})
    return Problem(507, "no_space", "the server has no space for this")


def _unfit_problem(_request: Request, _exc: Exception) -> Problem:
    detail = "a number or text that the registry can't hold"
    return Problem(422, "malformed", detail)


def _bug(_request: Request, exc: Exception) -> Problem:
    log.error("bug", exc_info=exc)
    # The traceback goes to the log, never to the client.
    return Problem(500, "internal", "the server failed; its log says why")
