"""Read an ESP application image: header, segments, app descriptor, appended digest. Pure.

    head = espimage.parse(first_288_bytes)       # refuse a wrong file before the first erase
    length, build = espimage.identify(read, limit)

What lies behind the digest (the signature sector of Secure Boot v2) is the bootloader's business.

Source: ESP-IDF esp_app_format.h, esp_app_desc.h, esp_image_format.c.

    off size field                         app descriptor at 0x20 (data of the first segment)
    0   1    magic 0xE9                    0   4   magic 0xABCD5432
    1   1    number of segments, <= 16     4   4   secure_version
    12  2    chip id                       16  32  version
    23  1    1: SHA-256 is appended        48  32  project name
    24  8    first segment: address, length
"""

import struct

from . import errors

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
MAGIC = 0xE9
_DESC_MAGIC = b"\x32\x54\xcd\xab"
MAX_SEGMENTS = 16
MAX_SEGMENT = 1 << 24


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
        raise errors.ImageError("image", "%d bytes" % len(head), "at least %d" % HEAD_LEN)
    if head[0] != MAGIC:
        raise errors.ImageError("image magic", "0x%02x" % head[0], "0xe9")
    if not 1 <= head[1] <= MAX_SEGMENTS:
        raise errors.ImageError("image segments", head[1], "1 to 16")
    if bytes(head[32:36]) != _DESC_MAGIC:
        raise errors.ImageError(
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
    if head[0] != MAGIC:
        raise errors.ImageError("image magic", "0x%02x" % head[0], "0xe9")
    if not 1 <= head[1] <= MAX_SEGMENTS:
        raise errors.ImageError("image segments", head[1], "1 to 16")
    pos = 24
    segment = bytearray(8)
    for _ in range(head[1]):
        if pos + 8 > limit:
            raise errors.ImageError("image length", "more than %d" % limit, "%d at most" % limit)
        read(pos, segment)
        length = struct.unpack_from("<I", segment, 4)[0]
        if length & 3 or length >= MAX_SEGMENT:
            raise errors.ImageError("segment length", length, "a multiple of 4 below 16 MiB")
        pos += 8 + length
    pos = (pos | 15) + 1  # the checksum is the last byte of a 16-byte unit
    end = pos + 32 if head[23] else pos
    if end > limit:
        raise errors.ImageError("image length", end, "%d at most" % limit)
    if not head[23]:
        return end, ""
    digest = bytearray(32)
    read(pos, digest)
    return end, "".join("%02x" % b for b in digest)
