"""The LED that shows an update."""

import asyncio

import machine

import twinslot

PIN = 2


class Levels:
    """Notes every level that is set."""

    def __init__(self, blink):
        self.seen = []
        self._led = blink._led
        blink._led = self

    def value(self, *level):
        if level:
            self.seen.append(1 if level[0] else 0)
            self._led.value(level[0])
        return self._led.value()


async def test_progress_blinks_and_the_end_is_dark():
    blink = twinslot.Blink(PIN)
    levels = Levels(blink)
    for done in range(4):
        blink("progress", {"done": done, "total": 4})
    assert levels.seen == [1, 0, 1, 0]
    blink("progress", {"done": 4, "total": 4})
    for name in ("confirmed", "idle"):
        blink(name, {})
        assert machine.Pin(PIN).value() == 0


async def test_an_error_flashes_ten_times_and_stops():
    blink = twinslot.Blink(PIN)
    levels = Levels(blink)
    blink("failed", {"code": "network"})
    await asyncio.sleep_ms(1600)
    assert levels.seen == [1, 0] * 10


async def test_events_it_does_not_know_are_none_of_its_business():
    blink = twinslot.Blink(PIN)
    levels = Levels(blink)
    for name in ("checking", "staging", "staged", "trial", "nosuch"):
        blink(name, {})
    assert levels.seen == []
