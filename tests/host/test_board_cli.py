"""`twinslot board ...` from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from twinslot_tools.board_cli import make_fault
from twinslot_tools.virtual_esp32 import vfs
from twinslot_tools.virtual_esp32.chip.flash import torn

TWINSLOT = Path(sys.executable).with_name("twinslot")


def twinslot(*args, code=0):
    done = subprocess.run([TWINSLOT, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def app(tmp_path):
    """A folder with a program that boots twice."""
    folder = tmp_path / "app"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "tool.py").write_text("import machine\nCAUSE = machine.reset_cause()\n")
    (folder / "main.py").write_text(
        "import tool, machine\nprint('cause', tool.CAUSE)\nif tool.CAUSE == 1: machine.reset()\n"
    )
    return folder


def test_new_and_run_a_folder(tmp_path, app):
    flash = tmp_path / "flash.bin"
    twinslot("board", "new", "--files", app, "--out", flash)
    done = twinslot("board", "run", flash)
    assert done.stdout == "cause 1\ncause 2\n"
    assert "boots ota_0" in done.stderr and "idle" in done.stderr


def test_run_as_json(tmp_path, app):
    flash = tmp_path / "flash.bin"
    twinslot("board", "new", "--files", app, "--out", flash)
    found = json.loads(
        twinslot("board", "run", flash, "--json", "--heap", "128K", "--max-boots", 3).stdout
    )
    assert found["outcome"] == "idle"
    assert [b["reset_cause"] for b in found["boots"]] == ["power-on", "hard"]
    assert [b["console"] for b in found["boots"]] == ["cause 1\n", "cause 2\n"]
    assert found["heap"]["limit"] == 131072
    assert found["flash"]["ops"] == 2  # otadata's first entry


def test_firmware_in_a_slot_of_an_s3(tmp_path, app):
    flash, image = tmp_path / "flash.bin", tmp_path / "image.bin"
    twinslot(
        "board", "firmware", app, "--chip", "esp32s3", "--version", "1.2.3", "--out", image,
        "--size", "600K",
    )  # fmt: skip
    assert image.stat().st_size >= 600 * 1024
    twinslot(
        "board", "new", "--chip", "esp32s3", "--flash", "8MiB", "--slot", f"ota_1={image}",
        "--out", flash,
    )  # fmt: skip
    shown = json.loads(twinslot("board", "show", flash, "--json").stdout)
    assert shown["chip"] == "esp32s3" and shown["boots"] == "ota_1"
    assert [s["version"] for s in shown["slots"] if s["label"] == "ota_1"] == ["1.2.3"]
    assert "1.2.3" in twinslot("board", "show", flash).stdout


def test_boot_runs_the_bootloader_once_and_writes_otadata(tmp_path):
    flash = tmp_path / "flash.bin"
    twinslot("board", "new", "--out", flash)
    before = flash.read_bytes()
    found = json.loads(twinslot("board", "boot", flash, "--json").stdout)
    assert sorted(found) == ["boots", "log", "otadata"]
    assert found["boots"] == "ota_0"
    first, second = found["otadata"]
    assert first["seq"] == 1 and first["state"].lower() == "valid" and first["crc_ok"] is True
    assert second["seq"] == 0xFFFFFFFF and second["crc_ok"] is False
    assert all(sorted(e) == ["crc_ok", "seq", "state"] for e in found["otadata"])
    assert flash.read_bytes() != before
    assert vfs.read_files(flash) == {}


def test_boot_with_nothing_to_boot(tmp_path):
    flash, blank = tmp_path / "flash.bin", tmp_path / "blank.csv"
    twinslot("board", "new", "--out", flash)
    with flash.open("r+b") as f:
        f.seek(0x10000)
        f.write(b"\xff" * 4096)
    done = twinslot("board", "boot", flash, "--json", code=1)
    assert json.loads(done.stdout)["boots"] is None
    assert "no-boot" in twinslot("board", "run", flash, code=1).stderr
    assert not blank.exists()


def test_power_cut(tmp_path, app):
    flash = tmp_path / "flash.bin"
    twinslot("board", "new", "--files", app, "--out", flash)
    found = json.loads(
        twinslot("board", "run", flash, "--cut-at", 2, "--torn", "half", "--json").stdout
    )
    assert [b["outcome"] for b in found["boots"]] == ["power-cut", "reset", "idle"]


def test_a_program_that_fails_is_exit_code_1(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    (app / "main.py").write_text("1/0\n")
    flash = tmp_path / "flash.bin"
    twinslot("board", "new", "--files", app, "--out", flash)
    assert "ZeroDivisionError" in twinslot("board", "run", flash, code=1).stdout


def test_errors_are_one_line(tmp_path, app):
    flash = tmp_path / "flash.bin"
    (tmp_path / "bad.bin").write_bytes(b"not an image")
    for args, text in (
        (("new", "--slot", f"ota_9={tmp_path / 'bad.bin'}"), "no slot 'ota_9' in the table"),
        (("new", "--slot", f"ota_0={tmp_path / 'bad.bin'}"), "invalid magic byte"),
        (("new", "--slot", f"ota_0={tmp_path / 'none.bin'}"), "none.bin: No such file"),
        (("new", "--table", "nosuch"), "built-in layouts are"),
        (("new", "--flash", "3MiB"), "3"),
    ):
        done = twinslot("board", *args, "--out", flash, code=1)
        assert text in done.stderr
        assert done.stderr.startswith("twinslot: ") and done.stderr.count("\n") == 1
    (app / "big").write_bytes(bytes(600_000))
    done = twinslot("board", "new", "--files", app, "--out", flash, code=1)
    assert "no space left" in done.stderr
    done = twinslot("board", "run", tmp_path / "bad.bin", code=1)
    assert "no bootloader of a known chip" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("new",),
        ("new", "--slot", "ota_0", "--out", "x"),
        ("run", "nosuch.bin"),
        ("run",),
        ("nosuch",),
    ],
)
def test_wrong_usage_is_exit_code_2(args):
    twinslot("board", *args, code=2)


def test_every_command_has_help_with_an_example():
    for command in ("new", "run", "show", "boot", "firmware"):
        assert f"$ twinslot board {command}" in twinslot("board", command, "--help").stdout


@pytest.mark.parametrize("length", [4, 32, 256, 4096, 65536])
def test_torn_half_is_half(length):
    fault = make_fault(1, "half")
    result = torn(bytes(length), b"\xff" * length, fault.shape, fault.seed)
    assert result == b"\xff" * (length // 2) + bytes(length // 2)
