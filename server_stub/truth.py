"""What became of one attempt to update one board. Pure: an attempt and news in, an attempt out.

    offered -> downloading -> staged -> trial -> confirmed | rolledback | failed

An update is done only when the board has said so *and* its new build has polled. A board that
comes back with its old build is rolled back even if it says nothing. What the server concluded by
itself (``presumed``) gives way to what the board says later; what the board said stands. A
board may stay ``staged`` for long: it says so itself while it waits for its install window.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

OPEN = ("offered", "downloading", "staged", "trial")
BAD = ("failed", "rolledback")
ENDED = ("confirmed", *BAD)

SET_ASIDE = ("withdrawn", "superseded", "interrupted")
"""Why the server itself ended an attempt that is no word against its build: it may be tried again,
and nobody counts it."""

SILENT_S = 3600
"""A new build that polls for so long without a word is taken as confirmed."""

_STEPS = {"staging": "downloading", "staged": "staged", "trial": "trial"}


@dataclass(frozen=True)
class Attempt:
    """One attempt; times are seconds since 1970."""

    build: str
    state: str = "offered"
    version: str | None = None
    from_build: str | None = None
    reason: str | None = None
    presumed: bool = False
    said_confirmed: bool = False
    polled_new: int | None = None
    bytes: int | None = None
    updated: int = 0
    ended: int | None = None
    waits_until: int | None = None

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


def after_report(
    attempt: Attempt, status: str, now: int, reason: str | None = None, bytes_: int | None = None
) -> Attempt:
    """Take a report of this attempt into account. Reports may come late, twice, out of order."""
    if attempt.state in ENDED and not attempt.presumed:
        return attempt
    if bytes_:
        attempt = dataclasses.replace(attempt, bytes=bytes_)
    if status in BAD:
        return _end(attempt, status, reason or status, now, presumed=False)
    if status == "confirmed":
        said = dataclasses.replace(attempt, said_confirmed=True)
        if attempt.polled_new is not None and attempt.state != "rolledback":
            return _end(said, "confirmed", None, now, presumed=False)
        return _forward(said, "trial", now)
    if status in _STEPS:
        return _forward(attempt, _STEPS[status], now)
    return attempt


def after_poll(
    attempt: Attempt, build: str | None, version: str, now: int, staged: str | None = None
) -> Attempt:
    """Take into account which build a poll came from, and which one waits in the other slot."""
    if attempt.state in ENDED and not attempt.presumed:
        return attempt
    is_new = build == attempt.build if build else version == attempt.version
    if is_new:
        since = now if attempt.polled_new is None else attempt.polled_new
        here = dataclasses.replace(attempt, polled_new=since)
        if here.said_confirmed:
            return _end(here, "confirmed", None, now, presumed=False)
        if attempt.state == "confirmed":
            return here
        if now - since >= SILENT_S:
            return _end(here, "confirmed", "silent", now, presumed=True)
        return dataclasses.replace(
            here, state="trial", updated=now, reason=None, presumed=False, ended=None
        )
    if staged and staged == attempt.build:
        return dataclasses.replace(
            attempt, state="staged", updated=now, reason=None, presumed=False, ended=None
        )
    was_confirmed = attempt.state == "confirmed" and build == attempt.from_build  # by its silence
    if attempt.state in ("staged", "trial") or was_confirmed:
        return _end(attempt, "rolledback", "came_back_old", now, presumed=True)
    if attempt.is_open and attempt.from_build and build and build != attempt.from_build:
        return _end(attempt, "failed", "superseded", now, presumed=True)
    return attempt


def give_up(attempt: Attempt, reason: str, now: int) -> Attempt:
    """End an attempt that the board has left alone; it may still have the last word."""
    return _end(attempt, "failed", reason, now, presumed=True) if attempt.is_open else attempt


def time_out(attempt: Attempt, before: int, now: int) -> Attempt:
    """Give up an attempt of which nothing was heard since ``before``; an offer that was not taken
    up tells nothing of its build."""
    if attempt.updated >= before:
        return attempt
    return give_up(attempt, "withdrawn" if attempt.state == "offered" else "timed_out", now)


def is_set_aside(attempt: Any) -> bool:
    """True for an attempt, or its row, that ended by no fault of board or build."""
    return attempt.presumed and attempt.reason in SET_ASIDE


def _forward(attempt: Attempt, state: str, now: int) -> Attempt:
    """A step that came late changes nothing; one after a presumed end shows it was none."""
    if attempt.is_open and OPEN.index(state) <= OPEN.index(attempt.state):
        return attempt
    if attempt.state in ("rolledback", "confirmed"):
        return attempt  # the poll that showed it came from a build, and weighs more
    return dataclasses.replace(
        attempt, state=state, updated=now, reason=None, presumed=False, ended=None
    )


def _end(attempt: Attempt, state: str, reason: str | None, now: int, presumed: bool) -> Attempt:
    return dataclasses.replace(
        attempt, state=state, reason=reason, presumed=presumed, updated=now, ended=now
    )
