"""The `esp32` module of the virtual board: Partition, NVS and the few functions an agent uses.

Semantics, limits and error numbers follow the C code, odd ones included. Not there: RMT, ULP,
PCNT, hall and temperature sensors.

Source: MicroPython ports/esp32/esp32_partition.c, esp32_nvs.c, mphalport.c (errors); ESP-IDF
esp_partition/partition_target.c, app_update/esp_ota_ops.c.
"""

import errno

import image
import micropython
import nvs as _nvs
import otadata
import soc
import table

HEAP_DATA = 4
HEAP_EXEC = 1
WAKEUP_ALL_LOW = False
WAKEUP_ANY_HIGH = True

_SECTOR = 4096

_NAMES = {
    -1: "ESP_FAIL",
    0x102: "ESP_ERR_INVALID_ARG",
    0x104: "ESP_ERR_INVALID_SIZE",
    0x105: "ESP_ERR_NOT_FOUND",
    0x10D: "ESP_ERR_NOT_ALLOWED",
    0x1101: "ESP_ERR_NVS_NOT_INITIALIZED",
    0x1102: "ESP_ERR_NVS_NOT_FOUND",
    0x1105: "ESP_ERR_NVS_NOT_ENOUGH_SPACE",
    0x1109: "ESP_ERR_NVS_KEY_TOO_LONG",
    0x110C: "ESP_ERR_NVS_INVALID_LENGTH",
    0x110E: "ESP_ERR_NVS_VALUE_TOO_LONG",
    0x1503: "ESP_ERR_OTA_VALIDATE_FAILED",
}


def _error(code):
    return OSError(-code, _NAMES.get(code, "UNKNOWN ERROR"))


def _found(part):
    if part is None:
        raise OSError(errno.ENOENT)
    return part


def _unlock_heap():
    """Undo heap_lock() for a call that allocates nothing on a board; return its depth."""
    micropython.heap_lock()
    depth = micropython.heap_unlock()
    for _ in range(depth):
        micropython.heap_unlock()
    return depth


def _lock_heap(depth):
    for _ in range(depth):
        micropython.heap_lock()


def _otadata():
    """The otadata partition. Raises OSError(-261) without one."""
    part = table.find(soc.partitions, table.TYPE_DATA, table.DATA_OTA)
    if part is None:
        raise _error(0x105)
    return part


def _boot_partition():
    """What esp_ota_get_boot_partition() names, or None."""
    part = table.find(soc.partitions, table.TYPE_DATA, table.DATA_OTA)
    if part is None:
        return None
    slots = table.ota_slots(soc.partitions)
    number = otadata.boot_slot(otadata.read_entries(soc.flash.read, part.offset), len(slots))
    if number is not None:
        return slots[number]
    factory = table.find(soc.partitions, table.TYPE_APP, table.APP_FACTORY)
    test = table.find(soc.partitions, table.TYPE_APP, table.APP_TEST)
    return factory or (slots[0] if slots else test)


def _rewrite(part, index, entry):
    """Write an otadata entry: erase its sector, then program 32 bytes. Two flash operations."""
    at = part.offset + index * otadata.SECTOR
    soc.flash.erase(at, otadata.SECTOR)
    soc.flash.program(at, otadata.pack(entry))


class Partition:
    """See MicroPython's documentation of esp32.Partition; a block device of the extended kind."""

    BOOT = 0
    RUNNING = 1
    TYPE_APP = 0
    TYPE_DATA = 1

    def __init__(self, id, block_size=_SECTOR):
        if isinstance(id, table.Partition):  # the other constructor, C code's own
            part = id
        elif isinstance(id, int):
            if id == self.BOOT:
                part = _boot_partition()
            elif id == self.RUNNING:
                part = soc.running
            else:
                raise ValueError
        elif isinstance(id, str):
            found = soc.find(table.TYPE_APP, label=id) or soc.find(table.TYPE_DATA, label=id)
            part = found[0] if found else None
        else:
            raise TypeError("can't convert %s to str" % type(id).__name__)
        self._part = _found(part)
        self._start = self._part.offset
        self._size = self._part.size
        self._block = block_size & 0xFFFF  # a uint16_t in C
        self._cache = bytearray(_SECTOR) if self._block < _SECTOR else None

    @staticmethod
    def find(type=TYPE_APP, subtype=0xFF, label=None, block_size=_SECTOR):
        return [Partition(p, block_size) for p in soc.find(type, subtype, label)]

    def __repr__(self):
        p = self._part
        return "<Partition type=%d, subtype=%d, address=%d, size=%d, label=%s, encrypted=%d>" % (
            p.type,
            p.subtype,
            p.offset,
            p.size,
            p.label,
            p.flags & table.FLAG_ENCRYPTED,
        )

    def info(self):
        p = self._part
        encrypted = bool(p.flags & table.FLAG_ENCRYPTED)
        return p.type, p.subtype, p.offset, p.size, p.label, encrypted

    def readblocks(self, block, buf, offset=0):
        locks = _unlock_heap()
        try:
            at = (block * self._block + offset) & 0xFFFFFFFF
            size = len(buf)
            self._check(at, size)
            soc.flash.read(self._start + at, buf)
        finally:
            _lock_heap(locks)

    def writeblocks(self, block, buf, offset=None):
        locks = _unlock_heap()
        try:
            self._write(block, buf, offset)
        finally:
            _lock_heap(locks)

    def _write(self, block, buf, offset):
        at = block * self._block & 0xFFFFFFFF
        if isinstance(buf, str):
            buf = buf.encode()
        if offset is not None:
            at = (at + offset) & 0xFFFFFFFF
        elif self._block >= _SECTOR:
            self._erase(at, len(buf))
        else:
            self._erase_around(at, len(buf))
        self._program(at, buf)

    def ioctl(self, op, arg=0):
        if op in (1, 2, 3):
            return 0
        if op == 4:
            return self._size // self._block
        if op == 5:
            return self._block
        if op == 6:
            if self._block != _SECTOR:
                return -22
            self._erase(arg * _SECTOR & 0xFFFFFFFF, _SECTOR)
            return 0
        return None

    def set_boot(self):
        part = self._part
        try:
            soc.verify(part)
        except image.ImageError as e:
            print("E esp_image: %s" % e)
            raise _error(0x1503)
        where = _otadata()
        if part.type == table.TYPE_APP and part.subtype == table.APP_FACTORY:
            soc.flash.erase(where.offset, where.size)
            return
        slots = table.ota_slots(soc.partitions)
        if part.type != table.TYPE_APP or not 0 <= part.subtype - table.APP_OTA_0 < len(slots):
            raise _error(0x102)
        entries = otadata.read_entries(soc.flash.read, where.offset)
        number = part.subtype - table.APP_OTA_0
        _rewrite(where, *otadata.next_entry(entries, number, len(slots), soc.config["idf6"]))

    @classmethod
    def mark_app_valid_cancel_rollback(cls):
        where = _otadata()
        entries = otadata.read_entries(soc.flash.read, where.offset)
        try:
            change = otadata.confirm_entry(entries, len(table.ota_slots(soc.partitions)))
        except otadata.OtadataError:
            raise _error(-1)
        if change is not None:
            _rewrite(where, *change)

    def get_next_update(self):
        slots = table.ota_slots(soc.partitions)
        if not slots:
            raise OSError(errno.ENOENT)
        number = slots.index(self._part) + 1 if self._part in slots else 0
        return Partition(slots[number % len(slots)])

    def _check(self, at, size):
        if at > self._size:
            raise _error(0x102)
        if at + size > self._size:
            raise _error(0x104)

    def _check_change(self, at, size):
        if self._part.flags & table.FLAG_READONLY:
            raise _error(0x10D)
        self._check(at, size)

    def _erase(self, at, size):
        self._check_change(at, size)
        if size % _SECTOR:
            raise _error(0x104)
        if at % _SECTOR:
            raise _error(0x102)
        soc.check_write(self._start + at, size)
        soc.flash.erase(self._start + at, size)

    def _program(self, at, buf):
        size = len(buf)
        self._check_change(at, size)
        soc.check_write(self._start + at, size)
        soc.flash.program(self._start + at, buf)

    def _erase_around(self, at, size):
        """Erase for a write with small blocks: sector by sector, with the neighbours put back."""
        cache = memoryview(self._cache)
        end = at + size
        sector = at // _SECTOR * _SECTOR
        head = at - sector
        while sector < end:
            tail = max(0, sector + _SECTOR - end)
            if head or tail:
                self._check(sector, _SECTOR)
                soc.flash.read(self._start + sector, self._cache)
            self._erase(sector, _SECTOR)
            if head:
                self._program(sector, cache[:head])
            if tail:
                self._program(end, cache[_SECTOR - tail :])
            head = 0
            sector += _SECTOR


# ---- NVS

_storage = None


def _start_nvs():
    """NVS init of main.c. Called once, before any user code."""
    global _storage
    part = table.find(soc.partitions, table.TYPE_DATA, table.DATA_NVS)
    if part is not None:
        _storage = _nvs.open_or_erase(soc.flash, part.offset, part.size)


class NVS:
    """See MicroPython's documentation of esp32.NVS. Every set reaches flash before it returns."""

    def __init__(self, namespace):
        if _storage is None:
            raise _error(0x1101)
        self._ns = self._call(_storage.open, namespace)

    @staticmethod
    def _call(function, *args):
        try:
            return function(*args)
        except _nvs.NvsError as e:
            raise _error(e.code)

    def set_i32(self, key, value):
        if not -0x80000000 <= value <= 0x7FFFFFFF:
            raise OverflowError("overflow converting long int to machine word")
        self._call(_storage.set_i32, self._ns, key, value)

    def get_i32(self, key):
        return self._call(_storage.get_i32, self._ns, key)

    def set_blob(self, key, value):
        self._call(_storage.set_blob, self._ns, key, value)

    def get_blob(self, key, buffer):
        return self._call(_storage.read_blob, self._ns, key, memoryview(buffer))

    def erase_key(self, key):
        self._call(_storage.erase_key, self._ns, key)

    def commit(self):
        """A no-op in ESP-IDF too."""


# ---- the rest


def idf_heap_info(capabilities):
    """(total, free, largest, lowest free) of each region of the IDF heap; figures of a typical
    board after Wi-Fi is up, or `idf_heap` of the board's configuration."""
    if capabilities == HEAP_DATA:
        regions = soc.config["idf_heap"]
    else:
        regions = [(15072, 4324, 4096, 4324)]
    return [tuple(r) for r in regions]


def wake_on_ext0(pin=None, level=None):
    pass


def wake_on_ext1(pins=None, level=None):
    pass


def wake_on_touch(wake):
    pass


def gpio_deep_sleep_hold(enable):
    pass
