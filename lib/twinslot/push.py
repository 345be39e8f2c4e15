"""Take a release over the prompt: the board's half of ``twinslot push``.

    push = Push()
    push.start("r/1.4.0.jws")       # prints what is wanted
    push.answer(2711)               # so many bytes follow; -1: there is no such file
    push.feed(b"...")               # until something else is wanted
    push.go()                       # activate: the board resets

It is an agent whose network is the person at the prompt: what it fetches, somebody has to hand
over. Signature, policy, slot, trial record and activation are the agent's own. Nothing is told to
the server; the outcome of the trial is, after the reset.

Each call prints one line of JSON and returns when the next one is due: ``state`` is ``wants``
(``url``, ``start``), ``more`` (``done``, ``total``: bytes of the image), ``ready`` (for ``go``),
``same`` (this image runs already) or ``failed`` (``code``, ``number``, ``message``). Between two
calls the event loop stands still. The guard resets a board that nobody goes on with.
"""

import asyncio
import json

from . import config, guard, payload
from .agent import Agent, foreseen
from .errors import BusyError, HttpError

_BASE = "https://cable.invalid/"  # what URLs are relative to; nobody looks it up
_PATIENCE_S = 120  # from one call to the next
_SIGNING_S = 900  # after hello(): somebody may have to press a button before a release is signed


class Push(Agent):
    """See the module.

    Args:
        path: the board's configuration.

    Raises:
        ConfigError, PartitionError: as ``Agent``.
    """

    def __init__(self, path="/ota.json"):
        asyncio.new_event_loop()  # what an interrupted main.py has left must not go on
        guard.feed(_PATIENCE_S)
        super().__init__(dict(config.load(path), budget=0))
        guard.started()  # somebody is there, and it is no fault of the application's
        self._client = self._line = _Line()
        self._ask = self._permission
        self._agreed = asyncio.Event()
        self._state = {}

    def hello(self):
        """Print what a release must fit, and what the board can unpack."""
        guard.feed(_SIGNING_S)
        facts = self.facts()
        facts["floor"] = self._journal.get("floor", int)
        facts["encodings"] = payload.encodings()
        facts["slot_size"] = self._slot.size
        facts["trial"] = self._verdict == "trial"
        print(json.dumps(facts))

    def start(self, release, force=False):
        """Begin with a release: its path, relative to the product's folder."""
        self._state = {"state": "more", "done": 0, "total": 0}
        self._task = asyncio.create_task(self._push(_BASE + release, force))
        self._until_rest()

    def answer(self, length):
        """What was wanted has ``length`` bytes from its start on, or -1: it isn't there."""
        self._line.length = length
        self._line.received = 0
        self.feed(b"")

    def feed(self, data):
        """Hand over the next bytes."""
        self._line.hand_over(data)
        self._until_rest()

    def go(self):
        """Activate the image and reset; prints only if that fails."""
        self._agreed.set()
        self._until_rest()

    # -- how an agent gets there --------------------------------------------------------------

    async def _push(self, url, force):
        from .console import on_trial

        try:
            if on_trial():  # a release of this very build would raise the floor unproven
                raise BusyError("the running image is on trial")
            await self._take(url, force)
            self._state = {"state": "same"}
        except Exception as exc:
            self._state = foreseen(exc).report()
            self._state["state"] = "failed"
        self._slot.abandon()
        self._line.rest.set()

    def _until_rest(self):
        """Let the agent run until it waits for the next call."""
        guard.feed(_PATIENCE_S)
        asyncio.get_event_loop().run_until_complete(self._line.rest.wait())
        self._line.rest.clear()
        state, wants = self._state, self._line.wants
        if wants:
            state = {"state": "wants", "url": wants[0][len(_BASE) :], "start": wants[1]}
        print(json.dumps(state))

    def _emit(self, name, **data):
        if name == "progress":
            self._state = dict(data, state="more")
        elif name == "staging":
            self._state = {"state": "more", "done": 0, "total": data["size"]}

    async def _send(self, report):
        """A report goes nowhere: there is no network, and there need not be any."""

    async def _permission(self, step, manifest):
        if step == "activate":
            self._state = {"state": "ready"}
            self._line.rest.set()
            await self._agreed.wait()
        return True


class _Line:
    """An ``http.Client`` and its answers, one at a time, as far as the agent uses them."""

    retry_after = etag = None

    def __init__(self):
        self.rest = asyncio.Event()  # set when somebody at the prompt has to act
        self.wants = None  # (url, start) until it is answered
        self._news = asyncio.Event()
        self._data = memoryview(b"")
        self.length = self.received = 0

    def hand_over(self, data):
        self.wants = None
        self._data = memoryview(data)[: max(0, self.length - self.received)]
        self._news.set()

    async def wait(self):
        self.rest.set()
        await self._news.wait()
        self._news.clear()

    async def get(self, url, etag=None, start=None, if_range=None, deadline_ms=None, redirects=0):
        self.wants = (url, start or 0)
        await self.wait()
        if self.length < 0:
            self.status, self.length = 404, 0
        else:
            self.status = 206 if start else 200
        return self

    def take(self, buf, n):
        if self.received == self.length:
            return None
        n = min(n, len(self._data))
        buf[:n] = self._data[:n]
        self._data = self._data[n:]
        self.received += n
        return n

    async def read(self, limit):
        if self.length > limit:
            raise HttpError("release", "%d bytes" % self.length, "at most %d" % limit)
        data = bytearray(self.length)
        view = memoryview(data)
        at = 0
        while at < len(data):
            n = self.take(view[at:], len(data) - at)
            if n:
                at += n
            else:
                await self.wait()
        return bytes(data)

    async def close(self):
        """The connection stays: it is somebody's cable."""
