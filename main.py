# An application with its updates beside it. Put your own in application(); the rest can stay.
import asyncio

import twinslot

beats = 0


async def application():
    global beats
    while True:
        beats += 1
        await asyncio.sleep_ms(100)


async def main():
    # Join your network before this line, for example with network.WLAN().
    agent = twinslot.Agent.from_config("/ota.json")
    agent.check("application runs", lambda: beats > 0)
    agent.on_event(twinslot.Blink(pin=2))
    update = asyncio.create_task(agent.run())
    await application()
    await update


asyncio.run(main())
