"""The bootloader's choice, row by row of the documented state machine, and with the power failing.

Sections are those of ESP-IDF's behaviour as the reference notes it: selection, life cycle, images
that fail, power loss, deep sleep. "F.." names a row of the fault catalogue.
"""

import hashlib
import struct

import pytest
from bench import Board, firmware
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.bootloader import (
    DEEPSLEEP_RESET,
    FACTORY,
    HARD_RESET,
    PWRON_RESET,
    TEST,
    WDT_RESET,
)
from twinslot_tools.virtual_esp32.build import make_flash
from twinslot_tools.virtual_esp32.chip import otadata, table
from twinslot_tools.virtual_esp32.chip.flash import SHAPES, PowerCut
from twinslot_tools.virtual_esp32.chip.image import verify
from twinslot_tools.virtual_esp32.chip.otadata import (
    ABORTED,
    INVALID,
    NEW,
    PENDING_VERIFY,
    UNDEFINED,
    VALID,
    entry,
)
from twinslot_tools.virtual_esp32.chip.table import Partition
from twinslot_tools.virtual_esp32.layout import load_layout

EMPTY = otadata.unpack(b"\xff" * 32)
OLD, NEW_SLOT = "ota_0", "ota_1"
RUNNING_OLD = (entry(1, VALID), EMPTY)
ACTIVATED = (entry(1, VALID), entry(2, NEW))
ON_TRIAL = (entry(1, VALID), entry(2, PENDING_VERIFY))
CONFIRMED = (entry(1, VALID), entry(2, VALID))

# Every way in which one operation can be cut. The seeds make other lengths and other bits.
CUTS = [("before", None, 0), ("after", None, 0)] + [
    ("torn", shape, seed) for shape in SHAPES for seed in (1, 5, 17, 30)
]


def bad_crc(seq, state):
    e = entry(seq, state)
    return e._replace(crc=e.crc ^ 0x100)


# --- selection (section 2.3) ---

# (layout, entries, what boots, the entries afterwards)
SELECTION = {
    "blank otadata boots factory and writes nothing":
        ("8MiB-factory", (EMPTY, EMPTY), "factory", ["blank", "blank"]),
    "blank otadata without factory boots ota_0 and seeds":
        ("4MiB", (EMPTY, EMPTY), "ota_0", [(1, "VALID"), "blank"]),
    "the larger seq wins":
        ("4MiB", (entry(3, VALID), entry(2, VALID)), "ota_0", [(3, "VALID"), (2, "VALID")]),
    "entry 1 has the larger seq":
        ("4MiB", (entry(3, VALID), entry(4, VALID)), "ota_1", [(3, "VALID"), (4, "VALID")]),
    "a tie goes to entry 0":
        ("4MiB", (entry(2, VALID), entry(2, NEW)), "ota_1", [(2, "VALID"), (2, "NEW")]),
    "NEW becomes PENDING_VERIFY":
        ("4MiB", ACTIVATED, "ota_1", [(1, "VALID"), (2, "PENDING_VERIFY")]),
    "NEW that is not active is left alone":
        ("4MiB", (entry(1, NEW), entry(2, VALID)), "ota_1", [(1, "NEW"), (2, "VALID")]),
    "PENDING_VERIFY becomes ABORTED":
        ("4MiB", ON_TRIAL, "ota_0", [(1, "VALID"), (2, "ABORTED")]),
    "ABORTED stays away":
        ("4MiB", (entry(1, VALID), entry(2, ABORTED)), "ota_0", [(1, "VALID"), (2, "ABORTED")]),
    "INVALID stays away":
        ("4MiB", (entry(1, VALID), entry(2, INVALID)), "ota_0", [(1, "VALID"), (2, "INVALID")]),
    "UNDEFINED boots without a trial":
        ("4MiB", (entry(1, VALID), entry(2, UNDEFINED)), "ota_1",
         [(1, "VALID"), (2, "UNDEFINED")]),
    "an unknown state boots without a trial":
        ("4MiB", (entry(1, VALID), entry(2, 0x00FF0001)), "ota_1",
         [(1, "VALID"), (2, "0x00ff0001")]),
    "a wrong crc doesn't count":
        ("4MiB", (entry(1, VALID), bad_crc(2, NEW)), "ota_0", [(1, "VALID"), "bad crc"]),
    "PENDING_VERIFY with a wrong crc is aborted all the same":
        ("4MiB", (entry(1, VALID), bad_crc(2, PENDING_VERIFY)), "ota_0",
         [(1, "VALID"), "bad crc"]),
    "PENDING_VERIFY that is not active is aborted all the same":
        ("4MiB", (entry(1, PENDING_VERIFY), entry(2, VALID)), "ota_1",
         [(1, "ABORTED"), (2, "VALID")]),
    "both given up: factory":
        ("8MiB-factory", (entry(1, INVALID), entry(2, ABORTED)), "factory",
         [(1, "INVALID"), (2, "ABORTED")]),
    "both given up without factory: ota_0, no seed":
        ("4MiB", (entry(1, INVALID), entry(2, ABORTED)), "ota_0",
         [(1, "INVALID"), (2, "ABORTED")]),
    "both pending: aborted, then ota_0":
        ("4MiB", (entry(1, PENDING_VERIFY), entry(2, PENDING_VERIFY)), "ota_0",
         [(1, "ABORTED"), (2, "ABORTED")]),
    "both given up with wrong crcs: ota_0 is seeded":
        ("4MiB", (bad_crc(1, INVALID), bad_crc(2, ABORTED)), "ota_0", [(1, "VALID"), "bad crc"]),
    "both crcs wrong with factory: factory, nothing repaired":
        ("8MiB-factory", (bad_crc(1, VALID), bad_crc(2, VALID)), "factory",
         ["bad crc", "bad crc"]),
    "both crcs wrong without factory: the first slot, nothing repaired":
        ("4MiB", (bad_crc(1, VALID), bad_crc(2, VALID)), "ota_0", ["bad crc", "bad crc"]),
    "seq 0 is a slot, too":
        ("4MiB", (entry(0, VALID), EMPTY), "ota_1", [(0, "VALID"), "blank"]),
    "the highest seq":
        ("4MiB", (entry(0xFFFFFFFE, VALID), entry(1, VALID)), "ota_1",
         [(0xFFFFFFFE, "VALID"), (1, "VALID")]),
    "a trial with factory falls back to the other slot, not to factory":
        ("8MiB-factory", ON_TRIAL, "ota_0", [(1, "VALID"), (2, "ABORTED")]),
    "a first update on a factory board falls back to factory":
        ("8MiB-factory", (entry(1, PENDING_VERIFY), EMPTY), "factory", [(1, "ABORTED"), "blank"]),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "before", "boots", "after"), SELECTION.values(), ids=SELECTION)
def test_selection(layout, before, boots, after):
    slots = ("ota_0", "ota_1", *(["factory"] if "factory" in layout else []))
    board = Board(layout, slots, before)
    predicted = bootloader.predict(board.data, board.chip)
    assert board.boot() == boots
    assert board.states() == after
    assert (predicted.partition, predicted.why) == (board.result.partition, board.result.why)


@pytest.mark.parametrize("chip", ["esp32", "esp32s3", "esp32c3", "esp32c5"])
def test_every_chip_boots_from_its_own_layout(chip):
    board = Board("8MiB", chip=chip, entries=CONFIRMED)
    assert board.boot(PWRON_RESET) == NEW_SLOT
    assert (
        board.result.image.digest
        == board.data[board.result.partition.offset + board.result.image.length - 32 :][:32]
    )


@pytest.mark.parametrize("cause", [PWRON_RESET, HARD_RESET, WDT_RESET])
def test_any_reset_but_a_wake_ends_the_trial(cause):
    board = Board(entries=ACTIVATED)
    assert board.boot() == NEW_SLOT
    assert board.boot(cause) == OLD
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


def test_each_otadata_update_is_one_erase_and_one_program():
    board = Board(entries=ON_TRIAL)
    board.put_entries(entry(1, PENDING_VERIFY), entry(2, PENDING_VERIFY))
    board.boot()
    assert board.stats.as_dict()["sector_erases"] == 2
    assert board.stats.as_dict()["page_programs"] == 2
    assert [n for n, count in enumerate(board.stats.erases()) if count] == [0xD, 0xE]


def test_prediction_writes_nothing():
    board = Board(entries=ACTIVATED)
    before = board.data
    assert bootloader.predict(before, "esp32").partition.label == NEW_SLOT
    assert board.data == before


states = st.sampled_from([NEW, PENDING_VERIFY, VALID, INVALID, ABORTED, UNDEFINED, 0x1234])
seqs = st.one_of(st.integers(0, 8), st.integers(0xFFFFFFF0, 0xFFFFFFFF), st.integers(0, 2**32 - 1))
any_entry = st.one_of(
    st.builds(entry, seqs, states),
    st.builds(otadata.Entry, seqs, st.just(b"\xff" * 20), states, seqs),
    st.binary(min_size=32, max_size=32).map(otadata.unpack),
)
FUZZED = Board("8MiB-factory", ("ota_0", "ota_1", "factory"))


@settings(max_examples=200)
@given(any_entry, any_entry)
@example(entry(0xFFFFFFFE, NEW), entry(0xFFFFFFFD, PENDING_VERIFY))
def test_any_otadata_boots_something(first, second):
    """F10: seq near 2**32, right crc with any seq, garbage: a defined slot and no exception."""
    FUZZED.put_entries(first, second)
    # Two entries may be on trial one after the other; then otadata is settled.
    for _ in range(3):
        assert FUZZED.boot() in ("ota_0", "ota_1", "factory")
    settled, runs = FUZZED.entries(), FUZZED.boot()
    assert FUZZED.entries() == settled
    assert FUZZED.boot() == runs
    assert PENDING_VERIFY not in [e.state for e in settled]


# --- the life of a board (section 2.5) ---


def test_normal_life_cycle():
    board = Board()
    assert board.boot(PWRON_RESET) == "ota_0"
    assert board.states() == [(1, "VALID"), "blank"]
    board.set_boot("ota_1")
    assert board.states() == [(1, "VALID"), (2, "NEW")]
    assert board.boot() == "ota_1"
    assert board.states() == [(1, "VALID"), (2, "PENDING_VERIFY")]
    assert board.boot() == "ota_0"  # nobody confirmed
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]
    assert board.boot() == "ota_0"
    board.set_boot("ota_1")
    assert board.states() == [(1, "VALID"), (2, "NEW")]  # the seq is used again
    assert board.boot() == "ota_1"
    board.confirm()
    assert board.states() == [(1, "VALID"), (2, "VALID")]
    assert board.boot() == "ota_1"
    board.set_boot("ota_0")
    assert board.states() == [(3, "NEW"), (2, "VALID")]
    assert board.boot() == "ota_0"
    board.confirm()
    assert board.boot(PWRON_RESET) == "ota_0"
    assert board.states() == [(3, "VALID"), (2, "VALID")]


def test_life_of_a_board_with_factory():
    board = Board("8MiB-factory", ("factory", "ota_0", "ota_1"))
    assert board.boot() == "factory"
    board.set_boot("ota_0")
    assert board.boot() == "ota_0"
    board.confirm()
    board.set_boot("ota_1")
    assert board.boot() == "ota_1"
    assert board.boot() == "ota_0"
    board.set_boot("factory")
    assert board.states() == ["blank", "blank"]
    assert board.boot() == "factory"


def test_activating_the_running_slot_costs_the_fallback():
    """The quirk of IDF 5: the tie goes to entry 0, so the running one is on trial again."""
    board = Board(entries=CONFIRMED)
    board.set_boot("ota_1")
    assert board.states() == [(2, "NEW"), (2, "VALID")]
    assert board.boot() == "ota_1"
    assert board.states() == [(2, "PENDING_VERIFY"), (2, "VALID")]
    assert board.boot() == "ota_1"
    assert board.states() == [(2, "ABORTED"), (2, "VALID")]


# --- images that fail (section 2.6) ---


def test_damaged_new_image_falls_back_within_one_boot():
    board = Board(entries=ACTIVATED)
    board.damage(NEW_SLOT)
    assert board.boot() == OLD
    assert board.states() == [(1, "VALID"), (2, "PENDING_VERIFY")]
    assert "ota_1 is not bootable: checksum failed" in board.result.why
    assert board.boot() == OLD
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


def test_confirming_after_a_fallback_marks_the_damaged_slot():
    """Why the agent confirms only when BOOT and RUNNING agree."""
    board = Board(entries=ACTIVATED)
    board.damage(NEW_SLOT)
    board.boot()
    board.confirm()
    assert board.states() == [(1, "VALID"), (2, "VALID")]
    for _ in range(3):
        assert board.boot() == OLD
        assert board.states() == [(1, "VALID"), (2, "VALID")]


# (layout, entries, damaged slots, what boots)
FALLBACKS = {
    "down to the lower slot": ("4MiB", CONFIRMED, ("ota_1",), "ota_0"),
    "up to the higher slot": ("4MiB", RUNNING_OLD, ("ota_0",), "ota_1"),
    "down past the lower slot to factory":
        ("8MiB-factory", CONFIRMED, ("ota_1", "ota_0"), "factory"),
    "down to factory before up": ("8MiB-factory", RUNNING_OLD, ("ota_0",), "factory"),
    "up when factory is damaged": ("8MiB-factory", RUNNING_OLD, ("ota_0", "factory"), "ota_1"),
    "from factory up": ("8MiB-factory", (EMPTY, EMPTY), ("factory",), "ota_0"),
    "from factory up further": ("8MiB-factory", (EMPTY, EMPTY), ("factory", "ota_0"), "ota_1"),
    "nothing is left": ("4MiB", CONFIRMED, ("ota_0", "ota_1"), None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "entries", "damaged", "boots"), FALLBACKS.values(), ids=FALLBACKS
)
def test_fallback(layout, entries, damaged, boots):
    slots = ("ota_0", "ota_1", *(["factory"] if "factory" in layout else []))
    board = Board(layout, slots, entries)
    before = board.states()
    for label in damaged:
        board.damage(label)
    assert board.boot() == boots
    assert board.states() == before  # a fallback never edits otadata
    for label in damaged:
        assert f"{label} is not bootable" in board.result.why


def test_rotten_rollback_target_keeps_running_what_works():
    """F17: the old slot rotted; even an aborted new one is better than nothing."""
    board = Board(entries=ON_TRIAL)
    board.damage(OLD)
    assert board.boot() == NEW_SLOT
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


def test_a_board_with_nothing_bootable_says_so():
    board = Board(slots=())
    assert board.boot() is None
    assert board.result.why.startswith("no bootable app partition; ota_0 is not bootable: invalid")
    assert board.log[-1] == "E boot: No bootable app partitions in the partition table"
    assert board.states() == ["blank", "blank"]


def test_image_that_only_the_bootloader_refuses():
    """A segment for RAM that isn't there: set_boot accepts the image, the bootloader doesn't."""
    board = Board(entries=ACTIVATED)
    slot = board.part(NEW_SLOT)
    image = bytearray(firmware(NEW_SLOT))
    at = image.index(struct.pack("<I", 0x40080000), 24)
    image[at : at + 4] = struct.pack("<I", 0x20000000)
    image[-32:] = hashlib.sha256(image[:-32]).digest()
    board.put(slot.offset, bytes(image))
    verify(
        lambda at, buf: board.flash().read(slot.offset + at, buf), slot.size, "esp32", slot.offset
    )
    assert board.boot() == OLD
    assert "bad load address range" in board.result.why


def test_the_seed_names_the_slot_that_really_booted():
    board = Board()
    board.damage("ota_0")
    assert board.boot() == "ota_1"
    assert board.states() == [(2, "VALID"), "blank"]


def test_unverified_image_without_its_header_is_never_booted():
    """F18: the header is programmed last, so lost otadata can't lead into a half-written slot."""
    board = Board(entries=(entry(1, VALID), entry(2, VALID)))
    board.put(board.part("ota_0").offset, b"\xff" * 32)  # ota_1 runs, ota_0 is being written
    for lost in ((EMPTY, EMPTY), (bad_crc(1, VALID), bad_crc(2, VALID)), (entry(1, VALID), EMPTY)):
        board.put_entries(*lost)
        assert board.boot(PWRON_RESET) == "ota_1"


def layout_with(*extra, drop=()):
    return [p for p in load_layout("4MiB") if p.label not in drop] + list(extra)


def boot_of(partitions, images, entries=(), size=4 << 20):
    board = Board()
    board.partitions = partitions
    built = Board(slots=("ota_0",)).data[0x10000:][:0x8000]
    data = make_flash("esp32", size, partitions, dict.fromkeys(images, built), entries=entries)
    board.put(0, bytes(data))
    return board.boot(), board


def test_test_app_is_the_last_resort():
    test_app = Partition("tester", table.TYPE_APP, table.APP_TEST, 0x390000, 0x10000, 0)
    partitions = layout_with(test_app, drop=("vfs",))
    boots, board = boot_of(partitions, ("tester",))
    assert (boots, board.result.index) == ("tester", TEST)
    assert board.states() == ["blank", "blank"]
    assert boot_of(partitions, ("tester", "ota_1"))[0] == "ota_1"


def test_table_without_otadata_boots_factory():
    factory = Partition("factory", table.TYPE_APP, table.APP_FACTORY, 0x390000, 0x10000, 0)
    partitions = layout_with(factory, drop=("vfs", "otadata"))
    boots, board = boot_of(partitions, ("factory", "ota_0"))
    assert (boots, board.result.index) == ("factory", FACTORY)
    assert board.result.why == "no otadata partition"


def test_slots_behind_a_gap_are_never_tried():
    """The bootloader counts records and then uses the count as the limit of the slot number."""
    ota_2 = Partition("ota_2", table.TYPE_APP, table.APP_OTA_0 + 2, 0x1D0000, 0x1C0000, 0)
    partitions = layout_with(ota_2, drop=("ota_1",))
    boots, board = boot_of(partitions, ("ota_2",), entries=(entry(1, VALID),))
    assert boots is None
    assert "ota_2" not in board.result.why


def test_three_slots_take_turns():
    thirds = [
        Partition(f"ota_{i}", table.TYPE_APP, table.APP_OTA_0 + i, 0x10000 * (i + 1), 0x10000, 0)
        for i in range(3)
    ]
    partitions = layout_with(*thirds, drop=("ota_0", "ota_1", "vfs"))
    for seq, label in ((1, "ota_0"), (5, "ota_1"), (6, "ota_2"), (7, "ota_0")):
        boots, _ = boot_of(partitions, ("ota_0", "ota_1", "ota_2"), entries=(entry(seq, VALID),))
        assert boots == label


def test_too_small_otadata_is_fatal():
    small = Partition("otadata", table.TYPE_DATA, table.DATA_OTA, 0xD000, 0x1000, 0)
    boots, board = boot_of(layout_with(small, drop=("otadata",)), ("ota_0",))
    assert boots is None
    assert "otadata has 4096 bytes, expected 8192" in board.result.why


# --- the table and the header ---


def test_broken_partition_table_ends_in_a_reset_loop():
    board = Board(entries=CONFIRMED)
    board.put(table.TABLE_OFFSET + 5, b"\x77")
    for _ in range(2):
        assert board.boot() is None
    assert board.result.why == "partition table: incorrect MD5 checksum"
    assert "E boot: load partition table error!" in board.log


def test_layout_beyond_the_size_in_the_bootloader_header_bricks():
    """MicroPython's releases say 4 MiB on every board: an 8 MiB layout needs a new header."""
    board = Board("8MiB", entries=CONFIRMED)
    board.put(0, bytes(make_flash("esp32", 8 << 20, [], {}, header_size=4 << 20)[:0x8000]))
    assert board.boot() is None
    assert "vfs" in board.result.why or "ota_1" in board.result.why
    assert "exceeds flash chip size 0x400000" in board.result.why


def test_header_that_names_more_flash_than_there_is_stops_the_application():
    board = Board(entries=CONFIRMED)
    board.put(0, bytes(make_flash("esp32", 4 << 20, [], {}, header_size=8 << 20)[:0x8000]))
    assert board.boot() is None
    assert "flash is smaller than the bootloader's header says (8 MiB)" in board.result.why


@pytest.mark.parametrize("damage", [b"\xff" * 32, b"\xe9\x02\x02\x20" + b"\x05" * 28])
def test_without_a_bootloader_the_rom_gives_up(damage):
    board = Board(entries=CONFIRMED)
    board.put(0x1000, damage)
    assert board.boot() is None
    assert board.result.why.startswith("no bootloader at 0x1000")


# --- deep sleep (section 2.8) ---


def test_wake_keeps_the_trial():
    board = Board(entries=ACTIVATED)
    assert board.boot() == NEW_SLOT
    for _ in range(3):
        assert board.boot(DEEPSLEEP_RESET) == NEW_SLOT
        assert board.result.why == "woke from deep sleep"
    assert board.states() == [(1, "VALID"), (2, "PENDING_VERIFY")]
    assert board.boot() == OLD


def test_activation_before_sleeping_is_not_honoured():
    board = Board(entries=RUNNING_OLD)
    board.boot()
    board.set_boot(NEW_SLOT)
    assert board.boot(DEEPSLEEP_RESET) == OLD
    assert board.states() == [(1, "VALID"), (2, "NEW")]
    assert board.boot() == NEW_SLOT


def test_wake_doesnt_verify():
    board = Board(entries=CONFIRMED)
    board.boot()
    board.damage(NEW_SLOT)
    assert board.boot(DEEPSLEEP_RESET) == NEW_SLOT
    assert board.boot() == OLD


def test_wake_into_an_erased_slot_goes_the_normal_way():
    board = Board(entries=CONFIRMED)
    board.boot()
    board.put(board.part(NEW_SLOT).offset, b"\xff" * 4096)
    assert board.boot(DEEPSLEEP_RESET) == OLD
    assert "E boot: Fast booting is not successful" in board.log


@pytest.mark.parametrize("lost", [bytes(12), b"\xa5" * 12])
def test_wake_with_lost_rtc_memory_goes_the_normal_way(lost):
    board = Board(entries=ACTIVATED)
    board.boot()
    board.rtc[:] = lost
    assert board.boot(DEEPSLEEP_RESET) == OLD
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


def test_sleeping_from_factory_wakes_in_factory():
    board = Board("8MiB-factory", ("factory", "ota_0"))
    board.boot()
    assert board.boot(DEEPSLEEP_RESET) == "factory"
    assert board.result.index == FACTORY


# --- power loss (section 2.7) ---


def test_power_cut_while_writing_slot_data_boots_the_running_slot():
    board = Board(entries=RUNNING_OLD)
    part = board.part(NEW_SLOT)
    for op in (1, 2, 5):
        board.cut(lambda: (board.flash().erase(part.offset, 0x10000),
                           board.flash().program(part.offset, bytes(1024))), op=op)  # fmt: skip
        assert board.boot(PWRON_RESET) == OLD
        assert board.states() == [(1, "VALID"), "blank"]


@pytest.mark.parametrize("prefix", range(33))
def test_power_cut_while_activating_boots_old_or_arms_new(prefix):
    """F5: all 33 prefixes of the entry. Only the whole entry counts."""
    board = Board(entries=RUNNING_OLD)
    board.cut(lambda: board.set_boot(NEW_SLOT), op=2, shape="prefix", seed=prefix)
    assert board.boot(PWRON_RESET) == (NEW_SLOT if prefix == 32 else OLD)
    if prefix == 32:
        assert board.states()[1] == (2, "PENDING_VERIFY")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", [1, 2])
def test_power_cut_anywhere_in_activation_never_loses_the_old_slot(op, cut):
    """F5, with entries that held something before (the erase can be torn, too)."""
    for before in (RUNNING_OLD, (entry(1, VALID), entry(2, ABORTED))):
        board = Board(entries=before)
        board.cut(lambda b=board: b.set_boot(NEW_SLOT), op, *cut)
        first = board.boot(PWRON_RESET)
        assert first in (OLD, NEW_SLOT)
        assert board.states()[0] == (1, "VALID")
        if first == NEW_SLOT and board.states()[1] == (2, "PENDING_VERIFY"):
            assert board.boot() == OLD


def test_torn_state_boots_the_new_slot_without_a_trial():
    """F8: seq and crc landed, the state only in part. The agent needs its own trial record."""
    unarmed = 0
    for seed in range(400):
        board = Board(entries=RUNNING_OLD)
        board.cut(lambda b=board: b.set_boot(NEW_SLOT), op=2, shape="bits", seed=seed)
        if board.boot(PWRON_RESET) == NEW_SLOT:
            state = board.states()[1]
            if state != (2, "PENDING_VERIFY"):
                unarmed += 1
                assert board.boot() == NEW_SLOT  # for ever
    assert unarmed > 0


@pytest.mark.parametrize("extra", [0x1, 0x80000000, 0x00010000, 0xFFFFFFFE])
def test_state_with_unprogrammed_bits_is_bootable_and_unmonitored(extra):
    board = Board(entries=(entry(1, VALID), entry(2, NEW | extra)))
    if extra == PENDING_VERIFY:
        assert board.boot() == OLD  # read as a trial that failed
        return
    assert board.boot() == NEW_SLOT
    assert board.boot() == NEW_SLOT


def test_power_cut_while_arming_the_trial_forgets_the_update():
    """F6, step (B) after its erase: the old slot boots, and nothing says ABORTED."""
    board = Board(entries=ACTIVATED)
    board.cut(board.boot, op=2, mode="before")
    assert board.boot(PWRON_RESET) == OLD
    assert board.states() == [(1, "VALID"), "blank"]


def test_power_cut_between_arming_and_start_counts_as_a_failed_trial():
    board = Board(entries=ACTIVATED)
    board.cut(board.boot, op=2, mode="after")
    assert board.states() == [(1, "VALID"), (2, "PENDING_VERIFY")]
    assert board.boot(PWRON_RESET) == OLD
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", [1, 2])
def test_power_cut_in_the_trial_rewrite_boots_old_or_new(op, cut):
    board = Board(entries=ACTIVATED)
    board.cut(board.boot, op, *cut)
    assert board.boot(PWRON_RESET) in (OLD, NEW_SLOT)
    assert board.states()[0] == (1, "VALID")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", [1, 2])
def test_power_cut_while_aborting_the_trial_boots_old_or_new(op, cut):
    """Step (A). Bits of the torn entry may survive as a bootable one; most cuts leave the old."""
    board = Board(entries=ON_TRIAL)
    board.cut(board.boot, op, *cut)
    mode, shape, _ = cut
    boots = board.boot(PWRON_RESET)
    assert boots in (OLD, NEW_SLOT)
    if mode in ("before", "after") or shape in ("untouched", "done", "prefix"):
        assert boots == OLD
    assert board.states()[0] == (1, "VALID")


@pytest.mark.parametrize("when", [(1, "after"), (2, "before")])
def test_power_cut_after_the_abort_erase_is_as_good_as_aborted(when):
    board = Board(entries=ON_TRIAL)
    board.cut(board.boot, *when)
    assert board.states() == [(1, "VALID"), "blank"]
    assert board.boot(PWRON_RESET) == OLD


def test_power_cut_while_confirming_boots_the_old_slot():
    """F7: the old slot boots although the new one was being confirmed."""
    board = Board(entries=ACTIVATED)
    board.boot()
    board.cut(board.confirm, op=2, mode="before")
    assert board.boot(PWRON_RESET) == OLD
    assert board.states() == [(1, "VALID"), "blank"]


def test_power_cut_while_confirming_without_a_fallback_boots_factory():
    board = Board("8MiB-factory", ("factory", "ota_0", "ota_1"), (entry(1, NEW), EMPTY))
    assert board.boot() == "ota_0"
    board.cut(board.confirm, op=2, mode="before")
    assert board.boot(PWRON_RESET) == "factory"


def test_power_cut_while_confirming_without_any_fallback_seeds_ota_0():
    board = Board(entries=(entry(1, ABORTED), entry(2, PENDING_VERIFY)))
    board.put_entries(entry(1, ABORTED), entry(2, NEW))
    assert board.boot() == "ota_1"
    board.cut(board.confirm, op=2, mode="before")
    assert board.states() == [(1, "ABORTED"), "blank"]
    assert board.boot(PWRON_RESET) == "ota_0"
    # An aborted entry with a right crc is no "initial contents": nothing is seeded.
    assert board.states() == [(1, "ABORTED"), "blank"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", [1, 2])
def test_power_cut_anywhere_in_confirming_boots_old_or_new(op, cut):
    board = Board(entries=ACTIVATED)
    board.boot()
    board.cut(board.confirm, op, *cut)
    assert board.boot(PWRON_RESET) in (OLD, NEW_SLOT)
    assert board.states()[0] == (1, "VALID")


@pytest.mark.parametrize(
    ("when", "boots"),
    [
        ((1, "before"), "ota_1"),
        ((1, "after"), "ota_1"),  # entry 0 is gone, entry 1 is left
        ((2, "before"), "ota_1"),
        ((2, "after"), "factory"),
    ],
)
def test_power_cut_while_activating_factory(when, boots):
    board = Board("8MiB-factory", ("factory", "ota_0", "ota_1"), CONFIRMED)
    board.cut(lambda: board.set_boot("factory"), *when)
    assert board.boot(PWRON_RESET) == boots


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", [1, 2])
def test_power_cut_while_seeding_repeats_it_or_does_without(op, cut):
    """Blank otadata is seeded at the next boot. A torn entry whose seq landed is none of
    "initial contents": then every boot tries the slots in order and repairs nothing."""
    board = Board()
    board.cut(board.boot, op, *cut)
    torn = board.states()[0] == "bad crc" and board.entries()[0].seq != 0xFFFFFFFF
    for _ in range(2):
        assert board.boot(PWRON_RESET) == "ota_0"
    assert board.states() == ["bad crc" if torn else (1, "VALID"), "blank"]


def test_both_entries_torn_boots_in_order_and_repairs_nothing():
    board = Board(entries=(bad_crc(1, VALID), bad_crc(2, VALID)))
    for _ in range(2):
        assert board.boot(PWRON_RESET) == "ota_0"
        assert board.states() == ["bad crc", "bad crc"]
    board.damage("ota_0")
    assert board.boot() == "ota_1"


def test_lost_otadata_boots_ota_0_whatever_ran_last():
    """F9: with both entries blank the possibly older ota_0 boots, and is seeded as valid."""
    board = Board(entries=CONFIRMED)
    assert board.boot() == "ota_1"
    board.put_entries(EMPTY, EMPTY)
    assert board.boot() == "ota_0"
    assert board.states() == [(1, "VALID"), "blank"]


@pytest.mark.parametrize("first", CUTS[::3])
@pytest.mark.parametrize("second", CUTS[1::4])
def test_double_cut(first, second):
    """F32: the power fails again while the bootloader cleans up after the first failure."""
    board = Board(entries=RUNNING_OLD)
    board.cut(lambda: board.set_boot(NEW_SLOT), 2, *first)
    try:
        board.cut(board.boot, 1, *second)
    except AssertionError:
        pass  # the first cut left nothing for the bootloader to write
    assert board.boot(PWRON_RESET) in (OLD, NEW_SLOT)
    assert board.states()[0] == (1, "VALID")


@pytest.mark.parametrize("brownouts", [1, 2, 3])
def test_brown_out_during_the_trial_ends_it(brownouts):
    """F11: IDF grants one boot. Re-arming is the agent's decision, each time anew."""
    board = Board(entries=RUNNING_OLD)
    for _ in range(brownouts):
        board.set_boot(NEW_SLOT)
        assert board.boot() == NEW_SLOT
        assert board.boot(PWRON_RESET) == OLD
    assert board.states() == [(1, "VALID"), (2, "ABORTED")]


def test_every_operation_of_a_whole_update_can_be_cut():
    """Activate, arm, confirm: every operation, every shape; it always boots old or new."""

    def update(board):
        board.boot()
        board.set_boot(NEW_SLOT)
        board.boot()
        board.confirm()
        board.boot()

    whole = Board(entries=RUNNING_OLD)
    update(whole)
    assert whole.stats.ops == 6
    for op in range(1, whole.stats.ops + 1):
        for cut in CUTS:
            board = Board(entries=RUNNING_OLD)
            board.cut(lambda b=board: update(b), op, *cut)
            for _ in range(3):
                assert board.boot(PWRON_RESET) in (OLD, NEW_SLOT)
            assert board.states()[0] == (1, "VALID")


def test_dead_board_stays_dead_until_power_returns():
    board = Board(entries=ACTIVATED)
    flash = board.flash()
    flash.dead = True
    with pytest.raises(PowerCut):
        bootloader.boot(flash, "esp32")
    assert board.boot(PWRON_RESET) == NEW_SLOT
