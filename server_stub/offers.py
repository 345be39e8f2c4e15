"""Which release, if any, one board is offered, and why. Pure: what it is told in, the answer out.

Precedence: a pin of the board, then a job, then a rollout, then its channel. The first of them
that is there decides. The rule of what suits a board is the device's own (``release.judge``),
asked with what the board said of itself. Where a board says less than it knows (its anti-rollback
floor, the builds that failed on it, its slot's size), it will refuse by itself what is offered
here in good faith.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from twinslot import release as rules
from twinslot import semver
from twinslot.errors import OtaError, ReleaseError

DEFAULT_POLL_S = 300


@dataclass(frozen=True)
class Board:
    """What a board says of itself when it asks."""

    device_id: str
    product: str
    hardware: str
    current_version: str
    current_build: str | None = None
    chip_id: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A release that something wants on this board.

    ``hold`` is (stable word, sentence) where it must wait; ``release`` is None where it can't be
    read, and ``hold`` says why.
    """

    origin: str  # pin, job, rollout, channel
    says: str  # "rollout 3 'June' (stage 2 of 4)"
    path: str = ""
    release: rules.Release | None = None
    hold: tuple[str, str] | None = None
    blocked: str | None = None
    force: bool = False
    percent: Mapping | None = None  # the pointer's {"percent", "seed"}
    late: bool = False  # past its deadline: windows no longer hold it
    rollout_id: int | None = None
    job_id: int | None = None


class Tries(NamedTuple):
    """Attempts of a build on one board within a day: that failed, and that broke off before."""

    failed: int = 0
    broken_off: int = 0


MOST_TRIES = Tries(failed=3, broken_off=20)


@dataclass(frozen=True)
class Situation:
    """Everything that bears on the answer to one board."""

    board: Board
    candidates: Sequence[Candidate]  # what decides; behind it what stands in if it is blocked
    enrolment: str = "accepted"
    tries: Mapping[str, Tries] = field(default_factory=dict)  # by build
    max_tries: Tries = MOST_TRIES
    download_in_s: int = 0  # until its window opens; 0 is now
    install_in_s: int = 0
    staged: str | None = None  # the build that waits in its other slot; None: it can't wait


@dataclass(frozen=True)
class Decision:
    """The answer: a release to fetch, or the stable word for why there is none; and a sentence."""

    reason: str
    sentence: str
    offer: Candidate | None = None
    version: str | None = None
    install_in_s: int = 0  # fetch it now, install it then
    ends_job: tuple[int, str] | None = None  # this board's part in it: completed, or failed
    leaves_rollout: int | None = None  # it can't take what this one brings


def decide(situation: Situation, now: int) -> Decision:
    """Answer one board.

    Args:
        situation: all that is known.
        now: seconds since 1970.
    """
    if situation.enrolment != "accepted":
        return Decision(
            situation.enrolment,
            {
                "pending": "This board waits to be accepted, so it is offered nothing.",
                "decommissioned": "This board is decommissioned, so it is offered nothing.",
            }.get(situation.enrolment, "This board may not update."),
        )
    if not situation.candidates:
        return Decision("no_channel", "Nothing is published for this board's channel.")
    first, *fallbacks = situation.candidates
    decision = _judge(situation, first, now)
    if decision.reason == "blocked":
        for candidate in fallbacks:
            if (other := _judge(situation, candidate, now)).offer:
                return other
    return decision


def _judge(situation: Situation, candidate: Candidate, now: int) -> Decision:
    board, says = situation.board, candidate.says
    release = candidate.release
    if release is None:
        word, why = candidate.hold or ("bad_release", "it can't be read")
        return Decision(word, f"{says}: {why}; it is not offered.")
    version = release.version
    image = release.firmware

    def no(word: str, why: str, part: str | None = None) -> Decision:
        return Decision(
            word,
            f"{says} wants {version}: {why}.",
            None,
            version,
            ends_job=(candidate.job_id, part) if candidate.job_id and part else None,
            leaves_rollout=candidate.rollout_id if part == "failed" else None,
        )

    if candidate.blocked is not None:
        return no("blocked", f"that release is blocked ({candidate.blocked})")
    current = _version(board.current_version)
    same = board.current_build in (None, "", image.build)
    if same and semver.compare(version, current) == 0:
        return no("up_to_date", "the board runs it already", "completed")
    try:
        rules.judge(
            release,
            rules.Board(
                product=board.product,
                hardware=board.hardware,
                chip_id=image.chip_id if board.chip_id is None else board.chip_id,
                version=current,
                build=board.current_build,
                floor=0,
                now=now,
                failed=(),
                slot_size=rules.SIZE_LIMIT,
            ),
        )
    except OtaError as exc:
        return no(
            exc.code, f"the board would refuse it ({exc.message})", None if exc.retry else "failed"
        )
    percent = candidate.percent
    if percent is not None and not rules.in_rollout(
        percent["percent"], percent["seed"], board.device_id, hashlib.sha256
    ):
        return no("rollout", f"the board is not among the first {percent['percent']} %")
    if candidate.hold is not None:
        return no(*candidate.hold)
    if not candidate.force:
        tries, most = situation.tries.get(image.build, Tries()), situation.max_tries
        if tries.failed >= most.failed:
            return no("tries", f"{tries.failed} attempts failed on this board within a day")
        if tries.broken_off >= most.broken_off:
            return no("tries", f"{tries.broken_off} attempts broke off on this board within a day")
    if candidate.force or candidate.late:
        return Decision("offered", f"{says} offers {version}.", candidate, version)
    wait_s = 0 if situation.staged == image.build else situation.download_in_s
    if situation.staged is None:  # its agent installs at once what it has fetched
        wait_s = max(wait_s, situation.install_in_s)
    if wait_s:
        return no("window", f"its maintenance window opens in {_minutes(wait_s)} min")
    then = situation.install_in_s
    when = f", to be installed in {_minutes(then)} min" if then else ""
    return Decision("offered", f"{says} offers {version}{when}.", candidate, version, then)


def _minutes(seconds: int) -> int:
    return -(-seconds // 60)


def _version(text: str) -> str:
    """A board that can't name its version in SemVer (stock firmware) is older than any."""
    try:
        semver.parse(text)
    except ReleaseError:
        return "0.0.0-0"
    return text
