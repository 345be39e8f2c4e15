"""Read an ESP application image: header, segments, app descriptor, appended digest. Pure.

    head = espimage.parse(first_288_bytes)       # refuse a wrong file before the first erase
    length, build = espimage.identify(read, limit)
    walk.feed(block)                              # all of it, in order; then walk.finish()

``Walk`` verifies an image as its bytes pass: segments, checksum, appended SHA-256. What lies
behind that digest (the signature sector of Secure Boot v2) is the bootloader's business.

Source: ESP-IDF esp_app_format.h, esp_app_desc.h, esp_image_format.c.

    off size field                         app descriptor at 0x20 (data of the first segment)
    0   1    magic 0xE9                    0   4   magic 0xABCD5432
    1   1    number of segments, <= 16     4   4   secure_version
    12  2    chip id                       16  32  version
    23  1    1: SHA-256 is appended        48  32  project name
    24  8    first segment: address, length
"""

import hashlib
import struct

from .errors import ImageError

HEAD_LEN = 288  # header, first segment's header and the app descriptor
CHIP_IDS = {  # esp_app_format.h, esp_chip_id_t
    0x0000: "esp32",
    0x0002: "esp32s2",
    0x0005: "esp32c3",
    0x0009: "esp32s3",
    0x000C: "esp32c2",
    0x000D: "esp32c6",
    0x0010: "esp32h2",
    0x0012: "esp32p4",
    0x0014: "esp32c61",
    0x0017: "esp32c5",
}
_MAGIC = 0xE9
_DESC_MAGIC = b"\x32\x54\xcd\xab"
_MAX_SEGMENTS = 16
_MAX_SEGMENT = 1 << 24
_CHECKSUM_SEED = 0xEF
_FOLD = 256  # bytes that are XORed at once
_HEAD, _SEGMENT, _DATA, _PADDING, _DIGEST, _DONE = range(6)  # parts of an image, in order


def chip_name(chip_id):
    """Return the chip's name, or its number for one not known here."""
    return CHIP_IDS.get(chip_id, "chip 0x%04x" % chip_id)


def _text(raw):
    raw = bytes(raw)
    end = raw.find(b"\0")
    try:
        return (raw if end < 0 else raw[:end]).decode()
    except UnicodeError:
        return ""


def parse(head):
    """Return what the first ``HEAD_LEN`` bytes of an image say.

    Returns:
        dict with ``chip_id``, ``segments``, ``hash_appended`` (bool), ``secure_version``,
        ``version`` and ``project`` (both empty in stock MicroPython).

    Raises:
        ImageError: not an application image; the message names the first thing that is wrong.
    """
    if len(head) < HEAD_LEN:
        raise ImageError("image", "%d bytes" % len(head), "at least %d" % HEAD_LEN)
    if head[0] != _MAGIC:
        raise ImageError("image magic", "0x%02x" % head[0], "0xe9")
    if not 1 <= head[1] <= _MAX_SEGMENTS:
        raise ImageError("image segments", head[1], "1 to 16")
    if bytes(head[32:36]) != _DESC_MAGIC:
        raise ImageError(
            "app descriptor magic", bytes(head[32:36]), "abcd5432 (a bootloader is no application)"
        )
    return {
        "chip_id": head[12] | head[13] << 8,
        "segments": head[1],
        "hash_appended": head[23] == 1,
        "secure_version": struct.unpack_from("<I", head, 36)[0],
        "version": _text(head[48:80]),
        "project": _text(head[80:112]),
    }


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
    except (ImportError, SyntaxError, ValueError):  # left out, no emitter, another architecture
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
            if kept[0] != _MAGIC or not 1 <= kept[1] <= _MAX_SEGMENTS:
                self.problem = "its first bytes are no image"
                return _DONE, 0
            if kept[23] != 1:
                self.problem = "no SHA-256 is appended"
                return _DONE, 0
            self._segments = kept[1]
            return _SEGMENT, 8
        if part == _SEGMENT:
            length = struct.unpack("<I", kept[4:])[0]
            if length & 3 or length >= _MAX_SEGMENT:
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
            raise ImageError("the image can't boot: " + self.problem)
        return self._build


def identify(read, limit):
    """Walk the segments of an image and return its ``(length, build)``.

    ``length`` counts the appended digest; ``build`` is that digest in lower-case hex: the name
    of exactly these bytes, or "" where the image carries none.

    Args:
        read: ``read(offset, buf)`` fills ``buf`` (a bytearray) from the image.
        limit: bytes available (the size of the slot or file).

    Raises:
        ImageError: no image there, or one that does not end within ``limit``.
    """
    head = bytearray(24)
    read(0, head)
    if head[0] != _MAGIC:
        raise ImageError("image magic", "0x%02x" % head[0], "0xe9")
    if not 1 <= head[1] <= _MAX_SEGMENTS:
        raise ImageError("image segments", head[1], "1 to 16")
    pos = 24
    segment = bytearray(8)
    for _ in range(head[1]):
        if pos + 8 > limit:
            raise ImageError("image length", "more than %d" % limit, "%d at most" % limit)
        read(pos, segment)
        length = struct.unpack_from("<I", segment, 4)[0]
        if length & 3 or length >= _MAX_SEGMENT:
            raise ImageError("segment length", length, "a multiple of 4 below 16 MiB")
        pos += 8 + length
    pos = (pos | 15) + 1  # the checksum is the last byte of a 16-byte unit
    end = pos + 32 if head[23] else pos
    if end > limit:
        raise ImageError("image length", end, "%d at most" % limit)
    if not head[23]:
        return end, ""
    digest = bytearray(32)
    read(pos, digest)
    return end, "".join("%02x" % b for b in digest)
