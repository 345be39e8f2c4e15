"""Who changed what, when: one line per change, in the transaction of the change, never altered."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from .schema import audit

_SECRET = ("token", "password", "secret", "tokens")


@dataclass(frozen=True)
class Who:
    """Somebody who may act: ``role`` is viewer, operator or admin."""

    name: str
    role: str


SELF = Who("scheduler", "admin")
"""The server, of its own accord."""

DISK = Who("disk", "admin")
"""Whoever may write where the server lies: releases in its tree, schedules in its file."""


def note(
    connection: Connection,
    who: Who,
    action: str,
    target: str,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Write a line. Of ``before`` and ``after`` only what differs is kept, secrets never."""
    if before is not None and after is not None:
        names = {n for n in (*before, *after) if before.get(n) != after.get(n)}
        before = {n: v for n, v in before.items() if n in names}
        after = {n: v for n, v in after.items() if n in names}
    connection.execute(
        audit.insert().values(
            at=int(time.time()),
            who=who.name,
            role=who.role,
            action=action,
            target=target[:200],
            before=_plain(before),
            after=_plain(after),
        )
    )


def listing(
    connection: Connection, limit: int | None = None, before: int | None = None
) -> list[dict[str, Any]]:
    """The newest lines, those with an id below ``before``."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    return [dict(row._mapping) for row in connection.execute(query)]


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {n: "(secret)" if n in _SECRET and v else v for n, v in values.items()}
