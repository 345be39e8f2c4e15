"""The stages on the board: the native adding loop against its plain twin, what a payload needs."""

import asyncio
import binascii
import builtins
import hashlib
import io
import os
import random
import struct
from binascii import unhexlify

import micropython
from harness import Skip, raises

from twinslot import patch, payload, release, walk
from twinslot.errors import FormatError
from twinslot.payload import BOUNDARY

HEAP = "4M"
LIMIT = 1 << 30  # small integers of a 32-bit port end here


def _native():
    try:
        from twinslot.native import add
    except (ImportError, ValueError):
        raise Skip("no native code here")
    return add


def _both(add, diff, base, n, at=0, mask=0xFF):
    native, plain = bytearray(b"\xa5" * (at + len(diff))), bytearray(b"\xa5" * (at + len(diff)))
    add(native, at, diff, base, mask, n)
    patch.plain_add(plain, at, diff, base, mask, n)
    assert native == plain, (diff, base, n, at, mask)
    return bytes(plain)


def test_the_native_loop_adds_as_the_plain_one():
    add = _native()
    every = bytes(range(256))
    for k in range(0, 256, 5):
        result = _both(add, bytes([k] * 256), every, 256)
        assert result[1] == (k + 1) % 256
    for n in (0, 1, 2, 3, 255, 1023, 1024):
        for at in (0, 1, 1023):
            _both(add, os.urandom(1024), os.urandom(1024), n, at)


def test_what_is_not_masked_in_is_taken_as_it_is():
    add = _native()
    diff = os.urandom(300)
    assert _both(add, diff, os.urandom(300), 300, 7, 0) == b"\xa5" * 7 + diff


def test_the_native_loop_touches_no_byte_beyond_its_count():
    add = _native()
    for n in range(9):
        for at in (0, 3):
            result = _both(add, b"\xff" * 8, b"\x01" * 8, n, at)
            assert result == b"\xa5" * at + bytes(n) + b"\xa5" * (8 - n)


def test_the_native_loop_works_within_larger_buffers():
    add = _native()
    for at in range(9):
        out = memoryview(bytearray(range(40)))
        base = memoryview(bytearray(range(100, 140)))
        diff = bytes(range(200, 220))
        add(out[2:], at, diff, base[9 - at :], 0xFF, 20)
        for i in range(40):
            k = i - 2 - at
            expected = diff[k] + base[9 - at + k] if 0 <= k < 20 else i
            assert out[i] == expected % 256, (at, i)


def test_the_native_checksum_is_the_plain_one():
    try:
        from twinslot.native import xor
    except (ImportError, ValueError):
        raise Skip("no native code here")
    data = memoryview(os.urandom(4096))
    for n in (0, 1, 2, 255, 256, 257, 1023, 4095, 4096):
        assert xor(data, n) == walk.plain_xor(data, n)
        assert xor(data[4096 - n :], n) == walk.plain_xor(data[4096 - n :], n)


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
        self._content = memoryview(content)
        self._step = step
        self.received = 0

    def take(self, buf, n):
        part = self._content[self.received : self.received + min(n, self._step)]
        buf[: len(part)] = part
        self.received += len(part)
        return len(part) or None

    async def wait(self):
        raise AssertionError("there is nothing to wait for")


class Drip(Body):
    """A byte at a time, nothing in between."""

    def __init__(self, content, step):
        super().__init__(content, 1)
        self._ready = False

    def take(self, buf, n):
        if not self._ready:
            return 0
        self._ready = False
        return super().take(buf, n)

    async def wait(self):
        self._ready = True


class Sink:
    def __init__(self):
        self.pieces = []

    def write(self, block):
        self.pieces.append(b"".join([bytes(piece) for piece in block]))


PATCH = release.Payload("", "identity", 0, 0, "detools", "")


async def _apply(content, base, size, step=1000, base_size=None, body=Body):
    def read(offset, buf):
        assert 0 <= offset and offset + len(buf) <= len(base)
        buf[:] = base[offset : offset + len(buf)]

    sink = Sink()
    stage = payload.open_stage(PATCH, body(content, step), (read, base_size or len(base)), size)
    await payload.pump(stage, payload.Writer(sink, size), lambda *_: None)
    return b"".join(sink.pieces)


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
    assert plain == 0, "beside the block"
    assert small > 4096 + 4096
    assert large - small == (1 << 15) - (1 << 12)
    assert need("gzip", 12, "detools") > small + payload.PIECE
    buffers = payload.buffers(release.Payload("", "gzip", 0, 12, None, None))
    assert 4096 + payload.AHEAD < buffers < small


def test_an_unknown_patch_is_refused():
    other = release.Payload("", "gzip", 0, 12, "xdelta", "")
    raises(FormatError, payload.open_stage, other, Body(b"", 1), (None, 0), 1)


# -- gzip


def member(content):
    """A gzip member that stores its content."""
    out = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    at = 0
    while True:
        part = content[at : at + 60000]
        at += len(part)
        last = at == len(content)
        out += struct.pack("<BHH", last, len(part), len(part) ^ 0xFFFF) + part
        if last:
            break
    return out + struct.pack("<II", binascii.crc32(content) & 0xFFFFFFFF, len(content))


# 65536 zeros in 96 bytes, by zlib: much output of little input.
ZEROS = unhexlify(
    "1f8b0800000000000203edc101010000008090feafee080a0000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000006a"
    "eb8e97d700000100"
)
GZIP = release.Payload("", "gzip", 0, 12, None, None)


async def _inflate(content, size, step=1000, state=None, offset=0):
    """Return the image's bytes, and (offset, state) of its boundaries."""
    sink, seen = Sink(), []
    at = state[0] if state else 0
    stage = payload.open_stage(GZIP, Body(content[at:], step), None, size, state)
    writer = payload.Writer(sink, size, offset)
    await payload.pump(stage, writer, lambda *where, seen=seen: seen.append(where))
    return b"".join(sink.pieces), seen


async def test_members_of_any_size_in_any_steps_are_one_image():
    parts = [os.urandom(n) for n in (1, 1023, 1025, 4097, 2)]
    image = b"".join(parts)
    content = b"".join([member(part) for part in parts])
    for step in (3, 100, 1023, 1024, 5000):
        got, seen = await _inflate(content, len(image), step)
        assert got == image, step
        assert seen == [(len(image), None)]
    got, _ = await _inflate(member(image), len(image) - 500)
    assert got == image[:-500], "no more than the image wants"


async def test_little_input_may_be_much_output():
    for step in (1, 7, 2000):
        got, _ = await _inflate(ZEROS + member(b"end"), BOUNDARY + 3, step)
        assert got == bytes(BOUNDARY) + b"end"


class Locked:
    """A slot to which each 64 KiB, but for its first block, comes with the heap locked."""

    def __init__(self):
        self.digest = hashlib.sha256()
        self.blocks = self.locked = 0
        self._is_locked = False

    def write(self, block):
        self.unlock()
        for piece in block:
            self.digest.update(piece)
        self.blocks += 1
        if self.blocks % (BOUNDARY // 4096):
            self.locked += 1
            self._is_locked = True
            micropython.heap_lock()

    def unlock(self):
        if self._is_locked:
            micropython.heap_unlock()
        self._is_locked = False


class Stored(Body):
    """A body read from a file, as little garbage as from a socket."""

    def __init__(self, content):
        self._file = io.BytesIO(content)
        self.received = 0

    def take(self, buf, n):
        n = self._file.readinto(buf, n)
        self.received += n
        return n or None


async def test_between_two_boundaries_nothing_is_allocated():
    image = os.urandom(3 * BOUNDARY)
    members = b"".join([member(image[at : at + BOUNDARY]) for at in (0, BOUNDARY, 2 * BOUNDARY)])
    plain = release.Payload("", "identity", len(image), 0, None, None)
    for chosen, content in ((plain, image), (GZIP, members)):
        sink = Locked()
        stage = payload.open_stage(chosen, Stored(content), None, len(image))
        try:
            await payload.pump(stage, payload.Writer(sink, len(image)), lambda *_: None)
        finally:
            sink.unlock()
        assert sink.locked == 3 * 15
        assert sink.digest.digest() == hashlib.sha256(image).digest()


async def test_a_member_that_ends_at_a_boundary_is_where_a_download_goes_on():
    image = os.urandom(2 * BOUNDARY + 700)
    parts = [member(image[at : at + BOUNDARY]) for at in range(0, len(image), BOUNDARY)]
    content = b"".join(parts)
    ends = [len(parts[0]), len(parts[0]) + len(parts[1])]
    for step in (100, 1024, 5000):
        got, seen = await _inflate(content, len(image), step)
        assert got == image
        assert seen == [
            (BOUNDARY, (ends[0], 0)),
            (2 * BOUNDARY, (ends[1], 0)),
            (len(image), None),
        ]
    got, seen = await _inflate(content, len(image), 1000, (ends[0], 0), BOUNDARY)
    assert got == image[BOUNDARY:]
    assert seen == [(2 * BOUNDARY, (ends[1], 0)), (len(image), None)]


async def test_a_member_that_goes_on_over_a_boundary_can_not_be_gone_on_from_and_loses_no_byte():
    image = os.urandom(2 * BOUNDARY)
    parts = member(image[: BOUNDARY + 1]), member(image[BOUNDARY + 1 :])
    for step in (1000, 5000):
        got, seen = await _inflate(parts[0] + parts[1], len(image), step)
        assert got == image
        assert seen == [(BOUNDARY, None), (2 * BOUNDARY, None)]


async def test_members_without_content_end_a_download_where_there_are_too_many():
    nothing, image = member(b""), b"image"
    good = nothing * 15 + member(image[:2]) + nothing * 14 + member(image[2:])
    got, _ = await _inflate(good, len(image))
    assert got == image
    await _gzip_refused(nothing * 16 + member(image), len(image), "16 members without content")


async def _gzip_refused(content, size, why):
    for step in (10, 5000):
        try:
            await _inflate(content, size, step)
        except FormatError as exc:
            assert why in str(exc), exc
        else:
            raise AssertionError("not refused")


async def test_gzip_that_is_cut_or_wrong_is_refused():
    whole = member(os.urandom(3000))
    for n in (5, 12, 100, 2000, len(whole) - 9):
        await _gzip_refused(whole[:n], 3000, "cut short")
    await _gzip_refused(whole, 3001, "1 bytes missing")
    await _gzip_refused(b"", 3000, "3000 bytes missing")
    for at in (0, 2, 10, len(whole) - 8):
        wrong = bytearray(whole)
        wrong[at] ^= 0x7
        await _gzip_refused(bytes(wrong) + bytes(9), 3001, "malformed")


async def test_what_follows_a_complete_image_is_read_and_harms_nothing():
    image = os.urandom(3000)
    got, _ = await _inflate(member(image) + b"no gzip", 3000)
    assert got == image
    rest = Body(member(image), 64)
    stage = payload.open_stage(GZIP, rest, None, 3000)
    await payload.pump(stage, payload.Writer(Sink(), 3000), lambda *_: None)
    assert rest.received == len(member(image)), "the connection is left clean"
    content = b"\0" + _number(3000) + _number(0) + _chunk(bytes(3000), b"", 0)
    rest = Body(content, 64)

    def read(offset, buf):
        buf[:] = image[offset : offset + len(buf)]

    stage = payload.open_stage(PATCH, rest, (read, 3000), 3000)
    await payload.pump(stage, payload.Writer(Sink(), 3000), lambda *_: None)
    assert rest.received == len(content)


class Hesitant(Body):
    """Has nothing to give before each ``wait``, and then one piece."""

    ready = False

    def take(self, buf, n):
        if not self.ready:
            return 0
        self.ready = False
        return super().take(buf, n)

    async def wait(self):
        self.ready = True


async def test_a_body_that_hesitates_before_each_piece_loses_no_byte():
    image = os.urandom(BOUNDARY + 5000)
    plain = release.Payload("", "identity", 0, 0, None, None)
    patch_head = b"\0" + _number(len(image)) + _number(0)

    def read(offset, buf):
        buf[:] = image[offset : offset + len(buf)]

    for chosen, content in (
        (plain, image),
        (GZIP, member(image[:BOUNDARY]) + member(image[BOUNDARY:])),
        (PATCH, patch_head + _chunk(bytes(300), image[300:], 0)),
    ):
        for step in (700, 4096):
            sink = Sink()
            stage = payload.open_stage(chosen, Hesitant(content, step), (read, 300), len(image))
            await payload.pump(stage, payload.Writer(sink, len(image)), lambda *_: None)
            assert b"".join(sink.pieces) == image


async def test_a_gzip_of_a_patch():
    base = os.urandom(3 * BOUNDARY)
    image = base[: BOUNDARY - 10] + os.urandom(10) + base[2 * BOUNDARY : 2 * BOUNDARY + 300]
    head = b"\0" + _number(len(image)) + _number(0)
    first = head + _chunk(bytes(BOUNDARY - 10), image[BOUNDARY - 10 : BOUNDARY], BOUNDARY + 10)
    second = _chunk(bytes(300), b"", 0)
    both = release.Payload("", "gzip", 0, 12, "detools", "")

    def read(offset, buf):
        buf[:] = base[offset : offset + len(buf)]

    for content, state in (
        (member(first) + member(second), (len(member(first)), 2 * BOUNDARY)),
        (member(first + second), None),
    ):
        # In whole pieces, and as a heap full of holes has them.
        for sizes in (None, [512] + [256] * 4 + [128] * 20):
            sink, seen = Sink(), []
            stage = payload.open_stage(both, Body(content, 700), (read, len(base)), len(image))
            block = sizes and [memoryview(bytearray(n)) for n in sizes]
            writer = payload.Writer(sink, len(image), 0, block)
            await payload.pump(stage, writer, lambda *where, seen=seen: seen.append(where))
            assert b"".join(sink.pieces) == image
            assert seen == [(BOUNDARY, state), (len(image), None)]
        if state:
            sink = Sink()
            rest = Body(content[state[0] :], 700)
            stage = payload.open_stage(both, rest, (read, len(base)), len(image), state)
            writer = payload.Writer(sink, len(image), BOUNDARY)
            await payload.pump(stage, writer, lambda *_: None)
            assert b"".join(sink.pieces) == image[BOUNDARY:]


# -- pace and boundaries


async def test_other_tasks_get_their_turn_after_eight_reads_and_after_each_block():
    body = Body(bytes(30), 1)
    turns = []

    async def sleep_ms(ms):
        turns.append((ms, body.received))

    plain = release.Payload("", "identity", 0, 0, None, None)
    kept = asyncio.sleep_ms
    asyncio.sleep_ms = sleep_ms
    try:
        stage = payload.open_stage(plain, body, None, 30)
        await payload.pump(stage, payload.Writer(Sink(), 30), lambda *_: None)
        assert turns == [(0, 8), (0, 16), (0, 24), (0, 30)]
        turns.clear()
        body = Body(bytes(3 * 4096), 4096)
        stage = payload.open_stage(plain, body, None, 3 * 4096)
        await payload.pump(stage, payload.Writer(Sink(), 3 * 4096), lambda *_: None)
        assert [at for _, at in turns] == [4096, 8192, 12288]
    finally:
        asyncio.sleep_ms = kept


async def test_a_plain_body_goes_on_anywhere():
    plain = release.Payload("", "identity", 0, 0, None, None)
    image = os.urandom(3 * BOUNDARY)
    sink, seen = Sink(), []
    stage = payload.open_stage(plain, Body(image[BOUNDARY:], 999), None, len(image), (BOUNDARY, 0))
    writer = payload.Writer(sink, len(image), BOUNDARY)
    await payload.pump(stage, writer, lambda *where, seen=seen: seen.append(where))
    assert b"".join(sink.pieces) == image[BOUNDARY:]
    assert seen == [(2 * BOUNDARY, (2 * BOUNDARY, 0)), (3 * BOUNDARY, None)]


# -- what a patch may not say


async def _patch_refused(content, why, base=bytes(64), size=2):
    for body in (Body, Drip):
        try:
            await _apply(content, base, size, body=body)
        except FormatError as exc:
            assert why in str(exc), exc
        else:
            raise AssertionError("not refused: %r" % content)


async def test_each_thing_that_a_patch_may_not_say_is_named():
    head, end = b"\0" + _number(2) + _number(0), _chunk(b"", b"ab", 0)
    assert await _apply(head + end, bytes(64), 2) == b"ab"
    for content, why in (
        (b"\1" + head[1:] + end, "type"),
        (b"\0" + _number(3) + _number(0) + end, "size of its image"),
        (b"\0" + _number(2) + _number(1) + end, "data format"),
        (b"\0" + _number(2) + _number(-1) + end, "a size"),
        (head + _number(-1) + end, "a size"),
        (head + _number(0) + _number(-1), "a size"),
        (head + _chunk(b"", b"a", -1) + end, "leaves the base"),
        (head + _chunk(b"", b"a", 65) + end, "leaves the base"),
        (head + _number(65) + bytes(65), "beyond the base"),
        (head + _chunk(b"", b"a", 63) + _number(2) + b"ab", "beyond the base"),
        (head[:1], "cut short"),
        (head, "cut short"),
        (head + end[:-2], "cut short"),
        (head + _number(LIMIT), "above 30 bits"),
        (head + b"\x80\x80\x80\x80\x80\x00" + end[1:], "above 30 bits"),
        (head + bytes(90) + end, "64 bytes without content"),
    ):
        await _patch_refused(content, why)


async def test_a_patch_may_go_to_either_end_of_its_base():
    base = bytes(range(64))
    head = b"\0" + _number(4) + _number(0)
    there = _chunk(b"", b"a", 64) + _chunk(b"", b"b", -64) + _chunk(b"", b"", 62)
    assert await _apply(head + there + _chunk(b"\1\1", b"", 0), base, 4) == b"ab\x3f\x40"
    there = _chunk(b"\1", b"a", 5) + _chunk(b"", b"b", -6) + _chunk(b"\1", b"", 0)
    assert await _apply(head + there, base, 4) == b"\1ab\1"


async def test_a_number_may_have_five_bytes():
    head = b"\0" + _number(1) + _number(0)
    assert await _apply(head + b"\x80\x80\x80\x80\0" + _number(1) + b"x", bytes(64), 1) == b"x"


async def test_64_bytes_of_numbers_may_come_before_each_byte_of_content_and_no_more():
    head = b"\0" + _number(2) + _number(0)
    idle = bytes(3 * 19)  # chunks without content
    padded, longer = b"\x80\0\x81\0", b"\x80\0\x81\x80\0"  # sizes of 0 and 1
    first = head + idle + padded + b"x"  # 3 + 57 + 4
    second = b"\x80\x80\0" + idle + padded + b"y"  # a seek of 3
    assert await _apply(first + second, bytes(64), 2) == b"xy"
    for content in (
        head + idle + longer + b"x" + second,
        first + b"\x80\x80\0" + idle + longer + b"y",
    ):
        await _patch_refused(content, "64 bytes")


async def test_a_patch_goes_on_between_chunks_only():
    base = os.urandom(2 * BOUNDARY)
    image = base[:BOUNDARY] + base[7 : 7 + BOUNDARY] + b"!"
    head = b"\0" + _number(len(image)) + _number(0)
    seek = 7 - BOUNDARY
    even = head + _chunk(bytes(BOUNDARY), b"", seek) + _chunk(bytes(BOUNDARY), b"!", 0)
    n = len(head + _chunk(bytes(BOUNDARY), b"", seek))
    odd = head + _chunk(bytes(BOUNDARY - 1), image[BOUNDARY - 1 : BOUNDARY + 1], seek + 2)
    odd += _chunk(bytes(BOUNDARY - 1), b"!", 0)

    def read(offset, buf):
        buf[:] = base[offset : offset + len(buf)]

    for content, state in ((even, (n, 7)), (odd, None)):
        for step in (1000, 4096):
            sink, seen = Sink(), []
            stage = payload.open_stage(PATCH, Body(content, step), (read, len(base)), len(image))
            writer = payload.Writer(sink, len(image))
            await payload.pump(stage, writer, lambda *where, seen=seen: seen.append(where))
            assert b"".join(sink.pieces) == image
            assert seen[0] == (BOUNDARY, state)
    sink = Sink()
    rest = Body(even[n:], 1000)
    stage = payload.open_stage(PATCH, rest, (read, len(base)), len(image), (n, 7))
    await payload.pump(stage, payload.Writer(sink, len(image), BOUNDARY), lambda *_: None)
    assert b"".join(sink.pieces) == image[BOUNDARY:]


# -- what a port may lack


class Without:
    """``with Without(name):`` nothing of that name can be imported."""

    def __init__(self, name, error):
        self.name = name
        self.error = error

    def __enter__(self):
        self.kept = builtins.__import__

        def refuse(name, *rest):
            if name.endswith(self.name):
                raise self.error
            return self.kept(name, *rest)

        builtins.__import__ = refuse

    def __exit__(self, *_):
        builtins.__import__ = self.kept


def test_encodings_of_a_port_with_deflate_and_without():
    assert payload.encodings() == ("identity", "gzip")
    for module in ("deflate", "micropython"):
        with Without(module, ImportError("none here")):
            assert payload.encodings() == ("identity",)
    assert payload.encodings() == ("identity", "gzip")


def test_the_native_loops_are_used_where_they_can_be_loaded():
    add = _native()
    assert patch._adder() is add
    assert walk._native_xor() not in (None, walk.plain_xor)


def test_where_the_native_loop_can_not_be_loaded_the_plain_one_adds():
    for error in (ImportError("left out"), SyntaxError("no emitter"), ValueError("architecture")):
        with Without("native", error):
            assert patch._adder() is patch.plain_add
            assert walk._native_xor() is walk.plain_xor


def test_an_image_is_verified_without_the_native_loop_where_there_is_no_room_for_it():
    with Without("native", MemoryError("1280 bytes")):
        assert walk._native_xor() is walk.plain_xor
