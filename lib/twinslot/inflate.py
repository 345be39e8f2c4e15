"""The stage that inflates a gzip payload: members, one after the other, in pieces.

Inflating never waits: the ring between the network and ``deflate.DeflateIO`` is filled with more
than a piece of output can need, then the piece is inflated in C. DeflateIO reads its source byte
by byte, and an empty source spoils it for good.

Source: RFC 1952; MicroPython extmod/moddeflate.c, py/objringio.c.
"""

import gc

import deflate
from micropython import RingIO, const

from . import errors
from .payload import AHEAD, STATE
from .slot import PIECE

_IDLE_MEMBERS = const(16)  # without content, in a row


class Inflate:
    """See ``payload`` for what a stage is.

    Args:
        response: the body.
        window: its logarithm to the base of 2, as the release names it.
        offset: of the body's first byte in the payload.
    """

    def __init__(self, response, window, offset):
        self._place = bytearray((1 << window) + STATE)  # kept for the next member's
        self._response = response
        self._window = window
        self._ring = RingIO(AHEAD + PIECE)
        self.spare = memoryview(bytearray(PIECE))  # in use while the ring is filled
        self._offset = offset
        self._ended = False
        self._member = None
        self._idle = 0
        self._byte = memoryview(bytearray(1))
        self._kept = False  # while _byte holds a byte that boundary() had to look at
        self.wait = response.wait

    def _filled(self):
        """Fill the ring with what is there; True when it holds enough for a piece."""
        ring = self._ring
        while not self._ended and ring.any() < AHEAD:
            n = self._response.take(self.spare, PIECE)
            if n is None:
                self._ended = True
            elif not n:
                return False
            else:
                ring.write(self.spare, n)  # pyright: ignore (not in the stubs)
        return True

    def take(self, view, at, n):
        if at:
            view = view[at:]
        if self._kept:
            self._kept = False
            view[0] = self._byte[0]
            return 1
        while self._filled():
            if self._member is None:
                if not self._ring.any():
                    return None
                self._place = None
                self._member = deflate.DeflateIO(self._ring, deflate.GZIP, self._window)
            got = self._read(view, n)
            if got:
                self._idle = 0
                return got
            self._end_member()
        return 0

    def _end_member(self):
        self._member = None
        gc.collect()  # what is allocated meanwhile must not lie in the middle of the only hole
        try:
            self._place = bytearray((1 << self._window) + STATE)
        except MemoryError:  # the state lay elsewhere
            self._place = bytearray(1 << self._window)
        self._idle += 1
        if self._idle >= _IDLE_MEMBERS:
            raise errors.FormatError(
                "gzip", "%d members without content" % _IDLE_MEMBERS, "an image"
            )

    def _read(self, view, n):
        try:
            return self._member.readinto(view, n if n < PIECE else PIECE)
        except EOFError:
            raise errors.FormatError("gzip: the payload is cut short")
        except OSError as exc:
            # EINVAL: malformed, a checksum, or a window larger than announced. EAGAIN: no
            # honest encoder needs so much input for so little output.
            raise errors.FormatError("gzip: malformed payload (error %s)" % exc.args[0])

    async def boundary(self):
        while not self._filled():
            await self.wait()
        if self._member is not None and self._read(self._byte, 1):
            self._kept = True
            return None
        return self._offset + self._response.received - self._ring.any(), 0
