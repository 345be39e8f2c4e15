"""The `machine` module of the virtual board: reset, reset cause, WDT, Timer, Pin, RTC, sleep.

The watchdog counts in the parent process, so it fires when this one hangs, and lives over a soft
reset. Timer callbacks are scheduled by a thread that does nothing else and exists only while a
Timer is armed. Not there: buses, ADC, PWM, UART.

Source: MicroPython ports/esp32/modmachine.c, machine_wdt.c, machine_timer.c, machine_rtc.c.
"""

import _thread
import sys
import time

import micropython
import shim_time
import soc
from umachine import PinBase, Signal  # noqa: F401

PWRON_RESET = 1
HARD_RESET = 2
WDT_RESET = 3
DEEPSLEEP_RESET = 4
SOFT_RESET = 5

PIN_WAKE = 2
EXT0_WAKE = 2
EXT1_WAKE = 3
TIMER_WAKE = 4
TOUCHPAD_WAKE = 5
ULP_WAKE = 6

_ticks_ms = time.ticks_ms
_ticks_add = time.ticks_add
_ticks_diff = time.ticks_diff
_sleep_ms = time.sleep_ms
_freq = 160000000


def reset():
    soc.end("reset")


def soft_reset():
    print("MPY: soft reboot")
    soc.end("soft-reset", repl=soc.repl_mode)


def reset_cause():
    return soc.config["reset_cause"]


def wake_reason():
    return TIMER_WAKE if reset_cause() == DEEPSLEEP_RESET else 0


def unique_id():
    return bytes(soc.config["mac"])


def freq(hz=None):
    global _freq
    if hz is None:
        return _freq
    if hz not in (20000000, 40000000, 80000000, 160000000, 240000000):
        raise ValueError("frequency must be 20MHz, 40MHz, 80Mhz, 160MHz or 240MHz")
    _freq = hz


def deepsleep(time_ms=0):
    """Sleep, then boot with reset cause 4; without a time only the reset button ends it."""
    soc.end("deepsleep", ms=time_ms)


def lightsleep(time_ms=0):
    if not time_ms:
        soc.halt()
    shim_time.sleep_ms(time_ms)


sleep = lightsleep


def idle():
    _sleep_ms(1)


def disable_irq():
    return 0


def enable_irq(state=0):
    pass


class RTC:
    """The board's clock: 2000-01-01 at power-on, kept over every other reset."""

    def datetime(self, value=None):
        if value is None:
            us = soc.clock_us()
            t = shim_time.gmtime(us // 1000000)
            return t[0], t[1], t[2], t[6], t[3], t[4], t[5], us % 1000000
        year, month, day, _, hour, minute, second, us = value
        seconds = shim_time.mktime((year, month, day, hour, minute, second, 0, 0))
        soc.set_clock_us(seconds * 1000000 + us)

    def init(self, value):
        self.datetime(value)

    def memory(self, data=None):
        if data is None:
            return soc.rtc_memory()
        if len(data) > soc.RTC_MEMORY:
            raise ValueError("buffer too long")
        soc.set_rtc_memory(data.encode() if isinstance(data, str) else data)


class WDT:
    """A watchdog that cannot be stopped; constructing it again only changes the timeout."""

    def __init__(self, id=0, timeout=5000):
        if id != 0:
            raise ValueError
        if timeout <= 0:
            raise ValueError("WDT timeout too short")
        soc.event("wdt", timeout=max(1, timeout // soc.config["speed"]))

    def feed(self):
        soc.feed()


# ---- Timer


def _tick():
    """The timer thread: wait for the earliest due time, schedule the dispatcher."""
    while soc.timers:
        _sleep_ms(1)
        if not _pending[0] and _ticks_diff(_ticks_ms(), _next[0]) >= 0:
            _pending[0] = 1
            try:
                micropython.schedule(_dispatch, 0)
            except RuntimeError:  # the queue is full: try again in a millisecond
                _pending[0] = 0
    _running[0] = 0


_next = [0]  # ticks at which the earliest timer is due
_pending = [0]
_running = [0]


def _dispatch(_):
    _pending[0] = 0
    now = _ticks_ms()
    for timer in list(soc.timers):
        if _ticks_diff(now, timer._due) >= 0:
            timer._fire(now)
    _plan()


def _plan():
    """Note when the next timer is due, and see that the thread is there."""
    if not soc.timers:
        return
    due = soc.timers[0]._due
    for timer in soc.timers:
        if _ticks_diff(timer._due, due) < 0:
            due = timer._due
    _next[0] = due
    if not _running[0]:
        _running[0] = 1
        _thread.start_new_thread(_tick, ())


class Timer:
    """A timer whose callback runs between two bytecodes of the main thread."""

    ONE_SHOT = 0
    PERIODIC = 1

    def __init__(self, id=-1, **kw):
        if not -1 <= id <= 3:
            raise ValueError("invalid Timer number")
        self._id = id
        self._callback = None
        if kw:
            self.init(**kw)

    def __repr__(self):
        return "Timer(%d)" % self._id

    def init(self, *, mode=PERIODIC, freq=-1, period=-1, callback=None, hard=False):
        self.deinit()
        if freq != -1:
            period = int(1000 / freq)
        if period <= 0:
            raise ValueError("invalid period")
        if self._id >= 0:  # one hardware timer has one setting
            for other in list(soc.timers):
                if other._id == self._id:
                    other.deinit()
        self._period = max(1, period // soc.config["speed"])  # of the host
        self._mode = mode
        self._callback = callback
        self._due = _ticks_add(_ticks_ms(), self._period)
        soc.timers.append(self)
        _plan()

    def deinit(self):
        if self in soc.timers:
            soc.timers.remove(self)

    def value(self):
        """Milliseconds since the timer was armed or last fired."""
        if self not in soc.timers:
            return 0
        return (self._period - _ticks_diff(self._due, _ticks_ms())) * soc.config["speed"]

    def _fire(self, now):
        if self._mode == self.ONE_SHOT:
            self.deinit()
        else:
            self._due = _ticks_add(self._due, self._period)
            if _ticks_diff(self._due, now) <= 0:  # late: don't fire for what was missed
                self._due = _ticks_add(now, self._period)
        if self._callback is None:
            return
        try:
            self._callback(self)
        except Exception as e:
            sys.print_exception(e)


# ---- Pin

_levels = {}
_handlers = {}


class Pin(PinBase):
    """A pin that remembers its level and tells the parent when it changes."""

    IN = 1
    OUT = 3
    OPEN_DRAIN = 7
    PULL_UP = 2
    PULL_DOWN = 1
    DRIVE_0 = 0
    DRIVE_1 = 1
    DRIVE_2 = 2
    DRIVE_3 = 3
    IRQ_RISING = 1
    IRQ_FALLING = 2
    WAKE_LOW = 4
    WAKE_HIGH = 5

    def __init__(self, id, mode=-1, pull=-1, *, value=None, drive=None, hold=None):
        if not isinstance(id, int) or not 0 <= id <= 48:
            raise ValueError("invalid pin")
        self._id = id
        self.init(mode, pull, value=value)

    def __repr__(self):
        return "Pin(%d)" % self._id

    def init(self, mode=-1, pull=-1, *, value=None, drive=None, hold=None):
        if value is not None:
            self.value(value)
        elif pull == self.PULL_UP:
            _levels.setdefault(self._id, 1)

    def value(self, x=None):
        if x is None:
            return _levels.get(self._id, 0)
        level = 1 if x else 0
        if _levels.get(self._id) != level:
            _levels[self._id] = level
            soc.event("pin", pin=self._id, value=level)

    def __call__(self, x=None):
        return self.value(x)

    def on(self):
        self.value(1)

    def off(self):
        self.value(0)

    def toggle(self):
        self.value(not self.value())

    def irq(self, handler=None, trigger=3, **_):
        _handlers[self._id] = (handler, trigger)
        return self
