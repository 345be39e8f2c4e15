"""``python -m twinslot_server.move DATA [URL]``: from the private folder's SQLite to PostgreSQL.

Copies every table into an empty database, in one transaction: all of it is there afterwards, or
nothing. The SQLite file stays as it is. URL may come from ``TWINSLOT_DATABASE`` instead, so that
its password is on no command line. The server must not run meanwhile. People log in again.
"""

import os
import sys
from pathlib import Path

from sqlalchemy import Connection, Table, func, select, text
from sqlalchemy.exc import DatabaseError

from .background import Leader
from .schema import meta, metadata, sessions
from .store import DATABASE, Store, StoreError, bump

_BATCH = 1000
_WAIT_S = 5.0


class MoveError(Exception):
    """It can't be moved; nothing was."""


def move(data: Path, url: str) -> dict[str, int]:
    """Copy the database of ``data`` to ``url``; return the lines of each table.

    Raises:
        MoveError, StoreError, DatabaseError: nothing was copied, and why.
    """
    if not (data / DATABASE).is_file():
        raise MoveError(f"{data / DATABASE} is missing")
    if url.startswith("sqlite:"):
        raise MoveError("expected the URL of a PostgreSQL database, postgresql+psycopg://...")
    here = Store(f"sqlite:///{data / DATABASE}", _WAIT_S)
    leader = Leader(here, data)
    try:
        if not leader.holds():
            raise MoveError(f"a server runs on {data}: stop it first")
        there = Store(url, _WAIT_S)
        try:
            return here.read(lambda old: there.write(lambda new: _copy_all(old, new)))
        finally:
            there.close()
    finally:
        leader.release()
        here.close()


def _copy_all(old: Connection, new: Connection) -> dict[str, int]:
    tables = [t for t in metadata.sorted_tables if t not in (meta, sessions)]
    for table in tables:
        if new.execute(select(func.count()).select_from(table)).scalar_one():
            raise MoveError(f"the other database is not empty: it has {table.name}")
    bump(new)
    return {table.name: _copy(old, new, table) for table in tables}


def _copy(old: Connection, new: Connection, table: Table) -> int:
    count = 0
    for rows in old.execute(select(table)).partitions(_BATCH):
        new.execute(table.insert(), [dict(row._mapping) for row in rows])
        count += len(rows)
    if "id" in table.c and count:  # the next one is numbered behind those that came
        new.execute(
            text(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), max(id))"
                f" FROM {table.name}"
            )
        )
    return count


def main(argv: list[str]) -> int:
    url = argv[1] if len(argv) == 2 else os.environ.get("TWINSLOT_DATABASE", "")
    if len(argv) not in (1, 2) or not url:
        print("usage: python -m twinslot_server.move DATA URL", file=sys.stderr)
        return 2
    try:
        moved = move(Path(argv[0]), url)
    except (MoveError, StoreError) as exc:
        print(f"twinslot_server: move: {exc}", file=sys.stderr)
        return 1
    except DatabaseError as exc:
        print(f"twinslot_server: move: {exc.orig}", file=sys.stderr)
        return 1
    print(", ".join(f"{name} {count}" for name, count in moved.items() if count))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
