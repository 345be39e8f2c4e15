"""Who is asking: boards by token, people by token or session, each within a role.

Roles of people: a viewer reads, an operator changes the fleet, an admin also changes users and
webhooks. The operator token made at first start is an admin's. A gateway is a board with a token
of its own, which speaks for the nodes labelled with its id.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from sqlalchemy import Connection, delete, select

from . import devices
from .audit import Who
from .problems import Problem
from .schema import sessions, users
from .store import Store
from .tokens import Token

ROLES = ("viewer", "operator", "admin")
GATEWAY = "gateway"
SESSION_S = 12 * 3600
COOKIE = "twinslot_session"
_TRIES = 5
_TRIES_WITHIN_S = 60.0
_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}


def presented(request: Request) -> str:
    """The bearer token of a request, or ""."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def refused() -> Problem:
    return Problem(
        401,
        "unauthorized",
        "this needs a valid bearer token of the right role",
        {"WWW-Authenticate": "Bearer"},
    )


class Boards:
    """Tells the token of a board from the fleet's, and both from others."""

    def __init__(self, store: Store, fleet: Token):
        self._store = store
        self._fleet = fleet
        self._known: dict[str, int] = {}  # hash -> generation it was looked up in

    async def __call__(self, request: Request) -> str | None:
        """Return the hash of the board's own token, or None for the fleet's.

        Raises:
            Problem: 401.
        """
        token = presented(request)
        if not token:
            raise refused()
        if self._fleet.matches(token):
            return None
        digest = devices.hash_token(token)
        generation = await self._store.current_generation()
        if self._known.get(digest) == generation:
            return digest
        row = await self._store.aread(lambda c: devices.of_token(c, digest))
        if row is None:
            raise refused()
        if len(self._known) > 100_000:
            self._known.clear()
        self._known[digest] = generation
        return digest


class People:
    """Finds out who a request is from, by bearer token or by the page's session."""

    def __init__(self, store: Store, first: Token):
        self._store = store
        self._first = first

    def need(self, role: str) -> Callable[[Request], Awaitable[Who]]:
        """Make a dependency that lets ``role`` and those above it pass."""

        async def check(request: Request) -> Who:
            who = await self.find(request)
            if who is None:
                raise refused()
            if ROLES.index(who.role) < ROLES.index(role):
                raise Problem(403, "forbidden", f"this needs the role {role}")
            return who

        return check

    def need_or_gateway(self, role: str) -> Callable[[Request], Awaitable[Who]]:
        """Make a dependency that lets gateways pass, too; their role is ``GATEWAY``."""
        person = self.need(role)

        async def check(request: Request) -> Who:
            if token := presented(request):
                digest = devices.hash_token(token)
                board = await self._store.aread(lambda c: devices.of_token(c, digest))
                if board is not None and board.enrolment == "accepted":
                    return Who(board.device_id, GATEWAY)
            return await person(request)

        return check

    async def find(self, request: Request) -> Who | None:
        """Who a request is from, or None. A session reads only: its changes need forms' tokens."""
        token = presented(request)
        if not token:
            value = request.cookies.get(COOKIE) if request.method in ("GET", "HEAD") else None
            if not value:
                return None
            row = await self._store.aread(lambda c: session(c, value, int(time.time())))
            return Who(row.name, row.role) if row else None
        if self._first.matches(token):
            return Who("operator-token", "admin")
        digest = devices.hash_token(token)
        row = await self._store.aread(
            lambda c: c.execute(select(users).where(users.c.token_hash == digest)).first()
        )
        return Who(row.name, row.role) if row else None


# ---- users and passwords


def set_user(
    connection: Connection, name: str, role: str, password: str | None, now: int
) -> dict[str, Any]:
    """Make or change a user; returns the new API token, shown once.

    Raises:
        Problem: 422.
    """
    if role not in ROLES:
        raise Problem(422, "malformed", f"role {role[:32]!r}: expected one of {', '.join(ROLES)}")
    if password is not None and len(password) < 10:
        raise Problem(422, "malformed", "password: expected 10 characters or more")
    old = connection.execute(select(users).where(users.c.name == name)).first()
    token = secrets.token_urlsafe(32)
    hashed = hash_password(password) if password is not None else old.password if old else None
    connection.execute(delete(users).where(users.c.name == name))
    connection.execute(delete(sessions).where(sessions.c.name == name))
    connection.execute(
        users.insert().values(
            name=name,
            role=role,
            password=hashed,
            token_hash=devices.hash_token(token),
            created=old.created if old else now,
        )
    )
    return {"name": name, "role": role, "token": token}


def remove_user(connection: Connection, name: str) -> None:
    """Raises Problem 404."""
    if connection.execute(delete(users).where(users.c.name == name)).rowcount == 0:
        raise Problem(404, "no_user", f"no user {name[:64]!r}")
    connection.execute(delete(sessions).where(sessions.c.name == name))


def list_users(connection: Connection) -> list[dict[str, Any]]:
    rows = connection.execute(select(users).order_by(users.c.name))
    return [
        {"name": r.name, "role": r.role, "password": r.password is not None, "created": r.created}
        for r in rows
    ]


def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)
    return f"scrypt${salt.hex()}${digest.hex()}"


def password_matches(password: str, stored: str | None) -> bool:
    """Takes as long for somebody who doesn't exist."""
    _, salt, digest = (stored or f"scrypt${'00' * 16}${'00' * 64}").split("$")
    presented = password.encode("utf-8", "surrogatepass")
    found = hashlib.scrypt(presented, salt=bytes.fromhex(salt), **_SCRYPT)
    return hmac.compare_digest(found.hex(), digest) and stored is not None


class Throttle:
    """At most a few wrong passwords a minute for one name or from one address."""

    def __init__(self) -> None:
        self._failures: dict[str, list[float]] = {}

    def check(self, *keys: str) -> None:
        """Raises Problem 429."""
        now = time.monotonic()
        for key in keys:
            recent = [t for t in self._failures.get(key, ()) if now - t < _TRIES_WITHIN_S]
            if len(recent) >= _TRIES:
                raise Problem(
                    429,
                    "throttled",
                    "too many wrong passwords: wait a minute",
                    {"Retry-After": "60"},
                )

    def failed(self, *keys: str) -> None:
        now = time.monotonic()
        if len(self._failures) > 10_000:
            self._failures.clear()
        for key in keys:
            recent = [t for t in self._failures.get(key, ()) if now - t < _TRIES_WITHIN_S]
            self._failures[key] = [*recent, now]


# ---- sessions of the page


def open_session(connection: Connection, who: Who, now: int) -> str:
    """Begin a session; the cookie's value, of which only a hash is kept."""
    value = secrets.token_urlsafe(32)
    connection.execute(delete(sessions).where(sessions.c.expires < now))
    connection.execute(
        sessions.insert().values(
            id_hash=devices.hash_token(value),
            name=who.name,
            role=who.role,
            csrf=secrets.token_urlsafe(24),
            expires=now + SESSION_S,
        )
    )
    return value


def session(connection: Connection, value: str | None, now: int) -> Any:
    """The session of a cookie, or None."""
    if not value:
        return None
    return connection.execute(
        select(sessions).where(
            sessions.c.id_hash == devices.hash_token(value), sessions.c.expires > now
        )
    ).first()


def close_session(connection: Connection, value: str) -> None:
    connection.execute(delete(sessions).where(sessions.c.id_hash == devices.hash_token(value)))
