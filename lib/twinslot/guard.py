"""The boot guard: the first lines of ``boot.py``, on every boot.

    import twinslot.guard
    twinslot.guard.start()

It finds out from flash and journal what this boot is (``health.reconcile``). On a trial boot it
starts the software watchdog: a ``machine.Timer`` that resets the board unless somebody calls
``feed`` in time, which the agent does from the event loop. A program that crashes, hangs or never
starts its agent so ends in a reset, and the bootloader returns to the old slot. A loop that hangs
inside C code does not run timers; for that there is the hardware watchdog (``wdt`` in seconds),
which the same timer feeds, and which can't be stopped until the next reset.

``start`` never raises: whatever is wrong with the journal or the slots, the application boots.
"""

import gc
import sys

import machine

_BOOT_S = 120  # until the agent's event loop runs; importing and joining a network takes long

_GC_THRESHOLD = 8192  # bytes

_verdict = None
_timer = None
_wdt = None
_left = 0


def start(wdt=0):
    """Reconcile, and on trial arm the way back. Later calls in the same boot do nothing but
    start a hardware watchdog that is not running yet.

    Args:
        wdt: seconds of the hardware watchdog, 0 for none. It stays on after the trial.

    Returns:
        ``"idle"``, ``"trial"`` or ``"armed"``, as ``health.reconcile``.
    """
    global _verdict
    if gc.threshold() < 0:
        # Left alone, the collector lets garbage spread over the whole heap before its first run,
        # and what stays lies scattered in it: of 45 KB free no 4 KB were in one piece, with this
        # 33 KB are. An application that has set its own threshold keeps it.
        gc.threshold(_GC_THRESHOLD)
    try:
        if _verdict is None:
            _verdict = "idle"
            _verdict = _reconcile()
        if wdt and not _wdt:
            _arm_wdt(wdt)
    except Exception as exc:
        # Also errors of our own making: a guard that keeps the application from booting would
        # be worse than none.
        print("twinslot: guard:", exc)
        sys.print_exception(exc)
    return _verdict


def _reconcile():
    global _left
    from . import health
    from .journal import Journal
    from .slot import FirmwareSlot

    journal = Journal.shared()
    verdict = health.reconcile(FirmwareSlot(), journal, machine.reset_cause())
    if verdict == "rejected":
        machine.reset()
    if verdict == "trial":
        print("twinslot: guard: this boot is a trial")
        _left = journal.get("trial").get("hang", _BOOT_S)
        _run_timer()
    return verdict


def _arm_wdt(seconds):
    global _wdt
    _wdt = machine.WDT(timeout=seconds * 1000)
    if _timer is None:
        _run_timer()


def _run_timer():
    global _timer
    # The highest numbers first: applications start with 0. The C3 has two timers.
    for number in (3, 1, 0):
        try:
            _timer = machine.Timer(number)
            _timer.init(period=1000, mode=machine.Timer.PERIODIC, callback=_tick)
            return
        except (ValueError, OSError):
            pass
    _timer = None
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
    """Give the application ``seconds`` more before the software watchdog resets the board."""
    global _left
    if _left:
        _left = seconds


def stop():
    """End the software watchdog: the trial is over. A hardware watchdog goes on being fed."""
    global _left, _timer
    _left = 0
    if _timer and not _wdt:
        _timer.deinit()
        _timer = None
