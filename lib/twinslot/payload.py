"""Turn a payload's bytes back into the image, one flash block at a time.

    writer = Writer(slot, image.size)
    await identity(response, writer, progress)

A stage takes bytes where it finds them and puts them straight into the free part of the one
block buffer (``space``/``advance``): nothing is copied twice and no stage holds more than a
block. Later encodings are further stages in front of the same Writer.

Allocates 4 KiB once per update; in the steady loop nothing.
"""

import asyncio

from .errors import FormatError
from .slot import BLOCK

ENCODINGS = ("identity",)


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


async def identity(response, writer, progress):
    """Copy a response's body to the slot.

    Args:
        response: ``await readinto(view)`` returns the bytes read, 0 at the end.
        writer: a :class:`Writer`.
        progress: called with the image offset after each block.

    Raises:
        FormatError: the body ends before the image does.
        NetworkError: from the response; ImageError, PartitionError: from the slot.
    """
    while writer.left():
        n = await response.readinto(writer.space())
        if n == 0:
            raise FormatError("payload", "%d bytes missing" % writer.left(), "the whole image")
        if writer.advance(n):
            progress(writer.offset)
            # The write held the application up; let it run before the next one does.
            await asyncio.sleep_ms(0)
