"""Maintenance windows: when may boards with a label download, and when install. Pure.

Evaluated by the server in the window's own time zone, so that a board needs no clock. Days are
those on which a window opens; one whose end is not after its start lasts into the next day. One
that would open in the hour which summer time skips opens an hour later by the clock, and lasts as
long as usual.
"""

import datetime as dt
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

KINDS = ("download", "install")
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


class WindowError(ValueError):
    """A window that can't be."""


@dataclass(frozen=True)
class Window:
    """``label`` is ``key=value`` or ``*``; ``days`` holds 0 (Monday) to 6; times are HH:MM."""

    label: str
    kind: str
    zone: str
    days: tuple[int, ...]
    start: str
    end: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise WindowError(f"kind {self.kind!r}: expected download or install")
        if self.label != "*" and "=" not in self.label:
            raise WindowError(f"label {self.label!r}: expected key=value or *")
        if not self.days or not set(self.days) <= set(range(7)):
            raise WindowError(f"days {list(self.days)}: expected some of 0 (Monday) to 6")
        for clock in (self.start, self.end):
            if not _CLOCK.fullmatch(clock):
                raise WindowError(f"time {clock!r}: expected HH:MM")
        try:
            ZoneInfo(self.zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise WindowError(f"zone {self.zone!r}: expected an IANA name or UTC") from None

    def applies_to(self, labels: Mapping[str, str]) -> bool:
        if self.label == "*":
            return True
        key, _, value = self.label.partition("=")
        return labels.get(key) == value

    def opens_in(self, now: int) -> int:
        """Seconds until it is open; 0 while it is."""
        zone = ZoneInfo(self.zone)
        today = dt.datetime.fromtimestamp(now, zone).date()
        best = None
        for offset in range(-1, 9):
            day = today + dt.timedelta(days=offset)
            if day.weekday() not in self.days:
                continue
            overnight = self.end <= self.start
            start, end = _at(day, self.start), _at(day + dt.timedelta(days=overnight), self.end)
            opens, closes = _moment(start, zone), _moment(end, zone)
            if dt.datetime.fromtimestamp(opens, zone).replace(tzinfo=None) != start:
                closes = opens + int((end - start).total_seconds())
            if opens <= now < closes:
                return 0
            if opens > now and (best is None or opens < best):
                best = opens
        return best - now if best is not None else 7 * 86400


def opens_in(windows: Iterable[Window], kind: str, labels: Mapping[str, str], now: int) -> int:
    """Seconds until a board with ``labels`` may; 0 is now, and so is having no window.

    A window for a label stands above the one for all: a site's own hours are its own.
    """
    applying = [w for w in windows if w.kind == kind and w.applies_to(labels)]
    own = [w for w in applying if w.label != "*"]
    return min((w.opens_in(now) for w in own or applying), default=0)


def shut(
    windows: Collection[Window], boards: Mapping[str, Mapping[str, str]], now: int
) -> set[str]:
    """Those of these boards, each with its labels, that may not both download and install now."""
    asked = {window.label for window in windows}
    known: dict[frozenset[str], bool] = {}  # by those labels that matter: boards are many
    found = set()
    for board, labels in boards.items():
        alike = frozenset(asked.intersection(f"{k}={v}" for k, v in labels.items()))
        if alike not in known:
            known[alike] = any(opens_in(windows, kind, labels, now) for kind in KINDS)
        if known[alike]:
            found.add(board)
    return found


def _at(day: dt.date, clock: str) -> dt.datetime:
    return dt.datetime.combine(day, dt.time.fromisoformat(clock))


def _moment(when: dt.datetime, zone: ZoneInfo) -> int:
    return int(when.replace(tzinfo=zone).timestamp())
