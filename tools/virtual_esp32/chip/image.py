"""Verify an ESP application image as the bootloader and `esp_ota_set_boot_partition` do.

Own code, on purpose independent of the updater's parser: one checks the other. Reads through a
callable, keeps one small buffer, writes nothing. Signatures are not checked (stock MicroPython
builds don't).

    image     header 24 | segments, each {load address, length, data} | 0x00 ... checksum | SHA-256
    checksum  last byte of a 16-byte unit: 0xEF XOR all segment data
    SHA-256   of everything before it; only there if header byte 23 is set

Source: ESP-IDF bootloader_support esp_image_format.c, esp_app_format.h, esp_app_desc.h; soc.h
and bootloader.ld of the chips (address ranges).
"""

import hashlib
import struct
import sys
from collections import namedtuple

HEADER_SIZE = 24
DESC_OFFSET = 0x20
DESC_SIZE = 256
DESC_MAGIC = 0xABCD5432
ROMFS_MAGIC = b"\xd2\xcd\x31"
MMU_PAGE = 0x10000

_MAGIC = 0xE9
_SIXTEEN_MIB = 0x1000000

# name        as esptool spells it
# chip_id     of the image header
# rev         revision of the virtual chip, major * 100 + minor
# blk_rev     eFuse block revision, likewise; None: such images don't limit it (ESP32)
# bootloader  flash offset of the second-stage bootloader
# drom, irom  (start, end) of the flash-mapped addresses; one and the same where data and code
#             share them
# ram         ((start, end), ...) where the bootloader can load
# loader      ((start, end), ...) of that, taken by the bootloader's data, stack and loading code
#             (its bootloader.ld; the stack with the 32 KiB of headroom that it checks)
# cache32     the cache addresses more than 16 MiB of flash
Chip = namedtuple(
    "Chip",
    (
        "name",
        "chip_id",
        "rev",
        "blk_rev",
        "bootloader",
        "drom",
        "irom",
        "ram",
        "loader",
        "cache32",
    ),
)

CHIPS = {
    "esp32": Chip(
        "esp32",
        0x0000,
        301,
        None,
        0x1000,
        (0x3F400000, 0x3F800000),
        (0x400D0000, 0x40400000),
        (
            (0x3FFAE000, 0x40000000),  # DRAM
            (0x40080000, 0x400AA000),  # IRAM
            (0x400C0000, 0x400C2000),  # RTC fast, instruction bus
            (0x3FF80000, 0x3FF82000),  # RTC fast, data bus
            (0x50000000, 0x50002000),  # RTC slow
        ),
        ((0x3FFF0000, 0x3FFF6000), (0x3FFDBF20, 0x3FFE3F20)),
        False,
    ),
    "esp32s3": Chip(
        "esp32s3",
        0x0009,
        2,
        103,
        0x0,
        (0x3C000000, 0x3E000000),
        (0x42000000, 0x44000000),
        (
            (0x3FC88000, 0x3FD00000),
            (0x40370000, 0x403E0000),
            (0x600FE000, 0x60100000),
            (0x50000000, 0x50002000),
        ),
        ((0x3FCE2700, 0x3FCEB710), (0x403CB700, 0x403D2700)),
        True,
    ),
    "esp32c3": Chip(
        "esp32c3",
        0x0005,
        4,
        103,
        0x0,
        (0x3C000000, 0x3C800000),
        (0x42000000, 0x42800000),
        (
            (0x3FC80000, 0x3FCE0000),
            (0x4037C000, 0x403E0000),
            (0x50000000, 0x50002000),
        ),
        ((0x3FCD5710, 0x3FCDE710), (0x403CE710, 0x403D5710)),
        False,
    ),
    "esp32c5": Chip(
        "esp32c5",
        0x0017,
        100,
        0,
        0x2000,
        (0x42000000, 0x44000000),
        (0x42000000, 0x44000000),
        (
            (0x40800000, 0x40860000),
            (0x50000000, 0x50004000),
        ),
        ((0x408555A0, 0x4085E5A0), (0x4084E5A0, 0x408555A0)),
        False,
    ),
}

# load address; offset of the data in the image; its length
Segment = namedtuple("Segment", ("load", "offset", "length"))

# segments    list of Segment
# length      of the whole image, appended digest included
# digest      32 bytes appended to the image (the build's identity), or None
# entry       start address
# chip_id     of the header
# desc        offset of the app descriptor (0x20), or None if there is none
ImageInfo = namedtuple("ImageInfo", ("segments", "length", "digest", "entry", "chip_id", "desc"))

# texts are str; elf_sha256 is 32 bytes
AppDesc = namedtuple(
    "AppDesc", ("secure_version", "version", "project", "time", "date", "idf", "elf_sha256")
)


class ImageError(Exception):
    """The image is not bootable; the text says why, in the bootloader's words."""


if sys.implementation.name == "micropython":
    import micropython

    @micropython.viper
    def _xor_bytes(buf, n: int) -> int:
        p = ptr8(buf)  # noqa: F821
        x = 0
        for i in range(n):
            x ^= p[i]
        return x

else:

    def _xor_bytes(buf, n):
        """XOR of the first n bytes."""
        x = int.from_bytes(memoryview(buf)[:n], "little")
        while n > 1:
            n = (n + 1) // 2
            x = (x >> 8 * n) ^ (x & ((1 << 8 * n) - 1))
        return x


def chip_by_id(chip_id):
    """Return the Chip with that id, or None."""
    for chip in CHIPS.values():
        if chip.chip_id == chip_id:
            return chip
    return None


def verify(
    read,
    limit,
    chip,
    flash_offset=0,
    *,
    in_bootloader=False,
    data=True,
    digest=True,
    buf=None,
):
    """Check an application image, in the order of ESP-IDF's esp_image_verify().

    Args:
        read: callable (offset, buf): fill buf from that offset of the image.
        limit: size of the partition in bytes; nothing beyond is read.
        chip: a Chip (of CHIPS) or the name of one.
        flash_offset: where the partition starts in flash (for the alignment of mapped segments).
        in_bootloader: also refuse segments that the bootloader can't load into RAM. Only it can
            know, so an image may pass set_boot and still be refused at boot.
        data: False leaves out checksum and digest, as a wake from deep sleep does.
        digest: False leaves out the digest alone, as the ROM does with the bootloader.
        buf: bytearray to read through, length a multiple of 4; None allocates 4096 bytes.
    Returns:
        ImageInfo.
    Raises:
        ImageError: with the first reason found.
    """
    if isinstance(chip, str):
        chip = CHIPS[chip]
    if limit > _SIXTEEN_MIB and not chip.cache32:
        raise ImageError("partition size 0x%x invalid, larger than 16MB" % limit)
    buf = bytearray(4096) if buf is None else buf
    head = bytearray(HEADER_SIZE)
    _read(read, 0, head, limit)
    count, entry, hash_appended = _check_header(head, chip)
    check = _Running(head, data, buf)
    segments = []
    desc = None
    end = HEADER_SIZE
    for i in range(count):
        head = bytearray(8)
        _read(read, end, head, limit)
        load, length = struct.unpack("<II", head)
        segment = Segment(load, end + 8, length)
        _check_segment(i, segment, chip, flash_offset, in_bootloader)
        end = segment.offset + segment.length
        if end > limit:
            raise ImageError(
                "segment %d: ends at 0x%x, doesn't fit in partition length 0x%x" % (i, end, limit)
            )
        if i == 0:
            desc = _find_desc(read, segment, chip)
        check.segment(read, head, segment)
        segments.append(segment)

    unpadded = end + 1
    end = (unpadded + 15) // 16 * 16
    tail = bytearray(end - unpadded + 1)
    _read(read, unpadded - 1, tail, limit)
    if data and tail[-1] != check.xor:
        raise ImageError("checksum failed: calculated 0x%02x, read 0x%02x" % (check.xor, tail[-1]))
    appended = None
    if hash_appended:
        appended = bytearray(32)
        _read(read, end, appended, limit)
        appended = bytes(appended)
        if data and digest:
            check.sha.update(tail)
            if check.sha.digest() != appended:
                raise ImageError("image hash failed: image is corrupt")
        end += 32
    return ImageInfo(segments, end, appended, entry, chip.chip_id, desc)


class _Running:
    """Checksum and digest of what was read so far."""

    def __init__(self, head, wanted, buf):
        self.wanted = wanted
        self.buf = buf
        self.xor = 0xEF
        self.sha = hashlib.sha256(head)

    def segment(self, read, head, segment):
        if not self.wanted:
            return
        self.sha.update(head)
        view = memoryview(self.buf)
        offset = segment.offset
        left = segment.length
        while left:
            n = min(left, len(view))
            chunk = view if n == len(view) else view[:n]
            read(offset, chunk)
            self.sha.update(chunk)
            self.xor ^= _xor_bytes(chunk, n)
            offset += n
            left -= n


def _read(read, offset, buf, limit):
    if offset + len(buf) > limit:
        raise ImageError(
            "image length 0x%x doesn't fit in partition length 0x%x" % (offset + len(buf), limit)
        )
    read(offset, buf)


def _check_header(head, chip):
    magic, count, _, _, entry = struct.unpack_from("<BBBBI", head)
    chip_id, _, min_rev, max_rev = struct.unpack_from("<HBHH", head, 12)
    if magic != _MAGIC:
        hint = " (nothing flashed here?)" if magic == 0xFF else ""
        raise ImageError("invalid magic byte 0x%02x, expected 0xe9%s" % (magic, hint))
    if chip_id != chip.chip_id:
        raise ImageError("mismatch chip ID, expected %d, found %d" % (chip.chip_id, chip_id))
    if chip.rev < min_rev:
        raise ImageError("chip revision %d is below the image's minimum %d" % (chip.rev, min_rev))
    if max_rev not in (0, 0xFFFF) and chip.rev > max_rev:
        raise ImageError("chip revision %d is above the image's maximum %d" % (chip.rev, max_rev))
    if count > 16:
        raise ImageError("segment count %d exceeds max 16" % count)
    return count, entry, head[23] != 0


def _check_segment(i, segment, chip, flash_offset, in_bootloader):
    load, offset, length = segment
    if length % 4 or length >= _SIXTEEN_MIB:
        raise ImageError("segment %d: invalid length 0x%x" % (i, length))
    mapped = _within(load, load, chip.drom) or _within(load, load, chip.irom)
    if mapped and (flash_offset + offset) % MMU_PAGE != load % MMU_PAGE:
        raise ImageError(
            "segment %d: load address 0x%08x doesn't match data at 0x%08x (64 KiB pages)"
            % (i, load, flash_offset + offset)
        )
    # Below 0x10000000 is padding, which nobody loads.
    if in_bootloader and not mapped and load >= 0x10000000 and length:
        _check_ram(i, load, length, chip)


def _check_ram(i, load, length, chip):
    end = load + length
    for start, stop in chip.loader:
        if load < stop and end > start:
            raise ImageError(
                "segment %d 0x%08x-0x%08x invalid: overlaps bootloader" % (i, load, end)
            )
    for area in chip.ram:
        if _within(load, end - 1, area):
            return
    raise ImageError("segment %d 0x%08x-0x%08x invalid: bad load address range" % (i, load, end))


def _within(first, last, area):
    return area[0] <= first and last < area[1]


def _find_desc(read, segment, chip):
    """Offset of the app descriptor if segment 0 begins with one; refuse a wrong eFuse revision."""
    if segment.offset != DESC_OFFSET or segment.length < DESC_SIZE:
        return None
    data = bytearray(DESC_SIZE)
    read(DESC_OFFSET, data)
    if struct.unpack_from("<I", data)[0] != DESC_MAGIC:
        return None
    low, high = struct.unpack_from("<HH", data, 176)
    if chip.blk_rev is not None and not (
        low <= chip.blk_rev and (high in (0, 0xFFFF) or chip.blk_rev <= high)
    ):
        raise ImageError(
            "eFuse block revision %d, image expects %d to %d" % (chip.blk_rev, low, high)
        )
    return DESC_OFFSET


def parse_desc(data):
    """Read an app descriptor from its 256 bytes, or return None if they are none."""
    if len(data) < DESC_SIZE or struct.unpack_from("<I", data)[0] != DESC_MAGIC:
        return None
    fields = struct.unpack_from("<I8x32s32s16s16s32s32s", data, 4)
    return AppDesc(*[f if i in (0, 6) else _text(f) for i, f in enumerate(fields)])


def _text(field):
    return "".join([chr(b) if 32 <= b < 127 else "?" for b in field.split(b"\0")[0]])


def read_desc(read, info):
    """Read the app descriptor of a verified image; None if it has none."""
    if info.desc is None:
        return None
    data = bytearray(DESC_SIZE)
    read(info.desc, data)
    return parse_desc(data)


def find_tree(read, info):
    """Find the Python tree (a ROMFS) that a virtual firmware carries instead of frozen modules.

    It is a flash-mapped data segment of its own (not the first) that begins with the ROMFS magic
    D2 CD 31 and holds as many bytes as the ROMFS says. A genuine image has none.

    Returns:
        (offset in the image, length in bytes) of the ROMFS, or None.
    """
    drom = chip_by_id(info.chip_id).drom
    head = bytearray(16)
    for segment in info.segments[1:]:
        if not _within(segment.load, segment.load, drom) or segment.length < len(head):
            continue
        read(segment.offset, head)
        if bytes(head[:3]) != ROMFS_MAGIC:
            continue
        # The size of what follows, as big-endian groups of 7 bits.
        size = 0
        for i in range(3, len(head)):
            size = size << 7 | head[i] & 0x7F
            if head[i] < 0x80:
                if i + 1 + size <= segment.length:
                    return segment.offset, i + 1 + size
                break
    return None
