"""Deliver events: POST of JSON, signed with HMAC-SHA-256, tried again, given up after two days.

    X-Twinslot-Timestamp: seconds since 1970
    X-Twinslot-Signature: sha256=HEX of HMAC(secret, timestamp + "." + body)

Redirects are not followed, and addresses of this network are refused unless the settings allow
them: a URL that an operator enters must not reach what only this server can.
"""

import hashlib
import hmac
import http.client
import ipaddress
import secrets
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, select, update

from .problems import Problem
from .schema import deliveries, webhooks
from .store import Store

TIMEOUT_S = 5
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


def deliver_due(store: Store, to_private: bool) -> int:
    """Try what is due; return how many were tried."""
    now = time.time()
    due = store.read(
        lambda c: c.execute(
            select(deliveries, webhooks.c.url, webhooks.c.secret)
            .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
            .where(deliveries.c.state == "waiting", deliveries.c.due <= now)
            .order_by(deliveries.c.id)
            .limit(_BATCH)
        ).all()
    )
    for row in due:
        error = _post(row.url, row.secret, row.body.encode(), to_private)
        store.write(lambda c, row=row, error=error: _book(c, row, error))
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
