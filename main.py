# An application with its updates beside it. Put your own in application(); the rest can stay.
import asyncio

import twinslot

beats = 0


async def application():
    global beats
    while True:
        beats += 1
        await asyncio.sleep_ms(100)


async def updates():
    try:
        agent = twinslot.Agent.from_config("/ota.json")
    except twinslot.OtaError:  # it has said why; the application runs all the same
        return
    agent.check("application runs", lambda: beats > 0)
    agent.on_event(twinslot.Blink(pin=2))
    await agent.run()  # joins the Wi-Fi network too, if ota.json names one


async def main():
    update = asyncio.create_task(updates())
    await application()
    await update


asyncio.run(main())
