"""The stage that applies a sequential detools patch to the running image.

After its header, until the image is complete: diff size, diff bytes (added to the base), extra
size, extra bytes (copied), adjustment of the position in the base.

Source: detools, create.py and apply.py.
"""

from micropython import const

from . import errors
from .slot import PIECE


def plain_add(out, at, diff, base, mask, n):
    """``out[at + i] = diff[i] + (base[i] & mask)`` modulo 256 for ``n`` bytes: the twin of
    ``native.add``."""
    for i in range(n):
        out[at + i] = (diff[i] + (base[i] & mask)) & 0xFF


def _adder():
    try:
        from .native import add

        return add
    except (ImportError, SyntaxError, ValueError):  # left out, no emitter, another architecture
        return plain_add


# The numbers of a patch, in their order; those of a chunk recur. Diff bytes follow the first of
# them, extra bytes the second.
_TYPE = const(0)
_IMAGE_SIZE = const(1)
_FORMAT = const(2)
_DIFF = const(3)
_EXTRA = const(4)
_SEEK = const(5)
_DIGITS = const(64)  # bytes of numbers that may come without a byte of the image between them


class Patch:
    """See ``payload`` for what a stage is.

    Args:
        stage: where the patch comes from.
        base: ``(read, size)`` of the running image; ``read(offset, buf)``.
        size: of the image.
        position: in the base where a chunk begins; None at the patch's beginning.
    """

    def __init__(self, stage, base, size, position):
        self._add = _adder()
        self._stage = stage
        self.wait = stage.wait
        self._base, self._base_size = base
        self._diff = memoryview(bytearray(PIECE))
        self._old = stage.spare or memoryview(bytearray(PIECE))
        self._byte = memoryview(bytearray(1))
        self._size = size
        self._position = position or 0
        self._next = _TYPE if position is None else _DIFF
        self._left = 0  # bytes of diff or extra that come before that number
        self._value = self._shift = 0  # of the number that is being read
        self._digits = 0  # since the last byte of the image

    def take(self, view, at, n):
        while not self._left:
            if not self._digit():
                return 0
        n = self._stage.take(self._diff, 0, min(n, self._left, PIECE))
        if n is None:
            raise errors.FormatError("patch: cut short")
        if not n:
            return 0
        mask = 0
        if self._next == _EXTRA:
            # More than is needed, where the base goes on: a slice would be a new object.
            whole = self._position + PIECE <= self._base_size
            self._base(self._position, self._old if whole else self._old[:n])
            self._position += n
            mask = 0xFF
        self._add(view, at, self._diff, self._old, mask, n)  # pyright: ignore (viper)
        self._left -= n
        self._digits = 0
        return n

    def _digit(self):
        """Act on a byte of a signed number: sign and 6 bits first, then 7 bits each, least first.
        False where there is none yet."""
        n = self._stage.take(self._byte, 0, 1)
        if n is None:
            raise errors.FormatError("patch: cut short")
        if not n:
            return False
        self._digits += 1
        if self._digits > _DIGITS:
            raise errors.FormatError("patch", "%d bytes without content" % _DIGITS, "an image")
        byte = self._byte[0]
        if self._next == _TYPE:
            if byte:
                raise errors.FormatError("patch type", byte, "0: sequential, not compressed")
            self._next = _IMAGE_SIZE
            return True
        if self._shift == 0:
            self._negative = byte & 0x40
            self._value = byte & 0x3F
            self._shift = 6
        else:
            self._value |= (byte & 0x7F) << self._shift
            self._shift += 7
        if self._shift > 34 or self._value >= 1 << 30:
            raise errors.FormatError("patch: a number above 30 bits")
        if not byte & 0x80:
            self._shift = 0
            self._number(-self._value if self._negative else self._value)
        return True

    def _number(self, n):
        """Act on a number that is complete."""
        if self._next == _SEEK:
            self._position += n
            if not 0 <= self._position <= self._base_size:
                raise errors.FormatError("patch: leaves the base image")
            self._next = _DIFF
            return
        if n < 0:
            raise errors.FormatError("patch: a size", n, "0 or more")
        if self._next == _IMAGE_SIZE and n != self._size:
            raise errors.FormatError("patch: size of its image", n, self._size)
        if self._next == _FORMAT and n:
            raise errors.FormatError("patch: a data format is not supported")
        if self._next == _DIFF and self._position + n > self._base_size:
            raise errors.FormatError("patch: reads beyond the base image")
        if self._next in (_DIFF, _EXTRA):
            self._left = n
        self._next += 1

    async def boundary(self):
        while self._next != _DIFF:
            if self._left:
                return None
            if not self._digit():
                await self.wait()
        state = await self._stage.boundary()
        return None if state is None else (state[0], self._position)
