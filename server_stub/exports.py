"""Everything there is of one kind, as JSON or CSV, sent page by page.

However much it is, no more than a page of it is in memory, and no transaction outlasts a page:
what changes meanwhile may or may not be in it.
"""

import csv
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection, Table, select

from . import audit, devices
from .http import with_dates
from .schema import attempts, downloads
from .store import Store

_PAGE = 200
_FORMULA = re.compile(r"^[=+\-@\t\r]")

Row = dict[str, Any]


async def respond(store: Store, what: str, kind: str) -> Response:
    """Answer with all lines of ``what``: devices, attempts, downloads or audit.

    Args:
        kind: ``json`` or ``csv``.

    Raises:
        StoreError, DatabaseError: the first page can't be read.
    """
    first = await store.aread(lambda c: _page(c, what, None))
    pages = _pages(store, what, first)
    if kind == "json":
        return StreamingResponse(_json(pages), media_type="application/json")
    headers = {"Content-Disposition": f'attachment; filename="{what}.csv"'}
    columns = list(first[0]) if first else ["nothing"]
    return StreamingResponse(_csv(pages, columns), 200, headers, "text/csv; charset=utf-8")


async def _pages(store: Store, what: str, page: list[Row]) -> AsyncIterator[list[Row]]:
    while page:
        yield page
        last = page[-1]["device_id" if what == "devices" else "id"]
        page = await store.aread(lambda c, last=last: _page(c, what, last))


def _page(connection: Connection, what: str, last: Any) -> list[Row]:
    return [with_dates(row) for row in _READ[what](connection, last)]


def _devices(connection: Connection, last: str | None) -> list[Row]:
    rows = devices.listing(connection, last or "", _PAGE, {})
    tags = devices.labels_by_board(connection, [row["device_id"] for row in rows])
    return [{**row, "tags": tags.get(row["device_id"], {})} for row in rows]


def _audit(connection: Connection, last: int | None) -> list[Row]:
    return audit.listing(connection, _PAGE, last)


def _by_number(table: Table) -> Callable[[Connection, int | None], list[Row]]:
    def read(connection: Connection, last: int | None) -> list[Row]:
        query = select(table).where(table.c.id > (last or 0)).order_by(table.c.id).limit(_PAGE)
        return [dict(row._mapping) for row in connection.execute(query)]

    return read


_READ: Mapping[str, Callable[[Connection, Any], Iterable[Row]]] = {
    "devices": _devices,
    "attempts": _by_number(attempts),
    "downloads": _by_number(downloads),
    "audit": _audit,
}


async def _json(pages: AsyncIterator[list[Row]]) -> AsyncIterator[str]:
    before = "["
    async for page in pages:
        yield before + ",".join(map(json.dumps, page))
        before = ","
    yield "]" if before == "," else "[]"


async def _csv(pages: AsyncIterator[list[Row]], columns: list[str]) -> AsyncIterator[str]:
    yield _lines([columns])
    async for page in pages:
        yield _lines([_cell(row[name]) for name in columns] for row in page)


def _lines(rows: Iterable[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    """Text that no spreadsheet takes for a formula."""
    text = json.dumps(value) if isinstance(value, dict | list) else value
    text = "" if text is None else str(text)
    return "'" + text if _FORMULA.match(text) else text
