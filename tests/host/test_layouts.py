"""Every partition table that comes with the package, by the documented rules."""

import re
from pathlib import Path

import pytest

from twinslot_tools.virtual_esp32 import bootloader, layout, vfs
from twinslot_tools.virtual_esp32.build import make_flash
from twinslot_tools.virtual_esp32.chip import table
from twinslot_tools.virtual_esp32.firmware import make_bootloader, make_firmware

FOLDER = Path(__file__).parents[2] / "partitions"
NAMES = layout.builtin_layouts()
FACTORY = [name for name in NAMES if name.endswith("-factory")]

# The largest genuine ESP32 application known (a factory build of 2024), in bytes.
TODAYS_FIRMWARE = 1_712_512
USEFUL_FILESYSTEM = 256 << 10

SIZE = re.compile(r"(\d+(?:\.\d+)?) ([KM])iB")

every = pytest.mark.parametrize("name", NAMES)


def load(name):
    size = flash_size(name)
    return size, layout.load_layout(name, size)


def flash_size(name):
    return layout.parse_size(name.split("-")[0])


def apps(parts):
    return [p for p in parts if p.type == table.TYPE_APP]


def by_label(parts, label):
    return next(p for p in parts if p.label == label)


def test_there_is_a_table_for_every_common_flash_and_one_with_factory_from_8_mib():
    assert NAMES == sorted(p.stem for p in FOLDER.glob("*.csv"))
    assert set(NAMES) == {f"{n}MiB" for n in (4, 8, 16, 32)} | {
        f"{n}MiB-factory" for n in (8, 16, 32)
    }


@every
def test_application_partitions_lie_on_64_kib_and_the_others_on_sectors(name):
    _, parts = load(name)
    for part in parts:
        assert part.offset % (0x10000 if part.type == table.TYPE_APP else 0x1000) == 0, part.label
        assert part.size % 0x1000 == 0, part.label


@every
def test_partitions_fill_the_flash_from_the_table_to_the_end_without_overlap(name):
    size, parts = load(name)
    end = 0x9000
    for part in parts:
        assert part.offset == end, part.label
        end += part.size
    assert end == size


@every
def test_slots_are_numbered_contiguously_and_equal(name):
    _, parts = load(name)
    slots = table.ota_slots(parts)
    assert [p.subtype for p in slots] == [0x10, 0x11]
    assert [p.label for p in slots] == ["ota_0", "ota_1"]
    assert slots[0].size == slots[1].size
    assert len(apps(parts)) == len(slots) + name.endswith("-factory")


@every
def test_otadata_is_two_sectors_and_nvs_three_or_more(name):
    _, parts = load(name)
    found = [p for p in parts if (p.type, p.subtype) == (table.TYPE_DATA, table.DATA_OTA)]
    assert [p.size for p in found] == [0x2000]
    assert by_label(parts, "nvs").subtype == table.DATA_NVS
    assert by_label(parts, "nvs").size >= 0x3000


@every
def test_every_slot_holds_todays_firmware_and_can_be_mapped_by_the_cache(name):
    _, parts = load(name)
    for part in apps(parts):
        assert part.size >= TODAYS_FIRMWARE
        assert part.offset + part.size <= 16 << 20


@every
def test_micropython_finds_its_filesystem_by_label_where_stock_firmware_has_type_fat(name):
    _, parts = load(name)
    volumes = [p for p in parts if p.label in ("vfs", "ffat")]
    assert [(p.label, p.type, p.subtype) for p in volumes] == [("vfs", table.TYPE_DATA, 0x81)]
    assert volumes[0].size >= USEFUL_FILESYSTEM


@every
def test_no_label_needs_more_than_the_field_and_none_is_there_twice(name):
    _, parts = load(name)
    assert len({p.label for p in parts}) == len(parts)
    assert all(0 < len(p.label) <= 16 for p in parts)


@pytest.mark.parametrize("name", FACTORY)
def test_factory_lies_where_stock_firmware_is_and_no_slot_number_leads_to_it(name):
    _, parts = load(name)
    factory = by_label(parts, "factory")
    assert (factory.subtype, factory.offset) == (table.APP_FACTORY, 0x10000)
    assert factory not in table.ota_slots(parts)


@every
def test_the_text_above_a_table_says_its_sizes(name):
    """Sizes in the comments go stale first."""
    _, parts = load(name)
    text = (FOLDER / f"{name}.csv").read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert comment.startswith(f"{flash_size(name) >> 20} MiB flash")
    said = [float(n) * {"K": 1 << 10, "M": 1 << 20}[u] for n, u in SIZE.findall(comment)]
    for part in (by_label(parts, "ota_0"), by_label(parts, "vfs")):
        assert any(abs(part.size - n) < 0.05 * (1 << 20) for n in said), (part, said)


@every
def test_the_bootloader_accepts_the_table_only_with_its_flash_size_in_the_header(name):
    size, parts = load(name)
    raw = table.build(parts)
    nibble = make_bootloader("esp32s3", size)[3] >> 4
    assert (1 << nibble) << 20 == size
    header = bytes([0xE9, 0, 0, nibble << 4])
    assert table.parse(raw, chip_size=bootloader.flash_size_of_header(header)) == parts
    with pytest.raises(table.TableError, match="exceeds flash chip size"):
        table.parse(raw, chip_size=size // 2)
    assert table.parse(raw, require_md5=True) == parts


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("32")])
def test_a_blank_board_boots_its_first_application_and_mounts_its_volume(name, tmp_path):
    size, parts = load(name)
    image = make_firmware(None, chip="esp32s3", version="", project="")
    flash = tmp_path / "flash.bin"
    flash.write_bytes(make_flash("esp32s3", size, parts, {apps(parts)[0].label: image}))
    vfs.write_files(flash, {"/main.py": b"pass"})
    assert vfs.read_files(flash) == {"/main.py": b"pass"}
    data = flash.read_bytes()
    volume = by_label(parts, "vfs")
    assert data[volume.offset + 8 : volume.offset + 16] == b"littlefs"
    found = bootloader.predict(data, "esp32s3")
    assert found.partition.label == apps(parts)[0].label
