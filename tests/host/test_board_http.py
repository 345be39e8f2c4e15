"""HTTP client and clock on the virtual board: its own RTC, name lookup in a thread."""

import time
from email.utils import formatdate
from pathlib import Path

import faultserver as fs
import pytest
from boards import new_board

from twinslot_tools.virtual_esp32 import vfs

LIB = Path(__file__).parents[2] / "lib" / "twinslot"
MODULES = (
    "__init__",
    "errors",
    "url",
    "certs",
    "context",
    "handshake",
    "link",
    "lookup",
    "http",
    "head",
    "request",
    "dial",
    "digits",
    "clock",
)

MAIN = """
import asyncio
from twinslot.clock import Clock
from twinslot.errors import OtaError
from twinslot.http import Client, Tls

TLS = {tls}

async def fetch(client, url):
    try:
        answer = await client.get(url)
        block, total = bytearray(4096), 0
        while True:
            n = await answer.readinto(block)
            if not n:
                break
            total += n
        print(answer.status, total)
    except OtaError as e:
        print(e.code, e)

async def main():
    clock = Clock(ntp="", floor={floor})
    for name in ("ca", "fingerprint"):
        if TLS.get(name) == "file":
            TLS[name] = open("/" + name, "rb").read()
    client = Client(Tls(**TLS), on_date=clock.observe)
    {before}
    await fetch(client, "{url}/body")
    await client.close()
    print(clock.state, clock.source, clock.now())

asyncio.run(main())
"""
NOW = int(time.time())


@pytest.fixture(scope="module")
def identity():
    return fs.make_identity(begins_days=-30)


@pytest.fixture(scope="module")
def server(identity):
    made = fs.FaultServer(fs.server_context(identity))
    body = bytes(100000)

    def script(peer: fs.Peer, request: fs.Request) -> bool:
        head = f"HTTP/1.1 200 OK\r\nDate: {formatdate(NOW, usegmt=True)}\r\n"
        peer.send(head + f"Content-Length: {len(body)}\r\n\r\n", body)
        return True

    made.scripts["/body"] = script
    yield made
    made.stop()


def run(folder, server, tls, *, floor=NOW - 86400, before="", **kw):
    files = {f"lib/twinslot/{name}.py": (LIB / f"{name}.py").read_text() for name in MODULES}
    kw.setdefault("clock", None)
    main = MAIN.format(tls=tls, url=server.url, floor=floor, before=before)
    board = new_board(folder, main, files=files, **kw)
    return board


def test_fingerprint_needs_no_clock_and_the_date_then_sets_it(tmp_path, server, identity):
    board = run(tmp_path, server, {"fingerprint": identity.fingerprint})
    lines = board.run(timeout=30).console.splitlines()
    assert lines == ["200 100000", f"known date {NOW}"]


def test_fingerprint_of_another_certificate_is_refused(tmp_path, server):
    before = len(server.requests)
    board = run(tmp_path, server, {"fingerprint": "ab" * 32})
    lines = board.run(timeout=30).console.splitlines()
    assert lines[0].startswith("tls certificate fingerprint: saw ")
    assert lines[1] == "unknown None None"
    assert len(server.requests) == before


def test_F36_unset_clock_refuses_until_the_lower_bound_is_set(tmp_path, server, identity):
    first = f"await fetch(client, '{server.url}/body')"
    then = "await clock.ensure()"
    board = run(tmp_path, server, {"ca": "file"}, before=f"{first}\n    {then}")
    vfs.write_files(board.path, {"/ca": identity.der})
    lines = board.run(timeout=30).console.splitlines()
    assert "not valid yet: is the clock set?" in lines[0]
    assert lines[1:] == ["200 100000", f"known date {NOW}"]


def test_certificate_as_pem_with_the_clock_of_the_host(tmp_path, server, identity):
    board = run(tmp_path, server, {"ca": "file"}, clock="host")
    vfs.write_files(board.path, {"/ca": identity.pem})
    assert board.run(timeout=30).console.splitlines()[0] == "200 100000"


LOOKUP = """
import asyncio, time
from twinslot import lookup
from twinslot.errors import OtaError

real = lookup._ask
def slow(answer, *args):
    time.sleep_ms(600)
    real(answer, *args)

async def look(limit_ms):
    began = time.ticks_ms()
    try:
        found = await lookup.lookup("localhost", 80, limit_ms=limit_ms)
        said = str(len(found) > 0)
    except OtaError as e:
        said = e.code
    print(said, time.ticks_diff(time.ticks_ms(), began) // 200)

gap = 0
async def ticker():
    global gap
    last = time.ticks_ms()
    while True:
        await asyncio.sleep_ms(1)
        now = time.ticks_ms()
        gap = max(gap, time.ticks_diff(now, last))
        last = now

async def main():
    asyncio.create_task(ticker())
    for _ in range(300):
        assert await lookup.lookup("localhost", 80)
    lookup._ask = slow
    await look(5000)        # slow, but it comes
    await look(250)         # gives up
    await look(5000)        # waits for the thread before, then asks itself
    print("held" if gap > 300 else "free")

asyncio.run(main())
"""


def test_F63_name_lookup_never_holds_the_event_loop(tmp_path):
    """300 lookups in threads, then ones of 600 ms each; time is printed in steps of 200 ms."""
    files = {f"lib/twinslot/{name}.py": (LIB / f"{name}.py").read_text() for name in MODULES}
    lines = new_board(tmp_path, LOOKUP, files=files).run(timeout=60).console.splitlines()
    assert lines[0] == "True 3"
    assert lines[1] == "timeout 1"
    assert lines[2].startswith("True ")
    assert lines[3] == "free"
