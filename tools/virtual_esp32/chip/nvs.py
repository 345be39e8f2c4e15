"""Non-volatile storage: ESP-IDF's NVS byte format over a NOR flash.

What it is for: the `esp32.NVS` of the virtual board, and reading or writing the
NVS partition of a flash dump on the host. Every set or erase reaches flash
before it returns, in ESP-IDF's order (new entry first, then the old one is
marked erased), so a power cut leaves the old value or the new one.

What it does not do: encryption, the other integer widths on writing, strings,
read-only partitions, and the legacy single-page blob (type 0x41).

Layout of a page (one 4 KiB sector), little-endian:
  0     32 B header: state u32, seq u32, version u8, 19 x FF, crc32 of bytes 4..27
  32    32 B bitmap, 2 bits per entry: 11 empty, 10 written, 00 erased
  64    126 entries of 32 B: ns u8, type u8, span u8, chunk u8, crc32 u32, key[16], data[8]
An entry's crc covers bytes 0..3 and 8..31. A blob is chunks (BLOB_DATA, payload
in the `span - 1` raw entries that follow) and one BLOB_IDX entry written last.

What a power cut leaves is found as ESP-IDF finds it, and no better: of an entry
whose bits in the bitmap were not written any more, it looks at the first word
only. Where that is blank, and the rest is not, the next item is programmed over
it, its CRC is wrong, and it is lost: see `_repair_page` and `_entries`. One
difference: an entry whose two bits read 01 (an erase of a free entry that was
cut) counts as erased here, and ends in an assertion there.

Memory: one 4 KiB buffer. Every look-up reads the flash; nothing is cached but
the order of the pages and the place of the next entry.

Source: ESP-IDF nvs_page.cpp (Page::mLoadEntryTable, findItem, alterEntryRangeState),
nvs_pagemanager.cpp, nvs_storage.cpp (writeItem, cmpMultiPageBlob), nvs_types.hpp.
"""

import struct
from binascii import crc32

try:
    from micropython import const
except ImportError:  # the host

    def const(value):
        return value


SECTOR = const(4096)
ENTRIES = const(126)
ENTRY = const(32)
_FIRST = const(64)  # offset of entry 0 in its page
_BITMAP = const(32)
CHUNK_MAX = const(4000)  # (ENTRIES - 1) * ENTRY
KEY_MAX = const(15)  # characters; the 16th byte is the NUL

_EMPTY = const(3)
_WRITTEN = const(2)
_ERASED = const(0)

_BLANK = const(0xFFFFFFFF)
_ACTIVE = const(0xFFFFFFFE)
_FULL = const(0xFFFFFFFC)
_FREEING = const(0xFFFFFFF8)
_CORRUPT = const(0xFFFFFFF0)
_VERSION = const(0xFE)  # versions count down: a smaller number is newer

U8 = const(0x01)
I32 = const(0x14)
BLOB_DATA = const(0x42)
BLOB_IDX = const(0x48)
ANY = const(0xFF)

ERR_NOT_INITIALIZED = const(0x1101)
ERR_NOT_FOUND = const(0x1102)
ERR_NOT_ENOUGH_SPACE = const(0x1105)
ERR_KEY_TOO_LONG = const(0x1109)
ERR_INVALID_LENGTH = const(0x110C)
ERR_NO_FREE_PAGES = const(0x110D)
ERR_VALUE_TOO_LONG = const(0x110E)
ERR_NEW_VERSION_FOUND = const(0x1110)


class NvsError(Exception):
    """An ESP-IDF error code (positive, as in nvs.h) in `code`."""

    def __init__(self, code, what):
        super().__init__("NVS error 0x%04x: %s" % (code, what))
        self.code = code


def _crc(data, value=_BLANK):
    return crc32(data, value) & _BLANK


def _entry_crc(entry):
    return _crc(entry[8:32], _crc(entry[:4]))


def _key_bytes(key):
    raw = key.encode() if isinstance(key, str) else bytes(key)
    if len(raw) > KEY_MAX:
        raise NvsError(ERR_KEY_TOO_LONG, "key of %d bytes, %d allowed" % (len(raw), KEY_MAX))
    return raw + b"\0" * (16 - len(raw))


def _make_entry(ns, kind, span, chunk, key16, data8):
    entry = bytearray(ENTRY)
    entry[0] = ns
    entry[1] = kind
    entry[2] = span
    entry[3] = chunk
    entry[8:24] = key16
    entry[24:32] = data8
    struct.pack_into("<I", entry, 4, _entry_crc(entry))
    return entry


class Nvs:
    """The NVS partition at `offset` (bytes) of `flash`, `size` bytes long.

    `flash` has read(offset, buf), program(offset, buf) and erase(offset, size).

    Raises: NvsError NO_FREE_PAGES or NEW_VERSION_FOUND when the partition must
    be erased first (see `erase_all` and `open_or_erase`).
    """

    def __init__(self, flash, offset, size):
        self._flash = flash
        self._offset = offset
        self._count = size // SECTOR
        self._page = bytearray(SECTOR)
        self._view = memoryview(self._page)
        self._loaded = -1
        self._used = []  # pages in order of their sequence number; the last one is written to
        self._free = []
        self._next_seq = 0
        self._next = 0  # first free entry of the page that is written to
        self._spoiled = False  # an item went where something was
        self._load_pages()

    # ---- the operations the board has

    def open(self, namespace):
        """Return the index of a namespace, creating it. Names count to 15 characters."""
        raw = namespace.encode() if isinstance(namespace, str) else bytes(namespace)
        names = self.namespaces()
        for name, index in names.items():
            if name.encode() == raw[:KEY_MAX]:
                return index
        for index in range(1, 255):
            if index not in names.values():
                self._write(0, U8, 0xFF, _key_bytes(raw), bytes((index,)) + b"\xff" * 7)
                return index
        raise NvsError(ERR_NOT_ENOUGH_SPACE, "254 namespaces")

    def get_i32(self, ns, key):
        """Return the value. Raises NvsError NOT_FOUND, also for a key of another type."""
        found = self._find(ns, I32, _key_bytes(key), ANY)
        if found is None:
            raise NvsError(ERR_NOT_FOUND, key)
        return struct.unpack_from("<i", self._page, _FIRST + found[1] * ENTRY + 24)[0]

    def set_i32(self, ns, key, value):
        """Store a signed 32-bit integer. Writes nothing if it is there already."""
        key16 = _key_bytes(key)
        data8 = struct.pack("<i", value) + b"\xff" * 4
        found = self._find(ns, I32, key16, ANY)
        if found is not None:
            at = _FIRST + found[1] * ENTRY + 24
            if self._page[at : at + 8] == data8:
                return
        self._erase_others(ns, key16, self._write(ns, I32, 0xFF, key16, data8))

    def get_blob(self, ns, key):
        """Return the stored bytes. Raises NvsError NOT_FOUND."""
        key16 = _key_bytes(key)
        out = bytearray(self._blob(ns, key16, key)[0])
        self.read_blob(ns, key, memoryview(out))
        return bytes(out)

    def read_blob(self, ns, key, buf):
        """Put the stored bytes to ``buf``; return their number. As on a board it takes no memory
        for them. Raises NvsError NOT_FOUND, INVALID_LENGTH if they are more."""
        key16 = _key_bytes(key)
        size, count, start = self._blob(ns, key16, key)
        if size > len(buf):
            raise NvsError(ERR_INVALID_LENGTH, key)
        done = 0
        for chunk in range(start, start + count):
            payload = self._chunk(ns, key16, chunk, key)
            if len(payload) > size - done:
                raise NvsError(ERR_INVALID_LENGTH, key)
            buf[done : done + len(payload)] = payload
            done += len(payload)
        if done != size:
            raise NvsError(ERR_NOT_FOUND, key)
        return size

    def set_blob(self, ns, key, data):
        """Store bytes. Writes nothing if they are there already.

        Raises: NvsError VALUE_TOO_LONG, NOT_ENOUGH_SPACE, KEY_TOO_LONG.
        """
        key16 = _key_bytes(key)
        data = memoryview(data.encode() if isinstance(data, str) else data)
        limit = min(self._count - 1, 127) * CHUNK_MAX
        if len(data) > limit:
            raise NvsError(ERR_VALUE_TOO_LONG, "blob of %d bytes, %d allowed" % (len(data), limit))
        start = 0
        old = self._find(ns, BLOB_IDX, key16, ANY)
        if old is not None:
            at = _FIRST + old[1] * ENTRY + 24
            size, _, old_start = struct.unpack_from("<IBB", self._page, at)
            if size == len(data) and self._holds(ns, key16, data):
                return
            start = 0 if old_start else 0x80
        self._erase_others(ns, key16, self._write_blob(ns, key16, data, start))

    def erase_key(self, ns, key):
        """Remove a key of any type. Raises NvsError NOT_FOUND."""
        key16 = _key_bytes(key)
        if self._find(ns, ANY, key16, ANY) is None:
            raise NvsError(ERR_NOT_FOUND, key)
        self._erase_others(ns, key16, None)

    # ---- for people who read a dump

    def namespaces(self):
        """Return {name: index}."""
        names = {}
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if self._page[at] == 0 and self._page[at + 1] == U8:
                    names[self._key_at(at)] = self._page[at + 24]
        return names

    def items(self):
        """Return [(namespace, key, type, value)]; the value of an unknown type is its 8 bytes."""
        names = {}
        for name, index in self.namespaces().items():
            names[index] = name
        rows = []
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if self._page[at] and self._page[at + 1] != BLOB_DATA:
                    rows.append(
                        (
                            self._page[at],
                            self._key_at(at),
                            self._page[at + 1],
                            bytes(self._page[at + 24 : at + 32]),
                        )
                    )
        out = []
        for ns, key, kind, raw in rows:
            value = raw
            if kind == I32:
                value = struct.unpack("<i", raw[:4])[0]
            elif kind == BLOB_IDX:
                value = self.get_blob(ns, key)
            out.append((names.get(ns, ns), key, kind, value))
        return out

    def _key_at(self, at):
        raw = bytes(self._page[at + 8 : at + 24])
        return raw[: raw.find(b"\0")].decode()

    # ---- reading pages

    def _load(self, page):
        if self._loaded != page:
            self._flash.read(self._offset + page * SECTOR, self._page)
            self._loaded = page

    def _state(self, i):
        """State of entry i of the loaded page."""
        return self._page[_BITMAP + (i >> 2)] >> ((i & 3) * 2) & 3

    def _entries(self, page):
        """Yield the index of each item of a page. Another page may be loaded between two.

        An item with a wrong CRC is marked erased when it is met. That there is one can only be
        since an item was programmed over something: all others were looked at when the page was
        loaded.
        """
        i = 0
        end = self._next_free(page) if page == self._used[-1] else ENTRIES
        while i < end:
            self._load(page)
            step = 1
            if self._state(i) == _WRITTEN:
                if self._spoiled and not self._sound(i):
                    self._mark(page, i, 1, _ERASED)
                else:
                    step = max(1, self._page[_FIRST + i * ENTRY + 2])
                    yield i
            i += step

    def _sound(self, i):
        """Is there a complete item header at entry i of the loaded page?"""
        at = _FIRST + i * ENTRY
        span = self._page[at + 2]
        if span == 0 or i + span > ENTRIES:
            return False
        crc = struct.unpack_from("<I", self._page, at + 4)[0]
        return crc == _entry_crc(self._view[at : at + ENTRY])

    def _is(self, i, ns, key16):
        """Does entry i of the loaded page belong to this key? Allocates nothing."""
        at = _FIRST + i * ENTRY
        if self._page[at] != ns:
            return False
        at += 8
        for k in range(16):
            if self._page[at + k] != key16[k]:
                return False
        return True

    def _find(self, ns, kind, key16, chunk):
        """Return (page, entry) of an item and leave its page loaded, or None."""
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if (
                    self._is(i, ns, key16)
                    and (kind == ANY or self._page[at + 1] == kind)
                    and (chunk == ANY or self._page[at + 3] == chunk)
                    and self._sound(i)
                ):
                    return page, i
        return None

    def _holds(self, ns, key16, data):
        """Is this what the blob holds, of the same size? A damaged one holds something else."""
        done = 0
        try:
            size, count, start = self._blob(ns, key16, "")
            for chunk in range(start, start + count):
                payload = self._chunk(ns, key16, chunk, "")
                if payload != data[done : done + len(payload)]:
                    return False
                done += len(payload)
        except NvsError:
            return False
        return done == size

    def _blob(self, ns, key16, name):
        """Return size, number of chunks and number of the first chunk of a blob."""
        index = self._find(ns, BLOB_IDX, key16, ANY)
        if index is None:
            raise NvsError(ERR_NOT_FOUND, name)
        at = _FIRST + index[1] * ENTRY + 24
        return struct.unpack_from("<IBB", self._page, at)

    def _chunk(self, ns, key16, chunk, name):
        """Return a chunk of a blob: a view of its page, which is loaded now."""
        found = self._find(ns, BLOB_DATA, key16, chunk)
        if found is None:
            raise NvsError(ERR_NOT_FOUND, name)
        at = _FIRST + found[1] * ENTRY
        length, _, crc = struct.unpack_from("<HHI", self._page, at + 24)
        payload = self._view[at + ENTRY : at + ENTRY + length]
        if _crc(payload) != crc:
            raise NvsError(ERR_NOT_FOUND, name)
        return payload

    # ---- writing

    def _program(self, page, at, data):
        self._flash.program(self._offset + page * SECTOR + at, data)
        if self._loaded == page:  # program clears bits, never sets them
            self._loaded = -1

    def _erase_page(self, page):
        self._flash.erase(self._offset + page * SECTOR, SECTOR)
        self._loaded = -1

    def _mark(self, page, first, count, state):
        """Set the bitmap of entries, one 32-bit word at a time, the last one first, as ESP-IDF
        does."""
        self._load(page)
        i = first + count - 1
        while i >= first:
            word = i >> 4
            bits = bytearray(self._page[_BITMAP + word * 4 : _BITMAP + word * 4 + 4])
            while i >= first and i >> 4 == word:
                shift = (i & 3) * 2
                byte = (i >> 2) & 3
                bits[byte] = bits[byte] & ~(3 << shift) | state << shift
                i -= 1
            self._program(page, _BITMAP + word * 4, bits)
            self._load(page)
        if page == self._used[-1]:
            self._next = max(self._next, first + count)

    def _next_free(self, page):
        """First entry that is free in the page that is written to; ENTRIES if it is full."""
        self._load(page)
        if struct.unpack_from("<I", self._page, 0)[0] == _FULL:
            return ENTRIES
        return self._next

    def _set_page_state(self, page, state):
        self._program(page, 0, struct.pack("<I", state))

    def _activate(self):
        """Take a free page into use; its header is written with its first entry."""
        page = self._free.pop(0)
        self._load(page)
        for byte in self._page:
            if byte != 0xFF:
                self._erase_page(page)
                break
        self._used.append(page)
        self._next = 0

    def _start_page(self, page):
        """Write the header of a page that has none yet."""
        self._load(page)
        if self._page[0] == 0xFF:
            body = struct.pack("<IB", self._next_seq, _VERSION) + b"\xff" * 19
            self._program(
                page, 0, struct.pack("<I", _ACTIVE) + body + struct.pack("<I", _crc(body))
            )
            self._next_seq += 1

    def _put(self, page, entry, payload=None):
        """Append an item to a page that has room: header entry, its bits, payload, its bits.

        Returns: the index of the entry.
        """
        self._start_page(page)
        i = self._next_free(page)
        at = _FIRST + i * ENTRY
        self._program(page, at, entry)
        self._mark(page, i, 1, _WRITTEN)
        if not self._sound(i):
            self._spoiled = True
        if payload is None:
            return i
        whole = len(payload) // ENTRY * ENTRY
        if whole:
            self._program(page, at + ENTRY, payload[:whole])
            self._mark(page, i + 1, whole // ENTRY, _WRITTEN)
        if len(payload) > whole:
            tail = bytes(payload[whole:])
            self._program(page, at + ENTRY + whole, tail + b"\xff" * (ENTRY - len(tail)))
            self._mark(page, i + 1 + whole // ENTRY, 1, _WRITTEN)
        return i

    def _full(self, page):
        self._load(page)
        if struct.unpack_from("<I", self._page, 0)[0] == _ACTIVE:
            self._set_page_state(page, _FULL)

    def _new_page(self):
        """Start another page; with one free page left, compact the page with most waste into it.

        Raises: NvsError NOT_ENOUGH_SPACE when there is nothing to compact.
        """
        self._full(self._used[-1])
        if len(self._free) >= 2:
            self._activate()
            return
        best = None
        waste = 0
        for page in self._used:
            erased = self._erased_count(page)
            if erased > waste:
                best = page
                waste = erased
        if best is None:
            raise NvsError(ERR_NOT_ENOUGH_SPACE, "no erased entry in %d pages" % len(self._used))
        self._activate()
        self._set_page_state(best, _FREEING)
        self._compact(best)

    def _erased_count(self, page):
        self._load(page)
        count = 0
        i = 0
        while i < ENTRIES:
            if self._state(i) != _WRITTEN:
                count += 1
            i += 1
        return count

    def _compact(self, page):
        """Copy the live items of a freeing page to the last page, then erase it."""
        target = self._used[-1]
        for i in self._entries(page):
            at = _FIRST + i * ENTRY
            entry = bytes(self._page[at : at + ENTRY])
            payload = None
            if entry[2] > 1:
                payload = bytes(self._page[at + ENTRY : at + entry[2] * ENTRY])
            self._put(target, entry, payload)
        self._erase_page(page)
        self._used.remove(page)
        self._free.append(page)

    def _write(self, ns, kind, chunk, key16, data8, payload=None):
        """Append an item, on a new page if the current one has no room. Returns (page, entry)."""
        span = 1
        if payload is not None:
            span += (len(payload) + ENTRY - 1) // ENTRY
        entry = _make_entry(ns, kind, span, chunk, key16, data8)
        if self._next_free(self._used[-1]) + span > ENTRIES:
            self._new_page()
            if self._next_free(self._used[-1]) + span > ENTRIES:
                raise NvsError(ERR_NOT_ENOUGH_SPACE, "%d entries" % span)
        page = self._used[-1]
        return page, self._put(page, entry, payload)

    def _tailroom(self):
        """Payload bytes that still fit in the current page behind a header entry."""
        return max(0, ENTRIES - self._next_free(self._used[-1]) - 1) * ENTRY

    def _write_blob(self, ns, key16, data, start):
        chunks = 0
        done = 0
        try:
            while True:
                room = self._tailroom()
                if chunks == 0 and room < len(data) and room < CHUNK_MAX // 10:
                    self._new_page()
                    room = self._tailroom()
                if room == 0:
                    raise NvsError(ERR_NOT_ENOUGH_SPACE, "blob of %d bytes" % len(data))
                piece = data[done : done + room]
                data8 = struct.pack("<HHI", len(piece), 0xFFFF, _crc(piece))
                self._write(ns, BLOB_DATA, start + chunks, key16, data8, piece)
                chunks += 1
                done += len(piece)
                if done < len(data) or room - len(piece) < ENTRY:
                    self._new_page()
                if done == len(data):
                    break
            data8 = struct.pack("<IBBH", len(data), chunks, start, 0xFFFF)
            return self._write(ns, BLOB_IDX, 0xFF, key16, data8)
        except NvsError:
            self._erase_chunks(ns, key16, chunks, start)
            raise

    # ---- erasing

    def _erase_item(self, found):
        page, i = found
        self._load(page)
        self._mark(page, i, self._page[_FIRST + i * ENTRY + 2], _ERASED)

    def _erase_chunks(self, ns, key16, count, start):
        for chunk in range(start, start + count):
            found = self._find(ns, BLOB_DATA, key16, chunk)
            if found is not None:
                self._erase_item(found)

    def _erase_others(self, ns, key16, keep):
        """Erase every item of a key but the one at `keep`, and the chunks of an erased blob."""
        chunks = []
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                kind = self._page[at + 1]
                if kind == BLOB_DATA or (page, i) == keep or not self._is(i, ns, key16):
                    continue
                if kind == BLOB_IDX:
                    chunks.append((self._page[at + 28], self._page[at + 29]))
                self._erase_item((page, i))
        for count, start in chunks:
            self._erase_chunks(ns, key16, count, start)

    # ---- start-up: what a power cut may have left

    def _load_pages(self):
        pages = []
        for page in range(self._count):
            self._load(page)
            state, seq, version = struct.unpack_from("<IIB", self._page, 0)
            crc = struct.unpack_from("<I", self._page, 28)[0]
            if state not in (_ACTIVE, _FULL, _FREEING) or crc != _crc(self._view[4:28]):
                self._free.append(page)
                continue
            if version < _VERSION:
                raise NvsError(
                    ERR_NEW_VERSION_FOUND, "page %d has version 0x%02x" % (page, version)
                )
            pages.append((seq, page, state))
        pages.sort()
        for seq, page, _ in pages:
            self._used.append(page)
            self._next_seq = (seq + 1) & _BLANK
            self._repair_page(page)
        if not self._used:
            if self._free:
                self._activate()
        else:
            freeing = [page for _, page, state in pages if state == _FREEING]
            self._drop_duplicate(freeing)
            self._finish_freeing(freeing)
        if not self._free:
            raise NvsError(
                ERR_NO_FREE_PAGES, "%d of %d pages used" % (len(self._used), self._count)
            )
        self._drop_orphans()

    def _repair_page(self, page):
        """Find the first free entry, and mark torn items and half-written entries erased."""
        self._load(page)
        self._next = 0
        end = ENTRIES
        if struct.unpack_from("<I", self._page, 0)[0] == _ACTIVE:
            while self._next < ENTRIES and self._state(self._next) != _EMPTY:
                self._next += 1
            while self._next < ENTRIES:
                at = _FIRST + self._next * ENTRY
                if self._page[at : at + 4] == b"\xff\xff\xff\xff":
                    break  # free, for all that is known
                self._mark(page, self._next, 1, _ERASED)
            end = self._next
        i = 0
        while i < end:
            span = 1
            if self._state(i) == _WRITTEN:
                if not self._sound(i):
                    self._mark(page, i, 1, _ERASED)
                else:
                    span = self._page[_FIRST + i * ENTRY + 2]
                    for j in range(i, i + span):
                        if self._state(j) != _WRITTEN:
                            self._mark(page, i, span, _ERASED)
                            break
            i += span

    def _drop_duplicate(self, freeing):
        """The newest item wins over one of the same key that was not erased any more."""
        newest = None
        for i in self._entries(self._used[-1]):
            newest = i
        if newest is None:
            return
        newest_page = self._used[-1]
        at = _FIRST + newest * ENTRY
        ns, kind, _, chunk = bytes(self._page[at : at + 4])
        key16 = bytes(self._page[at + 8 : at + 24])
        for page in self._used:
            if page in freeing:
                continue
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if (
                    self._is(i, ns, key16)
                    and self._page[at + 3] == chunk
                    and (kind == BLOB_DATA) == (self._page[at + 1] == BLOB_DATA)
                    and (page != newest_page or i != newest)
                ):
                    self._erase_item((page, i))
                    return

    def _finish_freeing(self, freeing):
        """Start over with a page whose copying was cut, then erase it."""
        for page in freeing:
            target = self._used[-1]
            self._load(target)
            state = struct.unpack_from("<I", self._page, 0)[0]
            if target != page and state == _ACTIVE:
                self._erase_page(target)
                self._used.remove(target)
                self._free.append(target)
            if not self._free:
                return
            self._activate()
            self._compact(page)

    def _drop_orphans(self):
        """Erase blob chunks that no index names: their index was never written, or is gone."""
        named = []
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if self._page[at + 1] == BLOB_IDX:
                    named.append(
                        (
                            self._page[at],
                            bytes(self._page[at + 8 : at + 24]),
                            self._page[at + 28],
                            self._page[at + 29],
                        )
                    )
        for page in self._used:
            for i in self._entries(page):
                at = _FIRST + i * ENTRY
                if self._page[at + 1] != BLOB_DATA:
                    continue
                ns = self._page[at]
                chunk = self._page[at + 3]
                key16 = bytes(self._page[at + 8 : at + 24])
                for other_ns, other_key, count, start in named:
                    if other_ns == ns and other_key == key16 and start <= chunk < start + count:
                        break
                else:
                    self._erase_item((page, i))


def erase_all(flash, offset, size):
    """Erase the whole partition."""
    flash.erase(offset, size)


def open_or_erase(flash, offset, size):
    """Initialise NVS as MicroPython's main.c does: erase the partition when ESP-IDF says so.

    Source: MicroPython ports/esp32/main.c.
    """
    try:
        return Nvs(flash, offset, size)
    except NvsError as e:
        if e.code not in (ERR_NO_FREE_PAGES, ERR_NEW_VERSION_FOUND):
            raise
    erase_all(flash, offset, size)
    return Nvs(flash, offset, size)
