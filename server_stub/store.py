"""The registry: one row per board, one per report, in SQLite.

Reports are idempotent by (device, attempt, status): a board that did not hear the answer says it
again. Times are seconds since 1970 by the server's clock; a board's own may be unset.
Every call is one transaction; what was answered is on disk (WAL, synchronous=FULL).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    ForeignKey,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from .limits import Limits

SCHEMA_VERSION = 1
DATABASE = "server.sqlite3"


class StoreError(Exception):
    """The database can't be used, or is full."""


class Base(DeclarativeBase):
    pass


class Device(Base):
    """A board, as it last described itself."""

    __tablename__ = "devices"

    device_id: Mapped[str] = mapped_column(primary_key=True)
    mac: Mapped[str | None]
    product: Mapped[str | None]
    channel: Mapped[str | None]
    hardware: Mapped[str | None]
    chip_id: Mapped[int | None]
    current_version: Mapped[str | None]
    current_build: Mapped[str | None]
    agent: Mapped[str | None]
    micropython: Mapped[str | None]
    labels: Mapped[list[str]] = mapped_column(JSON, default=list)
    status: Mapped[str | None]
    status_version: Mapped[str | None]
    first_seen: Mapped[int]
    last_seen: Mapped[int]


class Report(Base):
    """What a board said of one step of one attempt."""

    __tablename__ = "reports"
    __table_args__ = (UniqueConstraint("device_id", "attempt", "status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(
        ForeignKey("devices.device_id", ondelete="CASCADE"), index=True
    )
    attempt: Mapped[str]
    version: Mapped[str | None]
    build: Mapped[str | None]
    status: Mapped[str]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    received: Mapped[int]


def _columns(row: Base, without: Sequence[str] = ()) -> dict[str, Any]:
    return {c.key: getattr(row, c.key) for c in row.__table__.columns if c.key not in without}


class Store:
    """The database of one server.

    Args:
        path: the file; made where there is none.
        limits: how many rows it may grow to.
    """

    def __init__(self, path: Path, limits: Limits):
        self._limits = limits
        self._engine = create_engine(
            f"sqlite:///{path}", connect_args={"timeout": limits.database_wait_s}
        )
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(write=True)
        try:
            with self._writer.begin() as connection:
                _prepare(connection, path)
        except DatabaseError as exc:
            raise StoreError(f"{path}: {exc.orig}") from exc

    def close(self) -> None:
        self._engine.dispose()

    def seen(self, device_id: str, facts: dict[str, Any]) -> None:
        """Register a board or renew what is known of it; None in ``facts`` overwrites too.

        Raises:
            StoreError: it is new and the registry is full.
        """
        with Session(self._writer) as session, session.begin():
            self._touch(session, device_id, facts)

    def _touch(self, session: Session, device_id: str, facts: dict[str, Any]) -> Device:
        now = int(time.time())
        device = session.get(Device, device_id)
        if device is None:
            count = session.scalar(select(func.count()).select_from(Device)) or 0
            if count >= self._limits.devices:
                raise StoreError(f"the registry is full: {count} devices")
            device = Device(device_id=device_id, first_seen=now)
            session.add(device)
        for name, value in facts.items():
            setattr(device, name, value)
        device.last_seen = now
        session.flush()
        return device

    def report(self, device_id: str, report: dict[str, Any], running: dict[str, Any]) -> bool:
        """Keep a report; False where the same one is known already.

        Args:
            device_id: the board.
            report: columns of :class:`Report`.
            running: columns of :class:`Device` that say what the board runs; None is unknown.

        Raises:
            StoreError: the board is new and the registry is full.
        """
        with Session(self._writer) as session, session.begin():
            # A board this server has never seen may report: its database may be a new one.
            device = self._touch(session, device_id, {})
            added = session.execute(
                insert(Report)
                .values(device_id=device_id, received=device.last_seen, **report)
                .on_conflict_do_nothing()
                .returning(Report.id)
            ).scalar_one_or_none()
            if added is None:
                return False
            device.status = report["status"]
            device.status_version = report["version"]
            for name, value in running.items():
                if value is not None:
                    setattr(device, name, value)
            oldest_kept = (
                select(Report.id)
                .where(Report.device_id == device_id)
                .order_by(Report.id.desc())
                .offset(self._limits.reports_per_device - 1)
                .limit(1)
                .scalar_subquery()
            )
            session.execute(
                delete(Report).where(Report.device_id == device_id, Report.id < oldest_kept)
            )
            return True

    def devices(self, after: str, limit: int) -> list[dict[str, Any]]:
        """List boards by id, from the one behind ``after``."""
        with Session(self._engine) as session:
            rows = session.scalars(
                select(Device)
                .where(Device.device_id > after)
                .order_by(Device.device_id)
                .limit(limit)
            )
            return [_columns(row) for row in rows]

    def device(self, device_id: str) -> dict[str, Any] | None:
        """One board with its reports, oldest first."""
        with Session(self._engine) as session:
            row = session.get(Device, device_id)
            if row is None:
                return None
            reports = session.scalars(
                select(Report).where(Report.device_id == device_id).order_by(Report.id)
            )
            history = [_columns(report, without=("id", "device_id")) for report in reports]
            return {**_columns(row), "history": history}


def _prepare(connection: Connection, path: Path) -> None:
    """Make the tables of a new database; refuse one of another schema."""
    found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if found not in (0, SCHEMA_VERSION):
        raise StoreError(
            f"{path} has schema {found}, this server knows {SCHEMA_VERSION}: use the"
            " server that wrote it, or start with another --data folder"
        )
    Base.metadata.create_all(connection)
    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver starts no transaction of its own: _begin does
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A writer takes its lock before it reads: one that read first could only fail when another
    # has written since (SQLITE_BUSY_SNAPSHOT, which no timeout waits for).
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
