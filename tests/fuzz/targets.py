"""Fuzz the device's own parsers, run by MicroPython: many cases in one process.

    micropython -X heapsize=256K targets.py LIB CHIP SEEDS TARGET SEED COUNT SECONDS

Prints one line of JSON at the end. A case has passed if the code returned or raised an OtaError
(for the modules of the virtual chip: their own errors), in time and without running out of heap.
Anything else ends the run, with the input in the line. TARGET may name a file with one such input,
``http:tests/fuzz/found/http-3f3f0a.bin``: all cases are that one, for what a target draws by lot.
"""

import asyncio
import binascii
import json
import random
import struct
import sys
import time

sys.path[:0] = [sys.argv[1], sys.argv[2]]

from twinslot.errors import OtaError  # noqa: E402

SLOWEST_US = 500_000  # of one case; a hundred times that on a board
_TOKENS = (
    b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b":", b",", b"null", b"true",
    b"-1", b"1e9", b"99999999999999999999", b"0", b".", b"=", b"-", b"\r\n", b"\n", b"\r\n\r\n",
    b"chunked", b"Content-Length: ", b"Transfer-Encoding: ", b"Location: ", b"ETag: ", b"bytes ",
    b"HTTP/1.1 ", b"HTTP/1.0 ", b"100", b"206", b"304", b"ffffffff", b"7fffffff", b"80000000",
    b"\x00", b"\xff", b"\x80", b"\xe9", b"AQAB", b"PS256", b"none", b"../", b"%2e", b"//", b"@",
)  # fmt: skip


def mutate(raw, seeds):
    """Return a neighbour of ``raw``: bits, bytes, tokens, pieces gone, doubled, or of others."""
    data = bytearray(raw)
    for _ in range(1 + random.getrandbits(2)):
        n = len(data)
        how = random.randrange(9)
        at = random.randrange(n + 1)
        if how == 0 and n:
            data[at % n] ^= 1 << random.getrandbits(3)
        elif how == 1 and n:
            data[at % n] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.getrandbits(8)))
        elif how == 2:
            data = data[:at]
        elif how == 3:
            data = data[:at] + data[at + random.randrange(1, 17) :]
        elif how == 4:
            data = data[:at] + random.choice(_TOKENS) + data[at:]
        elif how == 5 and n:
            piece = bytes(data[at : at + random.randrange(1, 33)])
            data = data[:at] + piece * random.randrange(1, 9) + data[at:]
        elif how == 6:
            other = random.choice(seeds)
            cut = random.randrange(len(other) + 1)
            data = data[:at] + bytearray(other[cut : cut + random.randrange(1, 200)]) + data[at:]
        elif how == 7 and n >= 4:
            at = at % (n - 3)
            value = random.choice((0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 24))
            data[at : at + 4] = struct.pack(random.choice("<>") + "I", value)
        elif how == 8:
            data = data[:at] + bytes([random.getrandbits(8)]) * (1 << random.randrange(11))
        if len(data) > 20_000:
            data = data[:20_000]
    return bytes(data)


# ---- targets: each takes the bytes of a case and may raise OtaError


def _jws(seeds):
    from twinslot import jws, keyset, strict

    keys = keyset.load(strict.loads(seeds.pop(0)))

    def case(raw):
        jws.verify(raw, keys, random.choice((None, "twinslot-release+jws")))

    return case


def _keys(seeds):
    from twinslot import keyring

    def case(raw):
        keyring.load(raw)

    return case


class _Passed:
    """Takes the place of the signature check, so that what it guards gets its share too."""

    @staticmethod
    def verify(token, keys, typ=None):
        return bytes(token)


def _keyring(seeds):
    import twinslot
    from twinslot import keyring, keyset  # noqa: F401 (before the real one is gone)

    twinslot.jws = _Passed  # which is what the keyring imports

    def case(raw):
        keyring.parse(raw, {}, "sensor-node")

    return case


def _release(seeds):
    from twinslot import payload, release

    board = release.Board(
        "sensor-node", "ESP32_GENERIC", 0, "1.0.0", "", 0, 1800000000, (), 1 << 21
    )

    def case(raw):
        manifest = release.parse(raw)
        payload.usable(manifest.firmware, "c" * 64, ("identity", "gzip"))
        release.judge(manifest, board)

    return case


def _offer(seeds):
    from twinslot.sources import parse_offer
    from twinslot.url import parse, resolve

    def case(raw):
        if raw[:1] == b"h":
            try:
                parse(raw.decode())
            except UnicodeError:
                return
        try:
            obj = json.loads(raw)
        except ValueError:
            return
        parse_offer(obj, "https://updates.example/sensor-node/stable.json", resolve)

    return case


def _image(seeds):
    from twinslot import espimage
    from twinslot.walk import Walk

    def case(raw):
        def read(offset, buf):
            piece = raw[offset : offset + len(buf)]
            buf[: len(piece)] = piece

        walk = Walk()
        step = random.choice((1, 33, 256, 1000, 4096))
        if len(raw) < 2000 or step > 200:
            for at in range(0, len(raw), step):
                walk.feed(raw[at : at + step])
        for action in (
            lambda: espimage.parse(raw[: espimage.HEAD_LEN]),
            lambda: espimage.identify(read, len(raw)),
            walk.finish,
        ):
            try:
                action()
            except OtaError:
                pass

    return case


class _Parts:
    """esp32.Partition over bytes: two slots and otadata."""

    BOOT, RUNNING, TYPE_APP, TYPE_DATA = 0, 1, 0, 1
    raw = b""

    def __init__(self, index=0):
        self._index = index

    @classmethod
    def find(cls, kind, subtype=0xFF):
        return [cls(0), cls(1)] if kind == 0 else [cls(2)]

    def info(self):
        if self._index == 2:
            return (1, 0, 0xD000, 0x2000, "otadata", False)
        return (0, 0x10 + self._index, 0x10000, 0x10000, f"ota_{self._index}", False)

    def get_next_update(self):
        return _Parts(1 - self._index)

    def readblocks(self, block, buf, offset=0):
        at = block * 4096 + offset
        piece = _Parts.raw[at : at + len(buf)] if self._index == 2 else b""
        for i in range(len(buf)):
            buf[i] = piece[i] if i < len(piece) else 0xFF


def _otadata(seeds):
    import otadata

    from twinslot.slot import FirmwareSlot

    def case(raw):
        _Parts.raw = raw[:32] + b"\xff" * 4064 + raw[32:64]
        slot = FirmwareSlot(_Parts)
        ours = sorted((seq, state) for seq, state, _ in slot._entries())
        slot.status()
        # And the bootloader's reader: it must not trip, and read the same.
        entries = [otadata.unpack((raw + b"\xff" * 64)[at : at + 32]) for at in (0, 32)]
        otadata.boot_slot(entries, 2)
        theirs = sorted((e.seq, e.state) for e in entries if otadata.crc_ok(e) and e.seq)
        if ours != theirs:
            raise AssertionError(f"two readers: {ours} {theirs}")

    return case


def _table(seeds):
    import table

    def case(raw):
        try:
            table.parse(raw + b"\xff" * max(0, table.TABLE_SIZE - len(raw)))
        except table.TableError:
            pass

    return case


class _Blobs:
    """esp32.NVS with one content."""

    raw = b""

    def get_blob(self, key, buf):
        if len(_Blobs.raw) > len(buf):
            raise OSError(-0x110C)
        buf[: len(_Blobs.raw)] = _Blobs.raw
        return len(_Blobs.raw)

    def set_blob(self, key, value):
        pass

    def get_i32(self, key):
        raise OSError(-0x1102)

    def set_i32(self, key, value):
        pass

    def erase_key(self, key):
        raise OSError(-0x1102)

    def commit(self):
        pass


class _Slot:
    """A slot in any state, which takes all that health asks of it."""

    def status(self):
        states = ("new", "pending", "valid", "aborted", "blank")
        return {
            "build": random.choice(("b", "c")),
            "version": "1.0.0",
            "inactive_build": random.choice(("b", "c")),
            "running": "ota_0",
            "boot": random.choice(("ota_0", "ota_1")),
            "state": random.choice(states),
            "inactive_state": random.choice(states),
        }

    def is_settled(self):
        return True

    def confirm(self):
        pass

    settle = reject = confirm


def _journal(seeds):
    from twinslot import health
    from twinslot.journal import Journal

    def case(raw):
        if random.getrandbits(1):  # a right checksum over whatever follows
            raw = raw[:1] + struct.pack("<I", binascii.crc32(raw[5:]) & 0xFFFFFFFF) + raw[5:]
        _Blobs.raw = raw
        journal = Journal(_Blobs())
        for key, kind in (("trial", dict), ("floor", int), ("reports", list), ("confirmed", str)):
            if type(journal.get(key, kind)) is not kind:
                raise AssertionError(key)
        journal.checkpoint()
        for _, version, status, reason in journal.log():
            version + status + reason
        health.failed_builds(journal)
        journal.version("b") + journal.version("c")
        slot = _Slot()
        health.reconcile(slot, journal, random.randrange(6))
        health.confirm(slot, journal)
        journal.update(floor=3, reports=[{"a": 1}])

    return case


def _checkpoint(seeds):
    from twinslot.journal import Journal

    def case(raw):
        if random.getrandbits(1):
            raw = raw[:1] + struct.pack("<I", binascii.crc32(raw[5:]) & 0xFFFFFFFF) + raw[5:]
        _Blobs.raw = raw
        kept = Journal(_Blobs()).checkpoint()
        if kept:  # what a download makes of it
            range(kept["at"]), range(kept["position"]), range(kept["offset"])
            (kept.get("etag") or "").encode()

    return case


def _nvs(seeds):
    import io

    import flash as nor
    import nvs

    size = 0x4000

    def case(raw):
        data = bytearray(raw[:size])
        data.extend(b"\xff" * (size - len(data)))
        flash = nor.Flash(io.BytesIO(data), size, stats=None, strict=False)
        try:
            store = nvs.open_or_erase(flash, 0, size)
            space = store.open("twinslot")
            for key in ("journal", "floor"):
                try:
                    store.get_blob(space, key)
                except nvs.NvsError:
                    pass
            store.set_blob(space, "journal", b"x" * 100)
            if store.get_blob(space, "journal") != b"x" * 100:
                raise AssertionError("what was written is not what is read")
        except nvs.NvsError:
            pass

    return case


class _Socket:
    """The bytes a server sends, in pieces of any size, then the end or a reset."""

    def __init__(self, raw):
        self._raw = raw
        self._at = 0

    def readinto(self, buf, n=None):
        n = len(buf) if n is None else n
        if self._at >= len(self._raw):
            if random.getrandbits(2) == 0:
                raise OSError(104)
            return 0
        n = min(n, random.choice((1, 3, 100, 4096)), len(self._raw) - self._at)
        buf[:n] = self._raw[self._at : self._at + n]
        self._at += n
        return n

    def write(self, data):
        return len(data)

    def close(self):
        pass


def _http(seeds):
    import twinslot
    from twinslot import dial, http
    from twinslot.link import Link

    async def connect(client, url, deadline, since):
        client._link = link = Link(url[:3])
        link._sock = _Socket(client.raw)

    dial.connect = connect
    twinslot._RARE = twinslot._RARE.replace("dial ", "")  # this one stays
    client = http.Client(allow_http=True, read_timeout_ms=300, connect_timeout_ms=300)
    block = bytearray(512)

    async def one(raw):
        client.raw = raw
        await client.close()
        how = random.randrange(4)
        start = 5 if how == 1 else None
        answer = await client.get(
            "http://h/x", start=start, if_range='"e"' if start else None, redirects=how == 2
        )
        if how == 3:
            await answer.read(600)
        else:
            total = 0
            while True:
                n = await answer.readinto(block)
                if not n:
                    break
                total += n
                if total > 100_000:
                    raise AssertionError("more bytes than were sent")
        await answer.close()

    loop = asyncio.new_event_loop()

    def case(raw):
        loop.run_until_complete(one(raw))

    return case


class _Body:
    """The body of an answer, in reads of one size, with pauses."""

    def __init__(self, raw):
        self._raw = raw
        self._step = random.choice((1, 7, 100, 1024))
        self.received = 0

    def take(self, buf, n):
        if random.getrandbits(2) == 0:
            return 0
        piece = self._raw[self.received : self.received + min(n, self._step)]
        buf[: len(piece)] = piece
        self.received += len(piece)
        return len(piece) or None

    async def wait(self):
        pass


class _Form:
    """How a payload is encoded; the window is the builder's own."""

    window = 12

    def __init__(self, encoding, patch):
        self.encoding = encoding
        self.patch = patch


class _Sink:
    """Takes the place of the slot."""

    total = 0

    def write(self, block):
        self.total += sum(len(piece) for piece in block)


def _stage(encoding, patch, size):
    from twinslot import payload

    base = bytes(range(256)) * 32
    form = _Form(encoding, patch)

    def read(offset, buf):
        if offset < 0 or offset + len(buf) > len(base):
            raise AssertionError("beyond the base image")
        buf[:] = base[offset : offset + len(buf)]

    async def one(raw):
        sink = _Sink()
        state = None
        if random.getrandbits(2) == 0:  # it goes on at a chunk: behind the header
            state = (0, random.randrange(len(base)))
            raw = raw if encoding == "gzip" else raw[4:]
        stage = payload.open_stage(form, _Body(raw), (read, len(base)), size, state)
        try:
            await payload.pump(stage, payload.Writer(sink, size), lambda offset, state: None)
        finally:
            if sink.total > size:
                raise AssertionError("more than the image")

    loop = asyncio.new_event_loop()

    def make(seeds):
        return lambda raw: loop.run_until_complete(one(raw))

    return make


TARGETS = {
    "gzip": _stage("gzip", None, 9000),
    "patch": _stage("identity", "detools", 1500),
    "gzpatch": _stage("gzip", "detools", 1500),
    "http": _http,
    "jws": _jws,
    "keys": _keys,
    "keyring": _keyring,
    "release": _release,
    "offer": _offer,
    "image": _image,
    "otadata": _otadata,
    "table": _table,
    "journal": _journal,
    "checkpoint": _checkpoint,
    "nvs": _nvs,
}


def tell(case, raw, found):
    """Run one case; True if it passed."""
    start = time.clock()  # of this process: others use the machine, too
    try:
        case(raw)
        code = "taken"
    except OtaError as exc:
        code = exc.code
    except Exception as exc:
        sys.print_exception(exc)
        found["crash"] = binascii.hexlify(raw).decode()
        found["error"] = f"{type(exc).__name__}: {exc}"
        return False
    took = int((time.clock() - start) * 1_000_000)
    found["outcomes"][code] = found["outcomes"].get(code, 0) + 1
    found["cases"] += 1
    found["slowest_us"] = max(found["slowest_us"], took)
    if took > SLOWEST_US:
        found["crash"] = binascii.hexlify(raw).decode()
        found["error"] = f"took {took} us"
        return False
    return True


def main():
    _, _, _, path, name, seed, count, seconds = sys.argv
    name, _, single = name.partition(":")
    with open(path) as f:
        seeds = [binascii.unhexlify(text) for text in json.load(f)[name]]
    random.seed(int(seed))
    case = TARGETS[name](seeds)
    found = {"target": name, "cases": 0, "outcomes": {}, "slowest_us": 0, "seed": int(seed)}
    start = time.ticks_ms()
    raws = seeds
    if single:
        with open(single, "rb") as f:
            raws = [f.read()]
    for raw in raws:
        if not tell(case, raw, found):
            break
    while "crash" not in found and found["cases"] < int(count):
        if time.ticks_diff(time.ticks_ms(), start) > int(seconds) * 1000:
            break
        raw = raws[0] if single else mutate(random.choice(seeds), seeds)
        if not tell(case, raw, found):
            break
    print(json.dumps(found))


main()
