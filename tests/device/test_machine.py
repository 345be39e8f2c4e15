"""machine: timers, pins, clock and watchdog arguments as on an ESP32."""

import asyncio
import time

import machine
from harness import raises
from machine import RTC, WDT, Pin, Timer


def test_power_on_is_the_reset_cause_of_the_first_boot():
    assert machine.reset_cause() == machine.PWRON_RESET == 1
    assert (machine.HARD_RESET, machine.WDT_RESET) == (2, 3)
    assert (machine.DEEPSLEEP_RESET, machine.SOFT_RESET) == (4, 5)
    assert machine.wake_reason() == 0


def test_unique_id_is_a_mac():
    assert len(machine.unique_id()) == 6
    assert machine.unique_id()[:3] == b"\x24\x0a\xc4"


def test_freq():
    machine.freq(240000000)
    assert machine.freq() == 240000000
    raises(ValueError, machine.freq, 12345)


def test_watchdog_arguments():
    raises(ValueError, WDT, 1)
    raises(ValueError, WDT, 0, 0)
    raises(ValueError, WDT, timeout=-5)


def test_one_shot_timer_fires_once_while_the_program_sleeps():
    fired = []
    timer = Timer(-1)
    timer.init(mode=Timer.ONE_SHOT, period=20, callback=fired.append)
    time.sleep_ms(100)
    assert fired == [timer]


def test_periodic_timer_fires_in_a_busy_loop_until_deinit():
    fired = []
    began = time.ticks_ms()
    timer = Timer(0, period=10, callback=fired.append)
    while len(fired) < 10:
        pass
    timer.deinit()
    assert time.ticks_diff(time.ticks_ms(), began) >= 95
    count = len(fired)
    time.sleep_ms(50)
    assert len(fired) == count


async def test_timer_fires_while_asyncio_waits():
    fired = []
    timer = Timer(1, period=10, mode=Timer.PERIODIC, callback=fired.append)
    await asyncio.sleep_ms(150)
    timer.deinit()
    assert 5 <= len(fired) <= 16, len(fired)


def test_timers_of_one_number_share_one_setting():
    first, second = [], []
    Timer(2).init(period=10, callback=first.append)
    timer = Timer(2)
    timer.init(period=10, callback=second.append)
    time.sleep_ms(60)
    timer.deinit()
    assert not first and second


def test_a_callback_may_arm_its_timer_again():
    ticks = []

    def tick(timer):
        ticks.append(1)
        if len(ticks) < 3:
            timer.init(mode=Timer.ONE_SHOT, period=10, callback=tick)

    Timer(3).init(mode=Timer.ONE_SHOT, period=10, callback=tick)
    time.sleep_ms(150)
    assert len(ticks) == 3


def test_an_exception_in_a_callback_is_printed_and_ends_nothing():
    def fail(timer):
        count.append(1)
        raise ValueError("in a callback")

    count = []
    timer = Timer(-1)
    timer.init(period=10, callback=fail)
    time.sleep_ms(80)
    timer.deinit()
    assert len(count) > 2


def test_timer_arguments():
    raises(ValueError, Timer, 4)
    raises(ValueError, Timer, -2)
    raises(ValueError, Timer(0).init, mode=Timer.ONE_SHOT, period=0)


def test_sleeps_last_as_long_as_asked_with_a_timer_and_without():
    for period in (None, 10):
        timer = Timer(0, period=period, callback=None) if period else None
        for sleep, amount in ((time.sleep_ms, 60), (time.sleep, 0.06), (time.sleep_us, 60000)):
            start = time.ticks_ms()
            sleep(amount)
            took = time.ticks_diff(time.ticks_ms(), start)
            assert 59 <= took < 200, took
        if timer:
            timer.deinit()


def test_pins():
    pin = Pin(4, Pin.OUT, value=1)
    assert pin.value() == pin() == 1
    pin.toggle()
    assert pin.value() == 0
    pin(1)
    assert Pin(4).value() == 1
    pin.off()
    assert Pin(4)() == 0
    assert pin.irq(lambda p: None, Pin.IRQ_FALLING) is not None
    raises(ValueError, Pin, 99)
    raises(ValueError, Pin, "LED")
    assert repr(pin) == "Pin(4)"


def test_signal_inverts_a_pin():
    pin = Pin(5, Pin.OUT, value=0)
    led = machine.Signal(pin, invert=True)
    led.on()
    assert pin.value() == 0
    led.off()
    assert pin.value() == 1


def test_clock_is_unset_and_can_be_set():
    assert time.time() < 600
    rtc = RTC()
    assert rtc.datetime()[:4] == (2000, 1, 1, 5)
    rtc.datetime((2026, 11, 20, 0, 12, 34, 56, 0))
    assert rtc.datetime()[:6] == (2026, 11, 20, 4, 12, 34)
    assert time.gmtime()[:5] == (2026, 11, 20, 12, 34)
    assert time.localtime()[6:] == (4, 324)
    assert time.time() == time.mktime((2026, 11, 20, 12, 34, time.gmtime()[5], 0, 0))
    assert abs(time.time_ns() - time.time() * 10**9) < 2 * 10**9


def test_epoch_is_2000():
    assert time.gmtime(0) == (2000, 1, 1, 0, 0, 0, 5, 1)
    assert time.mktime((2000, 1, 2, 0, 0, 0, 0, 0)) == 86400
    assert time.gmtime(time.mktime((2038, 1, 19, 3, 14, 8, 0, 0)))[:6] == (2038, 1, 19, 3, 14, 8)
    assert time.gmtime(time.mktime((2024, 2, 29, 23, 59, 59, 0, 0)))[6:] == (3, 60)


def test_rtc_memory():
    rtc = RTC()
    assert rtc.memory() == b""
    rtc.memory(b"kept")
    assert rtc.memory() == b"kept"
    rtc.memory(bytes(2048))
    assert len(rtc.memory()) == 2048
    raises(ValueError, rtc.memory, bytes(2049))
    assert len(rtc.memory()) == 2048
