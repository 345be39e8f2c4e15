"""The boot guard: the first lines of ``boot.py``, on every boot.

    import twinslot.guard
    twinslot.guard.start()

It finds out from flash and journal what this boot is (``health.reconcile``), and sees to it that
the agent is reached, whatever the application does. A ``machine.Timer`` resets the board unless
somebody calls ``feed`` in time, which the agent does from the event loop. On a trial boot such a
reset returns to the old slot. On any other, starts that fail are counted, and after the fifth in a
row the agent runs alone, without ``main.py``, for an hour: a release that mends the application
can arrive. (At the prompt, ``twinslot.guard.stop()`` ends the watch.) Soft resets, by which tools
on the cable work as well as an application that ends, and resets without a known cause count a
twentieth. Power-on, which is also brown-out and the EN pin, and wake-up count nothing: they are a
board's daily life, and cost no flash write.

A loop that hangs inside C code does not run timers; for that there is the hardware watchdog
(``wdt`` in seconds), which the same timer feeds, and which can't be stopped until the next reset.

``start`` never raises: whatever is wrong with the journal or the slots, the application boots.
"""

import gc
import sys

import machine

_STARTS = 5  # that fail in a row, then the agent runs alone
_SOFT_STARTS = 20  # soft resets that count as one of these
_ALONE_S = 3600  # then the application gets another chance
GC_THRESHOLD = 8192  # bytes
_PWRON = 1  # machine.PWRON_RESET
_DEEPSLEEP = 4
_SOFT = 5
_UNKNOWN = 0  # also a reset over USB or JTAG

_verdict = None
_timer = None
_wdt = None
_left = 0


def start(wdt=0, config="/ota.json", patience=120):
    """Reconcile, and arm the way back. Later calls in the same boot do nothing but start a
    hardware watchdog that is not running yet.

    Args:
        wdt: seconds of the hardware watchdog, 0 for none. It stays on after the trial.
        config: what the agent is made from when it must run alone.
        patience: seconds from here until the agent's event loop runs.

    Returns:
        ``"idle"``, ``"trial"`` or ``"armed"``, as ``health.reconcile``.
    """
    global _verdict
    if gc.threshold() < 0:
        # Left alone, the collector lets garbage spread over the whole heap before its first run,
        # and what stays lies scattered in it: of 45 KB free no 4 KB were in one piece, with this
        # 33 KB are. An application that has set its own threshold keeps it.
        gc.threshold(GC_THRESHOLD)
    try:
        if _verdict is None:
            _verdict = "idle"
            _boot(machine.reset_cause(), config, patience)
        if wdt and not _wdt:
            _arm_wdt(wdt)
    except Exception as exc:
        # Also errors of our own making: a guard that keeps the application from booting would
        # be worse than none.
        print("twinslot: guard:", exc)
        sys.print_exception(exc)
    return _verdict


def _boot(cause, config, patience):
    global _verdict
    from . import health, tidy
    from .journal import Journal
    from .slot import FirmwareSlot

    feed(patience)
    journal = Journal.shared()
    _verdict = health.reconcile(FirmwareSlot(), journal, cause)
    if _verdict == "rejected":
        machine.reset()
    if _verdict == "trial":
        print("twinslot: guard: this boot is a trial")
        feed(journal.get("trial").get("hang") or patience)
    elif cause not in (_PWRON, _DEEPSLEEP):
        starts = journal.starts() + (1 if cause in (_SOFT, _UNKNOWN) else _SOFT_STARTS)
        journal.set_starts(starts)
        if starts > _STARTS * _SOFT_STARTS and _verdict == "idle":
            _run_alone(journal, config)
    del health
    tidy()  # before the application loads what stays: no holes between


def _run_alone(journal, config):
    """Safe mode: the agent without the application, then a reset into another try."""
    import asyncio

    from .agent import Agent

    print("twinslot: guard: starts fail; the agent runs alone")
    journal.set_starts(0)
    agent = Agent.from_config(config)  # where this fails too, main.py is all there is left
    try:
        asyncio.run(asyncio.wait_for(agent.run(), _ALONE_S))
    except Exception as exc:
        sys.print_exception(exc)
    machine.reset()


def started():
    """The application runs: its starts count no longer as failed."""
    from .journal import Journal

    Journal.shared().set_starts(0)


def _arm_wdt(seconds):
    global _wdt
    _wdt = machine.WDT(timeout=seconds * 1000)
    if _timer is None:
        _run_timer()


def _run_timer():
    global _timer
    # Applications start with 0, and Timer(-1) was timer 3 up to MicroPython 1.24. Chips with two
    # timers number them 0 and 2 up to 1.24, 0 and 1 since.
    for number in (2, 1, 0):
        try:
            _timer = machine.Timer(number)
            _timer.init(period=1000, mode=machine.Timer.PERIODIC, callback=_tick)
            return
        except (ValueError, OSError):
            pass
    _timer = 0  # there is none to be had: do not look again
    print("twinslot: guard: no timer is free; a hanging application will not be noticed")


def _tick(_):
    global _left
    if _left:
        _left -= 1
        if _left == 0:
            print("twinslot: guard: the application stands still; reset")
            machine.reset()
    if _wdt:
        _wdt.feed()


def feed(seconds):
    """Give the event loop ``seconds`` more before the software watchdog resets the board; 0 ends
    the watch."""
    global _left
    _left = seconds
    if seconds and _timer is None:
        _run_timer()


def stop():
    """End the software watchdog. A hardware watchdog goes on being fed."""
    global _timer
    feed(0)
    if _timer and not _wdt:
        _timer.deinit()  # pyright: ignore
        _timer = None
