"""The device package on partition tables of all kinds: what it refuses, where it goes back to."""

import json
from functools import cache
from pathlib import Path

import pytest
from boards import SIZE, flash_file

from twinslot_tools.virtual_esp32 import layout
from twinslot_tools.virtual_esp32.board import Board
from twinslot_tools.virtual_esp32.chip import otadata
from twinslot_tools.virtual_esp32.firmware import make_firmware

LIB = Path(__file__).parent.parent.parent / "lib"
HEAD = "nvs, data, nvs, 0x9000, 0x4000,\notadata, data, ota, 0xd000, 0x2000,\n"
VFS = "vfs, data, fat, 0x200000, 0x100000,\n"


@cache
def image(seed=0):
    return make_firmware(LIB, chip="esp32", version=f"1.{seed}.0", project="test", seed=seed)


def rows(*names, labels=None):
    """A table with these app slots, 320 KiB each; a label may differ from the subtype."""
    text = HEAD
    for i, name in enumerate(names):
        label = (labels or names)[i]
        text += f"{label}, app, {name}, {0x10000 + i * 0x50000:#x}, 0x50000,\n"
    return layout.parse_csv(text + VFS, SIZE)


def board(tmp_path, main, table, slots, entries=()):
    path = flash_file(
        tmp_path / "f.bin",
        {"main.py": main},
        {label: image(seed) for seed, label in enumerate(slots)},
        table=table,
        entries=entries,
    )
    return Board(path)


TELL = """
import twinslot
from twinslot import guard
from twinslot.errors import OtaError
from twinslot.slot import FirmwareSlot

print("guard:", guard.start())
guard.stop()
try:
    print("target:", FirmwareSlot().status()["inactive"])
except OtaError as exc:
    print(exc.code, exc)
for level, topic, text, remedy in twinslot.doctor():
    if topic == "slots":
        print("doctor:", level, remedy)
"""

ONE_SLOT = [
    ("factory alone", ("factory",), ("factory",), ()),
    ("one slot", ("ota_0",), ("ota_0",), ()),
    ("factory runs beside one slot", ("factory", "ota_0"), ("factory",), ()),
    (
        "the one slot runs beside factory",
        ("factory", "ota_0"),
        ("factory", "ota_0"),
        (otadata.entry(1, otadata.VALID),),
    ),
]


@pytest.mark.parametrize(
    ("names", "slots", "entries"), [row[1:] for row in ONE_SLOT], ids=[row[0] for row in ONE_SLOT]
)
def test_a_table_without_two_slots_is_refused_with_a_remedy(tmp_path, names, slots, entries):
    result = board(tmp_path, TELL, rows(*names), slots, entries).run(timeout=20)
    assert result.boots[-1].error is None
    lines = result.console.splitlines()
    assert "guard: idle" in lines, "the application boots all the same"
    assert any(line.startswith("partition this board has") for line in lines)
    assert "doctor: fail flash a partition table with two OTA slots" in lines


def test_slots_may_have_labels_of_their_own(tmp_path):
    # As on the Arduino Nano ESP32.
    table = rows("ota_0", "ota_1", labels=("app0", "app1"))
    result = board(tmp_path, TELL, table, ("app0",)).run(timeout=20)
    assert "target: app1" in result.console


def test_a_factory_slot_is_never_the_target(tmp_path):
    table = rows("factory", "ota_0", "ota_1")
    for entries, target in (
        ((), "ota_0"),
        ((otadata.entry(1, otadata.VALID),), "ota_1"),
        ((otadata.entry(2, otadata.VALID),), "ota_0"),
    ):
        slots = ("factory", "ota_0", "ota_1")
        result = board(tmp_path, TELL, table, slots, entries).run(timeout=20)
        assert f"target: {target}" in result.console


REJECT = """
import machine
from twinslot.errors import OtaError
from twinslot.slot import FirmwareSlot

slot = FirmwareSlot()
print("runs:", slot.status()["running"], slot.status()["state"])
if slot.status()["running"] == %r:
    try:
        slot.reject()
    except OtaError as exc:
        print(exc.code, exc)
    else:
        machine.reset()
"""
V, NEW, TORN = otadata.VALID, otadata.NEW, 0xFFFFFFF5
E = otadata.entry

BACK = [
    # table, slots that hold an image, entries, what runs and rejects itself, where that leads
    ("two slots", ("ota_0", "ota_1"), (E(1, V), E(2, NEW)), "ota_1", "ota_0"),
    ("two slots, unwatched", ("ota_0", "ota_1"), (E(1, V), E(2, TORN)), "ota_1", "ota_0"),
    ("no entry leads back", ("ota_0", "ota_1"), (E(1, NEW),), "ota_0", "ota_1"),
    ("factory", ("factory", "ota_0"), (E(1, NEW),), "ota_0", "factory"),
    ("factory, unwatched", ("factory", "ota_0"), (E(1, TORN),), "ota_0", "factory"),
    ("factory is not the last", ("factory", "ota_0", "ota_1"), (E(1, V), E(2, NEW)), "ota_1",
     "ota_0"),
    ("the second of three", ("ota_0", "ota_1", "ota_2"), (E(1, V), E(2, NEW)), "ota_1", "ota_0"),
    ("of three, unwatched", ("ota_0", "ota_1", "ota_2"), (E(1, V), E(2, TORN)), "ota_1", "ota_0"),
    ("the third of three", ("ota_0", "ota_1", "ota_2"), (E(3, NEW), E(2, V)), "ota_2", "ota_1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("slots", "entries", "rejects", "back"), [row[1:] for row in BACK], ids=[r[0] for r in BACK]
)
def test_a_rejected_image_gives_way_to_the_one_before_it(tmp_path, slots, entries, rejects, back):
    factory = ("factory",) if "factory" in slots else ()
    names = factory + (("ota_0", "ota_1", "ota_2") if "ota_2" in slots else ("ota_0", "ota_1"))
    result = board(tmp_path, REJECT % rejects, rows(*names), slots, entries).run(5, timeout=20)
    assert [b.partition for b in result.boots] == [rejects, back], result.console
    assert result.outcome == "idle"


def test_a_rejected_image_stays_where_nothing_else_boots(tmp_path):
    one = board(tmp_path, REJECT % "ota_0", rows("ota_0", "ota_1"), ("ota_0",), (E(1, NEW),))
    result = one.run(3, timeout=20)
    assert [b.partition for b in result.boots] == ["ota_0"]
    assert "rollback" in result.console


RENEW = """
import asyncio, json, machine
from esp32 import Partition
from twinslot import guard, health, release
from twinslot.journal import Journal
from twinslot.slot import FirmwareSlot

verdict = guard.start()
guard.stop()
slot = FirmwareSlot()
status = slot.status()
print("boot:", json.dumps([status["running"], status["inactive"], verdict]))
if verdict == "trial":
    health.confirm(slot, Journal.shared())
source = Partition(Partition.RUNNING)
size = %(size)d


async def copy():
    image = release.Image("firmware", 0, size, %(sha256)r, status["build"], [])
    if await slot.begin(image) == 0:
        block = bytearray(4096)
        for at in range(0, size, 4096):
            source.readblocks(at // 4096, block)
            rest = memoryview(block)[: min(4096, size - at)]
            slot.write([rest[n : n + 512] for n in range(0, len(rest), 512)])
    await slot.finish()
    slot.activate()


if status["inactive_build"] != status["build"]:
    asyncio.run(copy())
    machine.reset()
"""


def test_images_wander_through_all_slots_of_a_table(tmp_path):
    """Copies of the running image, slot by slot, until every one holds it."""
    import hashlib

    content = image()
    main = RENEW % {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    table = rows("factory", "ota_0", "ota_1", "ota_2")
    path = flash_file(tmp_path / "f.bin", {"main.py": main}, {"factory": content}, table=table)
    result = Board(path).run(8, timeout=40)
    lines = [line for line in result.console.splitlines() if line.startswith("boot: ")]
    assert [json.loads(line[6:]) for line in lines] == [
        ["factory", "ota_0", "idle"],
        ["ota_0", "ota_1", "trial"],
        ["ota_1", "ota_2", "idle"],  # by then it is the confirmed build, wherever it lies
        ["ota_2", "ota_0", "idle"],
    ]
    flash = path.read_bytes()
    for part in table:
        if part.type == 0:
            assert flash[part.offset : part.offset + len(content)] == content, part.label
