"""Show the update on an LED: it blinks on progress and flashes ten times on an error."""

import asyncio


class Blink:
    """An event listener. ``agent.on_event(twinslot.Blink(pin=2))``

    Args:
        pin: GPIO number of the LED.
    """

    def __init__(self, pin):
        from machine import Pin

        self._led = Pin(pin, Pin.OUT, value=0)
        self._task = None

    def __call__(self, name, data):
        if name == "progress":
            self._led.value(not self._led.value())
        elif name in ("failed", "rolledback"):
            self._task = asyncio.create_task(self._error())
        elif name in ("idle", "confirmed"):
            self._led.value(0)

    async def _error(self):
        for _ in range(10):
            self._led.value(1)
            await asyncio.sleep_ms(60)
            self._led.value(0)
            await asyncio.sleep_ms(60)
