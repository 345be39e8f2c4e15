"""The two otadata entries: which slot boots, and whether it is on trial.

Pure arithmetic on entries; reading and writing flash is the caller's. Each entry owns a sector
(entry 0 at otadata + 0, entry 1 at otadata + 0x1000) and is always rewritten as erase, then write:
two flash operations between which the power may fail.

    offset  size  field (little-endian, struct "<I20sII")
    0       4     seq    1-based counter; 0xFFFFFFFF = empty
    4       20    label  unused, left 0xFF
    24      4     state
    28      4     crc    CRC-32 of seq alone (state is not covered)

Source: ESP-IDF bootloader_common_loader.c (predicates), app_update/esp_ota_ops.c (the rest).
"""

import struct
from binascii import crc32
from collections import namedtuple

SIZE = 32
SECTOR = 4096

NEW = 0
PENDING_VERIFY = 1
VALID = 2
INVALID = 3
ABORTED = 4
UNDEFINED = 0xFFFFFFFF

STATES = {
    NEW: "NEW",
    PENDING_VERIFY: "PENDING_VERIFY",
    VALID: "VALID",
    INVALID: "INVALID",
    ABORTED: "ABORTED",
    UNDEFINED: "UNDEFINED",
}

_EMPTY = 0xFFFFFFFF
BLANK_LABEL = b"\xff" * 20

# seq int, label 20 bytes, state int, crc int (as stored)
Entry = namedtuple("Entry", ("seq", "label", "state", "crc"))


class OtadataError(Exception):
    """No entry is active, or no sequence number leads to the slot."""


def crc(seq):
    """CRC of an entry: esp_rom_crc32_le with start value 0xFFFFFFFF over the 4 bytes of seq."""
    return crc32(struct.pack("<I", seq), 0xFFFFFFFF) & 0xFFFFFFFF


def entry(seq, state, label=BLANK_LABEL):
    """Return an Entry with the right CRC."""
    return Entry(seq, label, state, crc(seq))


def pack(e):
    """Return the 32 bytes of an entry."""
    return struct.pack("<I20sII", e.seq, e.label, e.state, e.crc)


def unpack(data):
    """Read an Entry from 32 bytes (or more)."""
    return Entry(*struct.unpack_from("<I20sII", data))


def read_entries(read, offset):
    """Return [entry 0, entry 1]; `read(offset, buf)` fills buf, `offset` is otadata's in flash."""
    entries = []
    buf = bytearray(SIZE)
    for i in range(2):
        read(offset + i * SECTOR, buf)
        entries.append(unpack(buf))
    return entries


def state_name(state):
    """Name of a state as IDF spells it; an undocumented value (a torn write) comes back as hex."""
    return STATES.get(state) or "0x%08x" % state


def crc_ok(e):
    return e.crc == crc(e.seq)


def is_invalid(e):
    """Empty, or given up. The CRC is not consulted."""
    return e.seq == _EMPTY or e.state in (INVALID, ABORTED)


def is_valid(e):
    """Counts for choosing the slot: any other state with a right CRC, unknown ones included."""
    return not is_invalid(e) and crc_ok(e)


def active(entries):
    """Return the index of the entry that counts: larger seq, 0 on a tie; -1 if none is valid."""
    first, second = is_valid(entries[0]), is_valid(entries[1])
    if first and second:
        return 0 if entries[0].seq >= entries[1].seq else 1
    return 0 if first else 1 if second else -1


def slot(seq, n):
    """Slot number of a sequence number, with n OTA slots (32-bit arithmetic: seq 0 is defined)."""
    return ((seq - 1) & 0xFFFFFFFF) % n


def boot_slot(entries, n):
    """Slot that esp_ota_get_boot_partition() names, or None: then factory, else ota_0, else test.

    It doesn't look at images, so it may name one that the bootloader refuses.
    """
    if n == 0 or (is_invalid(entries[0]) and is_invalid(entries[1])):
        return None
    i = active(entries)
    return None if i < 0 else slot(entries[i].seq, n)


def slot_state(entries, target, n):
    """State of a slot as esp_ota_get_state_partition(): the first entry with that slot and a right
    CRC. None where IDF answers ESP_ERR_NOT_FOUND."""
    for e in entries:
        if n and slot(e.seq, n) == target and crc_ok(e):
            return e.state
    return None


def next_entry(entries, target, n, idf6=False):
    """What esp_ota_set_boot_partition() writes to activate slot `target` of n.

    In IDF 5 activating the slot that is active already takes the same seq into the other sector,
    which destroys the record of the other slot; IDF 6 (idf6=True) rewrites the entry in place.

    Returns:
        (index of the entry to erase and write, Entry), state NEW.
    Raises:
        ValueError: target is not below n.
        OtadataError: near 2**32, where the C loop would never end.
    """
    if not 0 <= target < n:
        raise ValueError("slot %d of %d" % (target, n))
    i = active(entries)
    if i < 0:
        return 0, entry(target + 1, NEW, entries[0].label)
    seq = entries[i].seq
    if idf6 and slot(seq, n) == target:
        return i, entry(seq, NEW, entries[i].label)
    return 1 - i, entry(_next_seq(seq, target, n), NEW, entries[1 - i].label)


def _next_seq(seq, target, n):
    """The first of r, r + n, r + 2n ... (r = (target + 1) % n, in 32 bits) not below seq."""
    start = (target + 1) % n
    for _ in range(n):
        new = start + max(0, -(-(seq - start) // n)) * n
        if new <= 0xFFFFFFFF:
            return new
        start = new - 0x100000000
    raise OtadataError("seq 0x%08x: no following number leads to slot %d of %d" % (seq, target, n))


def confirm_entry(entries, n):
    """What esp_ota_mark_app_valid_cancel_rollback() writes: it confirms the *active* entry,
    whichever slot runs.

    Returns:
        (index, Entry) to erase and write, or None if the active entry is VALID already.
    Raises:
        OtadataError: no entry is active, or there are no OTA slots (IDF: ESP_FAIL).
    """
    i = active(entries) if n else -1
    if i < 0:
        raise OtadataError("no active otadata entry")
    e = entries[i]
    return None if e.state == VALID else (i, entry(e.seq, VALID, e.label))
