"""What is outside of a board, for tests of its agent: a source, a trust and a client to order.

Slot, journal, health and the guard are the board's own. machine.reset() ends an update.
"""

import json
import sys

import machine
import workbench as bench
from workbench import BLOCK, VALID

import twinslot.agent
from twinslot import release
from twinslot.errors import OtaError
from twinslot.slot import FirmwareSlot
from twinslot.sources import parse_offer
from twinslot.url import resolve

HOME = "http://tree.example/"
OWN = FirmwareSlot().status()["build"]
IMAGE = bench.make_image(3 * BLOCK + 512, version="2.0.0")
OTHER = bench.signed(IMAGE).build
SETTINGS = {
    "product": "lamp",
    "url": HOME,
    "allow_http": True,
    "keys": "/keys.json",
    "ntp": "",
    "version": "1.0.0",
    "stable": 0,
    "deadline": 0,
    "poll": 60,
}


class Reset(BaseException):
    """machine.reset() of these tests."""


class Body:
    status = 200
    etag = retry_after = None

    def __init__(self, content):
        self.length = len(content)
        self.received = 0
        self._content = content

    def take(self, view, n):
        n = min(n, self.length - self.received)
        view[:n] = self._content[self.received : self.received + n]
        self.received += n
        return n or None

    async def wait(self):
        """There is nothing to wait for."""

    async def read(self, limit):
        self.received = self.length
        return self._content

    async def close(self):
        pass


class World:
    """What is outside of the board: offers, releases, bytes, and who is told.

    Attributes:
        offer: the pointer a poll finds, or an exception.
        manifest: the release it leads to, or an exception.
        content: the payload, or an exception.
        refuse: exceptions with which reports are answered, one by one.
        documents: {URL: JSON or an exception} of the signed tree.
        reports, fetched: what reached the source; URLs of payloads asked for.
    """

    def __init__(self, **manifest):
        self.offer = {"release": HOME + "lamp/r/2.0.0.jws"}
        self.manifest = make_release(**manifest)
        self.content = IMAGE
        self.refuse = []
        self.documents = {}
        self.reports = []
        self.fetched = []
        self.released = []
        self.polls = 0

    async def poll(self, client, facts):
        self.polls += 1
        if isinstance(self.offer, Exception):
            raise self.offer
        return parse_offer(self.offer, HOME, resolve)

    async def report(self, client, facts, report):
        if self.refuse:
            error = self.refuse.pop(0)
            if error:
                raise error
        self.reports.append(dict(report))

    async def release(self, client, url):
        self.released.append(url)
        if isinstance(self.manifest, Exception):
            raise self.manifest
        return self.manifest

    async def renew(self, client, version, base=None):
        return None

    def verified(self):
        pass

    async def get(self, url, **kw):
        self.fetched.append(url)
        if url in self.documents:
            if isinstance(self.documents[url], Exception):
                raise self.documents[url]
            return Body(json.dumps(self.documents[url]).encode())
        if isinstance(self.content, Exception):
            raise self.content
        return Body(self.content)

    @property
    def client(self):
        return self

    async def close(self):
        pass


def make_release(**change):
    image = bench.signed(IMAGE)
    payload = release.Payload("blobs/a.bin", "identity", len(IMAGE), 0, None, None)
    values = {
        "product": "lamp",
        "version": "2.0.0",
        "hardware": ["ESP32_GENERIC"],
        "security_version": 4,
        "downgrade": False,
        "issued": 1795165200,
        "expires": None,
        "notes": "",
        "firmware": release.Image("firmware", 0, image.size, image.sha256, OTHER, [payload]),
    }
    values.update(change)
    return release.Release(*[values[name] for name in fields(values)])


def fields(values):
    """Names of release.Release in its order; None for what a later one has more."""
    names = list(RELEASE_FIELDS)
    for name in names:
        values.setdefault(name, None)
    return names


RELEASE_FIELDS = (
    "product",
    "version",
    "hardware",
    "security_version",
    "downgrade",
    "issued",
    "expires",
    "notes",
    "firmware",
)


def start(world, *entries, settings=None, cause=machine.HARD_RESET, **journal):
    """Switch a board on, with this otadata and journal; return its agent and a list of events."""
    bench.otadata(*(entries or ((1, VALID),)))
    if not entries:
        bench.erase()
    bench.new_journal(**journal)
    with open("/keys.json", "w") as f:
        n = "v" + "7" * 340 + "Q"  # nobody's key
        json.dump({"keys": [{"kty": "RSA", "n": n, "e": "AQAB", "alg": "PS256"}]}, f)
    machine.reset = _reset
    machine.reset_cause = lambda: cause
    guard = sys.modules["twinslot.guard"]
    guard._verdict = None
    agent = twinslot.agent.Agent(dict(SETTINGS, **(settings or {})), source=world)
    guard.stop()
    agent._journal.set_starts(0)
    agent._trust = world
    events = []
    agent.on_event(lambda name, data: events.append((name, dict(data))))
    return agent, events


def _reset():
    raise Reset


def names(events):
    return [name for name, _ in events]


async def installs(agent, **kw):
    """Await an update that ends in a reset."""
    try:
        await agent.update_now(**kw)
    except Reset:
        return
    raise AssertionError("no reset")


async def refuses(kind, agent, **kw):
    try:
        await agent.update_now(**kw)
    except OtaError as exc:
        assert isinstance(exc, kind), repr(exc)
        return exc
    raise AssertionError("nothing raised, expected %s" % kind.__name__)
