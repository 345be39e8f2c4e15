"""What happens without anybody asking: flushing, rollouts moving on, schedules, webhooks.

Each worker flushes what it holds. The rest is done by one of them, whoever holds the lock; rules
look only at what the database says, so that nothing depends on when, or by whom, they are run.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy import Connection

from . import (
    audit,
    course,
    metrics,
    planned,
    releases,
    retention,
    rollouts,
    schedules,
)
from .audit import SELF
from .http import Parts
from .store import Store
from .webhooks import Courier

log = logging.getLogger("twinslot.server")

FLUSH_S = 5
TICK_S = 2
FORGET_S = 3600
_ADVISORY_LOCK = 0x7457_0002


class Leader:
    """At most one holder at a time: a file lock with SQLite, an advisory lock with PostgreSQL."""

    def __init__(self, store: Store, folder: Path):
        self._store = store
        self._path = folder / "scheduler.lock"
        self._held: Any = None
        self._one = threading.Lock()  # of the clock's threads

    def holds(self) -> bool:
        """Take the lock if it is free; tell whether it is ours."""
        with self._one:
            try:
                return self._file() if self._store.is_sqlite else self._advisory()
            except Exception as exc:
                log.warning("scheduler lock", extra={"fields": {"why": str(exc)[:200]}})
                self._let_go()
                return False

    def release(self) -> None:
        with self._one:
            self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            try:
                if not self._store.is_sqlite:  # by its end the database frees it some time later
                    held.exec_driver_sql(f"SELECT pg_advisory_unlock({_ADVISORY_LOCK})")
                held.close()
            except Exception as exc:  # the connection is gone, and with it the lock
                log.info("scheduler lock", extra={"fields": {"why": str(exc)[:200]}})

    def _file(self) -> bool:
        if self._held is None:
            file = self._path.open("ab")
            if os.name == "posix":
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.close()
                    return False
            self._held = file
        return True

    def _advisory(self) -> bool:
        if self._held is None:
            connection = self._store.engine.connect().execution_options(
                isolation_level="AUTOCOMMIT"
            )
            if not connection.exec_driver_sql(
                f"SELECT pg_try_advisory_lock({_ADVISORY_LOCK})"
            ).scalar():
                connection.close()
                return False
            connection.detach()  # closing it really ends it, and a lock that was not given back
            self._held = connection
        self._held.exec_driver_sql("SELECT 1")
        return True


def _try(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        log.exception("background")


class Background:
    """The clockwork of one worker; ``start`` and ``stop`` it around serving.

    Args:
        data: the private folder.
        now: seconds since 1970.
    """

    def __init__(self, parts: Parts, data: Path, now: Callable[[], float] = time.time):
        self._parts = parts
        self._data = data
        self._now = now
        self._leader = Leader(parts.store, data)
        to_private = parts.settings.webhooks_to_private
        self._courier = Courier(parts.store, to_private, self._leader.holds)
        self._counters = metrics.Writer(parts.store, parts.desk)
        self._clock = BackgroundScheduler(
            timezone="UTC",
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": 3600},
        )
        self._at_work = threading.Condition()
        self._working = 0
        self._stopped = False

    def start(self) -> None:
        for seconds, work in (
            (FLUSH_S, self._parts.desk.flush),
            (FLUSH_S, self._counters.flush),
            (TICK_S, self.tick),
            (TICK_S, self.keep_schedules),
            (1, self.deliver),
            (FORGET_S, self.forget),
        ):
            self._clock.add_job(self._guarded(work), "interval", seconds=seconds)
        self._clock.start()

    def stop(self) -> None:
        # Waiting is ours: the scheduler would hold, while it waits for a tick, what that needs.
        self._clock.shutdown(wait=False)
        with self._at_work:
            self._stopped = True
            self._at_work.wait_for(lambda: not self._working)
        self._courier.stop()
        _try(self._parts.desk.flush)
        self._leader.release()

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with self._at_work:
                if self._stopped:
                    return
                self._working += 1
            _try(work)
            with self._at_work:
                self._working -= 1
                self._at_work.notify_all()

        return run

    # -- the leader's ---------------------------------------------------------------------------

    def tick(self) -> None:
        """Move every rollout on."""
        if not self._leader.holds():
            return
        store = self._parts.store
        for rollout_id in store.read(course.due):
            _try(lambda n=rollout_id: self._move_on(n))  # one must not stop the others
        now = int(self._now())
        store.write(lambda c: course.time_out_others(c, now))

    def _move_on(self, rollout_id: int) -> None:
        action, why = self._parts.store.write(lambda c: self._tick(c, rollout_id))
        if action != "hold":
            fields = {"rollout": rollout_id, "action": action, "why": why}
            log.info("rollout", extra={"fields": fields})

    def _tick(self, connection: Connection, rollout_id: int) -> tuple[str, str]:
        now = int(self._now())
        action, why = course.tick(connection, rollout_id, now)
        if action in ("hold", "passed"):
            return action, why
        row = rollouts.get(connection, rollout_id)
        after = {"state": row.state, "stage": row.stage, "why": why}
        if action == "complete" and (channel := rollouts.promotes(row)):
            release = releases.get(connection, row.release_id)
            if releases.is_newer(connection, self._parts.site, release, channel):
                releases.promote(connection, self._parts.site, release, channel)
                after["channel"] = channel
        target = f"rollout {rollout_id}"
        audit.note(connection, SELF, f"rollout.{action}", target, None, after)
        return action, why

    def keep_schedules(self) -> None:
        """Do what schedules have due."""
        if not self._leader.holds():
            return
        now = int(self._now())
        for number in self._parts.store.read(lambda c: schedules.due(c, now)):
            _try(lambda n=number: planned.run(self._parts, self._data, n, now))

    def deliver(self) -> None:
        """Hand over webhooks that are due."""
        if self._leader.holds():
            self._courier.round()

    def forget(self) -> None:
        """Drop what is older than the operator wants to keep."""
        if self._leader.holds():
            before = int(self._now()) - self._parts.settings.keep_days * 86400
            gone = self._parts.store.write(lambda c: retention.forget(c, before))
            log.info("forgotten", extra={"fields": gone})
