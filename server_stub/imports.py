"""Boards registered before they call, from CSV with a header line; all of them or none.

Columns: ``device_id``, and any of mac, product, channel, hardware, labels (``k=v;k=v``), token
(``new`` makes one). A board that an operator has retired is not taken back by a file.
"""

import csv
import io
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from .devices import count, hash_token, is_label, labels_of_all
from .messages import DEVICE_ID
from .problems import Problem
from .schema import devices, labels
from .store import bump, insert

_FACTS = ("mac", "product", "channel", "hardware")
COLUMNS = ("device_id", *_FACTS, "labels", "token")
_ID = re.compile(DEVICE_ID[1:-1])
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,256}=*")
_CHARS = 64
_KNOWN = select(
    devices.c.device_id,
    devices.c.enrolment,
    devices.c.token_hash,
    *(devices.c[name] for name in _FACTS),
)


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


@dataclass(frozen=True)
class Imported:
    """What a file has changed; ``before`` and ``after`` of boards that were there, by their id."""

    boards: int
    new: list[str]
    tokens: dict[str, str | None]  # those made
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]


def import_csv(connection: Connection, text: str, now: int, limit: int) -> Imported:
    """Register the boards of a file.

    Raises:
        Problem: 422 with the line that is wrong; 409 where the registry would be too full, or a
            board of it was decommissioned.
    """
    boards = list(_read(text))
    if len({board.device_id for board in boards}) != len(boards):
        raise Problem(422, "malformed", "a device_id occurs twice")
    if count(connection, {}) + len(boards) > limit:
        raise Problem(409, "full", f"the registry takes {limit} devices")
    known = {row.device_id: row for row in connection.execute(_KNOWN)}
    for board in boards:
        if (row := known.get(board.device_id)) and row.enrolment == "decommissioned":
            raise Problem(
                409, "decommissioned", f"{row.device_id} was decommissioned: accept it first"
            )
    before, after = _changes(connection, boards, known)
    _write_boards(connection, [board.row(now) for board in boards], known)
    _write_labels(connection, boards)
    bump(connection)
    return Imported(
        len(boards),
        [board.device_id for board in boards if board.device_id not in known],
        {board.device_id: board.token for board in boards if board.is_new_token},
        before,
        after,
    )


def _changes(
    connection: Connection, boards: list[_Board], known: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What is to change of boards that are known: as it was, and as it will be."""
    labels_now = labels_of_all(connection)
    before: dict[str, dict[str, Any]] = {}
    after: dict[str, dict[str, Any]] = {}
    for board in boards:
        if (row := known.get(board.device_id)) is None:
            continue
        tags = labels_now.get(board.device_id, {})
        old = {name: getattr(row, name) for name in ("enrolment", *_FACTS)}
        old |= {f"label {key}": tags.get(key) for key in board.labels}
        new = {"enrolment": "accepted", **{n: v for n, v in board.facts.items() if v is not None}}
        new |= {f"label {key}": value for key, value in board.labels.items()}
        changed = {name for name, value in new.items() if value != old[name]}
        said = {name: new[name] for name in sorted(changed)}
        if board.token and hash_token(board.token) != row.token_hash:
            said["token"] = "(secret)"
        if said:
            before[board.device_id] = {name: old[name] for name in sorted(changed)}
            after[board.device_id] = said
    return before, after


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


def _write_boards(
    connection: Connection, rows: list[dict[str, Any]], known: Mapping[str, Any]
) -> None:
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
