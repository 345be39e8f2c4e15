"""The proof of an image on trial: the application's checks, and the source's.

    await Trial(slot, journal, checks, stable, deadline, feed).prove()

What confirms or gives up the image (`twinslot.health`) is loaded when that is decided: to reach
the source takes what memory there is.
"""

import asyncio
import time

from . import errors, tidy
from .errors import OtaError


class Trial:
    """The proof of an image on trial.

    Args:
        checks: list of ``(name, function)``; sync or async, true when all is well. A false
            answer, an exception or ten seconds of silence is a failure; all are asked again every
            second until the deadline.
        stable: seconds the application must have run.
        deadline: seconds after which a check that still fails ends the trial.
        feed: called with nothing, from the event loop, to keep the software watchdog quiet.
    """

    def __init__(self, slot, journal, checks, stable, deadline, feed):
        self._slot = slot
        self._journal = journal
        self._checks = checks
        self._stable = stable
        self._deadline = deadline
        self._feed = feed

    async def prove(self):
        """Run until the image is proven, then confirm it.

        Raises:
            HealthError: the trial failed; the way back is prepared, reset now.
            RollbackError: it failed and there is no way back; the running image stays.
        """
        start = time.ticks_ms()
        build = self._slot.status()["build"]
        feeder = asyncio.create_task(self._keep_feeding())
        try:
            await asyncio.sleep(self._stable)
            while True:
                complaint = await self._complaint()
                if build and self._journal.get("confirmed", str) == build:
                    return  # by hand, meanwhile
                if complaint is None:
                    tidy()  # what has reached the source
                    try:
                        from . import health

                        return health.confirm(self._slot, self._journal)
                    except (OtaError, MemoryError) as exc:
                        complaint = "can't be confirmed: %s" % exc
                if time.ticks_diff(time.ticks_ms(), start) >= self._deadline * 1000:
                    break
                await asyncio.sleep(1)
        finally:
            feeder.cancel()
        # An unreachable server need not be the image's fault: it may be offered again.
        tidy()
        from . import health

        tries = 1 if complaint.startswith("check 'source'") else health.TRIES
        health.give_up(self._slot, self._journal, complaint, tries)
        raise errors.HealthError(complaint)

    async def _keep_feeding(self):
        while True:
            self._feed()
            await asyncio.sleep_ms(500)

    async def _complaint(self):
        """Name the first check that fails, None if all pass."""
        for name, function in self._checks:
            try:
                answer = function()
                if hasattr(answer, "send"):  # a coroutine
                    answer = await asyncio.wait_for(answer, 10)
            except asyncio.TimeoutError:
                return "check '%s' did not answer in 10 s" % name
            except Exception as exc:
                return "check '%s' raised %s: %s" % (name, type(exc).__name__, exc)
            if not answer:
                return "check '%s' failed" % name
        return None
