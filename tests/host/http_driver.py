"""Run by MicroPython: carries out HTTP plans with the device's client, many at a time.

    micropython http_driver.py PLAN.json

The plan: {"lib": path, "width": tasks at a time, "cases": [{"id", "client", "steps"}]}. Prints one
JSON object per case, {"id", "steps": [outcome]}, and last {"gap_ms": n}: the longest time that a
task which only sleeps 1 ms did not get its turn. test_http.py makes the plans and judges.
"""

import json
import sys

with open(sys.argv[1]) as f:
    plan = json.load(f)
sys.path.insert(0, plan["lib"])

import asyncio
import binascii
import time

import twinslot.http  # noqa: F401
from twinslot.errors import OtaError

http = sys.modules["twinslot.http"]
link_module = sys.modules["twinslot.link"]

if plan.get("wrap_in_ms"):
    # ticks_ms as it is shortly before the counter starts again from 0 (F39).
    period = 1 << 62 if sys.maxsize > 1 << 32 else 1 << 30
    offset = period - plan["wrap_in_ms"] - time.ticks_ms()

    def _late():
        return (time.ticks_ms() + offset) % period

    http.ticks_ms = link_module.ticks_ms = _late


def make_client(options):
    options = dict(options)
    tls = options.pop("tls", None)
    if tls:
        tls = dict(tls)
        for name in ("ca", "client_cert", "client_key"):
            if tls.get(name):
                tls[name] = binascii.unhexlify(tls[name])
        options["tls"] = http.Tls(**tls)
    if "allow_hosts" in options:
        options["allow_hosts"] = tuple(options["allow_hosts"])
    if options.pop("dates", False):
        dates = []
        options["on_date"] = dates.append
        client = http.Client(**options)
        client.dates = dates
        return client
    return http.Client(**options)


async def take(answer, step):
    """Read a body as the step says and return it."""
    if "limit" in step:
        return await answer.read(step["limit"])
    body = b""
    if "block" in step:
        block = bytearray(step["block"])
        while len(body) < step.get("stop", 1 << 30):
            n = await answer.readinto(block)
            if not n:
                break
            body += block[:n]
            if step.get("pause_ms"):
                await asyncio.sleep_ms(step["pause_ms"])
    return body


async def fetch(client, step):
    url = step["url"]
    if "post" in step:
        answer = await client.post_json(url, step["post"], **step.get("args", {}))
    else:
        answer = await client.get(url, **step.get("args", {}))
    outcome = {}
    for name in (
        "status",
        "length",
        "etag",
        "date",
        "retry_after",
        "start",
        "total",
        "location",
        "secure",
    ):
        outcome[name] = getattr(answer, name)
    try:
        body = await take(answer, step)
    finally:
        await answer.close()
    outcome["body"] = binascii.hexlify(body).decode()
    return outcome


async def run_step(client, step):
    began = time.ticks_ms()
    try:
        if "cancel_ms" in step:
            try:
                outcome = await asyncio.wait_for_ms(fetch(client, step), step["cancel_ms"])
            except asyncio.TimeoutError:  # noqa: UP041 (MicroPython has no other)
                outcome = {"cancelled": True}
        elif "close_ms" in step:
            task = asyncio.create_task(fetch(client, step))
            await asyncio.sleep_ms(step["close_ms"])
            await client.close()
            outcome = await task
        elif "twice" in step:
            first = asyncio.create_task(fetch(client, step["twice"]))
            await asyncio.sleep_ms(100)
            try:
                outcome = await fetch(client, step)
            finally:
                await first
        else:
            outcome = await fetch(client, step)
    except OtaError as e:
        outcome = {"error": e.code, "message": str(e), "retry": e.retry}
        outcome["error_status"] = getattr(e, "status", None)
    except Exception as e:  # must not happen: the test says so
        outcome = {"error": "LEAKED", "message": repr(e)}
        sys.print_exception(e, sys.stderr)
    outcome["ms"] = time.ticks_diff(time.ticks_ms(), began)
    return outcome


async def run_case(case):
    outcomes = []
    try:
        client = make_client(case["client"])
    except OtaError as e:
        outcomes.append({"error": e.code, "message": str(e)})
    else:
        for step in case["steps"]:
            for _ in range(step.get("times", 1)):
                outcomes.append(await run_step(client, step))
        await client.close()
    result = {"id": case["id"], "steps": outcomes}
    if outcomes and hasattr(case.get("client"), "get") and case["client"].get("dates"):
        result["dates"] = client.dates
    print(json.dumps(result))


async def worker(cases):
    while cases:
        await run_case(cases.pop())


gaps = [0]


async def ticker():
    last = time.ticks_ms()
    while True:
        await asyncio.sleep_ms(1)
        now = time.ticks_ms()
        gaps[0] = max(gaps[0], time.ticks_diff(now, last))
        last = now


async def main():
    clock = asyncio.create_task(ticker())
    cases = list(reversed(plan["cases"]))
    await asyncio.gather(*[worker(cases) for _ in range(plan.get("width", 1))])
    clock.cancel()
    print(json.dumps({"gap_ms": gaps[0]}))


asyncio.run(main())
