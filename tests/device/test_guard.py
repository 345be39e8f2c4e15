"""The boot guard: what it makes of a boot, and the watchdog that leads back to the agent.

machine.reset() ends a board, and with it a test: here it is replaced by a note of it. The timers
are the board's own.
"""

import asyncio
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
        if "twinslot.agent" in sys.modules:
            sys.modules["twinslot.agent"].guard = self.guard
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
        (machine.SOFT_RESET, 1),
        (0, 2),  # a cause that the chip doesn't know
        (machine.HARD_RESET, 22),
        (machine.WDT_RESET, 42),
    ):
        with Boot(cause) as boot:
            boot.guard.start()
        assert journal.starts() == counts
    with Boot() as boot:
        boot.guard.started()
    assert journal.starts() == 0


def test_where_the_agent_can_not_run_alone_main_py_runs():
    journal = board((1, VALID), confirmed=OWN)
    journal.set_starts(180)
    with Boot() as boot:
        assert boot.guard.start(config="/absent.json") == "idle"
        assert not boot.resets
    assert journal.starts() == 0, "it gets as many tries again"


def test_a_trial_is_never_spent_running_alone():
    journal = board((3, PENDING), (2, VALID), trial={"build": OWN, "hang": 60}, confirmed=OTHER)
    journal.set_starts(180)
    with Boot() as boot:
        assert boot.guard.start(config="/absent.json") == "trial"


class FakeAgent:
    """In the place of the agent, which test_safe_mode.py runs: what is of interest here is what
    the guard does before and after."""

    made = []
    ends = None

    @classmethod
    def from_config(cls, path):
        cls.made.append(path)
        return cls()

    async def run(self):
        if FakeAgent.ends:
            raise FakeAgent.ends
        while True:
            await asyncio.sleep(1)


class AgentInstead:
    """``with AgentInstead() as waits:`` no hour is waited for; the seconds asked for are noted."""

    def __enter__(self):
        import twinslot.agent

        self.module = twinslot.agent
        self.kept = self.module.Agent, asyncio.wait_for
        self.module.Agent = FakeAgent
        FakeAgent.made.clear()
        FakeAgent.ends = None
        waits = []

        async def wait_for(coroutine, seconds):
            waits.append(seconds)
            return await self.kept[1](coroutine, 0.2)

        asyncio.wait_for = wait_for
        return waits

    def __exit__(self, *_):
        self.module.Agent, asyncio.wait_for = self.kept
        asyncio.new_event_loop()


def test_F30_after_five_starts_that_failed_the_agent_runs_alone_for_an_hour():
    journal = board((1, VALID), confirmed=OWN)
    with AgentInstead() as waits:
        for start in range(1, 7):
            with Boot() as boot:
                boot.guard.start(config="/mine.json")
                alone = start == 6
                assert journal.starts() == (0 if alone else 20 * start)
                assert FakeAgent.made == (["/mine.json"] if alone else [])
                assert len(boot.resets) == (1 if alone else 0), "then the application's turn again"
        assert waits == [3600]


def test_F30_a_hundred_soft_resets_without_a_good_start_are_a_boot_loop_too():
    journal = board((1, VALID), confirmed=OWN)
    with AgentInstead():
        for start in range(1, 102):
            with Boot(machine.SOFT_RESET) as boot:
                boot.guard.start(config="/mine.json")
                assert len(boot.resets) == (start == 101)
    assert journal.starts() == 0


def test_an_agent_that_fails_alone_gives_way_to_the_application_too():
    journal = board((1, VALID), confirmed=OWN)
    journal.set_starts(100)
    with AgentInstead():
        FakeAgent.ends = OSError("no network")
        with Boot() as boot:
            assert boot.guard.start() == "idle"
            assert FakeAgent.made == ["/ota.json"]
            assert len(boot.resets) == 1


def test_what_waits_for_its_reset_does_not_run_the_agent_alone():
    for cause in (machine.DEEPSLEEP_RESET, machine.SOFT_RESET):
        journal = board((1, VALID), (2, bench.NEW), trial={"build": OTHER}, confirmed=OWN)
        journal.set_starts(999)
        with AgentInstead(), Boot(cause) as boot:
            assert boot.guard.start() == "armed"
            assert FakeAgent.made == [] and not boot.resets


def test_F15_an_ordinary_start_that_hangs_is_reset_after_its_patience():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        boot.guard.start(patience=1)
        boot.wait(5)
        assert boot.resets
    with Boot() as boot:
        boot.guard.start()
        assert boot.guard._left == 120


def test_a_trial_that_does_not_say_how_long_gets_the_usual_patience():
    board((3, PENDING), (2, VALID), trial={"build": OWN}, confirmed=OTHER)
    with Boot() as boot:
        boot.guard.start(patience=77)
        assert boot.guard._left == 77


def test_the_garbage_collector_runs_often_unless_the_application_has_its_own_way():
    import gc

    before = gc.threshold()
    try:
        for found, left in ((-1, 8192), (20_000, 20_000), (0, 0)):
            board((1, VALID), confirmed=OWN)
            gc.threshold(found)
            with Boot() as boot:
                boot.guard.start()
            assert gc.threshold() == left
    finally:
        gc.threshold(before)


def test_a_timer_that_is_missing_or_taken_is_passed_over():
    real = machine.Timer

    class Timer:
        PERIODIC = real.PERIODIC
        tried = []
        there = ()
        error = ValueError

        def __init__(self, number):
            self.number = number
            Timer.tried.append(number)
            if number not in Timer.there:
                raise Timer.error(number)

        def init(self, period, mode, callback):
            Timer.tried.append((self.number, period, mode, callback))

        def deinit(self):
            Timer.tried.append(-self.number)

    machine.Timer = Timer
    try:
        for Timer.error in (ValueError, OSError):
            for Timer.there, order in (((2, 1), [2]), ((1, 0), [2, 1]), ((0,), [2, 1, 0])):
                board((1, VALID), confirmed=OWN)
                Timer.tried.clear()
                with Boot() as boot:
                    guard = boot.guard
                    guard.start()
                    last = order[-1]
                    tick = (last, 1000, Timer.PERIODIC, guard._tick)
                    assert Timer.tried == order + [tick]
                    guard.feed(5)
                    assert Timer.tried == order + [tick], "one is enough"
                    guard.stop()
                    assert Timer.tried[-1] == -last and guard._timer is None
                    guard.stop()
                    assert Timer.tried == order + [tick, -last], "it was given back once"
                    guard.feed(5)
                    assert Timer.tried == (order + [tick, -last]) + order + [tick]
        Timer.there = ()
        board((1, VALID), confirmed=OWN)
        Timer.tried.clear()
        with Boot() as boot:
            assert boot.guard.start(wdt=3) == "idle"
            boot.guard.feed(9)
            boot.guard.stop()
            assert Timer.tried == [2, 1, 0], "it is not looked for again"
            assert boot.watchdogs == [3000]
    finally:
        machine.Timer = real


def test_each_second_counts_down_once_and_only_the_last_one_resets():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        guard = boot.guard
        guard._timer = 0  # this test is the timer
        guard.start()
        guard.feed(2)
        guard._tick(None)
        assert guard._left == 1 and not boot.resets
        guard._tick(None)
        assert guard._left == 0 and len(boot.resets) == 1
        guard._tick(None)
        assert guard._left == 0 and len(boot.resets) == 1, "0 is the end of the watch"
        assert boot.watchdogs == []
        guard.start(wdt=4)
        guard._tick(None)
        guard._tick(None)
        assert boot.watchdogs == [4000, "fed", "fed"]


def test_a_hardware_watchdog_is_fed_where_nothing_else_is_watched():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        boot.guard.start(wdt=3, patience=0)
        assert boot.guard._timer
        boot.guard.feed(1)
        boot.guard.stop()
        boot.guard._tick(None)
        assert not boot.resets and boot.watchdogs[-1] == "fed", (
            "but the application is not watched"
        )


def test_an_ended_watch_takes_no_timer():
    board((1, VALID), confirmed=OWN)
    with Boot() as boot:
        boot.guard.feed(0)
        assert boot.guard._timer is None
        boot.guard.start(wdt=9)
        boot.guard.stop()
        assert boot.guard._timer, "a hardware watchdog goes on being fed"


def test_a_wake_up_or_power_on_is_no_failed_start_on_whatever_chip():
    journal = board((1, VALID), confirmed=OWN)
    journal.set_starts(3)
    for cause in (machine.PWRON_RESET, machine.DEEPSLEEP_RESET):
        with Boot(cause) as boot:
            boot.guard.start()
        assert journal.starts() == 3, cause
