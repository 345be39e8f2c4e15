"""Boards registered before they call, from CSV with a header line; all of them or none.

Columns: ``device_id``, and any of mac, product, channel, hardware, labels (``k=v;k=v``), token
(``new`` makes one).
"""

import csv
import io
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from .devices import count, hash_token, is_label
from .messages import DEVICE_ID
from .problems import Problem
from .schema import devices, labels
from .store import bump, insert

_FACTS = ("mac", "product", "channel", "hardware")
COLUMNS = ("device_id", *_FACTS, "labels", "token")
_ID = re.compile(DEVICE_ID[1:-1])
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,256}=*")
_CHARS = 64


@dataclass(frozen=True)
class _Board:
    """One line of the file."""

    device_id: str
    facts: Mapping[str, str | None]
    labels: Mapping[str, str]
    token: str | None
    is_new_token: bool

    def row(self, now: int) -> dict[str, Any]:
        return {
            "device_id": self.device_id,
            **self.facts,
            "labels": [],
            "first_seen": now,
            "last_seen": 0,
            "enrolment": "accepted",
            "token_hash": hash_token(self.token) if self.token else None,
        }


def import_csv(connection: Connection, text: str, now: int, limit: int) -> dict[str, Any]:
    """Register the boards of a file; return how many, how many are new, and the tokens made.

    Raises:
        Problem: 422 with the line that is wrong; 409 where the registry would be too full.
    """
    boards = list(_read(text))
    if len({board.device_id for board in boards}) != len(boards):
        raise Problem(422, "malformed", "a device_id occurs twice")
    before = count(connection, {})
    if before + len(boards) > limit:
        raise Problem(409, "full", f"the registry takes {limit} devices")
    _write_boards(connection, [board.row(now) for board in boards])
    _write_labels(connection, boards)
    bump(connection)
    return {
        "imported": len(boards),
        "new": count(connection, {}) - before,
        "tokens": {board.device_id: board.token for board in boards if board.is_new_token},
    }


def _read(text: str) -> Iterator[_Board]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names, lines = reader.fieldnames or (), list(reader)
    except csv.Error as exc:
        raise Problem(422, "malformed", f"line {reader.line_num}: {exc}") from None
    if "device_id" not in names or set(names) - set(COLUMNS):
        raise Problem(
            422, "malformed", f"line 1: expected device_id and any of {', '.join(COLUMNS[1:])}"
        )
    for number, line in enumerate(lines, 2):
        try:
            yield _board(line)
        except ValueError as exc:
            raise Problem(422, "malformed", f"line {number}: {exc}") from None


def _board(line: Mapping[Any, Any]) -> _Board:
    cells = {name: (line.get(name) or "").strip() for name in COLUMNS}
    if not _ID.fullmatch(cells["device_id"]) or None in line:
        raise ValueError("no usable device_id")
    if any(len(cells[name]) > _CHARS for name in _FACTS):
        raise ValueError(f"more than {_CHARS} characters")
    token = cells["token"]
    if token not in ("", "new") and not _TOKEN.fullmatch(token):
        raise ValueError("token is too short or unusable")
    return _Board(
        cells["device_id"],
        {name: cells[name] or None for name in _FACTS},
        dict(_label(text.strip()) for text in cells["labels"].split(";") if text),
        secrets.token_urlsafe(32) if token == "new" else token or None,
        token == "new",
    )


def _label(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (sign and is_label(key, value)):
        raise ValueError(f"label {text[:64]!r}")
    return key, value


def _write_boards(connection: Connection, rows: list[dict[str, Any]]) -> None:
    known = set(connection.scalars(select(devices.c.device_id)))
    new = [row for row in rows if row["device_id"] not in known]
    if new:
        connection.execute(devices.insert(), new)
    for row in rows:
        if row["device_id"] in known:  # what the file doesn't say stays
            said = {n: row[n] for n in (*_FACTS, "token_hash") if row[n] is not None}
            connection.execute(
                update(devices)
                .where(devices.c.device_id == row["device_id"])
                .values(enrolment="accepted", **said)
            )


def _write_labels(connection: Connection, boards: list[_Board]) -> None:
    rows = [
        {"device_id": board.device_id, "key": key, "value": value, "by": "operator"}
        for board in boards
        for key, value in board.labels.items()
    ]
    if rows:
        statement = insert(connection, labels)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["device_id", "key"],
                set_={"value": statement.excluded.value, "by": statement.excluded.by},
            ),
            rows,
        )
