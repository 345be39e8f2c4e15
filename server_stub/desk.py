"""Where boards are answered: a poll goes in, the answer and its bookings come out.

Most polls of a fleet say nothing new. Such a poll is answered from memory without touching the
database, as long as nothing it depends on has changed: what the board says, the channel's pointer,
and the generation number that every change of policy renews. Only "nothing for you" is ever
remembered; an offer is decided afresh each time, inside the transaction that books it, so that a
paused rollout offers nothing from that moment on.

Where more polls wait for the database than it answers in a moment, as when a fleet that nobody
knows boots, the next one is told that there is nothing for now, and when to ask again. No board
depends on one poll: what it would have said it says then.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from . import attempts, audit, devices, events, rollouts, truth
from .behind import Behind
from .choices import Caller, Chooser
from .limits import Limits
from .messages import CheckUpdate, ReportStatus
from .offers import Decision
from .problems import Problem
from .schema import reports as report_table
from .settings import Settings
from .site import File, Site
from .store import INSERTS, Store

log = logging.getLogger("twinslot.server")

REMEMBER_S = 3600.0
"""Only the age of failed tries and the expiry of a release change an answer by time alone."""

_ADD_REPORT = {
    dialect: make(report_table).on_conflict_do_nothing().returning(report_table.c.id)
    for dialect, make in INSERTS.items()
}

_PASSING = ("bad_pointer", "bad_release", "bad_keyring", "busy", "window")
_UNPUBLISHED = ("no_channel", "bad_pointer", "bad_release", "bad_keyring")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a board is told; ``etag`` lets it be told in fewer bytes next time."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class _Poll:
    device_id: str
    facts: dict[str, Any]
    token: str | None  # hash of the board's own


@dataclass(frozen=True, slots=True)
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
        self._kept: dict[str, _Kept] = {}
        self._chooser = Chooser(site, settings)
        self._behind = Behind(store, limits.downloads_kept)
        self._waiting = 0  # polls, for the database
        self.polls = 0
        self.remembered = 0
        self.sent_away = 0
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
        generation = await self._store.current_generation()
        facts = ask.model_dump(exclude={"device_id"})
        facts["address"] = address
        stamp = (
            generation,
            self._site.stamp(ask.product, ask.channel),
            token,
            # Free space changes often and decides nothing: written down with the next answer.
            *(tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k != "free"),
        )
        self.polls += 1
        kept = self._kept.get(ask.device_id)
        if kept and kept.stamp == stamp and kept.until > time.monotonic():
            self._behind.seen(ask.device_id, int(time.time()))
            self.remembered += 1
            return kept.answer
        if self._waiting >= self._limits.polls:
            self.sent_away += 1
            return _told(_nothing("overload", self._limits.come_back_s()))
        self._waiting += 1
        try:
            answer, settled = await self._store.awrite_together(
                self._answers, _Poll(ask.device_id, facts, token)
            )
        finally:
            self._waiting -= 1
        self._behind.seen(ask.device_id, int(time.time()))
        if settled:
            self._keep(ask.device_id, _Kept(stamp, time.monotonic() + REMEMBER_S, answer))
        return answer

    def _keep(self, device_id: str, kept: _Kept) -> None:
        if len(self._kept) > self._limits.devices:
            self._kept.clear()
        self._kept[device_id] = kept

    def _answers(
        self, connection: Connection, polls: Sequence[_Poll]
    ) -> list[tuple[Answer, bool]]:
        """Answer polls that wait together; true for an answer that may be remembered.

        What they all need is read at once, and so is written what they bring: when a whole fleet
        boots, statements for each board by itself are what a database can't keep up with.
        """
        by_board = {poll.device_id: poll for poll in polls}
        if len(by_board) < len(polls):  # who has asked twice is answered twice, in turn
            return [self._answers(connection, [poll])[0] for poll in polls]
        now = int(time.time())
        rows = self._registered(connection, by_board, now)
        self._chooser.hold(connection, rows.keys())
        latest = attempts.latest_of(connection, rows)
        for board, before in latest.items():
            after = attempts.on_poll(connection, before, rows[board], now)
            self._ended(connection, before.state, after, now)
            latest[board] = after
        in_turn = {poll.device_id: rows[poll.device_id] for poll in polls}
        callers = self._chooser.callers(connection, in_turn, latest, now)
        return [self._answer(connection, caller, now) for caller in callers]

    def _answer(self, connection: Connection, caller: Caller, now: int) -> tuple[Answer, bool]:
        row, latest = caller.row, caller.latest
        decision, channel = self._chooser.decide(connection, caller, now, booking=True)
        if decision.offer is not None:
            self._book(connection, row, latest, decision, now)
        elif not _under_way(latest):
            _part(connection, row.device_id, decision, now)
        _log_poll(row.device_id, decision)
        settled = _settled(decision, latest)
        poll_s = self._chooser.poll_s(connection, caller, channel)
        if not settled:  # an answer that is remembered must not hang on the time of day
            poll_s = self._chooser.sooner_s(connection, caller, poll_s, now)
        body = _body(decision, poll_s, self._site.keyring(row.product))
        return _told(body), settled

    def _registered(
        self, connection: Connection, polls: Mapping[str, _Poll], now: int
    ) -> dict[str, Any]:
        """The boards' rows as they are now: made, or renewed where one says something new."""
        settings = self._chooser.rules(connection).settings
        known = devices.find_all(connection, polls, lock=True)
        said = {}
        for board, poll in polls.items():
            row = known.get(board)
            _check_token(row, poll.token)
            said[board] = poll.facts
            if row is None:
                said[board] = {**poll.facts, "enrolment": settings.enrolment_of(poll.facts)}
            elif row.product is None and row.enrolment == settings.enrolment_of({}):
                # One that has only reported so far said too little for the rules, which have had
                # no other word for it. Anything else is an operator's, and stands.
                devices.judge(connection, row, settings.enrolment_of(poll.facts))
        rows = devices.touch(connection, said, known, now, self._limits.devices)
        if new := [{"device_id": board} for board in polls if board not in known]:
            events.emit_all(connection, "device.new", new, now)
        return rows

    def _book(
        self, connection: Connection, row: Any, latest: Any, decision: Decision, now: int
    ) -> None:
        offer = decision.offer
        assert offer is not None and offer.release is not None
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
                "waits_until": now + decision.install_in_s if decision.install_in_s else None,
            },
            now,
        )

    def explain(self, connection: Connection, device_id: str, now: int) -> dict[str, Any]:
        """Say what the board would be answered now, and why, without booking anything."""
        return self._chooser.explain(connection, device_id, now)

    def pointer(self, connection: Connection, name: str, file: File) -> File | None:
        """A channel's pointer as it is served; None: as if there were none."""
        return self._chooser.pointer(connection, name, file)

    # -- reports ------------------------------------------------------------------------------

    async def report(self, report: ReportStatus, token: str | None) -> bool:
        """Keep a report; False where the same one is known already."""
        self.reports += 1
        now = int(time.time())
        new = await self._store.awrite(lambda c: self._report(c, report, token, now), True)
        if not new:
            self._behind.seen(report.device_id, now)
        self._kept.pop(report.device_id, None)
        return new

    def _report(
        self, connection: Connection, report: ReportStatus, token: str | None, now: int
    ) -> bool:
        device_id = report.device_id
        before = devices.find(connection, device_id, lock=True)
        _check_token(before, token)
        # A board this server has never seen may report: its database may be a new one.
        row = before
        if row is None:
            settings = self._chooser.rules(connection).settings
            said = {device_id: {"enrolment": settings.enrolment_of({})}}
            row = devices.touch(connection, said, {}, now, self._limits.devices)[device_id]
        kept = report.model_dump(exclude={"device_id", "current_version", "current_build"})
        added = connection.execute(
            _ADD_REPORT[connection.dialect.name],
            {"device_id": device_id, "received": now, **kept},
        ).scalar_one_or_none()
        if added is None:
            return False
        running = {
            "current_version": report.current_version,
            "current_build": report.current_build,
        }
        devices.change(
            connection,
            row,
            {
                "status": report.status,
                "status_version": report.version,
                "last_seen": now,
                **{name: value for name, value in running.items() if value is not None},
            },
        )
        limits = self._limits
        if added % 16 == 0 or min(limits.reports_per_device, limits.logs_per_device) < 16:
            kept_last = limits.reports_per_device, limits.logs_per_device
            attempts.keep_last(connection, device_id, *kept_last)
        was, after = attempts.on_report(connection, row, kept, now)
        self._ended(connection, was, after, now, said=True)
        return True

    def _ended(
        self, connection: Connection, was: str, after: Any, now: int, said: bool = False
    ) -> None:
        """Do what the end of an attempt asks for; ``was`` is its state before."""
        if after.state == was or after.state in truth.OPEN:
            return
        if not said:
            status = {"status": after.state, "status_version": after.version}
            devices.change(connection, after, status)
        if after.job_id is not None:
            attempts.set_node(connection, after.job_id, after.device_id, after)
        attempts.tell(connection, after, now)
        if after.state in truth.BAD and after.rollout_id is not None:
            why = rollouts.after_bad_report(connection, after.rollout_id, now)
            if why:
                said_of = {"rollout": after.rollout_id, "why": why}
                log.warning("rollout paused", extra={"fields": said_of})
                audit.note(
                    connection,
                    audit.SELF,
                    "rollout.pause",
                    f"rollout {after.rollout_id}",
                    None,
                    {"state": "paused", "why": why},
                )
                rollouts.tell(connection, rollouts.get(connection, after.rollout_id), now)

    def downloaded(
        self, path: str, client: str | None, first: int, sent: int, complete: bool
    ) -> None:
        """Note a download; written down with the next flush."""
        self._behind.downloaded(path, client, first, sent, complete)
        self.bytes_sent += sent

    def flush(self) -> None:
        """Write down who was seen and what was fetched; every few seconds and at the end."""
        self._behind.flush()


def _part(connection: Connection, device_id: str, decision: Decision, now: int) -> None:
    """End a board's part in what has nothing for it: else that would wait for it for ever."""
    if decision.ends_job:
        job_id, status = decision.ends_job
        why = decision.sentence if status == "failed" else None
        attempts.put_node(connection, job_id, device_id, status, why, now)
    if decision.leaves_rollout:
        rollouts.leave(connection, decision.leaves_rollout, device_id)


def _body(decision: Decision, poll_s: int, keyring: int) -> dict[str, Any]:
    """An answer as the board reads it."""
    offer = decision.offer
    known = {"keyring": keyring} if keyring else {}
    if offer is None:
        return _nothing(decision.reason, poll_s) | known
    body: dict[str, Any] = {"update_available": True, "poll": poll_s, **known}
    body["release"] = f"/{offer.path}"
    if offer.percent is not None:
        body["rollout"] = offer.percent
    if decision.install_in_s:
        body["install"] = decision.install_in_s
    return body


def _nothing(reason: str, poll_s: int) -> dict[str, Any]:
    return {"update_available": False, "poll": poll_s, "reason": reason}


def _told(body: dict[str, Any]) -> Answer:
    content = json.dumps(body, separators=(",", ":")).encode()
    return Answer(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _settled(decision: Decision, latest: Any) -> bool:
    """True for a "nothing for you" that holds until something is changed."""
    return (
        decision.offer is None
        and decision.reason not in _PASSING
        and decision.ends_job is None
        and decision.leaves_rollout is None
        and not (_under_way(latest) or (latest is not None and latest.presumed))
    )


def _under_way(latest: Any) -> bool:
    return latest is not None and latest.state in truth.OPEN


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
