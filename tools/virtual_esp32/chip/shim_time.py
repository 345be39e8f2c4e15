"""`time` as an ESP32 has it: epoch 2000, the board's own clock, whole seconds.

Sleeps are cut in slices while a machine.Timer is armed: the unix port runs scheduled callbacks
only between two bytecodes, the ESP32 also while it sleeps. So they are while somebody may press
Ctrl-C.
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
    if not (soc.timers or soc.attended):
        return _time.sleep(seconds)
    sleep_ms(int(seconds * 1000))


def sleep_us(us):
    if us < 10000 or not (soc.timers or soc.attended):
        return _time.sleep_us(us)
    sleep_ms(us // 1000)
