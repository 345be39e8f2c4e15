"""Virtual firmware is what esptool, a bootloader and MicroPython take it for."""

import hashlib
import io
import re
import subprocess
import sys
import zlib

import pytest
from bench import run_on_micropython
from esptool.bin_image import LoadFirmwareImage

from twinslot_tools.virtual_esp32.build import BuildError, app_image, make_flash
from twinslot_tools.virtual_esp32.chip import image, otadata, table
from twinslot_tools.virtual_esp32.chip.image import CHIPS
from twinslot_tools.virtual_esp32.firmware import FirmwareError, make_bootloader, make_firmware
from twinslot_tools.virtual_esp32.layout import builtin_layouts, load_layout, parse_size


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    (folder / "app" / "deep").mkdir(parents=True)
    (folder / "main.py").write_text("import app\nprint('main', app.ANSWER)\n")
    (folder / "app" / "__init__.py").write_text("from .deep.inner import ANSWER\n")
    (folder / "app" / "deep" / "inner.py").write_text("ANSWER = 6 * 7\n")
    (folder / "data.txt").write_text("plain")
    (folder / "app" / "__pycache__").mkdir()
    (folder / "app" / "__pycache__" / "x.pyc").write_bytes(b"no")
    return folder


def make(tree=None, chip="esp32", version="1.2.3", project="sensor-node", **options):
    return make_firmware(tree, chip=chip, version=version, project=project, **options)


def verify(data, chip="esp32"):
    def read(at, buf):
        buf[:] = data[at : at + len(buf)]

    return read, image.verify(read, len(data), chip, 0x10000, in_bootloader=True)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", [None, 1_500_000])
def test_esptool_accepts_the_image(chip, size, tree):
    data = make(tree, chip, size=size)
    loaded = LoadFirmwareImage(chip, data)
    assert loaded.checksum == loaded.calculate_checksum()
    assert loaded.stored_digest == loaded.calc_digest == data[-32:]
    assert loaded.chip_id == CHIPS[chip].chip_id
    _, info = verify(data, chip)
    assert [(s.addr, len(s.data)) for s in loaded.segments] == [
        (s.load, s.length) for s in info.segments
    ]
    assert (info.length, info.digest) == (len(data), loaded.stored_digest)


def test_esptool_image_info_says_what_was_asked_for(tmp_path, tree):
    path = tmp_path / "fw.bin"
    path.write_bytes(make(tree, "esp32s3", secure_version=3))
    done = subprocess.run(
        [sys.executable, "-m", "esptool", "--chip", "esp32s3", "image-info", path],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    for line in (
        r"Project name: sensor-node",
        r"App version: 1\.2\.3",
        r"Secure version: 3",
        r"Checksum: 0x\w\w \(valid\)",
        r"Validation hash: \w{64} \(valid\)",
        r"Chip ID: 9 \(ESP32-S3\)",
    ):
        assert re.search(line, done.stdout), done.stdout


def test_same_arguments_make_the_same_bytes(tree):
    assert make(tree, size=50_000) == make(tree, size=50_000)
    builds = {
        make(tree)[-32:],
        make(tree, version="1.2.4")[-32:],
        make(tree, mpy=False)[-32:],
        make(None)[-32:],
        make(None, seed=1)[-32:],
        make(None, chip="esp32c3")[-32:],
        make(None, chip="esp32c5")[-32:],
    }
    assert len(builds) == 7


@pytest.mark.parametrize("size", [3000, 65_000, 65_536, 131_000, 1_572_864])
def test_size_is_a_floor_and_the_noise_does_not_compress(size):
    data = make(size=size)
    assert size <= len(data) < size + 256
    verify(data)
    assert len(zlib.compress(data)) > 0.9 * size - 3000


@pytest.mark.parametrize("length", [65_536 - 0x420 - 8 + extra for extra in range(-9, 48, 3)])
def test_segments_that_end_around_a_page_stay_aligned(length, tmp_path):
    """esptool pads what ends just over a page; the next segment must still be congruent."""
    (tmp_path / "blob.bin").write_bytes(bytes(length - 40))
    for chip in CHIPS:
        _, info = verify(make(tmp_path, chip), chip)
        assert len(info.segments) == 5  # and none of them is padding
        assert info.length < length + 4096


def test_genuine_looking_image_has_no_tree():
    data = make(None)
    read, info = verify(data)
    assert image.find_tree(read, info) is None


def tree_of(data, chip="esp32"):
    read, info = verify(data, chip)
    at, length = image.find_tree(read, info)
    return data[at : at + length]


@pytest.mark.parametrize("mpy", [True, False])
def test_micropython_runs_the_tree(tree, tmp_path, mpy):
    (tmp_path / "romfs.bin").write_bytes(tree_of(make(tree, mpy=mpy)))
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, vfs\n"
        "rom = open(sys.argv[1], 'rb').read()\n"
        "vfs.mount(vfs.VfsRom(rom), '/firmware')\n"
        "sys.path.insert(0, '/firmware')\n"
        "import main\n"
        "print(sorted(os.listdir('/firmware')), os.listdir('/firmware/app'))\n"
        "print(open('/firmware/data.txt').read())\n"
    )
    output = run_on_micropython(script, str(tmp_path / "romfs.bin")).splitlines()
    suffix = "mpy" if mpy else "py"
    assert output[0] == "main 42"
    assert output[1] == f"['app', 'data.txt', 'main.{suffix}'] ['__init__.{suffix}', 'deep']"
    assert output[2] == "plain"


def test_a_file_that_does_not_compile_is_named(tree):
    (tree / "app" / "bad.py").write_text("def f(:\n")
    with pytest.raises(FirmwareError, match=r"app/bad\.py: SyntaxError"):
        make(tree)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chip": "esp8266"}, "unknown chip 'esp8266', expected one of esp32"),
        ({"version": "1" * 32}, "expected up to 31 ASCII"),
        ({"project": "größe"}, "expected up to 31 ASCII"),
        ({"tree": "/no/such/folder"}, "no folder /no/such/folder"),
        ({"size": 5 << 20}, "don't fit into the drom space of esp32"),
    ],
)
def test_what_cannot_be_made_is_refused(options, error):
    with pytest.raises(FirmwareError, match=error):
        make(**options)


# --- the whole flash ---


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", builtin_layouts())
def test_flash_holds_everything_in_its_place(chip, name):
    size = parse_size(name.split("-")[0])
    partitions = load_layout(name, size)
    app = make(None, chip)
    flash = make_flash(
        chip, size, partitions, {"ota_1": app}, entries=[otadata.entry(2, otadata.VALID)]
    )
    assert len(flash) == size
    boot_at = {"esp32": 0x1000, "esp32s3": 0, "esp32c3": 0, "esp32c5": 0x2000}[chip]
    bootloader = LoadFirmwareImage(chip, bytes(flash[boot_at:0x8000]))
    assert bootloader.stored_digest == bootloader.calc_digest
    assert bootloader.flash_size_freq >> 4 == {4: 2, 8: 3, 16: 4, 32: 5}[size >> 20]
    assert table.parse(flash[0x8000:0x8C00], require_md5=True) == partitions
    ota_1 = table.ota_slots(partitions)[1]
    assert flash[ota_1.offset :].startswith(app)
    assert flash[0xD000:0xD020] == otadata.pack(otadata.entry(2, otadata.VALID))
    blank = [p for p in partitions if p.label not in ("ota_1", "otadata")]
    for part in blank:
        assert flash[part.offset : part.offset + part.size] == b"\xff" * part.size


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"chip": "esp32c6"}, "unknown chip 'esp32c6'"),
        ({"flash_size": 3 << 20}, "flash of 3145728 bytes"),
        ({"flash_size": 64 << 20}, "flash of 67108864 bytes"),
        ({"flash_size": 2 << 20}, "partition ota_1 ends at 0x390000, the flash at 0x200000"),
        ({"slots": {"ota_2": b""}}, "no slot 'ota_2' in the table, which has ota_0, ota_1"),
        ({"slots": {"vfs": b""}}, "no slot 'vfs'"),
        ({"slots": {"ota_0": make(size=0x1C0001)}}, "bytes doesn't fit ota_0.*: 1835008 bytes"),
        ({"slots": {"ota_0": make(chip="esp32c3")}}, "image for ota_0.*: mismatch chip ID"),
        ({"slots": {"ota_0": b"#!/bin/sh"}}, "image for ota_0.*: invalid magic"),
    ],
)
def test_what_does_not_fit_is_refused(change, error):
    arguments = {"chip": "esp32", "flash_size": 4 << 20, "slots": {}} | change
    with pytest.raises(BuildError, match=error):
        make_flash(partitions=load_layout("4MiB"), **arguments)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_combined_release_file_stands_for_its_application(chip):
    """MicroPython's download page has bootloader, table and application in one file."""
    app = make(None, chip)
    flash = make_flash(chip, 4 << 20, load_layout("4MiB"), {"ota_0": app})
    combined = bytes(flash[CHIPS[chip].bootloader : 0x10000 + len(app)])
    assert app_image(combined, chip) == app
    assert app_image(app, chip) == app
    again = make_flash(chip, 4 << 20, load_layout("4MiB"), {"ota_0": combined})
    assert hashlib.sha256(again).digest() == hashlib.sha256(flash).digest()


def test_bootloader_header_can_name_another_size():
    """MicroPython's releases say 4 MiB on every board."""
    assert make_bootloader("esp32", 16 << 20)[3] >> 4 == 4
    flash = make_flash("esp32", 16 << 20, load_layout("4MiB"), {}, header_size=4 << 20)
    assert flash[0x1003] >> 4 == 2


def test_image_streams_need_no_more_than_a_small_buffer():
    """The check runs on the chip: it must read in pieces, and each byte about once."""
    data = make(size=300_000)
    file, reads = io.BytesIO(data), []

    def read(at, buf):
        file.seek(at)
        reads.append(file.readinto(buf))

    image.verify(read, len(data), "esp32", buf=bytearray(1024), flash_offset=0x10000)
    assert max(reads) <= 1024
    assert len(data) - 64 <= sum(reads) < len(data) + 1024
