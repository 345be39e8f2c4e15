"""What is chosen for one board: what wants something of it is gathered here, ``offers`` judges it.

A pin, the jobs, the rollouts it is a member of, its channel: read from the database and the tree,
and handed to the pure rules. ``explain`` goes the same way as a poll and books nothing.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from . import attempts, devices, offers, policy, releases, rollouts, stages, truth, windows
from .offers import Board, Candidate, Decision, Situation
from .schema import job_nodes
from .settings import Settings
from .site import Channel, ChannelError, File, Site, names_release, naming
from .store import generation

log = logging.getLogger("twinslot.server")


@dataclass(frozen=True)
class Caller:
    """What the database knows of a board that asks."""

    row: Any
    latest: Any  # its newest attempt, or None
    tries: Mapping[str, offers.Tries]  # by build
    labels: Mapping[str, str]  # empty where no rule looks at any


class Chooser:
    """Finds what a board is offered, and why."""

    def __init__(self, site: Site, settings: Settings):
        self._site = site
        self._settings = settings
        self._policy: tuple[int, policy.Policy] | None = None

    def explain(self, connection: Connection, device_id: str, now: int) -> dict[str, Any]:
        """Say what the board would be answered now, and why, without booking anything."""
        row = devices.get(connection, device_id)
        if row.current_version is None or row.product is None or row.hardware is None:
            return {
                "device_id": device_id,
                "update_available": False,
                "reason": "never_seen",
                "sentence": "This board has not called yet.",
                "release": None,
                "version": None,
                "origin": None,
                "install_in_s": 0,
                "notes": [],
            }
        latest = attempts.latest_of(connection, [device_id])
        latest = {
            b: _Seen(one, attempts.poll_of(attempts.as_attempt(one), row, now))
            for b, one in latest.items()
        }
        (caller,) = self.callers(connection, {device_id: row}, latest, now)
        decision, _ = self.decide(connection, caller, now, booking=False)
        return {
            "device_id": device_id,
            "update_available": decision.offer is not None,
            "reason": decision.reason,
            "sentence": decision.sentence,
            "release": f"/{decision.offer.path}" if decision.offer else None,
            "version": decision.version,
            "origin": decision.offer.origin if decision.offer else None,
            "install_in_s": decision.install_in_s,
            "notes": self._notes(connection, row),
        }

    def hold(self, connection: Connection, boards: Collection[str]) -> None:
        """Let no other worker book anything of what these boards take part in, until the end."""
        if any(rollout.state in stages.ACTIVE for rollout in self.rules(connection).rollouts):
            rollouts.hold(connection, boards)

    def callers(
        self, connection: Connection, rows: Mapping[str, Any], latest: Mapping[str, Any], now: int
    ) -> list[Caller]:
        """Read what else must be known to answer these boards, for all of them at once."""
        rules = self.rules(connection)
        tries = attempts.tries(connection, latest, now) if latest else {}
        labels: Mapping[str, Mapping[str, str]] = {}
        if rules.windows or rules.rollouts or rules.settings.poll_by_label:
            labels = devices.labels_by_board(connection, rows)
        return [
            Caller(row, latest.get(board), tries.get(board, {}), labels.get(board, {}))
            for board, row in rows.items()
        ]

    def decide(
        self, connection: Connection, caller: Caller, now: int, booking: bool
    ) -> tuple[Decision, Channel | None]:
        rules = self.rules(connection)
        row = caller.row
        channel: Channel | None = None
        trouble: ChannelError | None = None
        try:
            channel = self._site.channel(row.product, row.channel or "stable")
        except ChannelError as exc:
            trouble = exc
        candidates = (
            self._pinned(rules, row)
            or self._of_jobs(connection, rules, row)
            or self._of_rollouts(connection, rules, caller, now, booking)
        )
        if not candidates:
            if trouble is not None:
                log.warning(
                    "no offer", extra={"fields": {"reason": trouble.code, "why": str(trouble)}}
                )
            candidates = self._of_channel(connection, rules, row, channel, trouble, booking)
        situation = Situation(
            Board(
                row.device_id,
                row.product,
                row.hardware,
                row.current_version,
                row.current_build,
                row.chip_id,
            ),
            candidates,
            row.enrolment,
            caller.tries,
            offers.MOST_TRIES,
            *_windows_in(rules, caller.labels, now),
            row.staged,
        )
        return offers.decide(situation, now), channel

    def rules(self, connection: Connection) -> policy.Policy:
        """What operators have decided, as this transaction sees it."""
        now, kept = generation(connection), self._policy
        if kept is None or kept[0] != now:
            # What is kept may be another thread's in the next moment.
            kept = self._policy = (now, policy.read(connection, self._settings))
        return kept[1]

    def _candidate(self, release: Any, origin: str, says: str, **more: Any) -> Candidate:
        """Make a candidate of a row of releases, read and verified."""
        try:
            return Candidate(
                origin,
                says,
                release.path,
                self._site.release(release.path),
                blocked=release.blocked,
                **more,
            )
        except ChannelError as exc:
            return Candidate(origin, says, release.path, hold=(exc.code, str(exc)))

    def _pinned(self, rules: policy.Policy, row: Any) -> list[Candidate]:
        if not row.pin:
            return []
        release = rules.by_version.get((row.product, row.pin))
        says = f"The pin to {row.pin}"
        if release is None:
            return [Candidate("pin", says, hold=("bad_release", "no such release is known"))]
        return [self._candidate(release, "pin", says)]

    def _of_jobs(self, connection: Connection, rules: policy.Policy, row: Any) -> list[Candidate]:
        if not rules.jobs:
            return []
        for job_id in connection.scalars(
            select(job_nodes.c.job_id)
            .where(
                job_nodes.c.device_id == row.device_id,
                job_nodes.c.status.in_(("pending", "in_progress")),
            )
            .order_by(job_nodes.c.job_id.desc())
        ):
            job = rules.jobs.get(job_id)
            if job is None:
                continue
            release = rules.releases[job.release_id]
            force = job.force_update
            return [self._candidate(release, "job", f"Job {job_id}", job_id=job_id, force=force)]
        return []

    def _of_rollouts(
        self,
        connection: Connection,
        rules: policy.Policy,
        caller: Caller,
        now: int,
        booking: bool,
    ) -> list[Candidate]:
        row = caller.row
        running = [
            r
            for r in rules.rollouts
            if r.state in stages.ACTIVE and rules.releases[r.release_id].product == row.product
        ]
        if not running:
            return []
        mine = rollouts.of_board(connection, row.device_id)
        for rollout in running:
            release = rules.releases[rollout.release_id]
            if rollout.id not in mine and not self._joins(rollout, release, caller, mine):
                continue
            if not _is_meant(rollout, release, row):
                if booking and not _about_to(rollout, caller.latest):
                    rollouts.leave(connection, rollout.id, row.device_id)
                continue
            if rollout.id not in mine and booking:
                rollouts.add(connection, rollout.id, [row.device_id], rollout.stage)
            fresh = rollouts.get(connection, rollout.id, lock=booking)
            if fresh.state not in stages.ACTIVE:
                continue
            says = (
                f"Rollout {rollout.id} '{rollout.name}'"
                f" (stage {fresh.stage + 1} of {len(fresh.stages)})"
            )
            deadline = fresh.policy.get("deadline_s")
            return [
                self._candidate(
                    release,
                    "rollout",
                    says,
                    rollout_id=rollout.id,
                    hold=self._hold(connection, fresh, row, caller.latest),
                    late=bool(deadline) and now > fresh.stage_started + deadline,
                )
            ]
        return []

    @staticmethod
    def _joins(rollout: Any, release: Any, caller: Caller, mine: set[int]) -> bool:
        """True if a newcomer belongs to a running rollout."""
        row, labels = caller.row, caller.labels
        if row.enrolment != "accepted" or row.hardware not in release.hardware:
            return False
        if took := rollout.target.get("took"):
            return took["rollout"] in mine and row.current_build == took["build"]
        if not rollout.policy.get("include_new"):
            return False
        return stages.matches(rollout.target, labels) and stages.joins(
            (row.device_id, labels), rollout.stages, rollout.stage, rollout.seed
        )

    @staticmethod
    def _hold(
        connection: Connection, rollout: Any, row: Any, latest: Any
    ) -> tuple[str, str] | None:
        """Why this member of a running rollout must wait, if it must."""
        own = latest
        if latest is not None and latest.rollout_id != rollout.id:
            own = rollouts.newest_attempt(connection, rollout.id, row.device_id)
        if own is not None:
            if own.state in truth.OPEN:
                return None
            if own.state in truth.BAD and not truth.is_set_aside(own):
                return "failed", f"this board's attempt ended: {own.state} ({own.reason})"
        busy = rollouts.in_flight(connection, rollout.id)
        most = rollout.policy["max_concurrent"]
        if busy >= most:
            return "busy", f"{busy} boards are updating, which is as many as may at once"
        return None

    def _of_channel(
        self,
        connection: Connection,
        rules: policy.Policy,
        row: Any,
        channel: Channel | None,
        trouble: ChannelError | None,
        booking: bool,
    ) -> list[Candidate]:
        name = f"Channel {row.channel or 'stable'}"
        if channel is None:
            assert trouble is not None
            return [Candidate("channel", name, hold=(trouble.code, str(trouble)))]
        known = rules.by_version.get((row.product, channel.release.version))
        if booking:
            names = [row.channel or "stable"]
            if known is None:
                releases.register(connection, self._site, channel.release_path, names)
            else:
                releases.note_channels(connection, known, names)
        blocked = known.blocked if known is not None else None
        first = Candidate(
            "channel",
            name,
            channel.release_path,
            channel.release,
            blocked=blocked,
            percent=channel.rollout,
        )
        if blocked is None:
            return [first]
        others = rules.fallbacks(row.product, row.channel or "stable", channel.release.version)
        says = f"{name}, whose {channel.release.version} is blocked,"
        return [first, *(self._candidate(other, "channel", says) for other in others)]

    def pointer(self, connection: Connection, name: str, file: File) -> File | None:
        """A channel's pointer as anybody may have it; None where it may offer nothing.

        Boards read it by themselves where there is no server to ask, or not now: what is blocked
        gives way there as it does in the answer to a poll.
        """
        rules = self.rules(connection)
        product, _, rest = name.partition("/")
        target = f"{product}/{names_release(file)}"
        found = (row for row in rules.releases.values() if row.path == target)
        blocked = next((row for row in found if row.blocked is not None), None)
        if blocked is None:
            return file
        for other in rules.fallbacks(product, rest.removesuffix(".json"), blocked.version):
            fits = set(blocked.hardware) <= set(other.hardware)
            if fits and self._candidate(other, "channel", name).release is not None:
                return naming(file, other.path.partition("/")[2])
        return None

    def _notes(self, connection: Connection, row: Any) -> list[str]:
        rules = self.rules(connection)
        paused = [
            r
            for r in rules.rollouts
            if r.state == "paused" and rules.releases[r.release_id].product == row.product
        ]
        return [f"Rollout {r.id} '{r.name}' is paused: {r.why}." for r in paused]

    def poll_s(self, connection: Connection, caller: Caller, channel: Channel | None) -> int:
        """How often the board shall ask."""
        rules = self.rules(connection)
        for label, wanted in rules.settings.poll_by_label.items():
            if stages.matches({"label": label}, caller.labels):
                return wanted
        if channel is not None and channel.poll is not None:
            return channel.poll
        return rules.settings.poll_s

    def sooner_s(self, connection: Connection, caller: Caller, poll_s: int, now: int) -> int:
        """How soon a board shall ask that something waits for: not later than its window opens."""
        opens_in = _windows_in(self.rules(connection), caller.labels, now)
        return min([poll_s, *filter(None, opens_in)])


def _is_meant(rollout: Any, release: Any, row: Any) -> bool:
    """False for one that shall be sent back, and does not run what it shall be sent back from."""
    took = rollout.target.get("took")
    return took is None or row.current_build in (took["build"], release.build)


def _about_to(rollout: Any, latest: Any) -> bool:
    """True while a board may still boot what it shall be sent back from."""
    build = rollout.target["took"]["build"]
    return latest is not None and latest.state in truth.OPEN and latest.build == build


def _windows_in(rules: policy.Policy, labels: Mapping[str, str], now: int) -> list[int]:
    """Seconds until a board may download, and until it may install."""
    return [windows.opens_in(rules.windows, kind, labels, now) for kind in windows.KINDS]


class _Seen:
    """A row of attempts as a poll would leave it, for ``explain``."""

    def __init__(self, row: Any, after: truth.Attempt):
        self._row = row
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._after if hasattr(self._after, name) else self._row, name)
