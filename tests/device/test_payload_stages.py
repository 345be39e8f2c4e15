"""The stages on the board: the native adding loop against its plain twin, what a payload needs."""

import os
import random

from harness import Skip, raises

from twinslot import payload, release
from twinslot.errors import FormatError

HEAP = "512K"
LIMIT = 1 << 30  # small integers of a 32-bit port end here


def _native():
    try:
        from twinslot.add import add
    except (ImportError, ValueError):
        raise Skip("no native code here")
    return add


def _both(add, out, base, n):
    native, plain = bytearray(out), bytearray(out)
    add(native, base, n)
    payload.plain_add(plain, base, n)
    assert native == plain, (out, base, n)
    return bytes(plain)


def test_the_native_loop_adds_as_the_plain_one():
    add = _native()
    every = bytes(range(256))
    for k in range(0, 256, 5):
        result = _both(add, bytes([k] * 256), every, 256)
        assert result[1] == (k + 1) % 256
    for n in (0, 1, 2, 3, 255, 1023, 1024):
        _both(add, os.urandom(1024), os.urandom(1024), n)


def test_the_native_loop_touches_no_byte_beyond_its_count():
    add = _native()
    for n in range(9):
        assert _both(add, b"\xff" * 8, b"\x01" * 8, n)[n:] == b"\xff" * (8 - n)


def test_the_native_loop_works_within_larger_buffers():
    add = _native()
    for at in range(9):
        out = memoryview(bytearray(range(40)))
        base = memoryview(bytearray(range(100, 140)))
        add(out[at:], base[9 - at :], 20)
        for i in range(40):
            expected = i + (100 + 9 - at + i - at if at <= i < at + 20 else 0)
            assert out[i] == expected % 256, (at, i)


def _number(n):
    out = bytearray([(0x40 if n < 0 else 0) | (abs(n) & 0x3F)])
    n = abs(n) >> 6
    while n:
        out[-1] |= 0x80
        out.append(n & 0x7F)
        n >>= 7
    return bytes(out)


class Body:
    def __init__(self, content, step):
        self._content = content
        self._step = step
        self.received = 0

    async def readinto(self, buf):
        part = self._content[self.received :][: min(len(buf), self._step)]
        buf[: len(part)] = part
        self.received += len(part)
        return len(part)


class Sink:
    def __init__(self):
        self.content = b""

    def write(self, buf):
        self.content += bytes(buf)


PATCH = release.Payload("", "identity", 0, 0, "detools", "")


async def _apply(content, base, size, step=1000, base_size=None):
    def read(offset, buf):
        assert 0 <= offset and offset + len(buf) <= len(base)
        buf[:] = base[offset : offset + len(buf)]

    sink = Sink()
    stage = payload.open_stage(PATCH, Body(content, step), (read, base_size or len(base)), size)
    await payload.pump(stage, payload.Writer(sink, size), lambda *_: None)
    return sink.content


def _chunk(diff, extra, seek):
    return _number(len(diff)) + diff + _number(len(extra)) + extra + _number(seek)


async def test_random_patches_in_random_steps():
    base = os.urandom(9000)
    for _ in range(30):
        position, image, chunks = 0, b"", b""
        for _ in range(random.getrandbits(4) + 1):
            n = random.getrandbits(11) % (len(base) - position + 1)
            diff, extra = os.urandom(n), os.urandom(random.getrandbits(9))
            image += bytes((diff[i] + base[position + i]) & 255 for i in range(n)) + extra
            position += n
            target = random.getrandbits(14) % len(base)
            chunks += _chunk(diff, extra, target - position)
            position = target
        if not image:
            continue
        content = b"\0" + _number(len(image)) + _number(0) + chunks
        step = random.getrandbits(10) + 1
        assert await _apply(content, base, len(image), step) == image


async def test_numbers_at_the_limits_of_small_integers():
    base = bytes(64)
    head = b"\0" + _number(2) + _number(0)
    for n in (LIMIT, LIMIT + 1, 2 * LIMIT - 1, 2 * LIMIT, 4 * LIMIT, 1 << 62, 1 << 63, 1 << 64):
        for content in (
            b"\0" + _number(n),
            head + _number(n),
            head + _number(0) + _number(n),
            head + _chunk(b"", b"x", n) + _chunk(b"", b"y", 0),
            head + _chunk(b"", b"x", -n) + _chunk(b"", b"y", 0),
        ):
            await _refused(content, base)
    # The largest that is no refusal of its own: a seek to the end of a base of that size.
    content = head + _chunk(b"", b"x", LIMIT - 1) + _chunk(b"", b"y", 0)
    assert await _apply(content, base, 2, base_size=LIMIT - 1) == b"xy"
    await _refused(content, base, LIMIT - 2)


async def _refused(content, base, base_size=None):
    try:
        await _apply(content, base, 2, base_size=base_size)
    except FormatError:
        return
    raise AssertionError("not refused: %r" % content)


def test_what_a_payload_needs_of_the_heap():
    def need(encoding, window=0, patch=None):
        return payload.heap(release.Payload("", encoding, 0, window, patch, None))

    plain, small, large = need("identity"), need("gzip", 12), need("gzip", 15)
    assert 4096 <= plain < 5000
    assert small > plain + 4096 + 4096
    assert large - small == (1 << 15) - (1 << 12)
    assert need("gzip", 12, "detools") > small + 1024


def test_encodings_of_a_port_without_deflate():
    import sys

    assert payload.encodings() == ("identity", "gzip")
    saved = sys.modules.pop("deflate", None)
    sys.modules["deflate"] = None
    try:
        if payload.encodings() != ("identity",):
            raise Skip("a module can't be hidden here")
    finally:
        del sys.modules["deflate"]
        if saved:
            sys.modules["deflate"] = saved


def test_an_unknown_patch_is_refused():
    other = release.Payload("", "gzip", 0, 12, "xdelta", "")
    raises(FormatError, payload.open_stage, other, Body(b"", 1), (None, 0), 1)
