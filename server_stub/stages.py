"""How a rollout goes on: who belongs to a stage, and when it advances, waits or pauses. Pure.

    draft -> pilot -> expand -> complete          and from each: paused, aborted

A stage is ``{"percent": 5}`` of the target, ``{"count": 20}`` of it, or ``{"label":
"ring=pilot"}``; each holds the ones before it. A board's place in the order is its bucket, the
same as on the board itself (``release.in_rollout``): a larger share only adds boards, and nothing
depends on when the scheduler runs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

BUCKETS = 10_000
ACTIVE = ("pilot", "expand")
_MOST = 0x7FFF_FFFF  # what a database takes for a number

Board = tuple[str, Mapping[str, str]]  # device id, labels


@dataclass(frozen=True)
class Policy:
    """How careful a rollout is; percents are of boards, times are seconds."""

    success_percent: float = 95
    failure_percent: float = 5
    min_sample: int = 5
    bake_s: int = 3600
    max_concurrent: int = 100
    timeout_s: int = 3600
    seen_within_s: int = 86400
    gate: bool = False  # each further stage waits for a person
    include_new: bool = False
    promote: bool = True  # when every board has it, so has the channel (``goes_to_all``)
    deadline_s: int = 0  # after so much of a stage its boards update outside windows too; 0: never

    # Of JSON: these members, these types, and no others.
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    def __post_init__(self) -> None:
        for name in ("success_percent", "failure_percent"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 100")
        for name in ("min_sample", "max_concurrent", "timeout_s", "seen_within_s"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 to {_MOST}")
        for name in ("bake_s", "deadline_s"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to {_MOST}")


def policy_of(row: Any) -> Policy:
    """The policy of a rollout's row."""
    return Policy(**row.policy)


@dataclass(frozen=True)
class Counts:
    """Boards of the stages so far: by their newest attempt in this rollout."""

    members: int = 0  # seen lately, or with an attempt
    confirmed: int = 0
    failed: int = 0
    rolledback: int = 0
    in_flight: int = 0
    asleep: int = 0  # not among the members: no stage waits for them

    @property
    def bad(self) -> int:
        return self.failed + self.rolledback

    @property
    def finished(self) -> int:
        return self.confirmed + self.bad

    @property
    def waiting(self) -> int:
        return max(0, self.members - self.finished - self.in_flight)


@dataclass(frozen=True)
class Progress:
    """Where a rollout stands."""

    state: str
    stage: int
    stages: int
    counts: Counts
    passed_at: int | None = None
    gate_open: bool = False
    is_share: bool = False  # the stage is a percentage, which may be too small for one board


@dataclass(frozen=True)
class Verdict:
    """What to do now."""

    action: Literal["hold", "passed", "advance", "complete", "pause"]
    why: str


def judge(progress: Progress, policy: Policy, now: int) -> Verdict:
    """Say how a running rollout goes on. Errors are looked at first.

    Nothing passes that no board has run: a stage that has nobody, or whose boards all sleep, shows
    nothing. Only a share too small for one board gives way to the next, larger one.
    """
    counts = progress.counts
    if failing(counts, policy):
        return Verdict(
            "pause",
            f"{counts.bad} of {counts.finished} finished boards failed or rolled back"
            f" (more than {policy.failure_percent:g} %)",
        )
    is_last = progress.stage + 1 >= progress.stages
    if not counts.members:
        if counts.asleep or is_last or not progress.is_share:
            return Verdict("hold", "no board has run it yet")
        return _onward(progress, policy, "has no board")
    if not enough(counts, policy):
        if counts.waiting == 0 and counts.in_flight == 0:
            return Verdict(
                "pause",
                f"{counts.confirmed} of {counts.members} boards confirmed, and none is left to"
                f" reach {policy.success_percent:g} %",
            )
        return Verdict(
            "hold",
            f"{counts.confirmed} of {counts.members} boards confirmed"
            f" ({policy.success_percent:g} % needed)",
        )
    if progress.passed_at is None:
        return Verdict("passed", "enough boards confirmed; the bake time begins")
    left = progress.passed_at + policy.bake_s - now
    if left > 0:
        return Verdict("hold", f"baking for another {left} s")
    if is_last:
        return Verdict("complete", "the last stage has passed")
    return _onward(progress, policy, "has passed")


def _onward(progress: Progress, policy: Policy, why: str) -> Verdict:
    if policy.gate and not progress.gate_open:
        return Verdict("hold", "waiting for a person to open the next stage")
    return Verdict("advance", f"stage {progress.stage + 1} {why}")


def enough(counts: Counts, policy: Policy) -> bool:
    """True where so many boards confirmed that the stage may bake."""
    share = counts.confirmed * 100 >= policy.success_percent * counts.members
    return counts.confirmed > 0 and share


def failing(counts: Counts, policy: Policy) -> bool:
    """True where more boards fail than may, with enough of them to tell."""
    sample = min(policy.min_sample, max(1, counts.members))
    return (
        counts.finished >= sample and counts.bad * 100 > policy.failure_percent * counts.finished
    )


def free_places(counts: Counts, policy: Policy) -> int:
    """How many more boards may begin now: a finished one gives its place to the next."""
    return max(0, policy.max_concurrent - counts.in_flight)


def bucket(seed: str, device_id: str) -> int:
    """The place of a board in the order of a rollout, 0 to 9999 (``release.in_rollout``)."""
    digest = hashlib.sha256((seed + device_id).encode()).digest()
    return int.from_bytes(digest[:4], "big") % BUCKETS


def members(
    boards: Iterable[Board], stages: Sequence[Mapping[str, Any]], upto: int, seed: str
) -> set[str]:
    """The boards of the stages 0 to ``upto``."""
    labels = dict(boards)
    ordered = sorted((bucket(seed, device_id), device_id) for device_id in labels)
    return {
        device_id
        for place, (drawn, device_id) in enumerate(ordered)
        if any(_within(stage, place, drawn, labels[device_id]) for stage in stages[: upto + 1])
    }


def joins(board: Board, stages: Sequence[Mapping[str, Any]], upto: int, seed: str) -> bool:
    """True if a newcomer belongs to the stages so far; counts are full, they take nobody."""
    device_id, labels = board
    drawn = bucket(seed, device_id)
    return any(
        "count" not in stage and _within(stage, 0, drawn, labels) for stage in stages[: upto + 1]
    )


def _within(stage: Mapping[str, Any], place: int, drawn: int, labels: Mapping[str, str]) -> bool:
    if "percent" in stage:
        return drawn < stage["percent"] * (BUCKETS // 100)
    if "count" in stage:
        return place < stage["count"]
    return matches({"label": stage["label"]}, labels)


def goes_to_all(target: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> bool:
    """True where the last stage is every board there is, so that none is left for its channel."""
    return not any(target.values()) and stages[-1].get("percent") == 100


def check_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse stages that mean nothing, or that shrink.

    Raises:
        ValueError: which stage, and why.
    """
    if not stages:
        raise ValueError("a rollout needs at least one stage")
    before: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        kinds = set(stage) & {"percent", "count", "label"}
        if len(kinds) != 1 or len(stage) != 1:
            raise ValueError(f"stage {number}: expected one of percent, count, label")
        kind = kinds.pop()
        value = stage[kind]
        if kind == "label":
            key, sign, _ = str(value).partition("=")
            if not (key and sign):
                raise ValueError(f"stage {number}: label {value!r}: expected key=value")
            continue
        top = 100 if kind == "percent" else _MOST
        if type(value) not in (int, float) or not 0 < value <= top:
            raise ValueError(f"stage {number}: {kind} {value!r} is out of range")
        if value < before.get(kind, 0):
            raise ValueError(f"stage {number}: {kind} {value} is less than before")
        before[kind] = value


def matches(target: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """True if a board with ``labels`` is meant: {} is everybody, ``label`` one or more k=v."""
    wanted = target.get("label") or []
    wanted = [wanted] if isinstance(wanted, str) else wanted
    for text in wanted:
        key, _, value = text.partition("=")
        if labels.get(key) != value:
            return False
    return True
