"""`select` whose poll lets machine.Timer callbacks run, and heeds Ctrl-C, while it waits, as the
ESP32's does."""

import select as _select
import time as _time
from select import *  # noqa: F403

import soc

_SLICE_MS = 5


def _real(timeout):
    """What the host must wait where the board's time runs faster."""
    return -(-timeout // soc.config["speed"]) if timeout > 0 else timeout


class _Poll:
    def __init__(self):
        poll = _select.poll()
        self._poll = poll
        self.register = poll.register
        self.unregister = poll.unregister
        self.modify = poll.modify

    def ipoll(self, timeout=-1, flags=0):
        timeout = _real(timeout)
        if timeout == 0 or not (soc.timers or soc.attended):
            soc.heed()
            return self._poll.ipoll(timeout, flags)
        return self._sliced(timeout)

    def poll(self, timeout=-1, flags=0):
        timeout = _real(timeout)
        if timeout == 0 or not (soc.timers or soc.attended):
            soc.heed()
            return self._poll.poll(timeout)
        return self._sliced(timeout)

    def _sliced(self, timeout):
        end = _time.ticks_add(_time.ticks_ms(), max(timeout, 0))
        while True:
            soc.heed()
            left = _SLICE_MS
            if timeout >= 0:
                left = min(left, max(0, _time.ticks_diff(end, _time.ticks_ms())))
            found = self._poll.poll(left)
            if found or (timeout >= 0 and _time.ticks_diff(end, _time.ticks_ms()) <= 0):
                return found


def poll():
    return _Poll()
