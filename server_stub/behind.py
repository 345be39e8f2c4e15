"""Write-behind: who was seen and what was fetched is kept in memory and written every few seconds.

What a crash takes with it is a few seconds of ``last_seen`` and of the download log, nothing that
was answered.
"""

import time
from typing import Any

from sqlalchemy import Connection, func, select

from . import devices
from .schema import downloads
from .store import Store

_PIECE = 500  # boards in one transaction: a few milliseconds
_WAITING = 10_000  # downloads between two flushes; more are counted, not listed


class Behind:
    """What waits to be written.

    Args:
        store: where to.
        downloads_kept: lines of the download log; older ones are dropped.
    """

    def __init__(self, store: Store, downloads_kept: int):
        self._store = store
        self._downloads_kept = downloads_kept
        self._seen: dict[str, int] = {}
        self._downloads: list[dict[str, Any]] = []

    def seen(self, device_id: str, now: int) -> None:
        self._seen[device_id] = now

    def downloaded(
        self, path: str, client: str | None, first: int, sent: int, complete: bool
    ) -> None:
        if len(self._downloads) < _WAITING:
            self._downloads.append(
                {
                    "at": int(time.time()),
                    "path": path,
                    "client": client,
                    "first": first,
                    "bytes": sent,
                    "complete": complete,
                }
            )

    def flush(self) -> None:
        """Write it all down, in pieces that keep no report waiting for long."""
        seen, self._seen = self._seen, {}
        fetched, self._downloads = self._downloads, []
        times = sorted(seen.items())
        for first in range(0, len(times), _PIECE):
            piece = times[first : first + _PIECE]
            self._store.write(lambda connection, some=piece: devices.seen(connection, some))
        if fetched:
            self._store.write(lambda connection: self._list(connection, fetched))

    def _list(self, connection: Connection, fetched: list[dict[str, Any]]) -> None:
        connection.execute(downloads.insert(), fetched)
        newest = connection.execute(select(func.max(downloads.c.id))).scalar_one()
        connection.execute(
            downloads.delete().where(downloads.c.id <= newest - self._downloads_kept)
        )
