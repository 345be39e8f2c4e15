"""A board's own software under CPython: boot guard, agent and push, over the flash of `onhost`.

    with installed():                          # once: what MicroPython has and CPython has not
        device = Device(first_image, settings, key_file)
        device.poll(url)                       # raises OtaError; True if the board has reset
        device.push("r/1.4.0.jws")             # what `twinslot push` is told in the end

The network is a dict, `device.documents`. For sequences of thousands of polls and boots: not for
memory, time or transport.
"""

import asyncio
import contextlib
import gc
import io
import json
import sys
import time
import types
from collections.abc import Iterator

import onhost
import pytest

from twinslot.journal import Journal
from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.chip import flash

BASE = "http://updates.example/"  # and the product's folder
CABLE = "https://cable.invalid/"


class Reset(SystemExit):
    """machine.reset(): nothing after it runs."""


class Cut(SystemExit):
    """The power failed; no handler on the board sees that."""


class Slip(SystemExit):
    """The software has met an error that it does not foresee."""


def _reset():
    raise Reset


def _slip(exc):
    raise Slip(repr(exc)) from exc


class _Timer:
    PERIODIC = 1

    def __init__(self, number):
        pass

    def init(self, **options):
        pass

    def deinit(self):
        pass


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put what MicroPython has into place, and import the software."""
    machine = types.ModuleType("machine")
    machine.reset, machine.Timer = _reset, _Timer
    machine.unique_id = lambda: b"\1\2\3\4\5\6"
    micropython = types.ModuleType("micropython")
    micropython.const = lambda value: value

    async def sleep_ms(ms):
        await asyncio.sleep(ms / 1000)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in (("machine", machine), ("micropython", micropython)):
            patch.setitem(sys.modules, name, module)
        patch.setitem(sys.modules, "esp32", onhost._ESP32)
        patch.setitem(sys.modules, "twinslot.native", None)  # that is for another emitter
        heap = [(0, 0, 1 << 20, 0)]
        patch.setattr(onhost._ESP32, "idf_heap_info", lambda kind: heap, raising=False)
        patch.setattr(flash, "PowerCut", Cut)
        patch.setattr(asyncio, "sleep_ms", sleep_ms)
        patch.setattr(gc, "collect", lambda: 0)
        patch.setattr(gc, "mem_free", lambda: 1 << 20, raising=False)
        patch.setattr(gc, "threshold", lambda *bytes_: 0, raising=False)
        patch.setattr(sys, "print_exception", _slip, raising=False)
        patch.setattr(time, "ticks_ms", lambda: int(time.monotonic() * 1000), raising=False)
        patch.setattr(time, "ticks_diff", lambda a, b: a - b, raising=False)
        patch.setattr(time, "ticks_add", lambda a, b: a + b, raising=False)
        from twinslot import push

        # What is loaded stays, and so does what a test has planted in it.
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "twinslot" and hasattr(module, "unload"):
                patch.setattr(module, "unload", lambda: None)
        patch.setattr(push, "asyncio", _OneLoop)
        yield


class _OneLoop:
    """What push.py uses of MicroPython's asyncio, which has but one loop."""

    Event = asyncio.Event
    loop: asyncio.AbstractEventLoop

    @staticmethod
    def new_event_loop():
        pass

    @classmethod
    def get_event_loop(cls):
        return cls.loop

    @classmethod
    def create_task(cls, coroutine):
        return cls.loop.create_task(coroutine)


class _Answer:
    etag = retry_after = None

    def __init__(self, data: bytes | None, start: int | None):
        self.status = 404 if data is None else 206 if start else 200
        self._left = memoryview((data or b"")[start or 0 :])
        self.length = len(self._left)
        self.received = 0

    def take(self, buf, n):
        if not self._left:
            return None
        n = min(n, len(self._left))
        buf[:n] = self._left[:n]
        self._left = self._left[n:]
        self.received += n
        return n

    async def wait(self):
        raise AssertionError("all of it is here")

    async def read(self, limit):
        assert self.length <= limit
        return bytes(self._left)

    async def close(self):
        pass


class _Source:
    """Offers what it is told to, as ``sources.static`` would."""

    def __init__(self):
        from twinslot.sources import Offer

        self._offer = Offer(None, None, 100, "", 0, 0)
        self.nothing = self._offer
        self.next = self._offer

    def offer(self, url, install_s):
        self.next = self._offer._replace(release=url, install=install_s)

    async def poll(self, client, facts):
        return self.next

    async def report(self, client, facts, report):
        pass


class Device:
    """A board from its first image on.

    Args:
        first: bytes of the image in ota_0, confirmed.
        config: path of its ota.json, whose ``url`` is BASE.
    """

    def __init__(self, first: bytes, config: str):
        self.on = onhost.OnHost(first)
        self.documents: dict[str, bytes] = {}  # by path, relative to the product's folder
        self.events: list[tuple[str, int, str]] = []  # with floor and version at that time
        self.healthy = True
        self._config = config
        self._source = None
        self.boot()

    # -- what a board does

    def boot(self, cause: int = bootloader.HARD_RESET) -> None:
        """Reset, and again while the guard wants it; then an agent is made."""
        from twinslot import agent, config, guard, journal

        self.cut_after(None)
        for _ in range(5):
            self._stop()
            self.on.boot(cause)
            self.on.partition()
            sys.modules["machine"].reset_cause = lambda cause=cause: cause
            journal._shared = Journal(self.on.nvs)
            guard._verdict = None
            try:
                self.verdict = guard.start()
            except Reset:
                cause = bootloader.HARD_RESET
                continue
            self._start_loop()
            self._source = _Source()
            self.agent = agent.Agent(config.load(self._config), self._source)
            self.agent._client = self.agent._trust.client = self
            self.agent.check("application", lambda: self.healthy)
            self.agent.on_event(self._note)
            return
        raise AssertionError("it resets for ever")

    @staticmethod
    def _start_loop():
        _OneLoop.loop = asyncio.new_event_loop()
        _OneLoop.loop.set_exception_handler(lambda loop, context: None)  # a reset ends tasks, too

    @staticmethod
    def _stop():
        loop = getattr(_OneLoop, "loop", None)
        if loop is None or loop.is_closed():
            return
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    def poll(self, path=None, force=False, now=None, install_s=0) -> bool:
        """One poll, which is offered ``path``; True if it ended in a reset into what it took."""
        if now is None or not self.agent._clock.observe(now, "user"):
            self.agent._clock.doubt()
        self._source.offer(path and BASE + path, install_s)
        return self._runs(self.agent.update_now(force))

    def push(self, path, force=False) -> str:
        """What ``twinslot push`` does; "reset", "same" or the code of the refusal."""
        from twinslot import push

        self._stop()
        self._start_loop()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            one = push.Push(self._config)
            try:
                one.start(path, force)
                rest = b""
                while True:
                    last = json.loads(said.getvalue().splitlines()[-1])
                    if last["state"] == "wants":
                        data = self.documents.get(last["url"])
                        rest = (data or b"")[last["start"] :]
                        one.answer(-1 if data is None else len(rest))
                    elif last["state"] == "more":
                        assert rest, "more is wanted than there is"
                        given, rest = rest, b""
                        one.feed(given)
                    elif last["state"] == "ready":
                        one.go()
                    else:
                        return last.get("code", last["state"])
            except Reset:
                return "reset"
            except Slip as slip:
                raise AssertionError(str(slip)) from slip

    def _runs(self, coroutine) -> bool:
        try:
            _OneLoop.loop.run_until_complete(coroutine)
        except Reset:
            return True
        except Slip as slip:
            raise AssertionError(str(slip)) from slip
        return False

    async def get(self, url, etag=None, start=None, if_range=None, deadline_ms=None, redirects=0):
        """The agent's ``http.Client`` is this."""
        return _Answer(self.documents.get(url.removeprefix(BASE)), start)

    async def close(self):
        pass

    def _note(self, name, data):
        self.events.append((name, self.floor, self.version))

    # -- what is done to it

    def cut_after(self, operations: int | None) -> None:
        """Let the power fail at one of the next flash operations."""
        board = self.on.board
        board.fault = None
        if operations:
            board.fault = flash.Fault(board.stats.ops + operations, "torn", None, 7)
        self.on.partition()

    # -- what it is

    @property
    def journal(self) -> Journal:
        return Journal.shared()

    @property
    def floor(self) -> int:
        return self.journal.get("floor", int)

    @property
    def running(self) -> str:
        return self.on.slot().status()["build"]

    @property
    def version(self) -> str:
        return self.agent.version()
