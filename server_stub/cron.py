"""Cron expressions as crontab(5) means them, as triggers of APScheduler. Pure.

APScheduler counts weekdays from Monday and wants day and weekday both to match; crontab counts
them from Sunday (0 or 7) and, where neither begins with ``*``, takes either.
"""

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def trigger(expression: str, zone: str) -> BaseTrigger:
    """Return the trigger of minute, hour, day, month and weekday.

    Raises:
        ValueError: it is not such an expression, or the zone is none.
    """
    try:
        minute, hour, day, month, weekday = expression.lower().split()
        weekdays = _weekdays(weekday)

        def at(day: str, weekdays: str) -> CronTrigger:
            return CronTrigger(
                minute=minute,
                hour=hour,
                day=day,
                month=month,
                day_of_week=weekdays,
                timezone=zone,
            )

        both = at(day, weekdays)
        if day.startswith("*") or weekday.startswith("*"):
            return both
        return OrTrigger([at(day, "*"), at("*", weekdays)])
    except Exception as exc:  # the zone's library raises KeyError, too
        raise ValueError(f"cron {expression!r} in {zone!r}: {exc}") from None


def _weekdays(field: str) -> str:
    """Name the days of a weekday field."""
    chosen: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = 0, 6
        else:
            start, _, end = span.partition("-")
            first = _weekday(start)
            last = _weekday(end) if end else 6 if step else first
            if last < first:  # fri-sun, 5-0
                last += 7
        chosen |= {day % 7 for day in range(first, last + 1, int(step or 1))}
    return ",".join(_DAYS[day] for day in sorted(chosen))


def _weekday(text: str) -> int:
    if text in _DAYS:
        return _DAYS.index(text)
    number = int(text)
    if not 0 <= number <= 7:
        raise ValueError(f"weekday {number}: expected 0 to 7")
    return number
