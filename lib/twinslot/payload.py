"""Turn a payload's bytes back into the image: inflate, patch, one flash block at a time.

    stage = payload.open_stage(chosen, response, base, size, state)
    await payload.pump(stage, writer, boundary)

A stage has ``await readinto(view)``, which puts image bytes straight into the free part of the
one block buffer, ``take(view)``, which does the same where no waiting is needed and else returns
0 (each await costs some 200 bytes of garbage), and ``await boundary()``, asked at every 64 KiB of
the image: it returns the stage's state, two small integers from which a download that was cut
goes on, or None where it can't. Nothing else is kept of what went before: a gzip member, and a
chunk of a patch, end there.

    state    (offset in the payload, position in the base image)

Inflating never waits: the ring between the network and ``deflate.DeflateIO`` is filled with more
than a slice of output can need, then the slice is inflated in C. DeflateIO reads its source byte
by byte, and an empty source spoils it for good.

What comes over the network proves nothing until the image's hash holds, so each stage is bounded
against any input: output by the image's size, input and work per output, time between two looks
at other tasks.

Memory, once per update: a block of 4 KiB; gzip adds 5 KiB and the window (4 KiB for window 12)
anew for each member; a patch adds 1 KiB. ``heap`` tells it before anything is opened.

Source: RFC 1952; detools' sequential patches (create.py, apply.py); MicroPython
extmod/moddeflate.c, py/objringio.c.
"""

import asyncio

from .errors import FormatError, OtaError
from .slot import BLOCK

BOUNDARY = 65536  # of the image; payload builders end gzip members and patch chunks there

_SLICE = 1024  # bytes inflated at a time, and read from the network at a time
# More than a slice can take from an honest encoder: stored blocks are 5 bytes longer than their
# content, a dynamic block's code tables are below 400 bytes.
_AHEAD = 3 * _SLICE
_IDLE_STEPS = 16  # parts without output that a patch, or members that a gzip may have in a row
_READS = 8  # of a stage, then other tasks run: tiny pieces make much work of few bytes


def encodings():
    """Encodings that this port can undo: names as in a release."""
    try:
        import deflate  # noqa: F401
        from micropython import RingIO  # noqa: F401
    except ImportError:
        return ("identity",)
    return ("identity", "gzip")


def heap(payload):
    """Bytes of heap that ``pump`` needs for a payload, its block included."""
    need = BLOCK
    if payload.encoding == "gzip":
        need += _AHEAD + 2 * _SLICE + (1 << payload.window) + 2048  # ring, buffer, window, objects
    if payload.patch:
        need += _SLICE + 512
    return need


class Writer:
    """Collects image bytes in one block and hands each full one to the slot.

    Args:
        slot: where ``write(buf)`` takes blocks of 4096 bytes, the last one shorter.
        size: bytes of the image.
        offset: where in the image writing goes on; a multiple of 4096.
    """

    def __init__(self, slot, size, offset=0):
        self._slot = slot
        self._size = size
        self._block = memoryview(bytearray(BLOCK))
        self._fill = 0
        self.offset = offset  # image bytes handed to the slot

    def left(self):
        """Image bytes still wanted."""
        return self._size - self.offset - self._fill

    def space(self):
        """Return the free part of the block as a memoryview, never more than the image wants."""
        end = min(BLOCK, self._size - self.offset)
        if self._fill == 0 and end == BLOCK:
            return self._block  # the usual case: no new object
        return self._block[self._fill : end]

    def advance(self, n):
        """Count ``n`` bytes put into ``space()``; True when that completed a block."""
        self._fill += n
        if self._fill < BLOCK and self.offset + self._fill < self._size:
            return False
        self._slot.write(self._block if self._fill == BLOCK else self._block[: self._fill])
        self.offset += self._fill
        self._fill = 0
        return True


async def pump(stage, writer, boundary):
    """Bring the rest of an image through ``stage`` to ``writer``.

    Args:
        boundary: called with ``(image offset, state)`` at every 64 KiB and at the end; ``state``
            is None where the download can't be resumed.

    Raises:
        FormatError: the payload ends before the image does, or is malformed.
        NetworkError: from the response; ImageError, PartitionError: from the slot.
    """
    reads = 0
    while writer.left():
        space = writer.space()
        n = stage.take(space) or await stage.readinto(space)
        if n == 0:
            raise FormatError("payload", "%d bytes missing" % writer.left(), "the whole image")
        reads += 1
        if writer.advance(n):
            if writer.offset % BOUNDARY == 0 and writer.left():
                boundary(writer.offset, await stage.boundary())
            reads = _READS  # the write held the application up
        if reads >= _READS:
            reads = 0
            await asyncio.sleep_ms(0)
    boundary(writer.offset, None)
    try:
        # The rest of an honest payload is a few bytes; with them read the connection lives on.
        await stage.boundary()
    except OtaError:
        pass  # the image is complete, and its hash is the judge


def open_stage(payload, response, base, size, state=None):
    """Return the stages that turn a response's body into image bytes.

    Args:
        payload: the chosen ``release.Payload``.
        response: the body, from ``state[0]`` on; ``received`` counts the bytes it has given.
        base: ``(read, size)`` of the running image, for a patch; ``read(offset, buf)``.
        size: of the image.
        state: where to go on; None at the beginning.

    Raises:
        FormatError: an encoding not known here.
    """
    offset, position = state or (0, 0)
    stage = _Plain(response, offset)
    if payload.encoding == "gzip":
        stage = _Inflate(response, payload.window, offset)
    elif payload.encoding != "identity":
        raise FormatError("payload encoding", payload.encoding, "identity or gzip")
    if payload.patch is None:
        return stage
    if payload.patch != "detools":
        raise FormatError("payload patch", payload.patch, "detools")
    return _Patch(stage, base, size, None if state is None else position)


class _Plain:
    """The body as it is."""

    def __init__(self, response, offset):
        self._response = response
        self._offset = offset
        self.readinto = response.readinto  # not through a method: it would allocate per read

    def take(self, view):
        return 0

    async def boundary(self):
        return self._offset + self._response.received, 0


class _Inflate:
    """A body of gzip members, one after the other."""

    def __init__(self, response, window, offset):
        from micropython import RingIO

        self._response = response
        self._window = window
        self._ring = RingIO(_AHEAD + _SLICE + 1)
        self._buf = memoryview(bytearray(_SLICE))
        self._offset = offset
        self._ended = False
        self._member = None
        self._spare = memoryview(bytearray(1))
        self._kept = 0  # 1 while _spare holds a byte that boundary() had to look at

    def _feed(self, n):
        if n == 0:
            self._ended = True
        else:
            self._ring.write(self._buf if n == _SLICE else self._buf[:n])

    def take(self, view):
        if self._member is None or self._kept or (not self._ended and self._ring.any() < _AHEAD):
            return 0
        n = self._read(view if len(view) <= _SLICE else view[:_SLICE])
        if not n:
            self._member = None
        return n

    async def readinto(self, view):
        if self._kept:
            self._kept = 0
            view[0] = self._spare[0]
            return 1
        for _ in range(_IDLE_STEPS):
            while not self._ended and self._ring.any() < _AHEAD:
                self._feed(await self._response.readinto(self._buf))
            if self._member is None:
                if not self._ring.any():
                    return 0
                self._open()
            n = self._read(view if len(view) <= _SLICE else view[:_SLICE])
            if n:
                return n
            self._member = None
        raise FormatError("gzip", "%d members without content" % _IDLE_STEPS, "an image")

    def _open(self):
        import deflate

        self._member = deflate.DeflateIO(self._ring, deflate.GZIP, self._window)

    def _read(self, view):
        try:
            return self._member.readinto(view)
        except EOFError:
            raise FormatError("gzip: the payload is cut short")
        except OSError as exc:
            # EINVAL: malformed, a checksum, or a window larger than announced. EAGAIN: no
            # honest encoder needs so much input for so little output.
            raise FormatError("gzip: malformed payload (error %s)" % exc.args[0])

    async def boundary(self):
        while not self._ended and self._ring.any() < _AHEAD:
            self._feed(await self._response.readinto(self._buf))
        if self._member is not None:
            if self._read(self._spare):
                self._kept = 1
                return None
            self._member = None
        return self._offset + self._response.received - self._ring.any(), 0


def plain_add(out, base, n):
    """``out[i] += base[i]`` modulo 256 for ``n`` bytes, in place: the twin of ``add.add``."""
    for i in range(n):
        out[i] = (out[i] + base[i]) & 0xFF


def _adder():
    try:
        from .add import add

        return add
    except (ImportError, SyntaxError, ValueError):  # left out, no emitter, another architecture
        return plain_add


# The numbers of a patch, in their order; those of a chunk recur. Diff bytes follow the first of
# them, extra bytes the second.
_TYPE, _IMAGE_SIZE, _FORMAT, _DIFF, _EXTRA, _SEEK = range(6)
_DIGITS = 64  # bytes of numbers that may come without a byte of the image between them


class _Patch:
    """A sequential detools patch, applied to the running image.

    After its header, until the image is complete: diff size, diff bytes (added to the base),
    extra size, extra bytes (copied), adjustment of the position in the base.
    """

    def __init__(self, stage, base, size, position):
        self._add = _adder()
        self._stage = stage
        self._base, self._base_size = base
        self._buf = memoryview(bytearray(_SLICE))
        self._byte = memoryview(bytearray(1))
        self._size = size
        self._position = position or 0
        self._next = _TYPE if position is None else _DIFF
        self._left = 0  # bytes of diff or extra that come before that number
        self._value = self._shift = 0  # of the number that is being read

    def take(self, view):
        return 0

    async def readinto(self, view):
        stage, byte = self._stage, self._byte
        for _ in range(_DIGITS):
            if self._left:
                break
            self._digit(stage.take(byte) or await stage.readinto(byte))
        else:
            raise FormatError("patch", "%d bytes without content" % _DIGITS, "an image")
        n = min(len(view), self._left, _SLICE)
        if n < len(view):
            view = view[:n]
        n = stage.take(view) or await stage.readinto(view)
        if n == 0:
            raise FormatError("patch: cut short")
        if self._next == _EXTRA:
            self._base(self._position, self._buf if n == _SLICE else self._buf[:n])
            self._add(view, self._buf, n)  # pyright: ignore (viper)
            self._position += n
        self._left -= n
        return n

    def _digit(self, n):
        """Act on a byte of a signed number: sign and 6 bits first, then 7 bits each, least first.

        Args:
            n: 1, or 0 where there was no byte.
        """
        if not n:
            raise FormatError("patch: cut short")
        byte = self._byte[0]
        if self._next == _TYPE:
            if byte:
                raise FormatError("patch type", byte, "0: sequential, not compressed")
            self._next = _IMAGE_SIZE
            return
        if self._shift == 0:
            self._negative = byte & 0x40
            self._value = byte & 0x3F
            self._shift = 6
        else:
            self._value |= (byte & 0x7F) << self._shift
            self._shift += 7
        if self._shift > 34 or self._value >= 1 << 30:
            raise FormatError("patch: a number above 30 bits")
        if not byte & 0x80:
            self._shift = 0
            self._number(-self._value if self._negative else self._value)

    def _number(self, n):
        """Act on a number that is complete."""
        if self._next == _SEEK:
            self._position += n
            if not 0 <= self._position <= self._base_size:
                raise FormatError("patch: leaves the base image")
            self._next = _DIFF
            return
        if n < 0:
            raise FormatError("patch: a size", n, "0 or more")
        if self._next == _IMAGE_SIZE and n != self._size:
            raise FormatError("patch: size of its image", n, self._size)
        if self._next == _FORMAT and n:
            raise FormatError("patch: a data format is not supported")
        if self._next == _DIFF and self._position + n > self._base_size:
            raise FormatError("patch: reads beyond the base image")
        if self._next in (_DIFF, _EXTRA):
            self._left = n
        self._next += 1

    async def boundary(self):
        while self._next != _DIFF or self._left or self._shift:
            if self._left:
                return None
            self._digit(self._stage.take(self._byte) or await self._stage.readinto(self._byte))
        state = await self._stage.boundary()
        return None if state is None else (state[0], self._position)
