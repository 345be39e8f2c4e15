"""What tests of the device package work with: images, otadata, an esp32.Partition that tells.

The board of these tests runs ota_0; ota_1 is theirs. Nothing here judges anything.
"""

import binascii
import hashlib
import struct

from esp32 import NVS, Partition

from twinslot import journal, release
from twinslot.slot import PIECE

NEW, PENDING, VALID, INVALID, ABORTED = 0, 1, 2, 3, 4
TORN = 0xFFFFFFF5  # a state that no bootloader watches
BLANK = None
BLOCK = 4096


def make_image(size, version="9.9.9", chip_id=0, seed=1, hash_appended=1):
    """Return an application image of exactly `size` bytes (a multiple of 16): one segment of
    noise behind its descriptor. An ESP32 accepts it, and would run nothing."""
    length = size - 32 - 32 - 1  # header and segment header, digest, checksum
    length -= length % 4
    image = bytearray(size)
    struct.pack_into("<BBBBI", image, 0, 0xE9, 1, 2, 0x2F, 0x40081528)
    struct.pack_into("<H", image, 12, chip_id)
    image[23] = hash_appended
    struct.pack_into("<II", image, 24, 0x3F400020, length)
    for i in range(32 + 256, 32 + length):
        image[i] = (i * 31 + (i >> 8) * 7 + seed) & 0xFF
    struct.pack_into("<I", image, 32, 0xABCD5432)
    image[48 : 48 + len(version)] = version.encode()
    checksum = 0xEF
    for i in range(32, 32 + length):
        checksum ^= image[i]
    image[size - 33] = checksum
    image[size - 32 :] = hashlib.sha256(memoryview(image)[: size - 32]).digest()
    return image


def signed(image, build=None, sha256=None, size=None):
    """Return the release.Image that a manifest would describe it by."""
    digest = hashlib.sha256(image).digest()
    return release.Image(
        "firmware",
        image[12] | image[13] << 8 if len(image) > 13 else 0,
        len(image) if size is None else size,
        binascii.hexlify(digest).decode() if sha256 is None else sha256,
        binascii.hexlify(image[-32:]).decode() if build is None else build,
        [],
    )


def pieces(buf):
    """Return a block as ``FirmwareSlot.write`` takes it."""
    view = memoryview(buf)
    return [view[at : at + PIECE] for at in range(0, len(view), PIECE)]


def put(image, label="ota_1", first=0):
    """Write an image into a slot, past everything that guards it, from its first block on."""
    part = Partition(label)
    for offset in range(first * BLOCK, len(image), BLOCK):
        block = bytearray(b"\xff" * BLOCK)
        piece = image[offset : offset + BLOCK]
        block[: len(piece)] = piece
        part.writeblocks(offset // BLOCK, block)


def read(n, offset=0, label="ota_1"):
    """Return n bytes of a slot."""
    buf = bytearray(n)
    Partition(label).readblocks(0, buf, offset)
    return buf


def flip(offset, mask=1, label="ota_1"):
    """Invert bits of a slot: a rotten cell."""
    block = read(BLOCK, offset // BLOCK * BLOCK, label)
    block[offset % BLOCK] ^= mask
    Partition(label).writeblocks(offset // BLOCK, block)


def erase(label="ota_1"):
    """Erase the first blocks of a slot."""
    for block in range(8):
        Partition(label).ioctl(6, block)


def otadata(*entries):
    """Write the two entries: (seq, state), (seq, state, crc), or BLANK."""
    part = Partition.find(1, 0)[0]
    for i in range(2):
        entry = entries[i] if i < len(entries) else BLANK
        part.ioctl(6, i)
        if entry is not BLANK:
            seq, state = entry[:2]
            crc = binascii.crc32(struct.pack("<I", seq), 0xFFFFFFFF) & 0xFFFFFFFF
            part.writeblocks(
                i,
                struct.pack("<I20sII", seq, b"\xff" * 20, state, entry[2] if entry[2:] else crc),
                0,
            )


def states():
    """Return {slot number: state} of the entries with a right CRC, the newer one of a slot."""
    found = {}
    part = Partition.find(1, 0)[0]
    raw = bytearray(32)
    for i in range(2):
        part.readblocks(i, raw)
        seq, state, crc = struct.unpack("<I20xII", raw)
        if crc == binascii.crc32(raw[:4], 0xFFFFFFFF) & 0xFFFFFFFF:
            if seq >= found.get((seq - 1) % 2, (0,))[0]:
                found[(seq - 1) % 2] = (seq, state)
    return {slot: state for slot, (_, state) in found.items()}


def new_journal(**content):
    """Return the board's journal, emptied, with this in it."""
    nvs = NVS("twinslot")
    for key in ("journal", "checkpoint", "log", "starts", "fetch", "spare", "probe"):
        try:
            nvs.erase_key(key)
        except OSError:
            pass
    journal._shared = None
    fresh = journal.Journal.shared()
    fresh.update(**content)
    return fresh


class Spy:
    """esp32.Partition, with a log of what is erased and written, and orders to fail.

    log: ("erase", block), ("write", offset, length), ("set_boot", label), ("confirm",).
        Writes that follow each other without a gap are one.
    fail: {"write": offset}, {"read": offset}, {"erase": block}: OSError there, in app slots.
        {"lost": offset}: what is written there does not arrive, and nobody says so.
    """

    BOOT = Partition.BOOT
    RUNNING = Partition.RUNNING
    TYPE_APP = Partition.TYPE_APP
    TYPE_DATA = Partition.TYPE_DATA
    log = []
    fail = {}

    def __init__(self, id):
        self._part = Partition(id) if isinstance(id, (int, str)) else id

    @classmethod
    def reset(cls, **fail):
        cls.log.clear()
        cls.fail.clear()
        cls.fail.update(fail)

    @classmethod
    def erases(cls):
        return [entry[1] for entry in cls.log if entry[0] == "erase"]

    @classmethod
    def writes(cls):
        return [entry[1] for entry in cls.log if entry[0] == "write"]

    @staticmethod
    def find(type=0, subtype=0xFF, label=None, block_size=BLOCK):
        return [Spy(p) for p in Partition.find(type, subtype, label, block_size)]

    @staticmethod
    def mark_app_valid_cancel_rollback():
        Spy.log.append(("confirm",))
        Partition.mark_app_valid_cancel_rollback()

    def _order(self, what, where):
        if self.info()[0] == self.TYPE_APP and self.fail.get(what) == where:
            raise OSError(-24577, "ESP_ERR_FLASH_OP_FAIL")

    def info(self):
        return self._part.info()

    def get_next_update(self):
        return Spy(self._part.get_next_update())

    def readblocks(self, block, buf, offset=0):
        self._order("read", block * BLOCK + offset)
        self._part.readblocks(block, buf, offset)

    def writeblocks(self, block, buf, offset=None):
        if offset is None:
            self._order("erase", block)
            self.log.append(("erase", block))
        at = block * BLOCK + (offset or 0)
        self._order("write", at)
        before = self.log[-1] if self.log else ("",)
        if before[0] == "write" and sum(before[1:]) == at:
            self.log[-1] = ("write", before[1], before[2] + len(buf))
        else:
            self.log.append(("write", at, len(buf)))
        if self.fail.get("lost") == at:
            return
        if offset is None:
            self._part.writeblocks(block, buf)
        else:
            self._part.writeblocks(block, buf, offset)

    def ioctl(self, op, arg):
        if op == 6:
            self._order("erase", arg)
            self.log.append(("erase", arg))
        return self._part.ioctl(op, arg)

    def set_boot(self):
        self.log.append(("set_boot", self.info()[4]))
        self._part.set_boot()
