"""The database: SQLite or PostgreSQL by URL, migrated at start, written by one thread.

Every change is a function of a connection. Changes that wait at the same moment share one
transaction (group commit), each within a savepoint of its own: one that fails takes none of the
others with it. What boards say pours in and hardly ever fails: it is spared the savepoint, and
where one fails, all are done anew with it. Polls that wait together are even one change, which
reads and writes for all of them at once. What was answered is on disk (SQLite: WAL,
synchronous=FULL). A change may be run more than once: for that, and where another worker's
transaction was in the way, the whole is done anew.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    Table,
    bindparam,
    create_engine,
    event,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError

from .schema import meta

DATABASE = "server.sqlite3"
HEAD = "0010"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BATCH = 256
_TRIES = 5
_IN_THE_WAY = ("40001", "40P01", "55P03")
"""PostgreSQL's serialization_failure, deadlock_detected, lock_not_available: nothing was done.
After any other error the outcome is another's to judge; SQLite has waited already."""

_FOREIGN_GENERATION_S = 0.5  # how soon one worker sees what another has changed
_MIGRATION_LOCK = 0x7457_0001

log = logging.getLogger("twinslot.server")

INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""INSERTs that know ``on_conflict_do_nothing`` and ``..._do_update``, by dialect."""

A = TypeVar("A")
T = TypeVar("T")
Change = Callable[[Connection], T]
Together = Callable[[Connection, list[A]], list[T]]
"""A change for all that ask for it at the same moment; their results in the same order."""


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
            self.generation = self.read(generation)
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
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._queue(_Waiting(_alone(change), None, future))
        return future

    def write(self, change: Change[T]) -> T:
        """Run a change and return its result once it is durable."""
        return self.submit(change).result()

    async def awrite(self, change: Change[T], pours: bool = False) -> T:
        """As :meth:`write`; ``pours``: a board's, which goes without a savepoint at first."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue(_Waiting(_alone(change), None, future, pours))
        return await future

    async def awrite_together(self, together: Together[A, T], asked: A) -> T:
        """Do ``together`` for ``asked`` and whatever else waits for it then; a board's."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue(_Waiting(together, asked, future, True))
        return await future

    def _queue(self, waiting: "_Waiting") -> None:
        with self._lock:
            if self._thread is None:  # not at construction: a forked worker has no threads
                self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
                self._thread.start()
        self._work.put(waiting)

    def _write(self) -> None:
        while True:
            batch = [self._work.get()]
            while len(batch) < _BATCH and not self._work.empty():
                batch.append(self._work.get())
            last = None in batch
            self._commit([item for item in batch if item is not None])
            if last:
                return

    def _commit(self, batch: "list[_Waiting]") -> None:
        done: list[_Done] = []
        apart = not all(one.pours for one in batch)
        left = _TRIES if batch else 0
        while left:
            left -= 1
            try:
                done, self.generation = self._transact(batch, apart)
                break
            except Exception as exc:
                if _was_in_the_way(exc) and left:
                    continue
                if not apart and len(batch) > 1:  # whose fault it was
                    apart, left = True, _TRIES
                    continue
                done = [(one.future, None, exc) for one in batch]
                break
        _settle(done)

    def _transact(self, batch: "list[_Waiting]", apart: bool) -> "tuple[list[_Done], int]":
        """Do a batch in one transaction; ``apart``, one that fails is undone by itself."""
        with self._engine.execution_options(write=True).begin() as connection:
            if apart:
                done = [_apart(connection, one) for one in batch]
            else:
                done = [one for some in _groups(batch) for one in _together(connection, some)]
            return done, generation(connection)

    # -- what others have changed -------------------------------------------------------------

    async def current_generation(self) -> int:
        """The number that every change of policy renews; other workers' with a small delay."""
        if not self.is_sqlite and time.monotonic() - self._asked > _FOREIGN_GENERATION_S:
            self._asked = time.monotonic()
            self.generation = await self.aread(generation)
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


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A change in the queue."""

    work: Together
    asked: Any
    future: Any
    pours: bool = False


_Done = tuple[Any, Any, BaseException | None]
"""A future, and its result or what went wrong."""


def _alone(change: Change) -> Together:
    return lambda connection, _: [change(connection)]


def _groups(batch: list[_Waiting]) -> Iterable[list[_Waiting]]:
    """Those that wait for the same work, together."""
    groups: dict[Together, list[_Waiting]] = {}
    for one in batch:
        groups.setdefault(one.work, []).append(one)
    return groups.values()


def _together(connection: Connection, some: list[_Waiting]) -> list[_Done]:
    results = some[0].work(connection, [one.asked for one in some])
    return [(one.future, result, None) for one, result in zip(some, results, strict=True)]


def _apart(connection: Connection, one: _Waiting) -> _Done:
    try:
        with connection.begin_nested():
            return _together(connection, [one])[0]
    except Exception as exc:
        if _was_in_the_way(exc):
            raise
        connection.info.pop(_GENERATION, None)
        return one.future, None, exc


def _was_in_the_way(exc: Exception) -> bool:
    return getattr(getattr(exc, "orig", None), "sqlstate", None) in _IN_THE_WAY


def _settle(done: list[_Done]) -> None:
    """Tell who waits; an event loop is woken once for all that wait in it."""
    loops: dict[asyncio.AbstractEventLoop, list[_Done]] = {}
    for item in done:
        if isinstance(item[0], asyncio.Future):
            loops.setdefault(item[0].get_loop(), []).append(item)
    _tell([item for item in done if not isinstance(item[0], asyncio.Future)])
    for loop, items in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(_tell, items)


def _tell(done: list[_Done]) -> None:
    for future, result, error in done:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def insert(connection: Connection, table: Table) -> Any:
    """An INSERT of the database in use, one of ``INSERTS``."""
    return INSERTS[connection.dialect.name](table)


_GENERATION = "generation"
_BUMP = update(meta).where(meta.c.key == _GENERATION).values(value=bindparam("number"))
_READ = select(meta.c.value).where(meta.c.key == _GENERATION)


def bump(connection: Connection) -> None:
    """Say that answers given so far may no longer hold.

    By a number that never was: what was remembered of a change that is undone fits no other.
    """
    number = connection.info[_GENERATION] = secrets.randbits(62)
    connection.execute(_BUMP, {"number": number})


def generation(connection: Connection) -> int:
    """The number that every change of policy renews, looked up once in a transaction."""
    # Outside a transaction it is still that of the one before, which may be long ago.
    known = connection.info.get(_GENERATION) if connection.in_transaction() else None
    if known is None:
        known = connection.info[_GENERATION] = connection.execute(_READ).scalar_one()
    return known


def _begin_anew(connection: Connection) -> None:
    connection.info.pop(_GENERATION, None)


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
    if url.startswith("sqlite:"):
        engine = create_engine(url, connect_args={"timeout": wait_s, "check_same_thread": False})
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
    else:
        engine = create_engine(url, pool_size=5, max_overflow=10, pool_pre_ping=True)
    event.listen(engine, "begin", _begin_anew)
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
