"""Turn a payload's bytes back into the image, one flash block at a time.

    stage = payload.open_stage(chosen, response, base, size, state)
    await payload.pump(stage, writer, boundary)

A stage has ``take(view, at, n)``, which puts up to n image bytes straight to ``view[at:]``, a
piece of the one block, and returns their number, 0 where ``await wait()`` has to come first,
None at the end. It never waits and, in the steady state, allocates nothing. ``await boundary()``,
asked at every 64 KiB of the image, returns the stage's state, two small integers from which a
download that was cut goes on, or None where it can't. Nothing else is kept of what went before: a
gzip member, and a chunk of a patch, end there. ``spare`` is a buffer of 512 bytes it does not
need between two ``take``, or None. The body has ``take``, ``wait`` and ``received``, as
``http.Response``.

    state    (offset in the payload, position in the base image)

What comes over the network proves nothing until the image's hash holds, so each stage is bounded
against any input: output by the image's size, input and work per output, time between two looks
at other tasks.

Memory, once per update: a block of 4 KiB; gzip adds 5 KiB and the window (4 KiB for window 12)
anew for each member; a patch adds 512 bytes, and its code. ``heap`` tells it before anything is
opened.

The stages that are not always needed are in ``inflate`` and ``patch``.
"""

import asyncio

from . import errors
from .errors import OtaError
from .slot import BLOCK, PIECE, new_block

BOUNDARY = 65536  # of the image; payload builders end gzip members and patch chunks there

# Of what is inflated, a piece at a time; it can't take more from an honest encoder: stored blocks
# are 5 bytes longer than their content, a dynamic block's code tables are below 400 bytes.
AHEAD = 4 * PIECE
STATE = 1472  # of DeflateIO beside its window: 1,440 bytes on a 64-bit port
_READS = 8  # of a stage, then other tasks run: tiny pieces make much work of few bytes


def encodings():
    """Encodings that this port can undo: names as in a release."""
    try:
        import deflate  # noqa: F401
        from micropython import RingIO  # noqa: F401
    except ImportError:
        return ("identity",)
    return ("identity", "gzip")


def usable(image, running_build, encodings=("identity",)):
    """List the payloads this device can apply, smallest first.

    Args:
        image: a ``release.Image``.
        running_build: build of the running image, the base a patch must name.
        encodings: as of ``encodings()``.
    """
    usable = [
        p
        for p in image.payloads
        if p.encoding in encodings and (p.patch is None or p.base == running_build)
    ]
    usable.sort(key=lambda p: p.size)
    return usable


def buffers(payload):
    """Bytes of what a stage needs in large pieces, beside the block: window and ring."""
    if payload.encoding != "gzip":
        return 0
    return (1 << payload.window) + STATE + AHEAD + PIECE + 64


def heap(payload):
    """Bytes of heap that a payload needs beside the block: what ``pump`` makes, and a patch's
    code."""
    need = buffers(payload)
    if need:
        need += PIECE + 640  # a buffer, objects
    if payload.patch:
        need += PIECE + 2560  # its code
    return need


class Writer:
    """Collects image bytes in one block, held in pieces, and hands each full one to the slot.

    Args:
        slot: where ``write(block)`` takes lists of such pieces, 4096 bytes in all, the last less.
        size: bytes of the image.
        offset: where in the image writing goes on; a multiple of 4096.
        block: what to collect them in, of ``slot.new_block``; made by default.
    """

    def __init__(self, slot, size, offset=0, block=None):
        self._slot = slot
        self._size = size
        self._block = block or new_block()
        self._fill = 0
        self.offset = offset  # image bytes handed to the slot
        self._aim(0)

    def left(self):
        """Image bytes still wanted."""
        return self._size - self.offset - self._fill

    def _aim(self, piece):
        """Say where the next bytes go: ``room`` of them to ``view[at:]``. No new object."""
        self._piece = piece
        self.view = self._block[piece]
        self.at = 0
        self.room = min(len(self.view), self.left())

    def advance(self, n):
        """Count ``n`` bytes put there; True when that completed a block."""
        self._fill += n
        self.at += n
        self.room -= n
        if self.room:
            return False
        fill = self._fill
        if fill < BLOCK and self.left():
            self._aim(self._piece + 1)
            return False
        block = self._block
        if fill < BLOCK:
            block = block[: self._piece] + [self.view[: self.at]]
        self._slot.write(block)
        self.offset += fill
        self._fill = 0
        self._aim(0)
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
    while writer.room:
        n = stage.take(writer.view, writer.at, writer.room)
        if n is None:
            raise errors.FormatError(
                "payload", "%d bytes missing" % writer.left(), "the whole image"
            )
        if not n:
            await stage.wait()
            continue
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


def load(payload):
    """Load what undoes a payload: before the room for its buffers is given up."""
    if payload.encoding == "gzip":
        from . import inflate  # noqa: F401
    if payload.patch:
        from . import patch  # noqa: F401


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
        from .inflate import Inflate

        stage = Inflate(response, payload.window, offset)
    elif payload.encoding != "identity":
        raise errors.FormatError("payload encoding", payload.encoding, "identity or gzip")
    if payload.patch is None:
        return stage
    if payload.patch != "detools":
        raise errors.FormatError("payload patch", payload.patch, "detools")
    from .patch import Patch

    return Patch(stage, base, size, None if state is None else position)


class _Plain:
    """The body as it is."""

    spare = None

    def __init__(self, response, offset):
        self._response = response
        self._offset = offset
        self.wait = response.wait

    def take(self, view, at, n):
        return self._response.take(view[at:] if at else view, n)

    async def boundary(self):
        return self._offset + self._response.received, 0
