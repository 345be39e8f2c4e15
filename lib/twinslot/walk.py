"""Verify an ESP application image as its bytes pass: segments, checksum, appended SHA-256. Pure.

    walk = Walk()
    walk.feed(block)                              # all of it, in order
    build = walk.finish()

Loaded when an image is read back; the formats are told in `twinslot.espimage`.

Source: ESP-IDF esp_image_format.c.
"""

import hashlib
import struct

from . import errors
from .espimage import MAGIC, MAX_SEGMENT, MAX_SEGMENTS

_CHECKSUM_SEED = 0xEF
_FOLD = 256  # bytes that are XORed at once
_HEAD, _SEGMENT, _DATA, _PADDING, _DIGEST, _DONE = range(6)  # parts of an image, in order


def plain_xor(buf, n):
    """Return the XOR of the first ``n`` bytes of ``buf``: the twin of ``native.xor``."""
    fold = 0
    for at in range(0, n, _FOLD):  # many at once
        fold ^= int.from_bytes(buf[at : min(at + _FOLD, n)], "little")
    result = 0
    for byte in fold.to_bytes(_FOLD, "little"):
        result ^= byte
    return result


def _native_xor():
    try:
        from .native import xor

        return xor
    # left out, no emitter, another architecture, no room for it
    except (ImportError, SyntaxError, ValueError, MemoryError):
        return plain_xor


class Walk:
    """Verify an image while its bytes pass by, in order and in pieces of any size.

    Nothing is raised before ``finish``: whether these are the bytes that were signed comes first.
    Allocates nothing for a piece that lies within a segment's data.
    """

    def __init__(self):
        self._sha = hashlib.sha256()
        self._xor = _native_xor()
        self._part = _HEAD
        self._left = 24  # bytes of the part that are still to come
        self._kept = b""  # of a part that is looked at when it is whole
        self._length = self._segments = 0
        self._checksum = _CHECKSUM_SEED  # of the segments' data so far
        self._build = None
        self.problem = "it ends early"

    def feed(self, buf):
        """Take the next bytes (bytes-like, at most a block)."""
        n = len(buf)
        if self._part == _DATA and n < self._left:  # the usual case: no new object
            self._pass(buf, n)
            return
        view = memoryview(buf)
        at = 0
        while at < n and self._part != _DONE:
            piece = view[at : at + self._left]
            at += len(piece)
            if self._part == _DATA:
                self._pass(piece, len(piece))
            else:
                self._left -= len(piece)
                self._kept += bytes(piece)
                if self._part != _DIGEST:
                    self._length += len(piece)
                    self._sha.update(piece)
            while not self._left and self._part != _DONE:
                kept, self._kept = self._kept, b""
                self._part, self._left = self._next(self._part, kept)

    def _pass(self, data, n):
        self._left -= n
        self._length += n
        self._sha.update(data)
        self._checksum ^= self._xor(data, n)

    def _next(self, part, kept):
        """Look at a whole part; return the next one and its length."""
        if part == _HEAD:
            if kept[0] != MAGIC or not 1 <= kept[1] <= MAX_SEGMENTS:
                self.problem = "its first bytes are no image"
                return _DONE, 0
            if kept[23] != 1:
                self.problem = "no SHA-256 is appended"
                return _DONE, 0
            self._segments = kept[1]
            return _SEGMENT, 8
        if part == _SEGMENT:
            length = struct.unpack("<I", kept[4:])[0]
            if length & 3 or length >= MAX_SEGMENT:
                self.problem = "a segment of %d bytes" % length
                return _DONE, 0
            return _DATA, length
        if part == _DATA:
            self._segments -= 1
            # The checksum is the last byte of a 16-byte unit.
            return (_SEGMENT, 8) if self._segments else (_PADDING, 16 - self._length % 16)
        if part == _PADDING:
            self._stored = kept[-1]  # what the checksum should be
            return _DIGEST, 32
        self._judge(kept)
        return _DONE, 0

    def _judge(self, digest):
        if self._stored != self._checksum:
            self.problem = "checksum 0x%02x, 0x%02x is right" % (self._stored, self._checksum)
        elif self._sha.digest() != digest:
            self.problem = "its appended SHA-256 belongs to another"
        else:
            self._build = "".join("%02x" % b for b in digest)

    def finish(self):
        """Return the image's build: its appended digest in hex, which holds.

        Raises:
            ImageError: the bytes that passed are no whole image.
        """
        if self._build is None:
            raise errors.ImageError("the image can't boot: " + self.problem)
        return self._build
