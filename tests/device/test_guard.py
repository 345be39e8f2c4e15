"""The boot guard: what it makes of a boot, and the watchdog that leads back to the agent.

machine.reset() ends a board, and with it a test: here it is replaced by a note of it. The timers
are the board's own.
"""

import sys
import time

import machine
import workbench as bench
from workbench import BLOCK, PENDING, TORN, VALID

from twinslot.slot import FirmwareSlot

HEAP = "1M"
TIMEOUT = 60
OWN = FirmwareSlot().status()["build"]
_other = bench.make_image(2 * BLOCK, version="2.0.0")
OTHER = bench.signed(_other).build


class Reset(BaseException):
    """Not caught by `except Exception`: a board's reset isn't either."""


class Boot:
    """A boot of the guard: a fresh module, resets noted, no watchdog left running behind it."""

    def __init__(self, cause=machine.HARD_RESET):
        self.cause = cause
        self.resets = []
        self.watchdogs = []

    def __enter__(self):
        self._kept = machine.reset, machine.reset_cause, machine.WDT
        machine.reset = self._reset
        machine.reset_cause = lambda: self.cause
        boot = self

        class WDT:
            def __init__(self, id=0, timeout=5000):
                boot.watchdogs.append(timeout)
                self.fed = 0

            def feed(self):
                boot.watchdogs.append("fed")

        machine.WDT = WDT
        sys.modules.pop("twinslot.guard", None)
        import twinslot

        twinslot.__dict__.pop("guard", None)
        import twinslot.guard

        self.guard = sys.modules["twinslot.guard"]
        return self

    def _reset(self):
        self.resets.append(time.ticks_ms())

    def __exit__(self, *_):
        self.guard._wdt = None
        self.guard.stop()
        machine.reset, machine.reset_cause, machine.WDT = self._kept
        return False

    def wait(self, seconds):
        """Let timers run for so long, or until a reset."""
        end = time.ticks_add(time.ticks_ms(), int(seconds * 1000))
        while not self.resets and time.ticks_diff(end, time.ticks_ms()) > 0:
            time.sleep_ms(10)


def board(*entries, **journal):
    bench.otadata(*entries)
    if bench.read(len(_other)) != _other:
        bench.put(_other)
    return bench.new_journal(**journal)


def test_an_ordinary_boot_is_idle():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        assert boot.guard.start() == "idle"
        assert not boot.resets


def test_a_trial_is_found_once_and_counted_once():
    journal = board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 60}, confirmed=OTHER)
    with Boot() as boot:
        assert boot.guard.start() == "trial"
        assert boot.guard.start() == "trial", "a later call does not judge again"
        assert journal.get("trial")["boots"] == 1
        assert not boot.resets


def test_F15_a_trial_whose_agent_never_comes_ends_in_a_reset():
    board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 1}, confirmed=OTHER)
    with Boot() as boot:
        start = time.ticks_ms()
        boot.guard.start()
        boot.wait(5)
        assert boot.resets
        assert 900 <= time.ticks_diff(boot.resets[0], start) < 3000


def test_feeding_puts_the_reset_off():
    board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 2}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start()
        for _ in range(6):
            boot.wait(0.5)
            boot.guard.feed(2)
        assert not boot.resets
        boot.wait(5)
        assert boot.resets


def test_a_stopped_watchdog_is_quiet():
    board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 1}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start()
        boot.guard.stop()
        boot.wait(1.5)
        assert not boot.resets


def test_a_busy_loop_of_python_does_not_stop_the_watchdog():
    board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 1}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start()
        end = time.ticks_add(time.ticks_ms(), 5000)
        while not boot.resets and time.ticks_diff(end, time.ticks_ms()) > 0:
            pass
        assert boot.resets


def test_F8_a_rejected_boot_resets_at_once():
    board((3, TORN), (2, VALID), trial={"build": OWN, "boots": 1}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start()
        assert len(boot.resets) == 1
        assert bench.states()[1] == bench.NEW


def test_the_guard_never_raises():
    journal = board((1, VALID), trial={"build": OWN})
    with Boot() as boot:
        journal.get = lambda *args: 1 // 0
        assert boot.guard.start() == "idle"
        assert not boot.resets
    bench.new_journal()


def test_F28_garbage_in_nvs_does_not_keep_a_board_from_booting():
    from esp32 import NVS

    board((1, VALID))
    NVS("twinslot").set_blob("journal", b"\x01garbage" * 9)
    from twinslot import journal

    journal._shared = None
    with Boot() as boot:
        assert boot.guard.start() == "idle"


def test_the_hardware_watchdog_is_fed_by_the_timer_also_after_the_trial():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        boot.guard.start(wdt=7)
        assert boot.watchdogs == [7000]
        boot.guard.start(wdt=7)
        assert boot.watchdogs[0] == 7000 and 7000 not in boot.watchdogs[1:]
        boot.guard.stop()
        boot.wait(2.5)
        assert boot.watchdogs.count("fed") >= 2
        assert not boot.resets


def test_applications_may_take_the_first_timers():
    mine = [machine.Timer(0), machine.Timer(1)]
    for timer in mine:
        timer.init(period=60_000, callback=lambda t: None)
    board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 1}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start()
        boot.wait(4)
        assert boot.resets
    for timer in mine:
        assert timer.value() > 0, "the guard took an application's timer"
        timer.deinit()


def test_starts_are_counted_where_something_went_wrong():
    journal = board((1, VALID), confirmed=OWN)
    for cause, counts in (
        (machine.PWRON_RESET, 0),
        (machine.DEEPSLEEP_RESET, 0),
        (machine.SOFT_RESET, 0),
        (machine.HARD_RESET, 1),
        (machine.WDT_RESET, 2),
    ):
        with Boot(cause) as boot:
            boot.guard.start()
        assert journal.starts() == counts
    with Boot() as boot:
        boot.guard.started()
    assert journal.starts() == 0


def test_where_the_agent_can_not_run_alone_main_py_runs():
    journal = board((1, VALID), confirmed=OWN)
    journal.set_starts(9)
    with Boot() as boot:
        assert boot.guard.start(config="/absent.json") == "idle"
        assert not boot.resets
    assert journal.starts() == 0, "it gets as many tries again"


def test_a_trial_is_never_spent_running_alone():
    journal = board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 60}, confirmed=OTHER)
    journal.set_starts(9)
    with Boot() as boot:
        assert boot.guard.start(config="/absent.json") == "trial"
