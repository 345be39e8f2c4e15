"""`twinslot flash`: from a firmware file of micropython.org to a board that updates itself."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from fakechip import FakeChip, Rfc2217Bridge
from stockfirmware import application, combined

from twinslot_tools import cli, flash, keys, stock
from twinslot_tools.lab import CRASH, Lab
from twinslot_tools.virtual_esp32 import layout, show, vfs
from twinslot_tools.virtual_esp32.board import Board
from twinslot_tools.virtual_esp32.chip import table
from twinslot_tools.virtual_esp32.process import find_micropython

TWINSLOT = Path(sys.executable).with_name("twinslot")
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "product": "sensor-node",
    "url": "https://updates.example.org/",
    "ca": "/ota/ca.pem",
    "keys": "/ota/keys.json",
}


class Done:
    """What a run of the command line left."""

    def __init__(self, code, stdout, stderr):
        self.code, self.stdout, self.stderr = code, stdout, stderr


class Person(io.StringIO):
    """Somebody at the keyboard."""

    def isatty(self):
        return True


def twinslot(*args, code=0, stdin=""):
    """Run the command line in this process: a new one takes a third of a second each time."""
    out, err = io.StringIO(), io.StringIO()
    seen = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["twinslot", *map(str, args)])
        patch.setattr(sys, "stdin", Person(stdin) if stdin else io.StringIO())
        try:
            cli.main()
        except SystemExit as exc:
            seen = exc.code or 0
    done = Done(seen, out.getvalue(), err.getvalue())
    assert done.code == code, done.stderr
    return done


@pytest.fixture(scope="module")
def release_key(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "release.key"
    keys.generate(path, 2048)
    return path


@pytest.fixture
def desk(tmp_path, release_key):
    """A folder with a firmware file, ota.json and what that names."""
    (tmp_path / "ota").mkdir()
    shutil.copy(keys.public_path(release_key), tmp_path / "ota" / "keys.json")
    (tmp_path / "ota" / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "ota.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "stock.bin").write_bytes(combined(application()))
    return tmp_path


def arguments(desk, *more, config="ota.json", firmware="stock.bin"):
    return ["flash", "--firmware", desk / firmware, "--config", desk / config, *more]


def plan(desk, **kw):
    kw.setdefault("flash_size", 4 << 20)
    return flash.make_plan(desk / "stock.bin", desk / "ota.json", **kw)


# ---- the file


def test_to_file_makes_a_flash_that_the_board_tools_and_esptool_agree_on(desk):
    out = desk / "flash.bin"
    command = [TWINSLOT, *arguments(desk, "--to-file", out)]
    subprocess.run(command, check=True, capture_output=True)
    shown = json.loads(twinslot("board", "show", out, "--json").stdout)
    assert shown["chip"] == "esp32"
    assert shown["flash_size"] == shown["header_flash_size"] == 4 << 20
    assert shown["table_error"] is None
    assert shown["boots"] == "ota_0"
    assert shown["slots"][0]["build"] == application()[-32:].hex()
    assert [s["error"] for s in shown["slots"][1:]] == ["empty"]
    assert [e["seq"] for e in shown["otadata"]] == [0xFFFFFFFF] * 2

    data = out.read_bytes()
    for name, image in (("boot.bin", data[0x1000:0x8000]), ("app.bin", data[0x10000:0x1D0000])):
        (desk / name).write_bytes(image)
        said = subprocess.run(
            [sys.executable, "-m", "esptool", "--chip", "esp32", "image-info", desk / name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert "(valid)" in said and "invalid" not in said, said
        assert "Flash size: 4MB" in said


def test_the_volume_mounts_under_micropythons_own_littlefs_and_holds_every_byte(desk):
    """Not through the virtual board: MicroPython's VfsLfs2 over the bytes of the partition."""
    made = plan(desk)
    image = desk / "volume.bin"
    image.write_bytes(made.flash[made.volume.offset : made.volume.offset + made.volume.size])
    (desk / "read.py").write_text(
        "import binascii, hashlib, os, sys, vfs\n"
        "class Bytes:\n"
        "    def __init__(self, data): self.data = data\n"
        "    def readblocks(self, n, buf, off=0):\n"
        "        at = n * 4096 + off\n"
        "        buf[:] = self.data[at:at + len(buf)]\n"
        "    def writeblocks(self, n, buf, off=0): raise OSError(30)\n"
        "    def ioctl(self, op, arg):\n"
        "        return {4: len(self.data) // 4096, 5: 4096}.get(op, 0)\n"
        "with open(sys.argv[1], 'rb') as f: bdev = Bytes(f.read())\n"
        "vfs.mount(vfs.VfsLfs2(bdev, readsize=32, progsize=32, lookahead=32), '/v')\n"
        "def walk(path):\n"
        "    for entry in os.ilistdir('/v' + path):\n"
        "        name = path + '/' + entry[0]\n"
        "        if entry[1] & 0x4000: walk(name)\n"
        "        else:\n"
        "            with open('/v' + name, 'rb') as f: data = f.read()\n"
        "            digest = hashlib.sha256(data).digest()\n"
        "            print(name, binascii.hexlify(digest).decode())\n"
        "walk('')\n"
    )
    said = subprocess.run(
        [find_micropython(), "-X", "heapsize=8M", desk / "read.py", image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert dict(line.split() for line in said.splitlines()) == {
        path: hashlib.sha256(data).hexdigest() for path, data in made.files.items()
    }


def test_the_board_gets_library_boot_main_configuration_and_what_it_names(desk):
    files = plan(desk).files
    assert files["/ota.json"] == (desk / "ota.json").read_bytes()
    assert files["/ota/keys.json"] == (desk / "ota" / "keys.json").read_bytes()
    assert files["/ota/ca.pem"] == (desk / "ota" / "ca.pem").read_bytes()
    assert files["/boot.py"] == (ROOT / "boot.py").read_bytes()
    assert files["/main.py"] == (ROOT / "main.py").read_bytes()
    sources = {
        f"/lib/{p.relative_to(ROOT / 'lib').with_suffix('.mpy').as_posix()}"
        for p in (ROOT / "lib").rglob("*.py")
    }
    assert {path for path in files if path.startswith("/lib/")} == sources
    assert all(files[path][:2] == b"M\x06" for path in sources)


def test_only_bytecode_or_native_code_of_the_chip_is_installed(desk):
    """Bits 2 to 5 of byte 2 name the architecture: 0 for bytecode, 10 xtensawin, 11 rv32imc."""
    for path, data in plan(desk).files.items():
        if path.endswith(".mpy"):
            assert data[2] >> 2 & 0xF in (0, 10), path


@pytest.mark.parametrize("name", layout.builtin_layouts())
def test_a_board_of_every_table_boots_and_finds_its_files(desk, name):
    (desk / "mine").mkdir()
    (desk / "mine" / "main.py").write_text("print(open('/ota.json').read())\n")
    size = layout.parse_size(name.split("-", maxsplit=1)[0])
    (desk / "stock.bin").write_bytes(combined(application("esp32s3"), "esp32s3"))
    made = plan(desk, flash_size=size, table=name, extra=desk / "mine", arch="x64")
    (desk / "flash.bin").write_bytes(made.flash)
    result = Board(desk / "flash.bin").run(
        max_boots=1, timeout=20, until=lambda event: "sensor-node" in event.get("line", "")
    )
    assert result.boots[0].partition == ("factory" if "factory" in name else "ota_0")
    assert "sensor-node" in result.console


def test_an_s3_firmware_begins_at_0_and_gets_the_table_of_its_flash(desk):
    (desk / "stock.bin").write_bytes(combined(application("esp32s3"), "esp32s3"))
    made = plan(desk, flash_size=16 << 20)
    assert (made.stock.start, made.table) == (0, "16MiB")
    found = show.describe(made.flash)
    assert (found["chip"], found["header_flash_size"]) == ("esp32s3", 16 << 20)
    assert found["boots"] == "ota_0"
    assert {path: data[2] >> 2 & 0xF for path, data in made.files.items() if ".mpy" in path}


def test_a_chip_without_a_virtual_board_can_be_flashed_all_the_same(desk):
    """A C6 differs from a C3 in its chip id, as far as a file goes."""

    def as_c6(image):
        image = bytearray(image)
        image[12:14] = (0x0D).to_bytes(2, "little")
        image[-32:] = hashlib.sha256(image[:-32]).digest()
        return bytes(image)

    data = bytearray(combined(as_c6(application("esp32c3")), "esp32c3"))
    loader = stock.espimage.identify(stock.images.reader(bytes(data)), 0x8000)[0]
    data[:loader] = as_c6(data[:loader])
    (desk / "stock.bin").write_bytes(data)
    made = plan(desk)
    assert made.stock.chip == "esp32c6"
    assert made.flash[made.volume.offset + 8 :][:8] == b"littlefs"


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_the_bootloaders_header_says_the_flash_size_and_its_digest_holds(desk, size):
    made = plan(desk, flash_size=size << 20)
    loader = made.flash[0x1000:0x8000]
    length = stock.espimage.identify(stock.images.reader(loader), len(loader))[0]
    image = stock.images.check_with_esptool("bootloader", "esp32", loader[:length])
    assert (1 << (image.flash_size_freq >> 4)) << 20 == size << 20
    assert image.flash_size_freq & 0xF == made.stock.bootloader[3] & 0xF
    assert image.stored_digest == image.calc_digest
    assert len(made.flash) == size << 20


def test_a_factory_table_gets_the_firmware_into_factory_where_a_blank_otadata_boots_it(desk):
    found = show.describe(plan(desk, flash_size=8 << 20, table="8MiB-factory").flash)
    assert found["boots"] == "factory"
    assert [s["label"] for s in found["slots"] if s["valid"]] == ["factory"]


def test_the_flash_size_of_a_file_follows_the_table_asked_for(desk):
    out = desk / "flash.bin"
    twinslot(*arguments(desk, "--to-file", out, "--table", "8MiB"))
    assert out.stat().st_size == 8 << 20


def test_a_table_of_ones_own_is_taken(desk):
    csv = desk / "mine.csv"
    csv.write_text(
        "nvs,data,nvs,0x9000,0x4000\notadata,data,ota,,0x2000\nota_0,app,ota_0,0x10000,1M\n"
        "ota_1,app,ota_1,,1M\nvfs,data,fat,,1M\n"
    )
    made = plan(desk, table=str(csv))
    assert made.volume.size == 1 << 20
    assert show.describe(made.flash)["boots"] == "ota_0"


# ---- the user's files


def test_the_users_files_replace_the_examples_and_the_rest_stays(desk):
    mine = desk / "mine"
    (mine / "lib").mkdir(parents=True)
    (mine / "main.py").write_text("print('mine')\n")
    (mine / "lib" / "sensor.py").write_text("X = 1\n")
    (mine / ".git").mkdir()
    (mine / ".git" / "HEAD").write_text("ref\n")
    files = plan(desk, extra=mine).files
    assert files["/main.py"] == b"print('mine')\n"
    assert files["/lib/sensor.py"] == b"X = 1\n"
    assert files["/boot.py"] == (ROOT / "boot.py").read_bytes()
    assert not any(".git" in path for path in files)


def test_a_source_that_would_hide_the_new_module_is_left_out_and_named(desk):
    """MicroPython finds foo.py before foo.mpy."""
    old = desk / "mine" / "lib" / "twinslot"
    old.mkdir(parents=True)
    (old / "agent.py").write_text("raise SystemExit\n")
    (desk / "mine" / "twinslot").mkdir()
    (desk / "mine" / "twinslot" / "jws.py").write_text("verify = None\n")
    (desk / "mine" / "ota.json").write_text("{}")
    made = plan(desk, extra=desk / "mine")
    assert "/lib/twinslot/agent.py" not in made.files
    assert "/twinslot/jws.py" not in made.files
    assert json.loads(made.files["/ota.json"]) == SETTINGS
    assert len(made.notes) == 3 and all("left out" in note for note in made.notes)


def test_a_boot_py_without_the_guard_is_noted(desk):
    (desk / "mine").mkdir()
    (desk / "mine" / "boot.py").write_text("print('hello')\n")
    assert any("guard" in note for note in plan(desk, extra=desk / "mine").notes)


def test_a_file_named_by_the_configuration_may_come_from_the_users_folder(desk):
    mine = desk / "mine"
    (mine / "ota").mkdir(parents=True)
    (desk / "ota" / "ca.pem").rename(mine / "ota" / "ca.pem")
    assert plan(desk, extra=mine).files["/ota/ca.pem"]


# ---- what is refused


def refused(desk, *more, **kw):
    done = twinslot(*arguments(desk, "--to-file", desk / "out.bin", *more, **kw), code=1)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("twinslot: ")
    assert not (desk / "out.bin").exists()
    return lines[0]


def edited(**changes):
    return {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (edited(product=None), "configuration member product: saw nothing"),
        (edited(url=None), "configuration member url"),
        (edited(polls=5), "configuration member: saw polls, expected one of"),
        (edited(poll="often"), "configuration member poll: saw str, expected int"),
        (edited(source="ftp"), "expected static or server"),
        (edited(ca="/ota/other.pem"), "put a file other.pem beside ota.json"),
        (edited(keys="/nokeys.json"), "put a file nokeys.json beside ota.json"),
        (edited(keys="/ota.json"), "NAME.pub.json"),
        ([1, 2], "a JSON object"),
    ],
)
def test_a_configuration_is_judged_by_the_boards_own_code_before_anything_is_written(
    desk, settings, said
):
    (desk / "ota.json").write_text(json.dumps(settings))
    line = refused(desk)
    assert said in line and "ota.json" in line


def test_a_configuration_that_is_no_json_is_refused(desk):
    (desk / "ota.json").write_text("{product: 1}")
    assert "not JSON" in refused(desk)


def test_a_private_key_never_reaches_a_board(desk, release_key):
    shutil.copy(release_key, desk / "ota" / "keys.json")
    line = refused(desk)
    assert "pub.json" in line
    secret = json.loads(release_key.read_text())["d"]
    assert secret[:16] not in line


def test_an_old_firmware_wants_the_boards_name_in_the_configuration(desk):
    (desk / "stock.bin").write_bytes(combined(application(micropython="1.24.1")))
    assert '"hardware": "ESP32_GENERIC"' in refused(desk)
    (desk / "ota.json").write_text(json.dumps(edited(hardware="ESP32_GENERIC")))
    assert plan(desk).stock.micropython == "1.24.1"


def test_a_firmware_too_old_for_the_library_is_refused(desk):
    (desk / "stock.bin").write_bytes(combined(application(micropython="1.23.0")))
    assert "MicroPython 1.23.0: needs 1.24 or newer" in refused(desk)


def test_an_application_image_alone_is_refused_with_what_to_download(desk):
    (desk / "stock.bin").write_bytes(application())
    line = refused(desk)
    assert "application for esp32 alone" in line and "micropython.org/download" in line


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"UF2\nWQ]\x9e" + bytes(504), "a UF2 file"),
        (b"\x7fELF" + bytes(60), "an ELF file"),
        (b"<html>404</html>", "no firmware file"),
        (b"", "no firmware file"),
        (b"\xff" * 0x1000 + combined(application()), "a flash dump"),
        (combined(application())[:0x9000], "the file is damaged"),
        (combined(application())[:-40], "the file is damaged"),
    ],
    ids=["uf2", "elf", "html", "empty", "dump", "no-app", "cut-off"],
)
def test_another_kind_of_file_is_refused_by_name(desk, data, said):
    (desk / "stock.bin").write_bytes(data)
    assert said in refused(desk)


@pytest.mark.parametrize("at", [0x100, 0x7010, 0x20000], ids=["bootloader", "table", "app"])
def test_a_damaged_download_is_refused(desk, at):
    data = bytearray(combined(application(size=100_000)))
    data[at] ^= 0x10
    (desk / "stock.bin").write_bytes(data)
    assert "download it again" in refused(desk)


def test_a_firmware_of_another_chip_than_the_boards_is_refused(desk):
    with pytest.raises(flash.FlashError, match=r"has an esp32s3, .* is for an esp32: take"):
        plan(desk, chip="esp32s3")


def test_a_firmware_that_does_not_fit_is_refused_with_the_table_that_would(desk):
    (desk / "stock.bin").write_bytes(combined(application(size=2_050_000), csv=BIG_TABLE))
    assert "need a larger flash" in refused(desk) and "8MiB" in refused(desk)
    line = refused(desk, "--flash-size", "8MiB", "--table", "4MiB")
    assert "use --table 8MiB" in line and "1,835,008" in line
    line = refused(desk, "--flash-size", "16MiB", "--table", "8MiB-factory")
    assert "factory of the table 8MiB-factory 2,031,616: use --table 16MiB" in line


BIG_TABLE = (
    "nvs,data,nvs,0x9000,0x6000\nphy_init,data,phy,,4K\nfactory,app,factory,0x10000,0x2F0000"
)


@pytest.mark.parametrize(
    ("csv", "said"),
    [
        ("nvs,data,nvs,,16K\nfactory,app,factory,,1M", "0 OTA slots"),
        ("nvs,data,nvs,,16K\nota_0,app,ota_0,,1M\nota_1,app,ota_1,,1M", "no otadata"),
        ("otadata,data,ota,,8K\nota_0,app,ota_0,,1M\nota_1,app,ota_1,,1M", "label nvs"),
        (
            "nvs,data,nvs,,16K\no,data,ota,,8K\nota_0,app,ota_0,,1M\nota_1,app,ota_1,,1M",
            "add vfs, data, fat, 0x210000, 0x1f0000",
        ),
        (
            "nvs,data,nvs,,16K\no,data,ota,,8K\na,app,ota_0,,1M\nb,app,ota_1,,1M\nffat,data,fat,,1M",
            "ffat is FAT",
        ),
        ("nvs,data,nvs,,16K\nota_0,app,ota_0,0x11000,1M", "line 2"),
        ("nvs,data,nvs,,16K\nota_0,app,ota_0,,8M", "the flash ends at 0x400000"),
    ],
)
def test_a_table_that_no_update_could_use_is_refused(desk, csv, said):
    (desk / "mine.csv").write_text(csv)
    assert said in refused(desk, "--table", desk / "mine.csv")


def test_a_flash_too_small_for_two_slots_is_refused(desk):
    assert "2 MiB of flash" in refused(desk, "--flash-size", "2MiB")


def test_files_that_do_not_fit_the_volume_are_refused_with_the_figures(desk):
    (desk / "mine").mkdir()
    (desk / "mine" / "big.bin").write_bytes(os.urandom(500_000))
    line = refused(desk, "--files", desk / "mine")
    assert "no space left" in line and "458,752" in line


@pytest.mark.parametrize("more", [[], ["--to-file", "x", "--port", "y"]])
def test_one_of_port_and_file_has_to_be_given(desk, more):
    twinslot(*arguments(desk, *more), code=2)


# ---- what it says


def test_dry_run_says_what_would_be_done_and_writes_nothing(desk):
    out = desk / "flash.bin"
    done = twinslot(*arguments(desk, "--to-file", out, "--dry-run"))
    assert not out.exists()
    for text in ("ota_0", "0x390000", "MicroPython 1.28.0", "/ota/keys.json", "/lib/twinslot/"):
        assert text in done.stdout
    assert "nothing was written" in done.stderr


def test_the_plan_as_json(desk):
    found = json.loads(twinslot(*arguments(desk, "--dry-run", "--json")).stdout)
    assert found["chip"] == "esp32" and found["dry_run"] is True
    assert found["firmware"]["slot"] == "ota_0"
    assert found["firmware"]["build"] == application()[-32:].hex()
    assert found["firmware"]["micropython"] == "1.28.0"
    assert found["files"]["/ota.json"] == (desk / "ota.json").stat().st_size
    assert [p["label"] for p in found["partitions"]] == [
        p.label for p in layout.load_layout("4MiB")
    ]


# ---- onto a board


class FakeBoard:
    """A flash full of what was there before; erases and writes as esptool's stub does."""

    def __init__(self, size, before=None):
        self.data = bytearray(before or os.urandom(size // 64) * 64)
        self.calls = []

    def erase(self, offset, size, progress):
        assert offset % 4096 == 0 and size % 4096 == 0
        self.data[offset : offset + size] = b"\xff" * size
        self.calls.append(("erase", offset, size))
        progress(1, 1)

    def write(self, offset, data, progress):
        assert offset % 4096 == 0
        end = offset + -(-len(data) // 4096) * 4096
        self.data[offset:end] = data.ljust(end - offset, b"\xff")
        self.calls.append(("write", offset, len(data)))
        progress(len(data), len(data))

    def read(self, offset, size):
        return bytes(self.data[offset : offset + size])


def test_a_used_board_becomes_what_the_file_is(desk):
    made = plan(desk)
    board = FakeBoard(4 << 20)
    seen = []
    flash.install(made, board, lambda step, done, total: seen.append((step.what, done, total)))
    for part in made.partitions:
        size = part.size
        if part.type == table.TYPE_APP:
            size = len(made.stock.application) if part == made.slot else 4096
        span = slice(part.offset, part.offset + size)
        assert board.data[span] == made.flash[span], part.label
    assert board.data[0x8000:0x9000] == made.flash[0x8000:0x9000]
    loader = len(made.stock.bootloader)
    assert board.data[0x1000 : 0x1000 + loader] == made.flash[0x1000 : 0x1000 + loader]
    assert [what for what, _, _ in seen][:2] == ["bootloader", "partition table"]
    assert not flash.contents(FakeBoard(4 << 20, b"\xff" * (4 << 20)).read, 4 << 20)


def test_a_used_board_runs_what_was_flashed(desk):
    """Old littlefs blocks in the free space must not come back to life."""
    (desk / "mine").mkdir()
    (desk / "mine" / "main.py").write_text("import os\nprint(sorted(os.listdir('/')))\n")
    before = bytearray(plan(desk).flash)
    made = plan(desk, extra=desk / "mine")
    board = FakeBoard(4 << 20, before)
    flash.install(made, board)
    (desk / "flash.bin").write_bytes(board.data)
    result = Board(desk / "flash.bin").run(
        max_boots=1, timeout=20, until=lambda event: "ota.json" in event.get("line", "")
    )
    assert result.boots[0].partition == "ota_0" and result.boots[0].error is None
    assert "['boot.py', 'lib', 'main.py', 'ota', 'ota.json']" in result.console
    assert vfs.read_files(desk / "flash.bin") == made.files


def test_what_a_board_holds_is_named_before_it_is_erased(desk):
    def lost(data):
        return flash.contents(FakeBoard(len(data), data).read, len(data))

    ours = plan(desk).flash
    assert lost(ours) == ["vfs: a littlefs filesystem of 448 KiB"]
    empty = bytearray(ours)
    empty[0x390000:] = b"\xff" * 0x70000
    assert lost(bytes(empty)) == []
    stock_board = bytearray(b"\xff" * (4 << 20))
    file = (desk / "stock.bin").read_bytes()
    stock_board[0x1000 : 0x1000 + len(file)] = file
    assert lost(bytes(stock_board)) == []
    # Stock MicroPython's volume is not in its table: what is behind the last partition.
    stock_board[0x200000:] = ours[0x390000:].ljust(0x200000, b"\xff")
    assert lost(bytes(stock_board)) == ["vfs: a littlefs filesystem of 2,048 KiB"]
    fat = bytearray(stock_board)
    fat[0x200000:0x202000] = bytes(510) + b"\x55\xaa" + bytes(0x1E00)
    assert lost(bytes(fat)) == ["vfs: a FAT filesystem of 2,048 KiB"]


# ---- onto a board, through esptool


@pytest.fixture
def chip():
    """Return a maker of chips in download mode on a TCP port, as esptool meets them."""
    made = []

    def make(flash=None, size=4 << 20, **kw):
        data = bytearray(flash) if flash is not None else bytearray(b"\xff") * size
        made.append(FakeChip(data, **kw))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_bare_board_is_flashed_over_its_port(desk, chip):
    board = chip()
    done = twinslot(*arguments(desk, "--port", board.url, "--json"))
    found = json.loads(done.stdout)
    assert (found["port"], found["chip"], found["erases"]) == (board.url, "esp32", [])
    made = plan(desk)
    assert show.describe(bytes(board.flash)) == show.describe(made.flash)
    (desk / "flash.bin").write_bytes(board.flash)
    assert vfs.read_files(desk / "flash.bin") == made.files


@pytest.mark.filterwarnings("ignore:set(Daemon|Name):DeprecationWarning")  # pyserial 3.5
def test_a_board_behind_a_terminal_server_is_flashed_over_rfc2217(desk, chip, monkeypatch):
    # pyserial's client polls each of its settings every 50 ms, four times per command.
    quick = types.SimpleNamespace(sleep=lambda _: time.sleep(0.001))
    monkeypatch.setattr("serial.rfc2217.time", quick)
    board = chip()
    bridge = Rfc2217Bridge(board)
    bridge.start()
    found = json.loads(twinslot(*arguments(desk, "--port", bridge.url, "--json")).stdout)
    bridge.close()
    assert found["port"] == bridge.url
    assert show.describe(bytes(board.flash)) == show.describe(plan(desk).flash)


def test_the_table_follows_the_flash_that_was_found(desk, chip):
    board = chip(size=8 << 20)
    found = json.loads(twinslot(*arguments(desk, "--port", board.url, "--json")).stdout)
    assert (found["flash_size"], found["table"]) == (8 << 20, "8MiB")
    assert show.describe(bytes(board.flash))["header_flash_size"] == 8 << 20


def test_a_board_that_holds_files_is_only_erased_with_consent(desk, chip):
    board = chip(plan(desk).flash)
    before = bytes(board.flash)
    done = twinslot(*arguments(desk, "--port", board.url), code=1)
    assert "holds vfs: a littlefs filesystem of 448 KiB" in done.stderr
    assert "--yes" in done.stderr
    done = twinslot(*arguments(desk, "--port", board.url), code=1, stdin="n\n")
    assert "Erase all of it?" in done.stderr and "nothing was changed" in done.stderr
    assert board.flash == before and not board.ops
    twinslot(*arguments(desk, "--port", board.url), stdin="y\n")
    assert board.ops
    board.ops.clear()
    twinslot(*arguments(desk, "--port", board.url, "--yes"))
    assert board.ops


def test_dry_run_on_a_port_changes_nothing(desk, chip):
    board = chip(plan(desk).flash)
    done = twinslot(*arguments(desk, "--port", board.url, "--dry-run"))
    assert "ota_1" in done.stdout and "nothing was written" in done.stderr
    assert not board.ops


def test_a_board_with_another_chip_is_left_as_it_is(desk, chip):
    (desk / "stock.bin").write_bytes(combined(application("esp32c3"), "esp32c3"))
    board = chip()
    done = twinslot(*arguments(desk, "--port", board.url), code=1)
    assert "the board has an esp32, stock.bin is for an esp32c3" in done.stderr
    assert not board.ops


def test_a_worn_flash_is_noticed(desk, chip):
    board = chip(fail_at=0x10200)
    done = twinslot(*arguments(desk, "--port", board.url), code=1)
    assert "MD5" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_chip_that_encrypts_its_flash_is_refused(desk, chip):
    board = chip(efuses={0: 1 << 20})
    done = twinslot(*arguments(desk, "--port", board.url), code=1)
    assert "encrypts its flash" in done.stderr
    assert not board.ops


@pytest.mark.parametrize(
    ("port", "said"),
    [("socket://127.0.0.1:1", "by hand"), ("/dev/ttyNowhere", "is the board connected?")],
)
def test_a_port_with_nobody_there_is_said_with_what_to_do(desk, port, said):
    done = twinslot(*arguments(desk, "--port", port), code=1)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and port in lines[0] and said in lines[0]


def test_a_wrong_file_is_refused_before_the_board_is_reset(desk):
    (desk / "stock.bin").write_bytes(application())
    done = twinslot(*arguments(desk, "--port", "socket://127.0.0.1:1"), code=1)
    assert "application for esp32 alone" in done.stderr


# ---- alive


class FlashedLab(Lab):
    """A lab whose board was made by `twinslot flash`: only files of its volume run."""

    table = "4MiB"

    def make_board(self, version="1.0.0"):
        desk = self.folder / "desk"
        (desk / "ota").mkdir(parents=True)
        (desk / "stock.bin").write_bytes(combined(application(size=300_000)))
        shutil.copy(self.folder / "server" / "server.crt", desk / "ota" / "ca.pem")
        shutil.copy(keys.public_path(self.folder / "release.key"), desk / "ota" / "keys.json")
        settings = {
            **SETTINGS,
            "url": self.url,
            "version": version,
            "source": "server",
            "token": self._token("device"),
            "ntp": f"127.0.0.1:{self._time.port}",
            "poll": 1,
            "timeout": 5,
            "stable": 1,
            "deadline": 8,
            "hang": 3,
        }
        (desk / "ota.json").write_text(json.dumps(settings))
        size = layout.parse_size(self.table.split("-", maxsplit=1)[0])
        made = flash.make_plan(
            desk / "stock.bin", desk / "ota.json", flash_size=size, table=self.table, arch="x64"
        )
        self.flash.write_bytes(made.flash)
        self.board = Board(self.flash, **self._board_options)

    def next_stock(self, version):
        """Another build of stock firmware, as micropython.org would bring it next."""
        path = self.folder / f"micropython-{version}.bin"
        path.write_bytes(application(size=310_000, seed=sum(version.encode())))
        return path


def test_a_flashed_board_updates_itself_over_https(tmp_path):
    with FlashedLab(tmp_path / "lab") as lab:
        lab.power_on()
        lab.wait(lambda e: e.name == "idle")
        lab.publish(lab.next_stock("1.1.0"), "1.1.0")
        lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "1.1.0")
        lab.wait_for_server(lambda d: d["current_version"] == "1.1.0")
        lab.power_off()
        found = lab.describe()
        assert found["boots"] == "ota_1"
        assert [s["state"] for s in found["slots"]] == ["VALID", "VALID"]


class FactoryLab(FlashedLab):
    table = "8MiB-factory"


def test_a_factory_image_survives_a_bad_update_and_a_good_one_untouched(tmp_path):
    with FactoryLab(tmp_path / "lab") as lab:
        factory = slice(0x10000, 0x200000)
        before = lab.flash.read_bytes()[factory]
        lab.power_on()
        lab.wait(lambda e: e.name == "idle")
        lab.publish(lab.firmware("1.1.0", CRASH), "1.1.0")
        lab.wait(lambda e: e.name == "rolledback")
        lab.publish(lab.next_stock("1.2.0"), "1.2.0")
        lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "1.2.0")
        lab.power_off()
        booted = [b["partition"] for b in lab.boots if b["event"] == "boot"]
        assert booted[:3] == ["factory", "ota_0", "factory"] and booted[-1] != "factory"
        assert lab.flash.read_bytes()[factory] == before


# ---- genuine firmware, where somebody has some


def genuine():
    given = os.environ.get("TWINSLOT_FIRMWARE", "")
    for path in map(Path, filter(None, given.split(os.pathsep))):
        yield from sorted(path.glob("ESP32_GENERIC*.bin")) if path.is_dir() else [path]


@pytest.mark.parametrize("path", list(genuine()), ids=lambda p: p.name)
def test_genuine_firmware(desk, path):
    source = stock.load(path)
    assert source.micropython and source.build
    (desk / "ota.json").write_text(json.dumps(edited(hardware="ESP32_GENERIC")))
    made = flash.make_plan(path, desk / "ota.json", flash_size=8 << 20)
    found = show.describe(made.flash) if source.chip in show.CHIPS else None
    assert found is None or found["boots"] == "ota_0"
    loader = stock.with_flash_size(source.bootloader, 8 << 20)
    image = stock.images.check_with_esptool("bootloader", source.chip, loader)
    assert image.stored_digest == image.calc_digest
