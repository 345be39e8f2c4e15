"""The database: SQLite or PostgreSQL by URL, migrated at start, written by one thread.

Every change is a function of a connection. Changes that wait at the same moment share one
transaction (group commit), each within a savepoint of its own: one that fails takes none of the
others with it. What was answered is on disk (SQLite: WAL, synchronous=FULL).
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, create_engine, event, inspect, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError

from .schema import meta

DATABASE = "server.sqlite3"
HEAD = "0003"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BATCH = 256
_FOREIGN_GENERATION_S = 0.5  # how soon one worker sees what another has changed
_MIGRATION_LOCK = 0x7457_0001

log = logging.getLogger("twinslot.server")

T = TypeVar("T")
Change = Callable[[Connection], T]


class StoreError(Exception):
    """The database can't be used, or is full."""


class Store:
    """The database of one server.

    Args:
        url: ``sqlite:///path`` or ``postgresql+psycopg://...``.
        wait_s: for another process that holds the database.
        migrate: bring an older schema up to date; else it is refused.

    Raises:
        StoreError: it can't be opened, or has a schema not known here.
    """

    def __init__(self, url: str, wait_s: float, migrate: bool = True):
        self.is_sqlite = url.startswith("sqlite:")
        self._engine = _engine(url, wait_s)
        self._name = self._engine.url.database or url
        try:
            self._prepare(migrate)
            self.generation = self.read(_read_generation)
        except DatabaseError as exc:
            raise StoreError(f"{self._name}: {exc.orig}") from exc
        self._asked = time.monotonic()
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        return self._engine

    def close(self) -> None:
        """Finish what waits, then let go of the database."""
        if self._thread:
            self._work.put(None)
            self._thread.join()
        self._engine.dispose()

    # -- reading and writing ------------------------------------------------------------------

    def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query in a transaction that is never written."""
        with self._engine.connect() as connection:
            return query(connection)

    async def aread(self, query: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(self.read, query)

    def submit(self, change: Change[T]) -> "concurrent.futures.Future[T]":
        """Queue a change; the future holds its result once it is durable."""
        with self._lock:
            if self._thread is None:  # not at construction: a forked worker has no threads
                self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
                self._thread.start()
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._work.put((change, future))
        return future

    def write(self, change: Change[T]) -> T:
        """Run a change and return its result once it is durable."""
        return self.submit(change).result()

    async def awrite(self, change: Change[T]) -> T:
        return await asyncio.wrap_future(self.submit(change))

    def _write(self) -> None:
        while True:
            batch = [self._work.get()]
            while len(batch) < _BATCH and not self._work.empty():
                batch.append(self._work.get())
            last = None in batch
            self._commit([item for item in batch if item is not None])
            if last:
                return

    def _commit(self, batch: list) -> None:
        if not batch:
            return
        done: list[tuple[concurrent.futures.Future, Any, BaseException | None]] = []
        try:
            with self._engine.execution_options(write=True).begin() as connection:
                for change, future in batch:
                    try:
                        with connection.begin_nested():
                            done.append((future, change(connection), None))
                    except Exception as exc:
                        done.append((future, None, exc))
                generation = _read_generation(connection)
        except Exception as exc:
            if len(batch) > 1 and not self.is_sqlite:
                # Another worker's transaction was in the way (a deadlock ends one of the two).
                for item in batch:
                    self._commit([item])
                return
            done = [(future, None, exc) for _, future in batch]
        else:
            self.generation = generation
        for future, result, error in done:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    # -- what others have changed -------------------------------------------------------------

    async def current_generation(self) -> int:
        """The number that every change of policy raises; other workers' with a small delay."""
        if not self.is_sqlite and time.monotonic() - self._asked > _FOREIGN_GENERATION_S:
            self._asked = time.monotonic()
            self.generation = await self.aread(_read_generation)
        return self.generation

    def _prepare(self, migrate: bool) -> None:
        with self._engine.execution_options(write=True).begin() as connection:
            found = _schema_of(connection, self._name)
            if found == HEAD:
                return
            if found is not None and not migrate:
                raise StoreError(
                    f"{self._name} has schema {found}, this server needs {HEAD}:"
                    " start it without --no-migrate, after a backup"
                )
            if not self.is_sqlite:  # several workers start at once
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
                if _schema_of(connection, self._name) == HEAD:
                    return
            _migrate(connection, found)


def insert(connection: Connection, table: Table) -> Any:
    """An INSERT that knows ``on_conflict_do_nothing`` and ``..._do_update`` in both dialects."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def bump(connection: Connection) -> None:
    """Say that answers given so far may no longer hold."""
    connection.execute(
        update(meta).where(meta.c.key == "generation").values(value=meta.c.value + 1)
    )


def _read_generation(connection: Connection) -> int:
    return connection.exec_driver_sql(
        "SELECT value FROM meta WHERE key = 'generation'"
    ).scalar_one()


# ---- schema


def _schema_of(connection: Connection, name: str) -> str | None:
    """The revision the database is at; None for an empty one.

    Raises:
        StoreError: one that this server has never heard of.
    """
    tables = set(inspect(connection).get_table_names())
    if connection.dialect.name == "sqlite":
        number = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if number not in (0, 1):
            raise StoreError(_unknown(name, number))
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found is not None and not (found.isdigit() and found <= HEAD):
            raise StoreError(_unknown(name, found))
        return found
    return "0001" if "devices" in tables else None


def _unknown(name: str, found: object) -> str:
    return (
        f"{name} has schema {found}, this server knows up to {HEAD}: use the server that wrote"
        " it, or start with another --data folder"
    )


def _migrate(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if found == "0001" and "alembic_version" not in inspect(connection).get_table_names():
        command.stamp(config, "0001")  # made before there were migrations
    command.upgrade(config, HEAD)
    if found is not None:
        log.info("migrated", extra={"fields": {"from": found, "to": HEAD}})


# ---- engines


def _engine(url: str, wait_s: float) -> Engine:
    if not url.startswith("sqlite:"):
        return create_engine(url, pool_size=5, max_overflow=10, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": wait_s, "check_same_thread": False})
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver starts no transaction of its own: _begin does
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA temp_store = MEMORY")  # what a savepoint may have to undo
    cursor.close()


def _begin(connection: Connection) -> None:
    # A writer takes its lock before it reads: one that read first could only fail when another
    # has written since (SQLITE_BUSY_SNAPSHOT, which no timeout waits for).
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
