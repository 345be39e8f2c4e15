"""Searches for devices that people have given a name: what the page and ``?filter=`` start from.

A search says which devices are shown, never which are updated: it looks anew each time.
"""

from typing import Any

from sqlalchemy import Connection, select

from . import devices
from .problems import Problem
from .schema import filters

MOST = 100


def listing(connection: Connection) -> list[dict[str, Any]]:
    """All of them by name, with how many devices each finds now."""
    return [shown(connection, **row) for row in saved(connection)]


def saved(connection: Connection) -> list[dict[str, Any]]:
    """All of them by name; to count what each finds can take a scan of the devices."""
    rows = connection.execute(select(filters).order_by(filters.c.name))
    return [dict(row._mapping) for row in rows]


def shown(connection: Connection, name: str, query: dict[str, Any]) -> dict[str, Any]:
    """A search as the API shows it."""
    return {"name": name, "query": query, "devices": devices.count(connection, query)}


def get(connection: Connection, name: str) -> dict[str, Any]:
    """What a search asks for.

    Raises:
        Problem: 404.
    """
    row = connection.execute(select(filters).where(filters.c.name == name)).first()
    if row is None:
        raise Problem(404, "no_filter", f"no filter {name[:64]!r}")
    return row.query


def save(connection: Connection, name: str, query: dict[str, Any]) -> dict[str, Any]:
    """Keep a search under a name; return what that was so far.

    Raises:
        Problem: 409 where there are too many.
    """
    known = dict(connection.execute(select(filters)).all())
    if name not in known and len(known) >= MOST:
        raise Problem(409, "too_many", f"there are {MOST} filters: remove one first")
    connection.execute(filters.delete().where(filters.c.name == name))
    connection.execute(filters.insert().values(name=name, query=query))
    return known.get(name, {})


def remove(connection: Connection, name: str) -> None:
    connection.execute(filters.delete().where(filters.c.name == name))
