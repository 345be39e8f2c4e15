"""The NVS byte format, and what a power cut leaves of it."""

import io
import struct
from zlib import crc32

import pytest

from twinslot.journal import Journal
from twinslot_tools.virtual_esp32.chip import nvs
from twinslot_tools.virtual_esp32.chip.flash import Fault, Flash, PowerCut
from twinslot_tools.virtual_esp32.chip.nvs import Nvs, NvsError

SIZE = 0x4000


def new_flash(data=None, fault=None):
    return Flash(io.BytesIO(data or b"\xff" * SIZE), SIZE, fault=fault)


def content(flash):
    buf = bytearray(SIZE)
    Flash(flash._file, SIZE).read(0, buf)
    return bytes(buf)


def test_bytes_of_a_first_integer_are_as_documented():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_i32(ns, "count", -2)
    raw = content(flash)
    header = struct.pack("<IB19s", 0, 0xFE, b"\xff" * 19)
    crc = struct.pack("<I", crc32(header, 0xFFFFFFFF))
    assert raw[:32] == struct.pack("<I", 0xFFFFFFFE) + header + crc
    assert raw[32:64] == b"\xfa" + b"\xff" * 31  # two entries written: 10 10
    head, rest = b"\x00\x01\x01\xff", b"app".ljust(16, b"\0") + b"\x01" + b"\xff" * 7
    entry = head + struct.pack("<I", crc32(head + rest, 0xFFFFFFFF)) + rest
    assert raw[64:96] == entry
    head, rest = b"\x01\x14\x01\xff", b"count".ljust(16, b"\0") + b"\xfe\xff\xff\xff" + b"\xff" * 4
    assert raw[96:128] == head + struct.pack("<I", crc32(head + rest, 0xFFFFFFFF)) + rest
    assert raw[128:] == b"\xff" * (SIZE - 128)


def test_a_blob_is_chunks_and_an_index_written_last():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    store.set_blob(store.open("app"), "b", b"\x5a" * 40)
    raw = content(flash)
    chunk = raw[96:128]
    assert chunk[:4] == b"\x01\x42\x03\x00"
    assert chunk[24:] == struct.pack("<HHI", 40, 0xFFFF, crc32(b"\x5a" * 40, 0xFFFFFFFF))
    assert raw[128:192] == b"\x5a" * 40 + b"\xff" * 24
    index = raw[192:224]
    assert index[:4] == b"\x01\x48\x01\xff"
    assert index[24:] == struct.pack("<IBBH", 40, 1, 0, 0xFFFF)


def test_a_rewritten_blob_takes_the_other_chunk_numbers():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    for i, start in enumerate((0x00, 0x80, 0x00)):
        store.set_blob(ns, "b", bytes([i]) * 5000)
        assert store.get_blob(ns, "b") == bytes([i]) * 5000
        assert living_entries(content(flash), nvs.BLOB_IDX) == [
            struct.pack("<IBBH", 5000, 2, start, 0xFFFF)
        ]


def living_entries(raw, kind):
    """Data field of each written entry of a type, by the documented layout alone."""
    found = []
    for page in range(0, SIZE, 4096):
        for i in range(126):
            state = raw[page + 32 + i // 4] >> (i % 4 * 2) & 3
            at = page + 64 + i * 32
            if state == 2 and raw[at + 1] == kind and raw[at] != 0xFF:
                found.append(raw[at + 24 : at + 32])
    return found


def test_a_dump_is_read_back_on_the_host():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_i32(ns, "n", 7)
    store.set_blob(ns, "b", b"abc")
    store.set_i32(store.open("other"), "n", 8)
    again = Nvs(new_flash(content(flash)), 0, SIZE)
    assert sorted(again.items()) == [
        ("app", "b", nvs.BLOB_IDX, b"abc"),
        ("app", "n", nvs.I32, 7),
        ("other", "n", nvs.I32, 8),
    ]


def test_an_identical_value_costs_no_write():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_i32(ns, "n", 7)
    store.set_blob(ns, "b", b"abc" * 1500)
    before = flash.stats.ops
    store.set_i32(ns, "n", 7)
    store.set_blob(ns, "b", b"abc" * 1500)
    assert store.open("app") == ns
    assert flash.stats.ops == before


def test_a_partition_without_a_free_page_is_erased_at_boot():
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    for i in range(3):
        store.set_blob(ns, f"b{i}", bytes([i]) * 3900)
    raw = bytearray(content(flash))
    body = struct.pack("<IB", 99, 0xFE) + b"\xff" * 19
    header = struct.pack("<I", 0xFFFFFFFC) + body + struct.pack("<I", crc32(body, 0xFFFFFFFF))
    raw[0x3000:0x3020] = header  # as if the last free page had been taken into use
    with pytest.raises(NvsError) as caught:
        Nvs(new_flash(raw), 0, SIZE)
    assert caught.value.code == nvs.ERR_NO_FREE_PAGES
    assert nvs.open_or_erase(new_flash(raw), 0, SIZE).items() == []


def test_a_newer_version_is_erased_at_boot():
    flash = new_flash()
    Nvs(flash, 0, SIZE).open("app")
    raw = bytearray(content(flash))
    raw[8] = 0xFD
    raw[28:32] = struct.pack("<I", crc32(raw[4:28], 0xFFFFFFFF))
    with pytest.raises(NvsError) as caught:
        Nvs(new_flash(raw), 0, SIZE)
    assert caught.value.code == nvs.ERR_NEW_VERSION_FOUND
    assert nvs.open_or_erase(new_flash(raw), 0, SIZE).items() == []


@pytest.mark.parametrize("noise", [b"\x00", b"\xa5", b"\x5a\xff\x00"])
def test_garbage_is_an_empty_store(noise):
    flash = new_flash((noise * SIZE)[:SIZE])
    store = nvs.open_or_erase(flash, 0, SIZE)
    assert store.items() == []
    store.set_i32(store.open("app"), "n", 1)
    assert Nvs(new_flash(content(flash)), 0, SIZE).items() == [("app", "n", nvs.I32, 1)]


def nearly_full_page():
    """A store with a precious blob, an old counter, and 6 entries left in its first page."""
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_blob(ns, "keep", b"precious" * 20)
    store.set_i32(ns, "keep_n", 42)
    store.set_blob(ns, "state", b"0" * 100)
    value = 0
    while store._next_free(store._used[-1]) < 120:
        store.set_i32(ns, "counter", value)
        value += 1
    return content(flash), ns, value - 1


def third_page_full():
    """As above, in the last page but one: the next page must be won by compaction."""
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_blob(ns, "keep", b"precious" * 20)
    store.set_i32(ns, "keep_n", 42)
    store.set_blob(ns, "state", b"0" * 100)
    value = 0
    while len(store._free) > 1 or store._next_free(store._used[-1]) < 120:
        store.set_i32(ns, "counter", value)
        value += 1
    return content(flash), ns, value - 1


@pytest.mark.parametrize("start", [nearly_full_page, third_page_full])
def test_power_cut_anywhere_leaves_the_old_value_or_the_new_one(start):
    """Every flash operation of a dozen updates, across a page change and a compaction."""
    raw, ns, value = start()
    blob = b"0" * 100
    cuts = erases = 0
    for step in range(8):
        new_value, new_blob = value, blob
        if step % 2:
            new_blob = bytes([65 + step]) * (100 + 17 * step)
        else:
            new_value = value + 1000 + step

        def update(store, new_value=new_value, new_blob=new_blob):
            store.set_i32(ns, "counter", new_value)
            store.set_blob(ns, "state", new_blob)

        whole = new_flash(raw)
        store = Nvs(whole, 0, SIZE)
        update(store)
        for op in range(1, whole.stats.ops + 1):
            for fault in faults(op, step):
                cuts += 1
                check_cut(raw, ns, fault, update, {blob, new_blob}, {value, new_value})
        erases += whole.stats.as_dict()["sector_erases"]
        raw = content(whole)
        value, blob = new_value, new_blob
    assert cuts > 200
    assert (erases > 0) == (start is third_page_full)


def faults(op, seed):
    yield Fault(op, "before", None, 0)
    yield Fault(op, "after", None, 0)
    for shape in ("prefix", "suffix", "bits"):
        yield Fault(op, "torn", shape, op * 31 + seed)


def check_cut(raw, ns, fault, update, blobs, values):
    flash = new_flash(raw, fault)
    with pytest.raises(PowerCut):
        update(Nvs(flash, 0, SIZE))
    if fault.mode == "torn" and flash.stats.as_dict()["sector_erases"]:
        # ESP-IDF trusts the header of a page whose erase was interrupted; so do we.
        return
    again = new_flash(content(flash))
    again.strict = fault.mode != "torn"  # what looks free may not be
    store = Nvs(again, 0, SIZE)
    assert store.get_blob(ns, "keep") == b"precious" * 20, fault
    assert store.get_i32(ns, "keep_n") == 42, fault
    assert store.get_blob(ns, "state") in blobs, fault
    assert store.get_i32(ns, "counter") in values, fault
    store.set_i32(ns, "probe", 1)  # which may be lost
    update(store)  # and it goes on
    assert store.get_blob(ns, "state") in blobs
    names = sorted(k for _, k, _, _ in store.items() if k != "probe")
    assert names == ["counter", "keep", "keep_n", "state"]


@pytest.mark.parametrize(("blank", "lost"), [(4, True), (2, False)], ids=["word", "less"])
def test_an_entry_that_is_torn_behind_its_first_word_costs_what_is_written_there_next(blank, lost):
    """As ESP-IDF's Page::mLoadEntryTable: it looks at the first word of what ought to be free."""
    flash = new_flash()
    store = Nvs(flash, 0, SIZE)
    ns = store.open("app")
    store.set_i32(ns, "n", 1)
    cut = new_flash(content(flash), Fault(1, "torn", "suffix", nvs.ENTRY - blank))
    with pytest.raises(PowerCut):
        Nvs(cut, 0, SIZE).set_i32(ns, "n", 2)
    again = new_flash(content(cut))
    again.strict = False
    store = Nvs(again, 0, SIZE)
    assert store.get_i32(ns, "n") == 1
    store.set_i32(ns, "n", 3)
    if lost:
        with pytest.raises(NvsError):
            store.get_i32(ns, "n")
        store.set_i32(ns, "n", 4)
    assert Nvs(again, 0, SIZE).get_i32(ns, "n") == (4 if lost else 3)


class Handle:
    """``esp32.NVS`` of a flash, after a boot."""

    def __init__(self, flash):
        self._store = Nvs(flash, 0, SIZE)
        self._ns = self._store.open("twinslot")
        self.commit = lambda: None

    def __getattr__(self, name):
        def call(key, *args):
            try:
                return getattr(self._store, name)(self._ns, key, *args)
            except NvsError as exc:
                raise OSError(-exc.code) from exc

        return call

    def get_blob(self, key, buf):
        try:
            blob = self._store.get_blob(self._ns, key)
        except NvsError as exc:
            raise OSError(-exc.code) from exc
        if len(blob) > len(buf):
            raise OSError(-nvs.ERR_INVALID_LENGTH)
        buf[: len(blob)] = blob
        return len(blob)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_F7_the_journal_is_whole_after_every_torn_entry_and_the_write_behind_it(twice):
    """Whatever is written in the boot that follows: `floor` is as it was, or as it should be."""
    flash = new_flash()
    Journal(Handle(flash)).update(floor=3)
    raw = content(flash)
    whole = new_flash(raw)
    Journal(Handle(whole)).update(floor=5, trial={"build": "b" * 64})
    for op in range(1, whole.stats.ops + 1):
        cut = new_flash(raw, Fault(op, "torn", "suffix", nvs.ENTRY - 12))
        with pytest.raises(PowerCut):
            Journal(Handle(cut)).update(floor=5, trial={"build": "b" * 64})
        if twice:  # and in the same way, in the first write of the boot that follows
            cut = new_flash(content(cut), Fault(1, "torn", "suffix", nvs.ENTRY - 8))
            cut.strict = False
            with pytest.raises(PowerCut):
                Journal(Handle(cut)).update(floor=6)
        again = new_flash(content(cut))
        again.strict = False
        journal = Journal(Handle(again))
        assert journal.get("floor", int) in (3, 5), op
        journal.update(floor=7)
        assert Journal(Handle(again)).get("floor", int) == 7, op
