"""`twinslot log`: the attempts and the journal, out of a flash that a board has written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from boards import flash_file, new_board

from twinslot.errors import FormatError
from twinslot_tools import log_cli
from twinslot_tools.virtual_esp32 import layout
from twinslot_tools.virtual_esp32.chip.flash import flip_bits

SIZE = 4 << 20
LIB = Path(__file__).parents[2] / "lib" / "twinslot"
MAIN = """
from twinslot.journal import Journal
journal = Journal.shared()
for i in range(20):
    journal.add_to_log("1.%d.0" % i, "failed", "reason \\x1b[31m %d " % i + "x" * 90)
journal.add_to_log("2.0.0", "confirmed")
journal.update(trial={"build": "ab", "version": "2.1.0"}, failed=[["c0ffee", "1.9.0", "crash", 3]])
checkpoint = {"offset": 65536, "crc": 7, "of": 9, "at": 65536, "position": 0}
journal.save_checkpoint(checkpoint)
journal.set_starts(2)
"""


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    names = ("__init__", "journal", "health", "errors")
    files = {f"twinslot/{name}.py": (LIB / f"{name}.py").read_text() for name in names}
    board = new_board(tmp_path_factory.mktemp("board"), MAIN, files=files)
    result = board.run(timeout=20)
    assert result.outcome == "idle" and not result.boots[0].error, result.console
    return board.path


def twinslot(*words):
    return subprocess.run(
        [sys.executable, "-m", "twinslot_tools.cli", "log", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_newest_attempts_are_told_oldest_first(flash):
    notes = log_cli.read(flash.read_bytes())
    assert [a[1] for a in notes.attempts] == [f"1.{i}.0" for i in range(5, 20)] + ["2.0.0"]
    assert notes.attempts[-1][2:] == ["confirmed", ""]
    assert notes.starts == 2 and notes.damaged == []


def test_a_person_reads_attempts_failures_and_what_is_under_way(flash):
    before = flash.read_bytes()
    done = twinslot(flash)
    assert done.returncode == 0, done.stderr
    assert "on trial: 2.1.0" in done.stdout
    assert "failed here: 1.9.0 (c0ffee): crash" in done.stdout
    assert "kept up to byte 65536 of the image" in done.stdout
    assert "\x1b[31m" not in done.stdout
    assert flash.read_bytes() == before


def test_a_machine_reads_the_same(flash):
    found = json.loads(twinslot(flash, "--json").stdout)
    assert found["journal"]["trial"]["version"] == "2.1.0"
    assert len(found["attempts"]) == 16


def test_a_damaged_journal_is_told_and_takes_nothing_else_with_it(flash, tmp_path):
    part = next(p for p in layout.load_layout("4MiB", SIZE) if p.label == "nvs")
    content = flash.read_bytes()
    at = content.rindex(b'"trial"', part.offset, part.offset + part.size)
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(content)
    with damaged.open("r+b") as f:
        flip_bits(f, at, b"\x01")
    done = twinslot(damaged)
    assert done.returncode == 0, done.stderr
    assert "2.0.0" in done.stdout
    assert "on trial" not in done.stdout


def test_a_board_that_never_updated_has_nothing_to_tell(tmp_path):
    done = twinslot(flash_file(tmp_path / "new.bin"))
    assert (done.returncode, done.stdout) == (0, "no attempts noted\n")


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(8192), b"\xff" * 65536], ids=["empty", "byte", "zeros", "blank"]
)
def test_what_is_no_flash_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "it.bin"
    path.write_bytes(content)
    done = twinslot(path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("twinslot: ") and done.stderr.count("\n") == 1


def test_no_byte_of_nvs_that_rots_breaks_the_reader(flash):
    part = next(p for p in layout.load_layout("4MiB", SIZE) if p.label == "nvs")
    content = bytearray(flash.read_bytes())
    for at in range(part.offset, part.offset + part.size, 97):
        kept = content[at]
        content[at] ^= 0x5A
        try:
            log_cli.read(bytes(content))
        except FormatError:
            pass
        content[at] = kept
    assert content == flash.read_bytes()
