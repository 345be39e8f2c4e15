"""What operators have decided, read once per generation: releases, rollouts, jobs, windows, and
how often boards ask and who is accepted.

Small next to the registry. Between two changes every poll is answered from one such snapshot; what
must be exact (a rollout's state and free places) is looked up again when an offer is booked.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from twinslot import semver

from . import stages
from .schema import jobs, releases, rollouts, windows
from .schema import settings as settings_table
from .settings import Changes, Settings
from .store import bump
from .windows import Window


@dataclass(frozen=True)
class Policy:
    """A snapshot; rows are those of the tables."""

    releases: Mapping[int, Any]
    by_version: Mapping[tuple[str, str], Any]
    rollouts: tuple[Any, ...]  # pilot, expand, paused; newest first
    jobs: Mapping[int, Any]  # not cancelled
    windows: tuple[Window, ...]
    settings: Settings  # as they are in force

    def fallbacks(self, product: str, channel: str, below: str) -> list[Any]:
        """Releases that may stand in for a blocked one, newest first."""
        found = [
            row
            for row in self.releases.values()
            if row.product == product
            and channel in row.channels
            and row.stable
            and row.blocked is None
            and semver.compare(row.version, below) < 0
        ]
        found.sort(key=lambda row: functools.cmp_to_key(semver.compare)(row.version), reverse=True)
        return found


def in_force(connection: Connection, configured: Settings) -> Settings:
    """The configuration, with what an administrator has set since in its place."""
    changed = Changes.model_validate(changes(connection))
    return configured.model_copy(update={n: getattr(changed, n) for n in changed.model_fields_set})


def changes(connection: Connection) -> dict[str, Any]:
    """What an administrator has set since, by name."""
    return dict(connection.execute(select(settings_table)).all())


def change(connection: Connection, wanted: Changes) -> None:
    """Set members in place of the configuration's; None: the configuration's hold again."""
    for name in sorted(wanted.model_fields_set):
        connection.execute(settings_table.delete().where(settings_table.c.name == name))
        if (value := getattr(wanted, name)) is not None:
            row = {"name": name, "value": value.model_dump()}
            connection.execute(settings_table.insert().values(row))
    bump(connection)


def read(connection: Connection, configured: Settings) -> Policy:
    """Read the snapshot."""
    running = connection.execute(
        select(rollouts)
        .where(rollouts.c.state.in_((*stages.ACTIVE, "paused")))
        .order_by(rollouts.c.id.desc())
    ).all()
    wanted = connection.execute(select(jobs).where(jobs.c.cancelled.is_(False))).all()
    # After what refers to them: each statement sees what other workers have made meanwhile.
    all_releases = connection.execute(select(releases)).all()
    return Policy(
        releases={row.id: row for row in all_releases},
        by_version={(row.product, row.version): row for row in all_releases},
        rollouts=tuple(running),
        jobs={row.id: row for row in wanted},
        windows=maintenance(connection),
        settings=in_force(connection, configured),
    )


def maintenance(connection: Connection) -> tuple[Window, ...]:
    """The windows."""
    return tuple(
        Window(row.label, row.kind, row.zone, tuple(row.days), row.start, row.end)
        for row in connection.execute(select(windows))
    )
