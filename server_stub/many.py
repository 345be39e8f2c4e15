"""Many rows of a table with one statement: what a fleet that boots brings all at once.

SQLite takes rows one by one as cheaply as can be. PostgreSQL is another process: there all of them
go in one JSON text, which it reads by the table's own types.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, bindparam, update

from .store import insert

Rows = Sequence[Mapping[str, Any]]
"""All with the same columns, those of the primary key among them."""


def add(connection: Connection, table: Table, rows: Rows) -> None:
    """Insert those rows whose key is not there yet."""
    if not rows:
        return
    if connection.dialect.name == "sqlite":
        connection.execute(insert(connection, table).on_conflict_do_nothing(), rows)
    else:
        connection.exec_driver_sql(_adding(table, tuple(rows[0])), (_text(rows),))


def renew(connection: Connection, table: Table, rows: Rows) -> None:
    """Overwrite what the rows hold, found by their key.

    In what order PostgreSQL locks them is its own choice: two workers that renew the same boards
    can be in each other's way, and the store does it anew.
    """
    if not rows:
        return
    keys = [column.name for column in table.primary_key]
    if connection.dialect.name == "sqlite":
        wanted = update(table).where(*(table.c[key] == bindparam(f"the_{key}") for key in keys))
        named = [{f"the_{n}" if n in keys else n: v for n, v in row.items()} for row in rows]
        connection.execute(wanted, named)
    else:
        connection.exec_driver_sql(_renewing(table, tuple(rows[0])), (_text(rows),))


def _text(rows: Rows) -> str:
    return json.dumps([{name: _clean(value) for name, value in row.items()} for row in rows])


def _clean(value: Any) -> Any:
    """As ``schema.String`` does it: PostgreSQL refuses NUL."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return [_clean(part) for part in value] if isinstance(value, list) else value


_SENT = "json_populate_recordset(NULL::{table}, %s::json)"


@functools.cache
def _adding(table: Table, names: tuple[str, ...]) -> str:
    columns = ", ".join(f'"{name}"' for name in names)
    sent = _SENT.format(table=table.name)
    chosen = f"SELECT {columns} FROM {sent}"
    return f"INSERT INTO {table.name} ({columns}) {chosen} ON CONFLICT DO NOTHING"


@functools.cache
def _renewing(table: Table, names: tuple[str, ...]) -> str:
    keys = [column.name for column in table.primary_key]
    columns = ", ".join(f'"{name}" = s."{name}"' for name in names if name not in keys)
    same = " AND ".join(f'{table.name}."{key}" = s."{key}"' for key in keys)
    sent = _SENT.format(table=table.name)
    return f"UPDATE {table.name} SET {columns} FROM {sent} AS s WHERE {same}"
