"""The fake `machine` answers as an ESP32 does."""

import time

import harness
import machine


def test_power_on_is_the_reset_cause_of_the_first_boot():
    assert machine.reset_cause() == machine.PWRON_RESET == 1
    assert (machine.HARD_RESET, machine.WDT_RESET) == (2, 3)
    assert (machine.DEEPSLEEP_RESET, machine.SOFT_RESET) == (4, 5)


def test_unique_id_is_a_mac():
    assert len(machine.unique_id()) == 6
    assert machine.unique_id()[:3] == b"\x24\x0a\xc4"


def test_timer_one_shot_fires_once_while_the_program_sleeps():
    fired = []
    timer = machine.Timer(-1)
    timer.init(mode=machine.Timer.ONE_SHOT, period=20, callback=fired.append)
    time.sleep_ms(100)
    assert fired == [timer]


async def test_nothing_async():
    import asyncio

    await asyncio.sleep_ms(1)


def test_raises():
    harness.raises(ValueError, machine.Timer, 9)
