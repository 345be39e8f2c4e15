"""The agent: an asyncio task beside the application that keeps its board up to date.

    agent = twinslot.Agent.from_config("/ota.json")
    agent.check("sensor answers", lambda: sensor.read() is not None)
    asyncio.create_task(agent.run())

Each poll goes one way: offer, signature, policy, download, verify, activate, reset. After the
reset the trial decides. Every step is an event, ``listener(name, data)``:

    checking keyring staging progress staged waiting trial confirmed rolledback failed idle

Whatever goes wrong in a poll ends as one ``failed`` event with an ``OtaError``; the running slot
is untouched and the next poll comes after a back-off.
"""

import asyncio
import binascii
import gc
import os
import random
import sys
import time

from . import __version__, errors, guard, reserve, tidy, unload
from .clock import BUILD_FLOOR, Clock
from .errors import OtaError
from .journal import REASON, Journal
from .slot import FirmwareSlot
from .trust import Trust

_BACKOFF_S = 60
_BACKOFF_MAX_S = 3600
_RETRY_AFTER_MAX_S = 6 * 3600
DAY_S = 86400
_WAIT_MAX_MS = 0x1FFFFFFF  # what the ticks of a 32-bit port can span: 6.2 days


def _hex(raw):
    return "".join("%02x" % b for b in raw)


class Agent:
    """Keeps one board up to date.

    Args:
        settings: dict as in ``config``.
        source: where offers come from; made from ``settings`` by default.

    Raises:
        ConfigError: the settings, or a file they name, can't be used.
        PartitionError: the board has no second slot.
    """

    def __init__(self, settings, source=None):
        import machine

        reserve()
        from . import config

        settings = config.check(settings)
        del config
        tidy()
        self._settings = s = dict(settings)  # a copy, where its makers were
        del settings
        self._machine = machine
        self.device_id = _hex(machine.unique_id())
        self._verdict = guard.start(s["wdt"])  # no second time if boot.py has done it
        self._slot = FirmwareSlot()
        self._journal = Journal.shared()
        found = self._slot.status()
        # What can't change before the next reset.
        self._running = {key: found[key] for key in ("build", "version", "inactive")}
        del found
        self._clock = Clock(
            ntp=s["ntp"],
            last=self._journal.get("time", int),
            floor=self._floor(),
        )
        # The clock began anew with this start, which is not counted yet.
        self._anew = self._clock.state == "unknown"
        tidy()  # what comes now stays: it finds the room, and leaves no hole behind
        self._trust = Trust(s, self._journal, self._clock)
        tidy()
        self._client = self._trust.client
        self._source = source
        self._ours = source is None  # made when it is asked, let go for a release
        self._listeners = [_console]
        self._checks = [("source", self._reachable)]
        self._ask = None
        self._path = None  # of the configuration, until it has worked
        self._updating = None  # the task that does
        self._watch = None  # the task that feeds the guard
        self._base = s["url"]  # or that of a mirror, until the poll ends
        self._done = None  # name of a release that needs no second look today; see tries
        # CRC-32 of a release's name, polls in which it failed to come (and then starts without a
        # clock), the last poll's time, polls in which any failed
        self._tried = self._journal.get("tried", list)
        self._counted = False  # this poll among them
        self._fetching = False  # so that a failure is one of the download
        self._failures = 0
        self._poll_s = s["poll"]
        self._retry_after = None
        self._free = None  # bytes of the volume, once they are counted for this poll

    @classmethod
    def from_config(cls, path="/ota.json"):
        """Make an agent from a configuration file.

        Without an agent nobody feeds the guard's watchdog, so it is stopped: an application that
        can't be updated runs all the same. An image on trial that can't make one goes back.

        Raises:
            ConfigError, PartitionError: as the constructor.
        """
        from . import config

        try:
            settings = config.load(path)
            del config
            tidy()
            agent = cls(settings)
        except OtaError as exc:
            print("twinslot: NO UPDATES:", exc)
            if guard.start() == "trial":
                from . import startup

                startup.give_up("no agent: " + exc.message)
            guard.stop()
            raise
        agent._path = path
        return agent

    # -- what the application says ------------------------------------------------------------

    def check(self, name, function):
        """Add a health check: sync or async, true when all is well. Asked on trial only."""
        self._checks.insert(-1, (name, function))  # the source, over the network, comes last

    def on_event(self, listener):
        """Add ``listener(name, data)``; ``data`` is a dict. It must not block."""
        self._listeners.append(listener)

    def on_install(self, ask):
        """Let the application decide when: ``ask(step, release)``, sync or async.

        ``step`` is ``"download"`` or ``"activate"`` (which resets the board). Answer True to go
        on, a number of seconds to be asked again then (24 hours at most in all), False to refuse
        this release.
        """
        self._ask = ask

    # -- what the agent says ------------------------------------------------------------------

    def _emit(self, name, **data):
        for listener in self._listeners:
            try:
                listener(name, data)
            except Exception as exc:  # a listener's fault is not the update's
                print("twinslot: listener:", exc)

    def version(self):
        """Version of the running image: as installed, else as in its descriptor, else as in
        the configuration, else 0.0.0."""
        running = self._running
        known = self._journal.version(running["build"])
        return known or running["version"] or self._settings["version"] or "0.0.0"

    def facts(self):
        """What the device tells a source about itself."""
        s = self._settings
        if self._free is None:  # littlefs walks through all its files for it
            self._free = _free_bytes()
        return {
            "device_id": self.device_id,
            "product": s["product"],
            "channel": s["channel"],
            "hardware": s["hardware"],
            "chip_id": self._slot.chip_id,
            "current_version": self.version(),
            "current_build": self._running["build"],
            "labels": s["labels"],
            "agent": __version__,
            "micropython": ".".join(str(n) for n in sys.implementation.version[:3]),
            "staged": self._waiting()[0],
            "flash": _flash_size(),
            "free": self._free,
            "reset_cause": self._machine.reset_cause(),
        }

    def _waiting(self):
        """What lies finished in the other slot until it may be installed: its build, its attempt
        and the CRC-32 of its release's name."""
        return self._journal.get("waiting", list) or ["", "", 0]

    async def _report(self, report, status, error=None):
        """Tell the source how an attempt stands. The update does not hang on it; a failure that
        could not be told is kept for the next poll."""
        report["status"] = status
        report["error"] = error.report() if error else None
        try:
            await self._send(report)
        except Exception as exc:
            print("twinslot: report not delivered:", foreseen(exc))
            if error:
                self._journal.update(reports=self._journal.get("reports", list) + [report])

    def _ask_source(self):
        if self._source is None:
            if self._settings["source"] == "server":
                from .sources.server import Server as Source
            else:
                from .sources.static import Static as Source
            self._source = Source(self._settings)
        return self._source

    def _let_go(self):
        """Give back what has nothing to do until the release has come."""
        if self._ours:
            self._source = None
        unload()

    async def _send(self, report):
        if self._client is not self._trust.client:
            raise errors.TlsError("reports go over a verified connection only")
        if self._base != self._settings["url"]:
            raise errors.UnreachableError(
                "reports go to the server itself, and that was not reached"
            )
        await self._ask_source().report(self._client, self.facts(), report)

    # -- running ------------------------------------------------------------------------------

    async def run(self):
        """Prove a trial, then poll for ever. Start it as a task; it only ends by a reset."""
        self._watch = asyncio.create_task(self._supervise())
        try:
            await self._begin()
        except Exception as exc:
            print("twinslot:", foreseen(exc))
        await persist(self._turn)

    async def _begin(self):
        from . import startup

        await startup.begin(self)

    async def _keep_network(self):
        from . import wifi

        await wifi.keep(self._settings["wifi"], self.device_id)

    async def _reachable(self):
        from . import startup

        return await startup.reachable(self)

    async def _turn(self):
        try:
            await self.update_now()
        except OtaError:
            pass  # told to the listeners, and counted, by update_now
        await asyncio.sleep_ms(self._delay_ms())

    async def _supervise(self):
        """Tell the guard that the event loop turns and, once, that this was a good start."""
        seconds = 0
        while True:
            if self._verdict != "trial":  # a trial feeds by itself
                guard.feed(self._settings["hang"])
            if seconds == self._settings["stable"]:
                guard.started()
            seconds += 1
            await asyncio.sleep_ms(1000)

    def _delay_ms(self):
        if self._failures == 0:
            return min(self._poll_s * (900 + random.getrandbits(8) % 200), _WAIT_MAX_MS)
        ceiling = min(_BACKOFF_S << min(self._failures - 1, 6), _BACKOFF_MAX_S)
        # Never slower after an error than a board that polls at leisure, nor as fast as an offer
        # may wish: that is not signed.
        ceiling = min(ceiling, max(self._settings["poll"], 1))
        wait_ms = random.getrandbits(24) % (ceiling * 1000)  # full jitter
        if self._retry_after:
            wait_ms += min(self._retry_after, _RETRY_AFTER_MAX_S) * 1000
        return wait_ms

    async def _finish_boot(self):
        """What this boot owes before anything new: the reset into an armed slot, or the proof of
        a trial."""
        if self._verdict == "armed":
            self._machine.reset()
        if self._verdict == "trial":
            from . import startup

            await startup.prove(self)

    # -- one update ---------------------------------------------------------------------------

    async def update_now(self, force=False):
        """Poll once, and install what is offered: then the board resets and this never returns.
        On a trial boot, prove the trial first. Without ``run`` the guard's watch ends with it.

        Args:
            force: look again at a release that failed here before.

        Returns:
            False: there was nothing to install.

        Raises:
            OtaError: refused or failed; told to the listeners too. The running slot is untouched.
        """
        try:
            task = asyncio.current_task()
            if self._updating not in (None, task) and not self._updating.done():
                raise errors.BusyError("an update is under way")
            self._updating = task
            try:
                await self._once(force)
            finally:
                self._updating = None
            return False
        except Exception as exc:
            raise foreseen(exc)

    async def _once(self, force):
        """One update; how it fails is counted and told."""
        self._retry_after = self._free = None
        try:
            await self._guarded(force)
            self._failures = 0
        except Exception as slip:
            exc = foreseen(slip)
            # What can't succeed later is no reason to poll at another pace.
            self._failures = self._failures + 1 if exc.retry else 0
            self._retry_after = exc.retry_after
            forget = getattr(self._source, "forget", None)
            if forget:
                forget()
            if isinstance(exc, errors.TlsError):
                self._clock.doubt()  # perhaps the date is to blame: ask again
            if isinstance(exc, errors.InternalError):
                self._log_once(exc)
            self._emit("failed", **exc.report())
            raise exc

    async def _guarded(self, force):
        """One update under the guard's watch; gives back all it took."""
        alone = None if self._watch else asyncio.create_task(self._supervise())
        try:
            await self._finish_boot()
            await self._from_anywhere(force)
        finally:
            if alone:
                alone.cancel()
                guard.stop()  # nobody is there to feed it
                guard.started()
            self._slot.abandon()
            await self._client.close()  # TLS holds 20 KB and more that others may want meanwhile
            tidy()

    async def _from_anywhere(self, force):
        """One update from the server or, where the network fails on the way, from a mirror."""
        mirrors = self._settings["mirrors"]
        self._base = self._settings["url"]
        self._counted = False
        for mirror in mirrors:
            try:
                return await self._update(force)
            except errors.NetworkError as exc:
                print("twinslot: %s; asking %s" % (exc, mirror))
                self._base = mirror
                self._slot.abandon()
                gc.collect()
        await self._update(force)

    async def _update(self, force):
        """One update from one server."""
        from . import plan

        found = await plan.offer(self, force)
        del plan
        if found:
            await self._take(found[0], force, found[1])

    async def _take(self, url, force, seconds=0):
        """Fetch a release, judge it and install it: then this never returns. It does if the
        release runs already, or may be activated only in so many seconds."""
        report = {"attempt": _hex(os.urandom(6)), "version": "", "build": "", "bytes": 0}
        self._let_go()
        gc.collect()
        url = "".join((url[:1], url[1:]))  # a copy, where its makers were: no hole is split
        name = self._name(url)
        self._fetching = True
        try:
            manifest = await self._verified(url)
            self._fetching = False
            from . import plan

            wanted = await plan.judge(self, manifest, report, name, force)
            del plan
            if not wanted:
                return
            await self._install(report, manifest, url)
            if seconds:
                crc = binascii.crc32(name.encode())
                waiting = [report["build"], report["attempt"], crc]
                self._journal.update(waiting=waiting)
                self._emit("waiting", seconds=seconds)
                return
            tidy()
            from . import plan

            await plan.activate(self, manifest, report["attempt"])
        except Exception as slip:
            raise await self._failed(report, name, slip)

    async def _verified(self, url):
        """Fetch a release and verify it."""
        threshold = gc.threshold()
        if threshold == guard.GC_THRESHOLD:
            gc.threshold(threshold // 4)  # what verifying leaves lies closer together
        try:
            return await self._trust.release(self._client, url)
        finally:  # a download leaves nothing, and the application's own goes on meanwhile
            gc.threshold(threshold)

    async def _failed(self, report, name, slip):
        """Note how a release has failed, and tell; return the OtaError for it."""
        exc = foreseen(slip)
        self._note(waiting=None)  # the next one is an attempt of its own
        tidy()  # what comes now has to find room
        from . import tries

        if self._fetching:
            # Once known, by what is signed: a server can call a release by many names.
            tries.count_once(self, report["version"] + report["build"] or name)
        # One that did not come at all was perhaps damaged on the way, or is a portal's page:
        # no word on the release itself.
        if report["build"] and not exc.retry:
            # Said once: what the board can't take now it will not take at the next poll.
            tries.look_past(self, name)
        del tries
        unload()
        if not isinstance(exc, errors.KnownBadError):  # that was told when it was rolled back
            self._journal.add_to_log(report["version"], "failed", exc.message)
            await self._report(report, "failed", exc)
        return exc

    def _name(self, url):
        """What a release is called at the server and all its mirrors."""
        return url[len(self._base) :] if url and url.startswith(self._base) else url

    def _floor(self):
        """Unix seconds that have passed for certain: the newest date signed by whom we trusted."""
        return max(BUILD_FLOOR, self._journal.get("issued", int))

    def _log_once(self, exc):
        """Note a failure that no release is to blame for, and not at every poll again."""
        last = self._journal.log()[-1:]
        if not last or not _is_same(last[0][3], exc.message):
            self._journal.add_to_log("", "failed", exc.message)

    async def _install(self, report, manifest, url):
        image = manifest.firmware
        if not self._slot.is_settled():
            if self._slot.status()["inactive_build"] == self._journal.get("trial").get("build"):
                self._machine.reset()  # activated, and then something kept us from it
            raise errors.BusyError("otadata names a slot that does not run; reset the board first")
        self._emit("staging", version=manifest.version, size=image.size)
        await self._report(report, "staging")
        start = time.ticks_ms()
        self._fetching = True
        self._let_go()
        gc.collect()
        from .download import Download

        await asyncio.sleep_ms(0)
        # Payload URLs are relative to the product's directory, where r/ and blobs/ lie.
        at = url.rfind("/r/")
        download = Download(self._slot, self._journal, self._client, self._emit, self._spend)
        self._journal.set_fetching(mark(manifest.version + image.build))
        try:
            await download.run(image, url[: at + 1] if at > 0 else url, self._running["build"])
        except errors.NetworkError:
            self._fetching = not download.further  # what the next poll goes on from is no failure
            raise
        finally:
            self._journal.set_fetching(0)
            report["bytes"] = download.fetched
        ms = time.ticks_diff(time.ticks_ms(), start)
        self._emit("staged", version=manifest.version, bytes=report["bytes"], ms=ms)
        await self._report(report, "staged")

    def _note(self, **changes):
        """Keep in the journal what an update can do without."""
        try:
            self._journal.update(**changes)
        except (errors.SpaceError, MemoryError) as exc:
            print("twinslot: not kept:", exc)

    def _spend(self, n):
        """Book ``n`` bytes of payload. Raises BusyError once the budget of the day is used up."""
        budget = self._settings["budget"]
        if not budget:
            return
        day = int(time.time()) // DAY_S
        booked = self._journal.get("spent", list)
        spent = n + (booked[1] if booked[:1] == [day] else 0)
        if n:
            self._note(spent=[day, spent])
        if spent >= budget:
            raise errors.BusyError("bytes today", spent, "less than the budget of %d" % budget)


def _is_same(kept, message):
    """True where the log has this message, perhaps cut, but for its numbers: bytes that are free
    differ each time."""
    bare, whole = ["".join(c for c in text if not c.isdigit()) for text in (kept, message)]
    return bare == whole or (len(kept) == REASON and whole.startswith(bare))


def mark(name):
    """Stands for a release in a number of NVS: 31 bits, never 0."""
    return binascii.crc32(name.encode()) & 0x7FFFFFFF or 1


def _flash_size():
    try:
        import esp

        return esp.flash_size()
    except (ImportError, AttributeError):
        return None


def _free_bytes():
    try:
        stats = os.statvfs("/")
        return stats[0] * stats[3]
    except OSError:
        return None


async def persist(step):
    """Await ``step()`` for ever: a slip must not end the updates of a board nobody can reach."""
    while True:
        try:
            await step()
        except Exception as exc:
            sys.print_exception(exc)
            await asyncio.sleep(_BACKOFF_S)


def foreseen(exc):
    """Return an OtaError for any exception: out of memory is BusyError, a slip InternalError."""
    if isinstance(exc, OtaError):
        return exc
    if isinstance(exc, MemoryError):
        tidy()  # what comes now has to find room: a report, a line in the log
        return errors.BusyError("out of memory: %s; %d bytes free" % (exc, gc.mem_free()))
    sys.print_exception(exc)
    return errors.InternalError("%s: %s" % (type(exc).__name__, exc))


def _console(name, data):
    """The listener every agent has: one line per step on the console, server text made safe."""
    if name == "progress":
        if data["done"] * 10 // data["total"] == (data["done"] - 65536) * 10 // data["total"]:
            return
    for key in sorted(data):  # dicts have no order here; a log that is read by eye should
        name += " %s=%s" % (key, str(data[key])[:160])
    text = bytearray(name.encode())
    for i, c in enumerate(text):
        if not 32 <= c <= 126:
            text[i] = 63  # a question mark
    print("twinslot:", text.decode())
