"""The registry: boards, their labels and tokens."""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, select, update

from .problems import Problem
from .schema import devices, job_nodes, label_keys, labels
from .store import INSERTS, StoreError, bump, insert

ENROLMENTS = ("pending", "accepted", "decommissioned")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VALUE = re.compile(r"[^\x00-\x1f\x7f=,]{0,64}")

_FIND = select(devices).where(devices.c.device_id == bindparam("board"))
_FORGET_SAID = delete(labels).where(
    labels.c.device_id == bindparam("board"), labels.c.by == "device"
)
_SAY = {dialect: make(labels).on_conflict_do_nothing() for dialect, make in INSERTS.items()}
_CHANGE = update(devices).where(devices.c.device_id == bindparam("board")).returning(*devices.c)


def is_label(key: str, value: str) -> bool:
    """True for a label that can be one."""
    return bool(LABEL.fullmatch(key) and _VALUE.fullmatch(value))


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def find(connection: Connection, device_id: str) -> Any:
    return connection.execute(_FIND, {"board": device_id}).first()


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
    device_id: str,
    facts: Mapping[str, Any],
    now: int,
    enrolment: str,
    limit: int,
    row: Any,
) -> Any:
    """Register a board or renew what is known of it; None in ``facts`` overwrites too.

    ``row`` is what :func:`find` found, None for a new board. Where nothing changed nothing is
    written: that the board was seen is the write-behind's.

    Raises:
        StoreError: it is new and the registry is full.
    """
    if row is None:
        count = connection.execute(select(func.count()).select_from(devices)).scalar_one()
        if count >= limit:
            raise StoreError(f"the registry is full: {count} devices")
        values = {"labels": [], **facts, "first_seen": now, "last_seen": now}
        connection.execute(
            insert(connection, devices)
            .values(device_id=device_id, enrolment=enrolment, **values)
            .on_conflict_do_nothing()
        )
        _keep_reported(connection, device_id, [], values["labels"])
        return find(connection, device_id)
    changed = {k: v for k, v in facts.items() if getattr(row, k) != v}
    if "labels" in changed:
        _keep_reported(connection, device_id, row.labels, changed["labels"])
    return change(connection, row, {**changed, "last_seen": now}) if changed else row


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
    query = _filtered(select(devices), filters).where(devices.c.device_id > after)
    rows = connection.execute(query.order_by(devices.c.device_id).limit(limit))
    return [public(row) for row in rows]


def count(connection: Connection, filters: Mapping[str, Any]) -> int:
    query = _filtered(select(func.count()).select_from(devices), filters)
    return connection.execute(query).scalar_one()


def _filtered(query: Select, filters: Mapping[str, Any]) -> Select:
    for name in ("product", "status", "current_version", "enrolment", "channel", "hardware"):
        if filters.get(name):
            query = query.where(devices.c[name] == filters[name])
    if filters.get("label"):
        key, _, value = filters["label"].partition("=")
        query = query.where(
            select(labels.c.key)
            .where(
                labels.c.device_id == devices.c.device_id,
                labels.c.key == key,
                labels.c.value == value,
            )
            .exists()
        )
    if filters.get("q"):
        query = query.where(
            devices.c.device_id.contains(filters["q"], autoescape=True)
            | devices.c.mac.contains(filters["q"], autoescape=True)
        )
    return query


def public(row: Any) -> dict[str, Any]:
    """A row as the API shows it: whether it has a token, never the token's hash."""
    shown = dict(row._mapping)
    shown["own_token"] = shown.pop("token_hash") is not None
    return shown


# ---- labels


def _keep_reported(
    connection: Connection, device_id: str, before: list[str], reported: Iterable[str]
) -> None:
    """What a board says as key=value counts, unless an operator has said otherwise."""
    if before:
        connection.execute(_FORGET_SAID, {"board": device_id})
    said = [
        {"device_id": device_id, "key": key, "value": value, "by": "device"}
        for key, sign, value in (text.partition("=") for text in reported)
        if sign and LABEL.fullmatch(key) and _VALUE.fullmatch(value)
    ]
    if said:
        connection.execute(_SAY[connection.dialect.name], said)


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
