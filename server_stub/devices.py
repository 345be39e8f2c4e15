"""The registry: boards, their labels and tokens."""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, select, update

from . import many
from .problems import Problem
from .schema import devices, job_nodes, label_keys, labels
from .store import StoreError, bump

ENROLMENTS = ("pending", "accepted", "decommissioned")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VALUE = re.compile(r"[^\x00-\x1f\x7f=,]{0,64}")

_FIND = select(devices).where(devices.c.device_id == bindparam("board"))
_FIND_ALL = select(devices).where(devices.c.device_id.in_(bindparam("boards", expanding=True)))
# Always in the same order, so that two workers do not wait for each other. SQLite has one writer.
_LOCK = _FIND.with_for_update(key_share=True)
_LOCK_ALL = _FIND_ALL.order_by(devices.c.device_id).with_for_update(key_share=True)
_FORGET_SAID = delete(labels).where(
    labels.c.device_id == bindparam("board"), labels.c.by == "device"
)
_LABELS_OF = select(labels.c.device_id, labels.c.key, labels.c.value).where(
    labels.c.device_id.in_(bindparam("boards", expanding=True))
)
_CHANGE = update(devices).where(devices.c.device_id == bindparam("board")).returning(*devices.c)


def is_label(key: str, value: str) -> bool:
    """True for a label that can be one."""
    return bool(LABEL.fullmatch(key) and _VALUE.fullmatch(value))


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def find(connection: Connection, device_id: str, lock: bool = False) -> Any:
    """A board, or None; ``lock``: until the end, no other worker books anything of it."""
    return connection.execute(_LOCK if lock else _FIND, {"board": device_id}).first()


def find_all(
    connection: Connection, device_ids: Iterable[str], lock: bool = False
) -> dict[str, Any]:
    """Those of these boards that are known, by id; ``lock`` as in :func:`find`."""
    rows = connection.execute(_LOCK_ALL if lock else _FIND_ALL, {"boards": list(device_ids)})
    return {row.device_id: row for row in rows}


def get(connection: Connection, device_id: str) -> Any:
    """One board.

    Raises:
        Problem: 404.
    """
    row = find(connection, device_id)
    if row is None:
        raise Problem(404, "no_device", f"no device {device_id[:64]!r}")
    return row


def touch(
    connection: Connection,
    said: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Any],
    now: int,
    limit: int,
) -> dict[str, Any]:
    """Register boards, or renew what is known of them: with few statements, however many.

    Where nothing changed nothing is written: that a board was seen is the write-behind's.

    Args:
        said: facts by board, the same columns for all that are new, and for all that are known;
            None in them overwrites too. What an operator may have changed since ``known`` was read
            has no place in those of a board that is known.
        known: what :func:`find_all` found of these boards.

    Returns:
        The boards' rows as they are now.

    Raises:
        StoreError: some are new and the registry is full.
    """
    new = sorted(said.keys() - known.keys())
    changed = sorted(board for board, row in known.items() if _differs(row, said[board]))
    if not (new or changed):
        return dict(known)
    if new:
        count = connection.execute(select(func.count()).select_from(devices)).scalar_one()
        if count + len(new) > limit:
            raise StoreError(f"the registry is full: {count} devices")
        blank = {"labels": [], "first_seen": now, "last_seen": now}
        rows = [{**blank, **said[board], "device_id": board} for board in new]
        many.add(connection, devices, rows)
    if changed:
        rows = [{**said[board], "device_id": board, "last_seen": now} for board in changed]
        many.renew(connection, devices, rows)
    before = {board: known[board].labels if board in known else [] for board in (*new, *changed)}
    _keep_reported(connection, before, said)
    return {**known, **find_all(connection, before)}


def judge(connection: Connection, row: Any, enrolment: str) -> None:
    """Say whether a board may have updates, unless an operator has said so since ``row``."""
    connection.execute(
        _CHANGE.where(devices.c.enrolment == row.enrolment),
        {"board": row.device_id, "enrolment": enrolment},
    )


def _differs(row: Any, said: Mapping[str, Any]) -> bool:
    return any(getattr(row, name) != value for name, value in said.items())


def change(connection: Connection, row: Any, values: Mapping[str, Any]) -> Any:
    """Write ``values`` of a board; return its row as it is now."""
    return connection.execute(_CHANGE, {"board": row.device_id, **values}).one()


def seen(connection: Connection, times: Sequence[tuple[str, int]]) -> None:
    """Renew many ``last_seen`` at once: of device id, and seconds since 1970."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(
            "UPDATE devices SET last_seen = ? WHERE device_id = ? AND last_seen < ?",
            [(at, device_id, at) for device_id, at in times],
        )
        return
    # A row that another worker holds is being renewed by it; to wait for it could be for ever.
    connection.exec_driver_sql(
        "UPDATE devices SET last_seen = free.at FROM ("
        " SELECT d.device_id, s.at FROM devices d"
        " JOIN unnest(%s::text[], %s::bigint[]) AS s (device_id, at) USING (device_id)"
        " WHERE d.last_seen < s.at FOR UPDATE OF d SKIP LOCKED"
        ") AS free WHERE devices.device_id = free.device_id",
        ([device_id for device_id, _ in times], [at for _, at in times]),
    )


def listing(
    connection: Connection, after: str, limit: int | None, filters: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Boards by id, from the one behind ``after``; None: all."""
    query = select(devices).where(devices.c.device_id > after, *_filters(filters))
    rows = connection.execute(query.order_by(devices.c.device_id).limit(limit))
    return [public(row) for row in rows]


def count(connection: Connection, filters: Mapping[str, Any]) -> int:
    query = select(func.count()).select_from(devices).where(*_filters(filters))
    return connection.execute(query).scalar_one()


def accept(
    connection: Connection, device_ids: Sequence[str] | None, filters: Mapping[str, Any]
) -> list[str]:
    """Accept those that wait and fit ``filters``; of these boards, or None: of all. Returns which.

    Raises:
        Problem: 404.
    """
    wanted = _filters({**filters, "enrolment": "pending"})
    if device_ids is not None:
        unknown = set(device_ids) - find_all(connection, device_ids).keys()
        if unknown:
            raise Problem(404, "no_device", f"no device {min(unknown)!r}")
        wanted.append(devices.c.device_id.in_(device_ids))
    found = connection.scalars(
        update(devices).where(*wanted).values(enrolment="accepted").returning(devices.c.device_id)
    )
    accepted = sorted(found)
    bump(connection)
    return accepted


def _filters(filters: Mapping[str, Any]) -> list[ColumnElement[bool]]:
    """Of the API's members of a search; an empty one is none."""
    wanted = []
    for name in ("product", "status", "version", "enrolment", "hardware"):
        if filters.get(name):
            column = devices.c["current_version" if name == "version" else name]
            wanted.append(column == filters[name])
    if filters.get("label"):
        key, _, value = filters["label"].partition("=")
        wanted.append(
            select(labels.c.key)
            .where(
                labels.c.device_id == devices.c.device_id,
                labels.c.key == key,
                labels.c.value == value,
            )
            .exists()
        )
    if filters.get("q"):
        wanted.append(
            devices.c.device_id.contains(filters["q"], autoescape=True)
            | devices.c.mac.contains(filters["q"], autoescape=True)
        )
    return wanted


def public(row: Any) -> dict[str, Any]:
    """A row as the API shows it: whether it has a token, never the token's hash."""
    shown = dict(row._mapping)
    shown["own_token"] = shown.pop("token_hash") is not None
    return shown


# ---- labels


def _keep_reported(
    connection: Connection,
    before: Mapping[str, list[str]],
    said: Mapping[str, Mapping[str, Any]],
) -> None:
    """What a board says as key=value counts, unless an operator has said otherwise.

    Args:
        before: what each board said so far.
        said: its facts now; without ``labels`` it has said nothing of them.
    """
    after = {board: said[board].get("labels", was) for board, was in before.items()}
    if gone := [{"board": b} for b, was in before.items() if was and was != after[b]]:
        connection.execute(_FORGET_SAID, gone)
    new = [
        {"device_id": board, "key": key, "value": value, "by": "device"}
        for board, was in before.items()
        if was != after[board]
        for key, sign, value in (text.partition("=") for text in after[board])
        if sign and LABEL.fullmatch(key) and _VALUE.fullmatch(value)
    ]
    many.add(connection, labels, new)


def set_labels(connection: Connection, device_id: str, wanted: Mapping[str, str | None]) -> None:
    """Set labels by an operator's word; None removes one.

    Raises:
        Problem: 422.
    """
    for key, value in wanted.items():
        if not LABEL.fullmatch(key) or (value is not None and not _VALUE.fullmatch(value)):
            raise Problem(
                422,
                "malformed",
                f"label {key[:64]}={str(value)[:64]}: expected key of letters, digits and ._-,"
                " value of up to 64 characters without = and ,",
            )
        connection.execute(
            delete(labels).where(labels.c.device_id == device_id, labels.c.key == key)
        )
        if value is not None:
            connection.execute(
                labels.insert().values(device_id=device_id, key=key, value=value, by="operator")
            )
    bump(connection)


def labels_of(connection: Connection, device_id: str) -> dict[str, str]:
    rows = connection.execute(
        select(labels.c.key, labels.c.value)
        .where(labels.c.device_id == device_id)
        .order_by(labels.c.key)
    )
    return dict(rows.all())


def labels_by_board(
    connection: Connection, device_ids: Iterable[str]
) -> dict[str, dict[str, str]]:
    """The labels of these boards, by id; of those that have some."""
    found: dict[str, dict[str, str]] = {}
    for device_id, key, value in connection.execute(_LABELS_OF, {"boards": list(device_ids)}):
        found.setdefault(device_id, {})[key] = value
    return found


def labels_of_all(connection: Connection) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for device_id, key, value in connection.execute(
        select(labels.c.device_id, labels.c.key, labels.c.value)
    ):
        found.setdefault(device_id, {})[key] = value
    return found


def describe_label(connection: Connection, key: str, description: str) -> None:
    connection.execute(delete(label_keys).where(label_keys.c.key == key))
    connection.execute(label_keys.insert().values(key=key, description=description))


def label_meanings(connection: Connection) -> dict[str, str]:
    """What each described label is for, by key."""
    return dict(connection.execute(select(label_keys)).all())


def label_table(connection: Connection) -> list[dict[str, Any]]:
    """Every label key with its values, how many boards have each, and what it means."""
    descriptions = label_meanings(connection)
    found: dict[str, dict[str, int]] = {key: {} for key in descriptions}
    for key, value, number in connection.execute(
        select(labels.c.key, labels.c.value, func.count())
        .group_by(labels.c.key, labels.c.value)
        .order_by(labels.c.key, labels.c.value)
    ):
        found.setdefault(key, {})[value] = number
    return [
        {"key": key, "description": descriptions.get(key, ""), "values": values}
        for key, values in sorted(found.items())
    ]


# ---- tokens


def of_token(connection: Connection, digest: str) -> Any:
    """The board whose own token has this hash, or None."""
    return connection.execute(select(devices).where(devices.c.token_hash == digest)).first()


def new_token(connection: Connection, device_id: str) -> str:
    """Give a board a token of its own, shown once; the fleet's no longer speaks for it."""
    token = secrets.token_urlsafe(32)
    _set_token(connection, device_id, token)
    return token


def _set_token(connection: Connection, device_id: str, token: str | None) -> None:
    connection.execute(
        update(devices)
        .where(devices.c.device_id == device_id)
        .values(token_hash=hash_token(token) if token else None)
    )
    bump(connection)


def decommission(connection: Connection, device_id: str) -> None:
    """Retire a board: offered nothing, its token void; its history stays, its jobs end."""
    connection.execute(
        update(devices)
        .where(devices.c.device_id == device_id)
        .values(enrolment="decommissioned", token_hash=None, pin=None)
    )
    connection.execute(
        update(job_nodes)
        .where(
            job_nodes.c.device_id == device_id,
            job_nodes.c.status.in_(("pending", "in_progress")),
        )
        .values(status="cancelled")
    )
    bump(connection)
