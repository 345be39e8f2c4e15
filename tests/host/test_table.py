"""The partition table: its bytes, who accepts what, and the CSV it is made from."""

import hashlib
import struct

import pytest
from bench import run_on_micropython

from twinslot_tools.virtual_esp32.chip import table
from twinslot_tools.virtual_esp32.chip.table import Partition, TableError
from twinslot_tools.virtual_esp32.layout import (
    LayoutError,
    builtin_layouts,
    load_layout,
    parse_csv,
    parse_size,
)

# What MicroPython ships, as its CSV files say it, and the first records of the table that the
# generator of ESP-IDF makes of each, the last being the MD5.
STOCK_4MIB_OTA = """
# Name,   Type, SubType, Offset,  Size, Flags
nvs,      data, nvs,     0x9000,  0x4000,
otadata,  data, ota,     0xd000,  0x2000,
phy_init, data, phy,     0xf000,  0x1000,
ota_0,    app,  ota_0,   0x10000, 0x180000,
ota_1,    app,  ota_1,   0x190000,0x180000,
"""
STOCK_4MIB_OTA_TABLE = """
aa50010200900000004000006e76730000000000000000000000000000000000
aa50010000d00000002000006f74616461746100000000000000000000000000
aa50010100f00000001000007068795f696e6974000000000000000000000000
aa50001000000100000018006f74615f30000000000000000000000000000000
aa50001100001900000018006f74615f31000000000000000000000000000000
ebebffffffffffffffffffffffffffff6f91ac1bb2b49e61a1daefd12de800a2
"""
STOCK_8MIB_OTA = STOCK_4MIB_OTA.replace("0x180000", "0x270000").replace("0x190000", "0x280000")
STOCK_FACTORY = """
nvs,      data, nvs,     0x9000,  0x6000,
phy_init, data, phy,     0xf000,  0x1000,
factory,  app,  factory, 0x10000, 0x1F0000,
"""


def test_stock_layout_becomes_the_bytes_of_the_generator():
    raw = table.build(parse_csv(STOCK_4MIB_OTA))
    expected = bytes.fromhex(STOCK_4MIB_OTA_TABLE)
    assert raw == expected + b"\xff" * (0xC00 - len(expected))
    assert (
        hashlib.sha256(raw).hexdigest()
        == "0241fa0d2e573dee86756e39fb4181e61ff7218087619cab565b602df55954d6"
    )


@pytest.mark.parametrize(
    ("csv", "md5"),
    [
        (STOCK_8MIB_OTA, "2c31f25ee20e8e374b1506295bcda871"),
        (STOCK_FACTORY, "8405a9bb5ce0b84c4f2ca5de9a76b050"),
    ],
)
def test_md5_of_other_stock_layouts(csv, md5):
    partitions = parse_csv(csv)
    raw = table.build(partitions)
    assert raw[32 * len(partitions) :][:32] == b"\xeb\xeb" + b"\xff" * 14 + bytes.fromhex(md5)


@pytest.mark.parametrize("name", builtin_layouts())
def test_built_in_layouts_are_usable(name):
    size = parse_size(name.split("-")[0])
    partitions = load_layout(name, size)
    assert table.parse(table.build(partitions), chip_size=size) == partitions
    slots = table.ota_slots(partitions)
    assert len(slots) == 2
    assert slots[0].size == slots[1].size
    assert slots[0].size > 1_672_800  # a genuine build
    assert [p.label for p in partitions if p.label == "factory"] == (
        ["factory"] if "factory" in name else []
    )
    assert partitions[-1].label == "vfs"
    assert partitions[-1].offset + partitions[-1].size == size


def test_both_readers_get_back_what_was_built():
    partitions = parse_csv(STOCK_4MIB_OTA)
    raw = table.build(partitions)
    assert table.parse(raw) == partitions
    assert table.parse(raw, require_md5=True) == partitions


def test_a_label_may_fill_all_16_bytes():
    part = Partition("sixteen_letters_", 1, 6, 0x9000, 0x1000, table.FLAG_READONLY)
    raw = table.build([part])
    assert raw[12:28] == b"sixteen_letters_"
    assert table.parse(raw) == [part]


def test_too_many_partitions_are_refused():
    parts = [Partition(f"p{i}", 0x40, 0, 0x9000 + 0x1000 * i, 0x1000, 0) for i in range(95)]
    assert table.parse(table.build(parts[:94])) == parts[:94]
    with pytest.raises(TableError, match="95 partitions, at most 94"):
        table.build(parts)


# --- section 1.3: who validates what ---

TABLE = table.build(parse_csv(STOCK_4MIB_OTA))
ROWS = parse_csv(STOCK_4MIB_OTA)
N = len(ROWS) * 32
BLANK = b"\xff" * 32


def with_record(i, record):
    return TABLE[: 32 * i] + record + TABLE[32 * (i + 1) :]


NO_MD5 = with_record(len(ROWS), BLANK)
BAD_MD5 = with_record(len(ROWS), TABLE[N : N + 31] + bytes([TABLE[N + 31] ^ 1]))


@pytest.mark.parametrize(
    ("data", "bootloader", "application"),
    [
        (TABLE, ROWS, ROWS),
        (NO_MD5, ROWS, []),
        (BAD_MD5, "incorrect MD5", []),
        (TABLE[: N + 32] + TABLE[N : N + 32] + TABLE[N + 64 :], "only one MD5", ROWS),
        (with_record(2, b"\x12\x34" + bytes(30)), "partition 2: magic 1234", []),
        (BLANK * 96, "empty partition table", []),
        (TABLE[: N + 32] + b"\x00" * (0xC00 - N - 32), "partition 6: magic 0000", ROWS),
        (TABLE[:32] * 96, "no terminating entry", []),
        # The end is told by type and subtype, too: FFFF alone is no terminator.
        (TABLE[: N + 32] + b"\xff\xff\x00\x00" + TABLE[N + 36 :], "magic ffff", ROWS),
    ],
    ids=[
        "good", "no-md5", "wrong-md5", "two-md5", "unknown-record", "blank", "no-terminator",
        "full-of-records", "half-terminator",
    ],
)  # fmt: skip
def test_bootloader_and_application_read_by_their_own_rules(data, bootloader, application):
    assert table.parse(data, require_md5=True) == application
    if isinstance(bootloader, list):
        assert table.parse(data) == bootloader
    else:
        with pytest.raises(TableError, match=bootloader):
            table.parse(data)


def test_only_the_bootloader_minds_the_chip_size():
    eight = table.build(parse_csv(STOCK_8MIB_OTA))
    with pytest.raises(TableError, match=r"ota_1.* exceeds flash chip size 0x400000"):
        table.parse(eight, chip_size=4 << 20)
    assert len(table.parse(eight, require_md5=True, chip_size=4 << 20)) == 5


def test_slots_are_counted_up_to_the_first_gap():
    parts = [Partition(f"ota_{i}", 0, 0x10 + i, 0x10000 * (i + 1), 0x10000, 0) for i in (0, 1, 3)]
    assert [p.label for p in table.ota_slots(parts)] == ["ota_0", "ota_1"]


# --- section 1.4: the generator's rules ---


def rows(csv):
    return [(p.label, p.type, p.subtype, p.offset, p.size, p.flags) for p in parse_csv(csv)]


def test_blank_offsets_are_filled_in_aligned_for_the_type():
    assert rows(
        "nvs,data,nvs,,0x4000\nota_0,app,ota_0,,1M\nx,data,fat,,4K\nota_1,app,ota_1,,1M"
    ) == [
        ("nvs", 1, 2, 0x9000, 0x4000, 0),
        ("ota_0", 0, 0x10, 0x10000, 0x100000, 0),
        ("x", 1, 0x81, 0x110000, 0x1000, 0),
        ("ota_1", 0, 0x11, 0x120000, 0x100000, 0),
    ]


def test_types_may_be_numbers_and_sizes_have_suffixes():
    assert rows("a, 0x40, 0x07, 36K, 8k, encrypted:readonly\nb, 1, 2, , 0x3000") == [
        ("a", 0x40, 7, 0x9000, 0x2000, 3),
        ("b", 1, 2, 0xB000, 0x3000, 0),
    ]


def test_negative_size_means_the_end():
    assert rows("vfs, data, littlefs, 0x10000, -2M")[0][4] == 0x200000 - 0x10000


def test_blank_data_subtype_is_undefined():
    assert rows("x, data, , , 4K")[0][2] == 6


def test_long_name_is_cut_to_its_field():
    assert rows("a_name_of_more_than_sixteen, data, , , 4K")[0][0] == "a_name_of_more_t"


@pytest.mark.parametrize(
    ("csv", "error"),
    [
        ("", "no partitions"),
        ("a, data, nvs, 0x9000", "line 1: the size is blank"),
        ("# note\n\na, app, , , 64K", "line 3: an app partition needs a subtype"),
        (
            "a, data, nvs, 0x8000, 16K",
            "line 1: 'a' begins at 0x8000, but the partition table",
        ),
        ("a,data,nvs,,16K\nb,data,phy,0xc000,4K", "line 2: 'b' begins at 0xc000, but 'a' before"),
        ("a,data,fat,,4097\nb,data,fat,0xa000,4K", "line 2: 'b' begins at 0xa000, but 'a' before"),
        ("a, app, ota_0, 0x18000, 64K", "line 1: 'a': offset 0x18000, expected a multiple"),
        ("a, app, ota_0, 0x10000, 0x800", "line 1: 'a': size 0x800, expected a multiple"),
        ("a, data, fat, 0x9100, 4K", "line 1: 'a': offset 0x9100, expected a multiple of 0x1000"),
        ("a,data,fat,,4K\na,data,phy,,4K", "line 2: 'a': the same name as line 1"),
        ("a,data,ota,,8K\nb,data,ota,,8K", "line 2: 'b': a second otadata partition"),
        ("a, data, ota, , 4K", "line 1: 'a': size 0x1000, otadata has 0x2000"),
        ("a, data, nvs, , 8K", "nvs needs 0x3000 unless it is readonly"),
        ("a, data, ota, , 8K, readonly", "line 1: 'a': can't be readonly"),
        ("a, data, nvs, , 16K, hidden", "line 1: unknown flag 'hidden'"),
        ("a, data, wifi, , 16K", "line 1: unknown subtype 'wifi'"),
        ("a, programs, 0, , 16K", "line 1: unknown type 'programs'"),
        ("a, 256, 0, , 16K", "line 1: type 256 is not within"),
        ("a, data, nvs, , lots", "line 1: 'lots' is no size"),
        (", data, nvs, , 16K", "line 1: the name is blank"),
        ("a, data, fat, 0x10000, -0x10000", "line 1: 'a' has no size left"),
        ("a, data, nvs, 0x9000, 16K, , x", "line 1: 7 columns"),
        ("a, data, fat, 0x10000, 8M", "line 1: 'a': ends at 0x810000, the flash ends at 0x400000"),
    ],
)
def test_bad_csv_names_the_line_and_the_matter(csv, error):
    with pytest.raises(LayoutError, match=error.replace("(", r"\(")):
        parse_csv(csv, 4 << 20)


def test_small_nvs_is_fine_when_readonly():
    assert rows("a, data, nvs, , 4K, readonly")[0][5] == table.FLAG_READONLY


def test_layout_is_read_from_csv_table_or_name(tmp_path):
    csv, binary = tmp_path / "my.csv", tmp_path / "table.bin"
    csv.write_text(STOCK_4MIB_OTA)
    binary.write_bytes(TABLE)
    assert load_layout(csv) == load_layout(binary) == ROWS
    with pytest.raises(LayoutError, match=r"no file 5MiB, .*4MiB"):
        load_layout("5MiB")
    binary.write_bytes(BAD_MD5)
    with pytest.raises(LayoutError, match=r"table\.bin: incorrect MD5"):
        load_layout(binary)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4MiB", 4 << 20), ("16MB", 16 << 20), ("0x1c0000", 0x1C0000), ("4096", 4096)],
)
def test_sizes_are_read_as_people_write_them(text, value):
    assert parse_size(text) == value


def test_micropython_reads_the_same_table(tmp_path):
    raw = table.build(parse_csv(STOCK_8MIB_OTA))
    (tmp_path / "table.bin").write_bytes(raw)
    script = tmp_path / "read.py"
    script.write_text(
        "import sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import table\n"
        "raw = open(sys.argv[1], 'rb').read()\n"
        "parts = table.parse(raw, require_md5=True)\n"
        "assert table.build(parts) == raw and table.parse(raw) == parts\n"
        "for p in parts: print(*p)\n"
    )
    output = run_on_micropython(script, str(tmp_path / "table.bin"))
    assert output.splitlines() == [" ".join(map(str, p)) for p in table.parse(raw)]


def test_record_layout_is_the_documented_struct():
    part = Partition("ota_1", 0, 0x11, 0x1D0000, 0x1C0000, 0)
    assert table.build([part])[:32] == struct.pack(
        "<2sBBLL16sL", b"\xaa\x50", 0, 0x11, 0x1D0000, 0x1C0000, b"ota_1", 0
    )
