"""`time` as an ESP32 has it: epoch 2000, the board's own clock, whole seconds.

Sleeps are cut in slices while a machine.Timer is armed: the unix port runs scheduled callbacks
only between two bytecodes, the ESP32 also while it sleeps. So they are while somebody may press
Ctrl-C.

`configure` bends time for tests: ticks that start again from 0 after 2**30 ms, as a 32-bit port's
do, and seconds that pass faster than the host's.
"""

import time as _time
from time import (  # noqa: F401
    ticks_add,
    ticks_cpu,
    ticks_diff,
    ticks_ms,
    ticks_us,
)

import soc

_EPOCH_2000 = 946684800
_SLICE_MS = 5
_speed = 1
_real_ms = _time.ticks_ms


def time():
    return soc.clock_us() // 1000000


def time_ns():
    return soc.clock_us() * 1000


def gmtime(seconds=None):
    if seconds is None:
        seconds = time()
    return _time.gmtime(int(seconds) + _EPOCH_2000)[:8]


localtime = gmtime


def mktime(value):
    # The host's zone is UTC: the parent sees to that.
    return int(_time.mktime(tuple(value)[:8] + (0,))) - _EPOCH_2000


def sleep_ms(ms):
    if not (soc.timers or soc.attended):
        return _time.sleep_ms(ms)
    end = ticks_add(ticks_ms(), ms)
    while True:
        soc.heed()
        left = ticks_diff(end, ticks_ms())
        if left <= 0:
            return
        _time.sleep_ms(min(left, _SLICE_MS))


def sleep(seconds):
    if _speed == 1 and not (soc.timers or soc.attended):
        return _time.sleep(seconds)
    sleep_ms(int(seconds * 1000))


def sleep_us(us):
    if us < 10000 or not (soc.timers or soc.attended):
        return _time.sleep_us(us)
    sleep_ms(us // 1000)


def configure(speed, wrap_in_ms):
    """Let time pass `speed` times as fast; let ticks wrap to 0 that soon, at 2**30 (None: as the
    host's do). Returns True where asyncio's own C code can't follow, as it asks the host."""
    global _speed
    if speed == 1 and wrap_in_ms is None:
        return False
    _speed = speed
    mask = (1 << 30) - 1
    began = _real_ms()
    start = 1 if wrap_in_ms is None else (1 << 30) - wrap_in_ms

    def ticks_ms():
        return (start + _time.ticks_diff(_real_ms(), began) * speed) & mask

    def ticks_us():  # noqa: F811
        return _time.ticks_us() * speed & mask

    def ticks_add(ticks, delta):
        return (ticks + delta) & mask

    def ticks_diff(a, b):
        return (a - b + (1 << 29) & mask) - (1 << 29)

    def sleep_ms(ms):
        end = ticks_add(ticks_ms(), ms)
        while True:
            left = ticks_diff(end, ticks_ms())
            if left <= 0:
                return
            _time.sleep_ms(min(-(-left // speed), _SLICE_MS))

    def sleep_us(us):
        _time.sleep_us(us // speed)

    for function in (ticks_ms, ticks_us, ticks_add, ticks_diff, sleep_ms, sleep_us):
        globals()[function.__name__] = function
    return True
