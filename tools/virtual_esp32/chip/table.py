"""The partition table: 32-byte records at flash offset 0x8000.

Pure: bytes in, partitions out, and back. Reading CSV and checking a layout is the generator's job
(`layout.py` on the host side).

    offset  size  field (little-endian, struct "<2sBBLL16sL")
    0       2     magic AA 50 (partition) or EB EB (MD5 of all records before it, at offset 16)
    2       1     type
    3       1     subtype
    4       4     offset in flash
    8       4     size
    12      16    label, NUL padded
    28      4     flags: bit 0 encrypted, bit 1 readonly

Source: ESP-IDF bootloader_support flash_partitions.c (bootloader), esp_partition/partition.c
(application), partition_table/gen_esp32part.py (generator).
"""

import hashlib
import struct
from binascii import hexlify
from collections import namedtuple

TABLE_OFFSET = 0x8000
TABLE_SIZE = 0xC00

TYPE_APP = 0
TYPE_DATA = 1
APP_FACTORY = 0x00
APP_OTA_0 = 0x10
APP_TEST = 0x20
DATA_OTA = 0x00
DATA_PHY = 0x01
DATA_NVS = 0x02
FLAG_ENCRYPTED = 1
FLAG_READONLY = 2

_RECORD = "<2sBBLL16sL"
_MAGIC = b"\xaa\x50"
_MAGIC_MD5 = b"\xeb\xeb"

# label str, type int, subtype int, offset and size in bytes, flags int
Partition = namedtuple("Partition", ("label", "type", "subtype", "offset", "size", "flags"))


class TableError(Exception):
    """The bootloader would not accept this partition table."""


def parse(data, require_md5=False, chip_size=None):
    """Read a partition table, in table order.

    Args:
        data: the table's bytes, 0xC00 or more.
        require_md5: False reads by the bootloader's rules: an unknown record, a second or wrong
            MD5, a partition beyond chip_size or a missing terminator refuse the whole table; no
            MD5 is fine. True reads by the application's: reading ends at the first unknown record,
            and without a right MD5 the list is empty (IDF only logs an error).
        chip_size: bytes, from the bootloader's image header; None doesn't check.
    Returns:
        list of Partition.
    Raises:
        TableError: by the bootloader's rules only, with the reason.
    """
    if require_md5:
        return _parse_app(data)
    partitions = []
    md5_found = False
    for at in range(0, TABLE_SIZE, 32):
        record = bytes(data[at : at + 32])
        magic = record[:2]
        if magic == _MAGIC:
            part = _partition(record)
            if chip_size is not None and part.offset + part.size > chip_size:
                raise TableError(
                    "partition %d (%s) invalid: offset 0x%x size 0x%x exceeds flash chip size 0x%x"
                    % (at // 32, part.label, part.offset, part.size, chip_size)
                )
            partitions.append(part)
        elif magic == _MAGIC_MD5:
            if md5_found:
                raise TableError("only one MD5 checksum is allowed")
            if record[16:] != _md5(data[:at]):
                raise TableError("incorrect MD5 checksum")
            md5_found = True
        elif record[:4] == b"\xff\xff\xff\xff":
            if not partitions:
                raise TableError("empty partition table")
            return partitions
        else:
            raise TableError(
                "partition %d: magic %s, expected aa50" % (at // 32, hexlify(magic).decode())
            )
    raise TableError("partition table has no terminating entry")


def _parse_app(data):
    partitions = []
    for at in range(0, TABLE_SIZE, 32):
        record = bytes(data[at : at + 32])
        if record[:2] == _MAGIC_MD5:
            return partitions if record[16:] == _md5(data[:at]) else []
        if record[:2] != _MAGIC:
            break
        partitions.append(_partition(record))
    return []


def build(partitions):
    """Return the 0xC00 bytes of a table: the records, their MD5, 0xFF.

    Raises: TableError if they don't fit.
    """
    records = b"".join(
        [
            struct.pack(
                _RECORD,
                _MAGIC,
                p.type,
                p.subtype,
                p.offset,
                p.size,
                p.label.encode()[:16],
                p.flags,
            )
            for p in partitions
        ]
    )
    # One record for the MD5, one for the terminator.
    if len(records) > TABLE_SIZE - 64:
        raise TableError("%d partitions, at most %d fit" % (len(partitions), TABLE_SIZE // 32 - 2))
    records += _MAGIC_MD5 + b"\xff" * 14 + _md5(records)
    return records + b"\xff" * (TABLE_SIZE - len(records))


def find(partitions, type, subtype):
    """Return the first partition of that type and subtype, or None."""
    for p in partitions:
        if p.type == type and p.subtype == subtype:
            return p
    return None


def ota_slots(partitions):
    """Return [ota_0, ota_1, ...] as the application counts them: up to the first gap."""
    slots = []
    while len(slots) < 16:
        p = find(partitions, TYPE_APP, APP_OTA_0 + len(slots))
        if p is None:
            break
        slots.append(p)
    return slots


def _partition(record):
    _, type_, subtype, offset, size, label, flags = struct.unpack(_RECORD, record)
    label = label.split(b"\0")[0]
    try:
        label = label.decode()
    except UnicodeError:
        label = "".join([chr(b) if b < 128 else "?" for b in label])
    return Partition(label, type_, subtype, offset, size, flags)


def _md5(data):
    return hashlib.md5(bytes(data)).digest()
