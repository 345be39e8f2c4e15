"""Where boards are answered: a poll goes in, the answer and its bookings come out.

Most polls of a fleet say nothing new. Such a poll is answered from memory without touching the
database, as long as nothing it depends on has changed: what the board says, the channel's pointer,
and the generation number that every change of policy raises. Only "nothing for you" is ever
remembered; an offer is decided afresh each time, inside the transaction that books it, so that a
paused rollout offers nothing from that moment on.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select, update

from . import attempts, devices, events, offers, policy, releases, rollouts, stages, truth, windows
from .limits import Limits
from .messages import CheckUpdate, ReportStatus
from .offers import Board, Candidate, Decision, Situation
from .problems import Problem
from .schema import devices as device_table
from .schema import downloads as download_table
from .schema import job_nodes, members
from .schema import reports as report_table
from .settings import Settings
from .site import Channel, ChannelError, Site
from .store import Store, insert

log = logging.getLogger("twinslot.server")

REMEMBER_S = 3600.0
"""Only the age of failed tries and the expiry of a release change an answer by time alone."""

_UNPUBLISHED = ("no_channel", "bad_pointer", "bad_release", "bad_keyring")


@dataclass(frozen=True)
class Answer:
    """What a board is told; ``etag`` lets it be told in fewer bytes next time."""

    body: bytes
    etag: str


@dataclass(frozen=True)
class _Kept:
    stamp: tuple
    until: float
    answer: Answer


class Desk:
    """Answers polls and takes reports."""

    def __init__(self, site: Site, store: Store, limits: Limits, settings: Settings):
        self._site = site
        self._store = store
        self._limits = limits
        self._settings = settings
        self._kept: dict[str, _Kept] = {}
        self._seen: dict[str, int] = {}
        self._policy: tuple[int, policy.Policy] | None = None
        self._downloads: list[dict[str, Any]] = []
        self.polls = 0
        self.remembered = 0
        self.reports = 0
        self.bytes_sent = 0

    # -- polls --------------------------------------------------------------------------------

    async def poll(self, ask: CheckUpdate, token: str | None, address: str | None) -> Answer:
        """Answer a poll.

        Args:
            ask: what the board says.
            token: hash of its own token, or None where it came with the fleet's.
            address: where it called from.

        Raises:
            Problem: the token does not speak for this board.
            StoreError, DatabaseError: the registry can't take it now.
        """
        now = int(time.time())
        generation = await self._store.current_generation()
        facts = ask.model_dump(exclude={"device_id"})
        facts["address"] = address
        stamp = (
            generation,
            self._site.stamp(ask.product, ask.channel),
            token,
            *(tuple(v) if isinstance(v, list) else v for v in facts.values()),
        )
        self.polls += 1
        kept = self._kept.get(ask.device_id)
        if kept and kept.stamp == stamp and kept.until > time.monotonic():
            self._seen[ask.device_id] = now
            self.remembered += 1
            return kept.answer
        answer, settled = await self._store.awrite(
            lambda connection: self._answer(connection, ask.device_id, facts, token, now)
        )
        if settled:
            self._keep(ask.device_id, _Kept(stamp, time.monotonic() + REMEMBER_S, answer))
        return answer

    def _keep(self, device_id: str, kept: _Kept) -> None:
        if len(self._kept) > self._limits.devices:
            self._kept.clear()
        self._kept[device_id] = kept

    def _answer(
        self,
        connection: Connection,
        device_id: str,
        facts: Mapping[str, Any],
        token: str | None,
        now: int,
    ) -> tuple[Answer, bool]:
        before = devices.find(connection, device_id)
        _check_token(before, token)
        row = devices.touch(
            connection,
            device_id,
            facts,
            now,
            self._settings.enrolment_of(facts),
            self._limits.devices,
            before,
        )
        if before is None:
            events.emit(connection, "device.new", {"device_id": device_id}, now)
        latest = attempts.latest(connection, device_id)
        if latest is not None:
            after = attempts.on_poll(
                connection, latest, row.current_build, row.current_version, now
            )
            self._ended(connection, latest, after, now)
            latest = after
        decision, channel = self._decide(connection, row, latest, now, booking=True)
        poll_s = self._poll_s(connection, row, channel, now)
        body: dict[str, Any] = {"update_available": decision.offer is not None, "poll": poll_s}
        if keyring := self._site.keyring(row.product):
            body["keyring"] = keyring
        if decision.offer is None:
            body["reason"] = decision.reason
        else:
            body["release"] = f"/{decision.offer.path}"
            if decision.offer.percent is not None:
                body["rollout"] = decision.offer.percent
            self._book(connection, row, latest, decision.offer, now)
        _log_poll(device_id, decision)
        settled = (
            decision.offer is None
            and decision.reason
            not in ("bad_pointer", "bad_release", "bad_keyring", "busy", "window")
            and (latest is None or not (latest.state in truth.OPEN or latest.presumed))
        )
        content = json.dumps(body, separators=(",", ":")).encode()
        return Answer(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'), settled

    def _book(
        self, connection: Connection, row: Any, latest: Any, offer: Candidate, now: int
    ) -> None:
        assert offer.release is not None
        attempts.on_offer(
            connection,
            row,
            latest,
            {
                "build": offer.release.firmware.build,
                "version": offer.release.version,
                "origin": offer.origin,
                "rollout_id": offer.rollout_id,
                "job_id": offer.job_id,
            },
            now,
        )

    def _poll_s(self, connection: Connection, row: Any, channel: Channel | None, now: int) -> int:
        """How soon the board shall ask again; not later than its window opens."""
        seconds = self._settings.poll_s
        if channel is not None and channel.poll is not None:
            seconds = channel.poll
        rules = self._snapshot(connection)
        if not (self._settings.poll_by_label or rules.windows):
            return seconds
        labels = devices.labels_of(connection, row.device_id)
        for label, wanted in self._settings.poll_by_label.items():
            if stages.matches({"label": label}, labels):
                seconds = wanted
                break
        wait = self._window_in(rules, labels, now)
        return max(1, min(seconds, wait)) if wait else seconds

    # -- deciding -----------------------------------------------------------------------------

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
                "notes": [],
            }
        latest = attempts.latest(connection, device_id)
        if latest is not None:
            after = truth.after_poll(
                attempts.as_attempt(latest), row.current_build, row.current_version, now
            )
            latest = _Seen(latest, after)
        decision, _ = self._decide(connection, row, latest, now, booking=False)
        return {
            "device_id": device_id,
            "update_available": decision.offer is not None,
            "reason": decision.reason,
            "sentence": decision.sentence,
            "release": f"/{decision.offer.path}" if decision.offer else None,
            "version": decision.version,
            "origin": decision.offer.origin if decision.offer else None,
            "notes": self._notes(connection, row),
        }

    def _decide(
        self, connection: Connection, row: Any, latest: Any, now: int, booking: bool
    ) -> tuple[Decision, Channel | None]:
        rules = self._snapshot(connection)
        channel: Channel | None = None
        trouble: ChannelError | None = None
        try:
            channel = self._site.channel(row.product, row.channel or "stable")
        except ChannelError as exc:
            trouble = exc
        candidates = (
            self._pinned(rules, row)
            or self._of_jobs(connection, rules, row)
            or self._of_rollouts(connection, rules, row, latest, now, booking)
        )
        if not candidates:
            if trouble is not None:
                log.warning(
                    "no offer", extra={"fields": {"reason": trouble.code, "why": str(trouble)}}
                )
            candidates = self._of_channel(connection, rules, row, channel, trouble, booking)
        labels = devices.labels_of(connection, row.device_id) if rules.windows else {}
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
            attempts.tries(connection, row.device_id, now) if latest is not None else {},
            attempts.TRIES,
            self._window_in(rules, labels, now),
        )
        return offers.decide(situation, now), channel

    def _snapshot(self, connection: Connection) -> policy.Policy:
        generation = connection.exec_driver_sql(
            "SELECT value FROM meta WHERE key = 'generation'"
        ).scalar_one()
        if self._policy is None or self._policy[0] != generation:
            self._policy = (generation, policy.read(connection))
        return self._policy[1]

    @staticmethod
    def _window_in(rules: policy.Policy, labels: Mapping[str, str], now: int) -> int:
        # A board installs what it has downloaded, so both must be open.
        return max(windows.opens_in(rules.windows, kind, labels, now) for kind in windows.KINDS)

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
            if release.product == row.product:
                return [
                    self._candidate(
                        release,
                        "job",
                        f"Job {job_id}",
                        job_id=job_id,
                        force=job.force_update,
                    )
                ]
        return []

    def _of_rollouts(
        self,
        connection: Connection,
        rules: policy.Policy,
        row: Any,
        latest: Any,
        now: int,
        booking: bool,
    ) -> list[Candidate]:
        running = [
            r
            for r in rules.rollouts
            if r.state in stages.ACTIVE and rules.releases[r.release_id].product == row.product
        ]
        if not running:
            return []
        mine = set(
            connection.scalars(
                select(members.c.rollout_id).where(
                    members.c.device_id == row.device_id,
                    members.c.rollout_id.in_([r.id for r in running]),
                )
            )
        )
        for rollout in running:
            release = rules.releases[rollout.release_id]
            if rollout.id not in mine and not self._joins(connection, rollout, release, row):
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
            hold = self._hold(connection, fresh, row, latest)
            return [self._candidate(release, "rollout", says, rollout_id=rollout.id, hold=hold)]
        return []

    @staticmethod
    def _joins(connection: Connection, rollout: Any, release: Any, row: Any) -> bool:
        """True if a newcomer belongs to a running rollout."""
        if not rollout.policy.get("include_new") or row.hardware not in release.hardware:
            return False
        if row.enrolment != "accepted":
            return False
        labels = devices.labels_of(connection, row.device_id)
        return stages.matches(rollout.target, labels) and stages.joins(
            (row.device_id, labels), rollout.stages, rollout.stage, rollout.seed
        )

    @staticmethod
    def _hold(
        connection: Connection, rollout: Any, row: Any, latest: Any
    ) -> tuple[str, str] | None:
        """Why this member of a running rollout must wait, if it must."""
        own = rollouts.newest_attempt(connection, rollout.id, row.device_id)
        if own is not None and latest is not None and own.id == latest.id:
            own = latest
        if own is not None:
            if own.state in truth.OPEN:
                return None
            if own.state in truth.BAD and own.reason not in ("withdrawn", "interrupted"):
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
        if known is None and booking:
            releases.register(
                connection, self._site, channel.release_path, row.channel or "stable"
            )
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

    def _notes(self, connection: Connection, row: Any) -> list[str]:
        rules = self._snapshot(connection)
        paused = [
            r
            for r in rules.rollouts
            if r.state == "paused" and rules.releases[r.release_id].product == row.product
        ]
        return [f"Rollout {r.id} '{r.name}' is paused: {r.why}." for r in paused]

    # -- reports ------------------------------------------------------------------------------

    async def report(self, report: ReportStatus, token: str | None) -> bool:
        """Keep a report; False where the same one is known already."""
        self.reports += 1
        new = await self._store.awrite(
            lambda connection: self._report(connection, report, token, int(time.time()))
        )
        self._kept.pop(report.device_id, None)
        return new

    def _report(
        self, connection: Connection, report: ReportStatus, token: str | None, now: int
    ) -> bool:
        device_id = report.device_id
        before = devices.find(connection, device_id)
        _check_token(before, token)
        # A board this server has never seen may report: its database may be a new one.
        row = devices.touch(
            connection,
            device_id,
            {},
            now,
            self._settings.enrolment_of({}),
            self._limits.devices,
            before,
        )
        kept = report.model_dump(exclude={"device_id", "current_version", "current_build"})
        added = connection.execute(
            insert(connection, report_table)
            .values(device_id=device_id, received=now, **kept)
            .on_conflict_do_nothing()
            .returning(report_table.c.id)
        ).scalar_one_or_none()
        if added is None:
            return False
        running = {
            "current_version": report.current_version,
            "current_build": report.current_build,
        }
        connection.execute(
            update(device_table)
            .where(device_table.c.device_id == device_id)
            .values(
                status=report.status,
                status_version=report.version,
                **{name: value for name, value in running.items() if value is not None},
            )
        )
        if added % 16 == 0 or self._limits.reports_per_device < 16:
            attempts.keep_last(connection, device_id, self._limits.reports_per_device)
        old, after = attempts.on_report(connection, row, kept, now)
        self._ended(connection, old, after, now, said=True)
        return True

    def _ended(
        self, connection: Connection, before: Any, after: Any, now: int, said: bool = False
    ) -> None:
        """Do what the end of an attempt asks for."""
        if after.state == before.state or after.state in truth.OPEN:
            return
        if not said:
            connection.execute(
                update(device_table)
                .where(device_table.c.device_id == after.device_id)
                .values(status=after.state, status_version=after.version)
            )
        if after.job_id is not None:
            attempts.set_node(connection, after.job_id, after.device_id, after)
        events.emit(
            connection,
            f"attempt.{after.state}",
            {
                "device_id": after.device_id,
                "version": after.version,
                "reason": after.reason,
                "rollout": after.rollout_id,
            },
            now,
        )
        if after.state in truth.BAD and after.rollout_id is not None:
            why = rollouts.after_bad_report(connection, after.rollout_id, now)
            if why:
                log.warning(
                    "rollout paused", extra={"fields": {"rollout": after.rollout_id, "why": why}}
                )
                events.emit(
                    connection, "rollout.paused", {"rollout": after.rollout_id, "why": why}, now
                )

    def downloaded(
        self, path: str, client: str | None, first: int, sent: int, complete: bool
    ) -> None:
        """Note a download; written down with the next flush."""
        if len(self._downloads) < 10_000:
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
        self.bytes_sent += sent

    # -- write-behind -------------------------------------------------------------------------

    def flush(self) -> None:
        """Write down who was seen and what was fetched; every few seconds and at the end."""
        if not (self._seen or self._downloads):
            return
        seen, self._seen = self._seen, {}
        fetched, self._downloads = self._downloads, []

        def work(connection: Connection) -> None:
            devices.seen(connection, seen)
            if fetched:
                connection.execute(download_table.insert(), fetched)
                newest = connection.execute(select(func.max(download_table.c.id))).scalar_one()
                connection.execute(
                    download_table.delete().where(
                        download_table.c.id <= newest - self._limits.downloads_kept
                    )
                )

        self._store.write(work)


class _Seen:
    """A row of attempts as a poll would leave it, for ``explain``."""

    def __init__(self, row: Any, after: truth.Attempt):
        self._row = row
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._after if hasattr(self._after, name) else self._row, name)


def _check_token(row: Any, token: str | None) -> None:
    """A board with a token of its own is spoken for by nobody else."""
    if row is not None and row.token_hash is not None and row.token_hash != token:
        raise Problem(
            401,
            "unauthorized",
            "this board has a token of its own",
            {"WWW-Authenticate": "Bearer"},
        )


def _log_poll(device_id: str, decision: Decision) -> None:
    if decision.reason in _UNPUBLISHED:
        return  # said as a warning
    fields = {"device": device_id, "version": decision.version, "reason": decision.reason}
    log.info("checked", extra={"fields": {k: v for k, v in fields.items() if v is not None}})
