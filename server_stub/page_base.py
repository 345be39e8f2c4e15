"""What every page rests on: templates with their headers, and who is logged in.

Who is logged in is a session in the database, known by a cookie that scripts can't read and other
sites can't send; every form carries the session's CSRF token.
"""

import hmac
import json
import time
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request, Response
from starlette.datastructures import UploadFile

from twinslot import espimage

from . import auth
from .audit import Who
from .http import Parts, date
from .problems import Problem

HERE = Path(__file__).parent
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


class Away(Exception):
    """Nobody is logged in."""


def headers() -> dict[str, str]:
    return {
        "Content-Security-Policy": CSP,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


class Renderer:
    """Templates with escaping on, and the headers every page carries."""

    def __init__(self) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            when=lambda s: s if isinstance(s, str) else date(s) or "never",
            ago=_ago,
            plain=_plain,
            size=_size,
            chip=espimage.chip_name,
            stage=_stage,
        )

    def __call__(self, name: str, session: Any, status: int = 200, **values: Any) -> Response:
        """Render a page for ``session``, whose role says which forms it has."""
        rank = auth.ROLES.index(session.role) if session is not None else -1
        text = self._environment.get_template(name).render(
            me=session, can=rank >= 1, rules=rank >= 2, here=name.removesuffix(".html"), **values
        )
        return Response(text, status, headers(), "text/html; charset=utf-8")

    def refusal(self, session: Any, problem: Problem) -> Response:
        """Say on a page why something could not be done."""
        response = self("refused.html", session, problem.status_code, why=problem.detail)
        response.headers.update(problem.headers or {})
        return response


def _ago(seconds: float | None) -> str:
    if not seconds:
        return "never"
    left = int(time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if left >= size:
            return f"{left // size} {unit} ago"
    return "just now"


def _plain(value: Any) -> str:
    """A value of the API as people read it: ``a=1, b=x``."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _size(count: int) -> str:
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def _stage(stage: dict[str, Any]) -> str:
    kind, value = next(iter(stage.items()))
    return {"percent": f"{value} %", "count": f"{value} boards", "label": str(value)}[kind]


class Guard:
    """Finds the session of a request; checks the CSRF token and the role of a form."""

    def __init__(self, parts: Parts):
        self._parts = parts

    async def __call__(self, request: Request) -> Any:
        """Raises Away without a session."""
        value = request.cookies.get(auth.COOKIE)
        session = await self._parts.store.aread(lambda c: auth.session(c, value, int(time.time())))
        if session is None:
            raise Away
        return session

    async def role(self, request: Request, role: str) -> Any:
        """Raises Problem 403 where the session's role is below ``role``."""
        session = await self(request)
        if auth.ROLES.index(session.role) < auth.ROLES.index(role):
            raise Problem(403, "forbidden", f"this needs the role {role}")
        return session


def same_page(session: Any, form: Any) -> None:
    """Raises Problem 403 where a form doesn't hold its session's token."""
    presented = str(form.get("csrf", "")).encode("utf-8", "surrogatepass")
    if not hmac.compare_digest(presented, session.csrf.encode()):
        raise Problem(403, "csrf", "this form is not from this page: reload it")


def who(session: Any) -> Who:
    return Who(session.name, session.role)


async def fields(form: Any) -> dict[str, str]:
    """A form's members as text, files read."""
    found = {}
    for name, value in form.items():
        uploaded = isinstance(value, UploadFile)
        found[name] = (await value.read()).decode("utf-8-sig", "replace") if uploaded else value
    return found
