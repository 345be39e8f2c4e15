"""Deliver events: POST of JSON, signed with HMAC-SHA-256, tried again, given up after some hours.

    X-Twinslot-Timestamp: seconds since 1970
    X-Twinslot-Signature: sha256=HEX of HMAC(secret, timestamp + "." + body)

Redirects are not followed, and addresses of this network are refused unless the settings allow
them: a URL that an operator enters must not reach what only this server can.

Each hook is served by itself: one that is slow, or dead, keeps no other waiting, nor the server
from stopping. What it has taken, and the server could not write down, it gets again: ``id`` tells.
"""

import hashlib
import hmac
import http.client
import ipaddress
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, select, update

from .problems import Problem
from .schema import deliveries, webhooks
from .store import Store

log = logging.getLogger("twinslot.server")

TIMEOUT_S = 5
STOP_S = 2
"""A stop waits so long for what hooks are being told, and no longer."""

TRIES = 12
_BACKOFF_S = 10
_BATCH = 20
KEPT = 10_000


def check_url(url: str) -> str:
    """Raises Problem 422 for what is no HTTP(S) URL."""
    try:
        parts = urlsplit(url)
        usable = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise Problem(422, "malformed", "url: expected http(s)://host/path")
    return url


def create(connection: Connection, url: str, events: list[str], now: int) -> dict[str, Any]:
    """Make a webhook; its secret is shown once."""
    secret = secrets.token_urlsafe(32)
    number = connection.execute(
        webhooks.insert()
        .values(url=check_url(url), secret=secret, events=events, created=now)
        .returning(webhooks.c.id)
    ).scalar_one()
    return {"id": number, "url": url, "events": events, "secret": secret}


def listing(connection: Connection) -> list[dict[str, Any]]:
    found = []
    for row in connection.execute(select(webhooks).order_by(webhooks.c.id)):
        dead = connection.execute(
            select(deliveries.c.body, deliveries.c.error)
            .where(deliveries.c.webhook_id == row.id, deliveries.c.state == "dead")
            .order_by(deliveries.c.id.desc())
            .limit(20)
        )
        found.append(
            {
                "id": row.id,
                "url": row.url,
                "events": row.events,
                "created": row.created,
                "dead": [dict(d._mapping) for d in dead],
            }
        )
    return found


def remove(connection: Connection, number: int) -> None:
    """Raises Problem 404."""
    connection.execute(deliveries.delete().where(deliveries.c.webhook_id == number))
    if not connection.execute(webhooks.delete().where(webhooks.c.id == number)).rowcount:
        raise Problem(404, "no_webhook", f"no webhook {number}")


def signature(secret: str, timestamp: str, body: bytes) -> str:
    mac = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={mac.hexdigest()}"


class Courier:
    """Tells each hook what it waits for, in a thread of its own.

    Args:
        may: whether to go on, asked before each event.
    """

    def __init__(self, store: Store, to_private: bool, may: Callable[[], bool]):
        self._store = store
        self._to_private = to_private
        self._may = may
        self._stopped = False
        self._under_way: dict[int, threading.Thread] = {}

    def round(self) -> None:
        """Begin with every hook that has something due and is not being told already."""
        self._under_way = {n: t for n, t in self._under_way.items() if t.is_alive()}
        for hook in self._store.read(_hooks_due):
            if hook not in self._under_way:
                thread = threading.Thread(target=self._tell, args=(hook,), daemon=True)
                self._under_way[hook] = thread
                thread.start()

    def stop(self) -> None:
        """Begin nothing more; what takes longer than ``STOP_S`` is left, and told anew later."""
        self._stopped = True
        until = time.monotonic() + STOP_S
        for thread in self._under_way.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _tell(self, hook: int) -> None:
        try:
            deliver(self._store, hook, self._to_private, lambda: not self._stopped and self._may())
        except Exception:
            log.exception("webhook", extra={"fields": {"webhook": hook}})


def _due(now: float) -> tuple[Any, ...]:
    return deliveries.c.state == "waiting", deliveries.c.due <= now


def _hooks_due(connection: Connection) -> list[int]:
    query = select(deliveries.c.webhook_id).where(*_due(time.time())).distinct()
    return list(connection.scalars(query))


def deliver(
    store: Store, hook: int, to_private: bool, may: Callable[[], bool] = lambda: True
) -> int:
    """Tell a hook what is due, up to what it doesn't take; return how many events were tried."""
    now = time.time()
    due = store.read(
        lambda c: c.execute(
            select(deliveries, webhooks.c.url, webhooks.c.secret)
            .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
            .where(deliveries.c.webhook_id == hook, *_due(now))
            .order_by(deliveries.c.id)
            .limit(_BATCH)
        ).all()
    )
    for tried, row in enumerate(due):
        if not may():
            return tried
        error = _post(row.url, row.secret, row.body.encode(), to_private)
        store.write(lambda c, row=row, error=error: _book(c, row, error))
        if error is not None:
            return tried + 1
    return len(due)


def _book(connection: Connection, row: Any, error: str | None) -> None:
    tries = row.tries + 1
    state = "delivered" if error is None else "dead" if tries >= TRIES else "waiting"
    connection.execute(
        update(deliveries)
        .where(deliveries.c.id == row.id)
        .values(tries=tries, state=state, error=error, due=time.time() + _BACKOFF_S * 2**row.tries)
    )
    connection.execute(deliveries.delete().where(deliveries.c.id <= row.id - KEPT))


def _post(url: str, secret: str, body: bytes, to_private: bool) -> str | None:
    """Send it; None, or what went wrong."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
        if not to_private and not ipaddress.ip_address(address).is_global:
            return f"{host} is an address of this network: set webhooks_to_private to allow it"
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        plain = socket.create_connection((address, port), timeout=TIMEOUT_S)
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            if parts.scheme == "https"
            else plain
        )
        timestamp = str(int(time.time()))
        try:
            connection.request(
                "POST",
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                body,
                {
                    "Content-Type": "application/json",
                    "X-Twinslot-Timestamp": timestamp,
                    "X-Twinslot-Signature": signature(secret, timestamp, body),
                },
            )
            status = connection.getresponse().status
        finally:
            connection.close()
        return None if 200 <= status < 300 else f"answered {status}"
    except (OSError, http.client.HTTPException, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}"[:200]
