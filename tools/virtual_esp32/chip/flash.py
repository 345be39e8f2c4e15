"""NOR flash over a host file: erase sets bits, program clears them, power may fail in between.

Runs under MicroPython (inside the virtual chip) and CPython (bootloader model, tests), with the
same results. It knows nothing of partitions; protecting the running slot is the caller's matter.

    flash = Flash(open("flash.bin", "r+b", buffering=0), 4 << 20, stats=Stats(stats_file, 4 << 20))
    flash.erase(0x10000, 0x10000)
    flash.program(0x10000, b"\\xe9...")

An **operation** is one command to the flash chip: the erase of a 4 KiB sector or of a 64 KiB
block, or the program of up to 256 bytes within one page. Operations are numbered from 1; the
number runs on over boots as long as the same `Stats` file is used. An operation is counted when it
begins, so a process killed at any moment loses no count.

Source: ESP-IDF components/spi_flash (esp_flash_api.c: 64 KiB erase when aligned and enough
remains; programs split at pages), Winbond W25Q128JV data sheet (times), and the vendors' remarks
on interrupted commands, which the torn shapes stand for.
"""

import hashlib
import io
import struct
import sys
from array import array
from collections import namedtuple

SECTOR = 4096
BLOCK = 65536
PAGE = 256

# Typical times of the Winbond W25Q128JV, microseconds. Reads are not modelled, and a program of
# less than a page costs as much as a full one.
ERASE_SECTOR_US = 45000
ERASE_BLOCK_US = 150000
PROGRAM_PAGE_US = 400

TRACED_ERASE = 1 << 31

_BLANK = b"\xff" * SECTOR


class FlashError(Exception):
    """A use of flash that no driver would make: out of range, unaligned, or 0 -> 1 (strict)."""


class PowerCut(Exception):
    """The power failed here. Every later access of the same `Flash` raises it again."""


# Where the power fails.
#   op     number of the operation (1 = the first since the stats file was new)
#   mode   "before": not begun; "after": carried out, but nobody hears of it; "torn": in the middle
#   shape  for "torn": a name of SHAPES, or None to let the seed choose
#   seed   int. With an explicit "prefix" or "suffix" the number of finished bytes is
#          seed % (length + 1), so that a loop over seeds meets every length.
Fault = namedtuple("Fault", ("op", "mode", "shape", "seed"))

MODES = ("before", "torn", "after")
# What an interrupted command leaves: nothing happened, all of it happened, the first bytes, the
# last bytes (some parts go downwards), or any subset of the bits that were to change.
SHAPES = ("untouched", "done", "prefix", "suffix", "bits")


if sys.implementation.name == "micropython":
    import micropython

    @micropython.viper
    def _and_into(old, new, n: int) -> int:
        o = ptr8(old)  # noqa: F821
        w = ptr8(new)  # noqa: F821
        bad = -1
        for i in range(n):
            keep = o[i] & w[i]
            if keep != w[i]:
                if bad < 0:
                    bad = i
            o[i] = keep
        return bad

else:

    def _and_into(old, new, n):
        """Program: clear in `old` the bits that are 0 in `new`. Return the index of the first
        byte with a bit that would have to rise from 0 to 1, or -1."""
        before = int.from_bytes(old, "little")
        wanted = int.from_bytes(new, "little")
        old[:] = (before & wanted).to_bytes(n, "little")
        rising = wanted & ~before
        return ((rising & -rising).bit_length() - 1) // 8 if rising else -1


def _noise(seed, label, n):
    """n pseudo-random bytes, the same on every Python."""
    out = b""
    i = 0
    while len(out) < n:
        out += hashlib.sha256(b"%d %s %d" % (seed, label, i)).digest()
        i += 1
    return out[:n]


def torn(old, new, shape, seed):
    """Return what flash holds after the change of `old` into `new` was interrupted.

    Args:
        old, new: bytes of equal length.
        shape: a name of SHAPES, or None for one chosen by the seed.
        seed: int, see `Fault`.
    """
    n = len(old)
    count = seed % (n + 1)
    if shape is None:
        dice = _noise(seed, b"shape", 8)
        shape = SHAPES[dice[0] % len(SHAPES)]
        count = struct.unpack("<I", dice[4:])[0] % (n + 1)
    if shape == "untouched":
        return bytes(old)
    if shape == "done":
        return bytes(new)
    if shape == "prefix":
        return bytes(new[:count]) + bytes(old[count:])
    if shape == "suffix":
        return bytes(old[: n - count]) + bytes(new[n - count :])
    if shape == "bits":
        # A bit changes with probability 1/2, 3/4 ... 63/64: from "half done" to "all but a few".
        out = bytearray(n)
        masks = [
            _noise(seed, b"bits%d" % i, n) for i in range(1 + _noise(seed, b"level", 1)[0] % 6)
        ]
        for i in range(n):
            mask = 0
            for m in masks:
                mask |= m[i]
            out[i] = old[i] ^ ((old[i] ^ new[i]) & mask)
        return bytes(out)
    raise ValueError("unknown torn shape %r, expected one of %s" % (shape, ", ".join(SHAPES)))


class Stats:
    """Counters in a small file that the chip and its parent share (one writer at a time).

    Layout, little-endian:

        offset  size  what
        0       8     magic "TWFLASH1"
        8       8     flash size, bytes
        16      8     ops: operations begun (commands, see the module's text)
        24      8     sector_erases: 4 KiB erase commands
        32      8     block_erases: 64 KiB erase commands
        40      8     page_programs
        48      8     bytes_programmed
        56      8     reads: calls of read()
        64      8     bytes_read
        72      8     busy_us: modelled time spent erasing and programming
        80      48    zero
        128     4*n   erases of each of the n 4 KiB sectors (a block erase counts for its 16)

    Args:
        file: open binary file, read and write, unbuffered; it is filled in if it is empty.
            None: count in memory only. A file opened for reading alone serves to look.
        flash_size: bytes, a multiple of 4096; None takes what the file says.
    Raises:
        FlashError: the file is another kind of file, or of another flash size.
    """

    FIELDS = (
        "ops",
        "sector_erases",
        "block_erases",
        "page_programs",
        "bytes_programmed",
        "reads",
        "bytes_read",
        "busy_us",
    )
    _MAGIC = b"TWFLASH1"
    _HEADER = 128

    def __init__(self, file, flash_size=None):
        self._file = io.BytesIO() if file is None else file
        # 8 bytes each here; with "Q" MicroPython would make a big integer of every item it reads.
        self.head = array("L" if sys.maxsize > 1 << 32 else "Q", [0] * 16)
        self._four = bytearray(64)
        self._file.seek(0)
        if self._file.readinto(self.head) == 0:
            if not flash_size:
                raise FlashError("empty stats file, and no flash size to fill it in with")
            self._file.write(self._MAGIC + struct.pack("<Q", flash_size) + bytes(112))
            left = flash_size // SECTOR * 4
            while left:
                left -= self._file.write(bytes(min(left, SECTOR)))
            self.reload()
        magic = struct.pack("<Q", self.head[0])
        if magic != self._MAGIC or (flash_size and self.head[1] != flash_size):
            raise FlashError(
                "stats file: saw %r for %d bytes of flash, expected %r for %s"
                % (magic, self.head[1], self._MAGIC, flash_size or "any")
            )
        self.flash_size = self.head[1]

    def reload(self):
        """Read the counters again, after another process wrote them."""
        self._file.seek(0)
        self._file.readinto(self.head)

    def as_dict(self):
        """Return {name: value} of all FIELDS."""
        return {name: self.head[2 + i] for i, name in enumerate(self.FIELDS)}

    @property
    def ops(self):
        """Operations begun so far; the next one has the number ops + 1."""
        return self.head[2]

    def erases(self):
        """Return an array of the erase count of every 4 KiB sector."""
        counts = array("I", [0] * (self.flash_size // SECTOR))
        self._file.seek(self._HEADER)
        self._file.readinto(counts)
        return counts

    def save(self):
        """Write the counters down."""
        self._file.seek(0)
        self._file.write(self.head)

    def _erased(self, sector, n):
        buf = memoryview(self._four)[: 4 * n]
        at = self._HEADER + 4 * sector
        self._file.seek(at)
        self._file.readinto(buf)
        for i in range(n):
            struct.pack_into("<I", buf, 4 * i, struct.unpack_from("<I", buf, 4 * i)[0] + 1)
        self._file.seek(at)
        self._file.write(buf)

    def count_erase(self, offset, size):
        head = self.head
        head[2] += 1
        block = size == BLOCK
        head[4 if block else 3] += 1
        head[9] += ERASE_BLOCK_US if block else ERASE_SECTOR_US
        self.save()
        self._erased(offset // SECTOR, size // SECTOR)

    def count_program(self, size, pages=1):
        head = self.head
        head[2] += pages
        head[5] += pages
        head[6] += size
        head[9] += PROGRAM_PAGE_US * pages
        self.save()

    def count_read(self, size):
        """Count a read. The file hears of it at the next operation, or by `save`."""
        self.head[7] += 1
        self.head[8] += size


class Flash:
    """One flash chip.

    Args:
        file: open binary host file of exactly `size` bytes, read and write, unbuffered
            (`buffering=0` in CPython), so that a killed process has lost no write. A file opened
            for reading alone serves to look.
        size: bytes.
        stats: a `Stats`, or None to count in memory.
        strict: True: programming a 1 over a 0 raises FlashError; False: it ANDs, as the part does.
        fault: a `Fault`, or None.
        trace: open binary file, or None. Every erase and program is appended to it before it is
            carried out: offset and length as u32, little-endian, bit 31 of the length set for an
            erase command, then the bytes that a program was given (up to a sector).
        unsteady: open binary file, read and write, unbuffered, or None: cells that were erased or
            programmed in part, so that each read of them gives another answer until an erase, or
            a program of 0, is carried out to the end. As `unsteady_cells` packs them.
    """

    def __init__(
        self, file, size, *, stats=None, strict=True, fault=None, trace=None, unsteady=None
    ):
        found = file.seek(0, 2)
        if found != size or size % SECTOR:
            raise FlashError(
                "flash file has %d bytes, expected %d (sectors of 4096)" % (found, size)
            )
        if fault is not None and (
            fault.mode not in MODES or fault.shape not in SHAPES + (None,) or fault.op < 1
        ):
            raise FlashError("bad fault plan %r" % (fault,))
        self.size = size
        self.stats = stats or Stats(None, size)
        self.strict = strict
        self.fault = fault
        self.trace = trace
        self._unsteady = unsteady
        self._cells = _unpack_cells(unsteady)
        self.dead = False
        # Called once with no arguments when the power fails, before PowerCut is raised: C code
        # between us and the caller (littlefs) would turn the exception into an I/O error.
        self.on_cut = None
        self._file = file
        self._page = bytearray(PAGE)
        self._sector = bytearray(SECTOR)

    def read(self, offset, buf):
        """Fill `buf` (bytearray or writable memoryview of bytes) from `offset`, any alignment.

        Raises: FlashError out of range; PowerCut.
        """
        self._check("read", offset, len(buf))
        self.stats.count_read(len(buf))
        self._file.seek(offset)
        self._file.readinto(buf)
        for at, mask in self._cells:
            begin, end = max(at, offset), min(at + len(mask), offset + len(buf))
            if begin < end:
                noise = _noise(self.stats.head[7] + at, b"read", end - begin)
                for i in range(begin, end):
                    buf[i - offset] ^= noise[i - begin] & mask[i - at]

    def program(self, offset, buf):
        """Clear bits: flash becomes flash AND buf, page by page. Any offset and length.

        Raises: FlashError out of range, or (strict) on a bit that would rise; PowerCut.
        """
        size = len(buf)
        self._check("program", offset, size)
        view = memoryview(buf)
        done = 0
        while done < size:
            n = min(SECTOR - (offset + done) % SECTOR, size - done)
            piece = buf if n == size else view[done : done + n]
            if self.trace is not None:
                self.trace.write(struct.pack("<II", offset + done, n))
                self.trace.write(piece)
            if not self._program_at_once(offset + done, piece, n):
                self._program_pages(offset + done, memoryview(piece), n)
            if self._cells:
                self._make_firm(offset + done, n, piece)
            done += n

    def _program_at_once(self, at, new, n):
        """Program all pages of one sector in one go; False if a cut or an error lies in there.

        The result is that of page by page, for a tenth of the garbage in the chip's heap.
        """
        pages = (at + n - 1) // PAGE - at // PAGE + 1
        ops = self.stats.ops
        if self.fault is not None and ops < self.fault.op <= ops + pages:
            return False
        old = self._sector if n == SECTOR else memoryview(self._sector)[:n]
        self._file.seek(at)
        self._file.readinto(old)
        if _and_into(old, new, n) >= 0 and self.strict:
            return False
        self.stats.count_program(n, pages)
        self._file.seek(at)
        self._file.write(old)
        return True

    def _program_pages(self, offset, view, size):
        done = 0
        while done < size:
            n = min(PAGE - (offset + done) % PAGE, size - done)
            self._program_page(offset + done, view[done : done + n], n)
            done += n

    def erase(self, offset, size):
        """Set whole sectors to 0xFF, with 64 KiB commands where aligned and enough remains.

        Raises: FlashError out of range or unaligned; PowerCut.
        """
        self._check("erase", offset, size)
        if offset % SECTOR or size % SECTOR:
            raise FlashError(
                "erase of 0x%x bytes at 0x%x: not in sectors of 4096" % (size, offset)
            )
        end = offset + size
        while offset < end:
            n = BLOCK if offset % BLOCK == 0 and end - offset >= BLOCK else SECTOR
            if self.trace is not None:
                self.trace.write(struct.pack("<II", offset, n | TRACED_ERASE))
            self.stats.count_erase(offset, n)
            if self.fault is not None and self.stats.ops == self.fault.op:
                self._cut(offset, n, None)
            self._file.seek(offset)
            for _ in range(n // SECTOR):
                self._file.write(_BLANK)
            if self._cells:
                self._make_firm(offset, n, None)
            offset += n

    def _make_firm(self, offset, n, new):
        """What is erased (`new` is None) or programmed to 0 reads as it should from now on."""
        for at, mask in self._cells:
            for i in range(max(at, offset), min(at + len(mask), offset + n)):
                mask[i - at] &= 0 if new is None else new[i - offset]
        self._unsteady.seek(0)
        self._unsteady.write(b"".join(unsteady_cells(at, mask) for at, mask in self._cells))

    def _check(self, what, offset, size):
        if self.dead:
            raise PowerCut("no power")
        if offset < 0 or offset + size > self.size:
            raise FlashError(
                "%s of 0x%x bytes at 0x%x: flash has 0x%x" % (what, size, offset, self.size)
            )

    def _program_page(self, at, new, n):
        self.stats.count_program(n)
        if self.fault is not None and self.stats.ops == self.fault.op:
            self._cut(at, n, new)
        old = self._page if n == PAGE else memoryview(self._page)[:n]
        self._file.seek(at)
        self._file.readinto(old)
        if old != (_BLANK_PAGE if n == PAGE else _BLANK_PAGE[:n]):
            new = self._cleared(at, old, new, n)
        self._file.seek(at)
        self._file.write(new)

    def _cleared(self, at, old, new, n):
        was = bytes(old) if self.strict else b""
        bad = _and_into(old, new, n)
        if bad >= 0 and self.strict:
            raise FlashError(
                "program at 0x%x: holds 0x%02x, can't become 0x%02x without an erase"
                % (at + bad, was[bad], new[bad])
            )
        return old

    def _cut(self, at, n, new):
        """Leave what the plan says of this operation, then die. `new` is None for an erase."""
        old = bytearray(n)
        self._file.seek(at)
        self._file.readinto(old)
        before = bytes(old)
        if new is None:
            after = b"\xff" * n
        else:
            _and_into(old, new, n)
            after = bytes(old)
        fault = self.fault
        shape = {"before": "untouched", "after": "done"}.get(fault.mode, fault.shape)
        self._file.seek(at)
        self._file.write(torn(before, after, shape, fault.seed))
        self.dead = True
        if self.on_cut:
            self.on_cut()
        raise PowerCut("power cut at operation %d (0x%x)" % (fault.op, at))


_BLANK_PAGE = _BLANK[:PAGE]


def unsteady_cells(offset, mask):
    """Pack cells for `Flash(unsteady=)`; several may follow each other.

    Args:
        offset: of the first byte.
        mask: bytes; a 1 bit is one whose reads differ.
    """
    return struct.pack("<II", offset, len(mask)) + bytes(mask)


def _unpack_cells(file):
    """Return [(offset, mask)] of a file of unsteady cells, or of None."""
    found, raw = [], file.read() if file else b""
    while raw:
        at, n = struct.unpack_from("<II", raw, 0)
        found.append((at, bytearray(raw[8 : 8 + n])))
        raw = raw[8 + n :]
    return found


def flip_bits(file, offset, mask):
    """Invert bits in a flash file from outside, against all NOR rules: a rotten cell.

    Args:
        file: open binary host file, read and write.
        offset: of the first byte.
        mask: bytes; a 1 bit inverts that bit of flash.
    """
    file.seek(offset)
    old = file.read(len(mask))
    file.seek(offset)
    file.write(bytes([old[i] ^ mask[i] for i in range(len(mask))]))
