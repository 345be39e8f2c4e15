"""Run by MicroPython: leads the device's clock through scripts.

    micropython clock_driver.py PLAN.json

The plan: {"lib": path, "scripts": [{"id", "rtc", "clock", "steps"}]}; a step is a list: a name and
its arguments. Prints one JSON object per script: the state after each step.
"""

import json
import sys

with open(sys.argv[1]) as f:
    plan = json.load(f)
sys.path.insert(0, plan["lib"])

import asyncio
import time

from twinslot.clock import Clock
from twinslot.errors import OtaError


class Rtc:
    """A clock that stands still unless told otherwise."""

    def __init__(self, unix, settable):
        self.unix = unix
        self.settable = settable

    def read(self):
        return self.unix

    def set(self, unix):
        if self.settable:
            self.unix = unix


async def run_step(clock, rtc, name, args):
    if name == "ensure":
        return await clock.ensure(*args)
    if name == "tick":
        rtc.unix += args[0]
        return None
    if name == "rtc":
        rtc.unix = args[0]
        return None
    if name == "now":
        return clock.now()
    return getattr(clock, name)(*args)


async def run_script(script):
    rtc = Rtc(script["rtc"], script.get("settable", True))
    trail = []
    try:
        clock = Clock(read=rtc.read, set_rtc=rtc.set, **script["clock"])
    except OtaError as e:
        print(json.dumps({"id": script["id"], "trail": [{"error": e.code, "message": str(e)}]}))
        return
    for step in [["now"]] + script["steps"]:
        began = time.ticks_ms()
        returned = await run_step(clock, rtc, step[0], step[1:])
        trail.append(
            {
                "step": step[0],
                "returned": returned,
                "state": clock.state,
                "trusted": clock.trusted,
                "source": clock.source,
                "now": clock.now(),
                "lasting": clock.lasting(),
                "problem": clock.problem,
                "rtc": rtc.unix,
                "ms": time.ticks_diff(time.ticks_ms(), began),
            }
        )
    print(json.dumps({"id": script["id"], "trail": trail}))


async def main():
    for script in plan["scripts"]:
        await run_script(script)


gaps = [0]


async def ticker():
    last = time.ticks_ms()
    while True:
        await asyncio.sleep_ms(1)
        now = time.ticks_ms()
        gaps[0] = max(gaps[0], time.ticks_diff(now, last))
        last = now


async def with_ticker():
    task = asyncio.create_task(ticker())
    await main()
    task.cancel()
    print(json.dumps({"id": "gap", "trail": gaps}))


asyncio.run(with_ticker())
