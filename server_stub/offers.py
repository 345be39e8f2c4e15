"""Which release, if any, one board is offered. Pure: what it is told in, the answer out.

The rule is the device's own (``release.judge``), asked with what the board said of itself. Where
a board says less than it knows (its anti-rollback floor, the builds that failed on it, its slot's
size), it will refuse by itself what is offered here in good faith.
"""

import hashlib
from dataclasses import dataclass

from twinslot import release as rules
from twinslot import semver
from twinslot.errors import OtaError, ReleaseError

from .site import Channel

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
class Offer:
    """The answer: a release to fetch, or the stable word for why there is none."""

    release: str | None  # path below the site
    reason: str
    version: str | None = None


def decide(board: Board, channel: Channel, now: int) -> Offer:
    """Judge the channel's release for one board.

    Args:
        board: what the board said.
        channel: what is published.
        now: seconds since 1970.
    """
    release = channel.release
    image = release.firmware
    version = _version(board.current_version)
    same = board.current_build in (None, "", image.build)
    if same and semver.compare(release.version, version) == 0:
        return Offer(None, "up_to_date", release.version)
    try:
        rules.judge(
            release,
            rules.Board(
                product=board.product,
                hardware=board.hardware,
                chip_id=image.chip_id if board.chip_id is None else board.chip_id,
                version=version,
                build=board.current_build,
                floor=0,
                now=now,
                failed=(),
                slot_size=rules.SIZE_LIMIT,
            ),
        )
    except OtaError as exc:
        return Offer(None, exc.code, release.version)
    if channel.rollout is not None and not rules.in_rollout(
        channel.rollout["percent"], channel.rollout["seed"], board.device_id, hashlib.sha256
    ):
        return Offer(None, "rollout", release.version)
    return Offer(channel.release_path, "offered", release.version)


def _version(text: str) -> str:
    """A board that can't name its version in SemVer (stock firmware) is older than any."""
    try:
        semver.parse(text)
    except ReleaseError:
        return "0.0.0-0"
    return text
