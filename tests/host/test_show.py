"""What `board show` tells of a flash, the virtual board's or a dump of a real one."""

import io
import json

import pytest
from bench import Board, firmware
from rich.console import Console

from twinslot_tools.virtual_esp32 import show
from twinslot_tools.virtual_esp32.build import make_flash
from twinslot_tools.virtual_esp32.chip import otadata
from twinslot_tools.virtual_esp32.chip.otadata import NEW, VALID, entry
from twinslot_tools.virtual_esp32.firmware import make_firmware
from twinslot_tools.virtual_esp32.layout import load_layout


def slot(description, label):
    return next(s for s in description["slots"] if s["label"] == label)


def text_of(description):
    console = Console(file=io.StringIO(), width=140)
    console.print(show.render(description))
    return console.file.getvalue()


@pytest.mark.parametrize("chip", ["esp32", "esp32s3", "esp32c3", "esp32c5"])
def test_an_activated_update_is_described(chip):
    board = Board("8MiB-factory", chip=chip, entries=(entry(1, VALID), entry(2, NEW)))
    before = board.data
    d = show.describe(before)
    assert json.loads(json.dumps(d)) == d
    assert board.data == before
    assert (d["chip"], d["flash_size"], d["header_flash_size"]) == (chip, 8 << 20, 8 << 20)
    assert d["partitions"][3] == {
        "label": "factory", "type": "app", "subtype": "factory",
        "offset": 0x10000, "size": 0x1F0000, "flags": [],
    }  # fmt: skip
    assert d["otadata"] == [
        {"seq": 1, "state": "VALID", "crc_ok": True, "slot": "ota_0"},
        {"seq": 2, "state": "NEW", "crc_ok": True, "slot": "ota_1"},
    ]
    assert (d["active"], d["boots"]) == (1, "ota_1")
    ota_0, factory = slot(d, "ota_0"), slot(d, "factory")
    image = firmware("ota_0", chip)
    assert ota_0["valid"] and ota_0["error"] is None and not ota_0["tree"]
    assert (ota_0["version"], ota_0["project"]) == ("ota_0", "bench")
    assert (ota_0["build"], ota_0["length"]) == (image[-32:].hex(), len(image))
    assert ota_0["state"] == "VALID" and slot(d, "ota_1")["state"] == "NEW"
    assert not factory["valid"] and factory["error"] == "empty" and factory["state"] is None
    text = text_of(d)
    for word in (chip, "8 MiB flash", "ota_1", "NEW", "bench ota_0", ota_0["build"][:16]):
        assert word in text
    assert "boots next: ota_1 (otadata entry 1: seq 2, NEW" in text


def test_description_and_boot_agree():
    board = Board(entries=(entry(1, VALID), entry(2, NEW)))
    board.damage("ota_1")
    d = show.describe(board.data)
    assert board.boot() == d["boots"] == "ota_0"
    assert d["why"] == board.result.why
    assert d["log"] == board.log
    assert "checksum failed" in slot(d, "ota_1")["error"]


def test_blank_and_torn_otadata_are_told_apart():
    board = Board(entries=(entry(7, 0x4321)._replace(crc=1),))
    d = show.describe(board.data)
    assert d["otadata"][0] == {"seq": 7, "state": "0x00004321", "crc_ok": False, "slot": "ota_0"}
    assert d["otadata"][1]["seq"] == 0xFFFFFFFF
    assert d["otadata"][1]["slot"] is None
    assert d["active"] is None
    assert "empty" in text_of(d) and "wrong" in text_of(d)


def test_a_board_that_cannot_boot_says_why():
    d = show.describe(Board(slots=()).data)
    assert d["boots"] is None
    assert "boots next: nothing (no bootable app partition" in text_of(d)


def test_a_broken_table_is_shown_as_far_as_it_can_be_read():
    board = Board("8MiB")
    board.put(0, bytes(make_flash("esp32", 8 << 20, [], {}, header_size=4 << 20)[:0x8000]))
    d = show.describe(board.data)
    assert "exceeds flash chip size" in d["table_error"]
    assert len(d["partitions"]) == 6 and slot(d, "ota_0")["valid"]
    assert d["boots"] is None
    assert "bootloader header: 4 MiB" in text_of(d)
    board.put(0x8000, b"\xff" * 0xC00)
    d = show.describe(board.data)
    assert d["table_error"] == "empty partition table"
    assert (d["partitions"], d["otadata"], d["slots"]) == ([], None, [])
    text_of(d)


def test_a_stock_board_without_otadata_is_described(tmp_path):
    csv = tmp_path / "stock.csv"
    csv.write_text(
        "nvs, data, nvs, 0x9000, 0x6000\nphy_init, data, phy, 0xf000, 0x1000\n"
        "factory, app, factory, 0x10000, 0x1F0000\n"
    )
    flash = make_flash("esp32", 4 << 20, load_layout(csv), {"factory": firmware()})
    d = show.describe(bytes(flash))
    assert (d["boots"], d["otadata"], d["active"]) == ("factory", None, None)
    assert d["why"] == "no otadata partition"


def test_a_tree_is_noticed(tmp_path):
    (tmp_path / "main.py").write_text("x = 1\n")
    app = make_firmware(tmp_path, chip="esp32", version="1", project="p")
    flash = make_flash("esp32", 4 << 20, load_layout("4MiB"), {"ota_0": app})
    assert slot(show.describe(bytes(flash)), "ota_0")["tree"]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff" * 65536, "no bootloader of a known chip at 0x0, 0x1000 or 0x2000"),
        (b"", "no bootloader"),
        (firmware(), "no bootloader|expected a whole flash"),
        (Board().data[:0x8800], "expected a whole flash"),
        (Board().data[:-1], "expected a whole flash"),
    ],
)
def test_what_is_no_flash_is_refused(data, error):
    with pytest.raises(show.ShowError, match=error):
        show.describe(data)


def test_a_dump_cut_short_shows_what_it_holds():
    """Only the first 2 MiB were read: the slot beyond is not there."""
    board = Board(entries=(entry(1, VALID), entry(2, VALID)))
    d = show.describe(board.data[: 0x1D0000 + 4096])
    assert slot(d, "ota_0")["valid"]
    assert d["boots"] is None
    d = show.describe(board.data[:0x100000])
    assert not slot(d, "ota_1")["valid"]


def test_chip_can_be_named_where_the_header_is_lost():
    board = Board(entries=(entry(1, VALID), otadata.unpack(b"\xff" * 32)))
    board.put(0x1000, b"\xff" * 16)
    with pytest.raises(show.ShowError):
        show.describe(board.data)
    d = show.describe(board.data, chip="esp32")
    assert slot(d, "ota_0")["valid"]
    assert d["boots"] is None and "no bootloader at 0x1000" in d["why"]
    with pytest.raises(show.ShowError, match="unknown chip"):
        show.describe(board.data, chip="esp9000")
