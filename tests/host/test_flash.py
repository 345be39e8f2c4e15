"""The NOR flash: what a part does, what drivers may do, and how power fails."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench import CHIP_FOLDER, run_on_cpython, run_on_micropython
from hypothesis import given
from hypothesis import strategies as st

from twinslot_tools.virtual_esp32.chip import flash as nor
from twinslot_tools.virtual_esp32.chip.flash import (
    BLOCK,
    PAGE,
    SECTOR,
    Fault,
    Flash,
    FlashError,
    PowerCut,
    Stats,
)

SIZE = 4 * BLOCK
CASES = Path(__file__).with_name("chip_cases.py")


def new_flash(size=SIZE, content=b"\xff", **options):
    return Flash(io.BytesIO(content * size), size, **options)


def content(flash):
    data = bytearray(flash.size)
    flash.read(0, data)
    return bytes(data)


# --- what cells do ---


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2 * SECTOR - 600), st.binary(max_size=600)),
            st.tuples(st.integers(0, 1), st.integers(0, 2)),
        ),
        max_size=12,
    )
)
def test_flash_behaves_as_cells_that_only_erase_sets(steps):
    size = 2 * SECTOR
    flash = new_flash(size, strict=False)
    cells = [0xFF] * size
    for where, what in steps:
        if isinstance(what, bytes):
            flash.program(where, what)
            for i, byte in enumerate(what):
                cells[where + i] &= byte
        else:
            last = min(where + what, 2)
            flash.erase(where * SECTOR, (last - where) * SECTOR)
            cells[where * SECTOR : last * SECTOR] = [0xFF] * ((last - where) * SECTOR)
    assert content(flash) == bytes(cells)


def test_programming_a_zero_back_to_one_is_an_error_that_names_the_address():
    flash = new_flash()
    flash.program(0x1234, b"\x0f\xf0")
    with pytest.raises(FlashError, match=r"0x1235: holds 0xf0, can't become 0xf1"):
        flash.program(0x1234, b"\x0f\xf1")


def test_strict_mode_accepts_what_only_clears_bits():
    flash = new_flash()
    flash.program(10, b"\xf0\xff")
    flash.program(10, b"\x80\x01")
    assert content(flash)[10:12] == b"\x80\x01"


@pytest.mark.parametrize(
    ("action", "offset", "size"),
    [
        ("erase", 1, SECTOR),
        ("erase", 0, SECTOR - 1),
        ("erase", SIZE - SECTOR, 2 * SECTOR),
        ("program", SIZE - 1, 2),
        ("program", -1, 2),
        ("read", SIZE, 1),
    ],
)
def test_out_of_range_or_unaligned_access_is_refused(action, offset, size):
    flash = new_flash(content=b"\x00")
    with pytest.raises(FlashError):
        getattr(flash, action)(offset, size if action == "erase" else bytearray(size))
    assert content(flash) == bytes(SIZE)


def test_a_file_of_another_size_is_refused():
    with pytest.raises(FlashError, match="8192 bytes, expected 4096"):
        Flash(io.BytesIO(bytes(8192)), 4096)


# --- operations, counters, time ---


@pytest.mark.parametrize(
    ("offset", "size", "sectors", "blocks"),
    [
        (0, SECTOR, 1, 0),
        (0, BLOCK, 0, 1),
        (SECTOR, BLOCK, 16, 0),  # never aligned with 64 KiB remaining
        (SECTOR, 2 * BLOCK, 16, 1),
        (BLOCK, BLOCK + SECTOR, 1, 1),
    ],
)
def test_erase_uses_block_commands_as_the_driver_does(offset, size, sectors, blocks):
    flash = new_flash(content=b"\x00")
    flash.erase(offset, size)
    counted = flash.stats.as_dict()
    assert (counted["sector_erases"], counted["block_erases"]) == (sectors, blocks)
    assert counted["ops"] == sectors + blocks
    assert counted["busy_us"] == sectors * 45_000 + blocks * 150_000
    erased = set(range(offset // SECTOR, (offset + size) // SECTOR))
    assert [n for n, count in enumerate(flash.stats.erases()) if count] == sorted(erased)
    data = content(flash)
    assert data[offset : offset + size] == b"\xff" * size
    assert data.count(0) == SIZE - size


def test_program_is_split_at_page_boundaries():
    flash = new_flash()
    flash.program(PAGE - 1, bytes(PAGE + 2))
    counted = flash.stats.as_dict()
    assert (counted["page_programs"], counted["bytes_programmed"]) == (3, PAGE + 2)
    assert counted["busy_us"] == 3 * 400


def test_a_whole_image_takes_the_time_the_data_sheet_says():
    """26 blocks and 6535 pages of the worked example: 7 to 9 s with 64 KiB erases."""
    flash = new_flash(26 * BLOCK)
    flash.erase(0, 26 * BLOCK)
    flash.program(0, bytes(1_672_800))
    assert flash.stats.as_dict()["page_programs"] == 6535
    assert 6.0 < flash.stats.as_dict()["busy_us"] / 1e6 < 9.0


def test_counters_run_on_in_the_stats_file(tmp_path):
    path = tmp_path / "stats"
    path.touch()
    for _ in range(3):
        with path.open("r+b", buffering=0) as file:
            flash = new_flash(stats=Stats(file, SIZE))
            flash.erase(SECTOR, SECTOR)
            flash.program(0, b"x")
    with path.open("rb") as file:
        stats = Stats(file)
        assert stats.ops == 6
        assert stats.flash_size == SIZE
        assert list(stats.erases())[:3] == [0, 3, 0]


def test_stats_of_another_flash_are_refused():
    file = io.BytesIO()
    Stats(file, SIZE)
    with pytest.raises(FlashError, match="expected"):
        Stats(file, 2 * SIZE)
    with pytest.raises(FlashError, match="saw"):
        Stats(io.BytesIO(b"something else altogether" * 99), SIZE)


def test_a_killed_process_loses_no_write_and_no_count(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import flash\n"
        "size = 1 << 20\n"
        "f = flash.Flash(open(sys.argv[2], 'r+b'), size,\n"
        "    stats=flash.Stats(open(sys.argv[3], 'r+b'), size))\n"
        "print('begin')\n"
        "at = 0\n"
        "while True:\n"
        "    f.program(at % size, b'\\x00' * 256)\n"
        "    at += 256\n"
    )
    flash_file, stats_file = tmp_path / "flash", tmp_path / "stats"
    flash_file.write_bytes(b"\xff" * (1 << 20))
    stats_file.touch()
    micropython = Path(sys.executable).with_name("micropython")
    with subprocess.Popen(
        [micropython, script, CHIP_FOLDER, flash_file, stats_file], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with stats_file.open("rb", buffering=0) as file:
            stats = Stats(file)
            while stats.ops < 100:
                stats.reload()
        process.send_signal(signal.SIGKILL)
    with stats_file.open("rb") as file:
        ops = Stats(file).ops
    programmed = flash_file.read_bytes().count(0) // 256
    # Killed between the count and the write, one operation is counted and not done.
    assert min(ops, 4096) - programmed in (0, 1)


# --- power cuts ---


def cut_flash(mode, shape=None, seed=0, op=2):
    flash = new_flash(content=b"\xf0", strict=False, fault=Fault(op, mode, shape, seed))
    flash.program(0, b"\x30")
    return flash


def test_nothing_works_after_the_cut_and_it_is_told_once():
    flash = cut_flash("before")
    told = []
    flash.on_cut = lambda: told.append(True)
    for action in (
        lambda: flash.program(300, b"\x00"),
        lambda: flash.program(300, b"\x00"),
        lambda: flash.erase(0, SECTOR),
        lambda: flash.read(0, bytearray(1)),
    ):
        with pytest.raises(PowerCut):
            action()
    assert told == [True]
    assert flash.dead


def test_cut_counts_operations_over_boots_and_strikes_once():
    file, stats = io.BytesIO(b"\xff" * SIZE), Stats(None, SIZE)
    fault = Fault(3, "before", None, 0)
    first = Flash(file, SIZE, stats=stats, fault=fault)
    first.program(0, b"a")
    second = Flash(file, SIZE, stats=stats, fault=fault)
    second.program(SECTOR, b"b")
    with pytest.raises(PowerCut):
        second.program(2 * SECTOR, b"c")
    third = Flash(file, SIZE, stats=stats, fault=fault)
    third.program(3 * SECTOR, b"d")
    data = content(third)
    assert [data[i * SECTOR] for i in range(4)] == [*b"ab", 0xFF, *b"d"]


@pytest.mark.parametrize(("mode", "expected"), [("before", b"\xf0"), ("after", b"\xff")])
def test_cut_before_or_after_an_erase(mode, expected):
    flash = cut_flash(mode)
    with pytest.raises(PowerCut):
        flash.erase(SECTOR, SECTOR)
    flash.dead = False
    assert content(flash)[SECTOR : 2 * SECTOR] == expected * SECTOR


def torn_content(action, shape, seed):
    flash = cut_flash("torn", shape, seed)
    with pytest.raises(PowerCut):
        action(flash)
    flash.dead = False
    return content(flash)


def test_torn_prefix_meets_every_length_of_a_program():
    data = bytes(range(32))
    seen = {
        torn_content(lambda f: f.program(PAGE, data), "prefix", seed)[PAGE : PAGE + 32]
        for seed in range(33)
    }
    old = b"\xf0" * 32
    new = bytes(b & 0xF0 for b in data)
    assert seen == {new[:k] + old[k:] for k in range(33)}


@pytest.mark.parametrize("shape", [*nor.SHAPES, None])
@pytest.mark.parametrize("seed", range(8))
def test_torn_operation_changes_only_bits_on_their_way(shape, seed):
    """F2, F3: whatever is left lies between the old and the new content, and only there."""
    data = bytes([0x5A]) * PAGE
    after_program = torn_content(lambda f: f.program(PAGE, data), shape, seed)
    for got in after_program[PAGE : 2 * PAGE]:
        assert got & 0xF0 == got
        assert got & 0x50 == 0x50
    assert after_program[2 * PAGE :] == b"\xf0" * (SIZE - 2 * PAGE)

    after_erase = torn_content(lambda f: f.erase(BLOCK, 2 * BLOCK), shape, seed)
    assert all(got & 0xF0 == 0xF0 for got in after_erase[BLOCK : 2 * BLOCK])
    assert after_erase[2 * BLOCK :] == b"\xf0" * 2 * BLOCK  # the second command never began


def test_torn_shapes_leave_what_they_are_named_after():
    def program(flash):
        flash.program(PAGE, bytes(64))

    def left(shape, seed):
        return torn_content(program, shape, seed)[PAGE : PAGE + 64]

    assert left("untouched", 3) == b"\xf0" * 64
    assert left("done", 3) == bytes(64)
    assert left("prefix", 20) == bytes(20) + b"\xf0" * 44
    assert left("suffix", 20) == b"\xf0" * 44 + bytes(20)
    mixed = {left("bits", seed) for seed in range(20)}
    assert len(mixed) == 20
    ones = sorted(sum(b.bit_count() for b in m) for m in mixed)
    assert ones[0] < 20 and ones[-1] > 100  # from nearly done to half done, of 256 bits


def test_seed_alone_chooses_among_all_shapes():
    old, new = b"\xff" * 256, bytes(256)
    kinds = set()
    for seed in range(60):
        got = nor.torn(old, new, None, seed)
        if got in (old, new):
            kinds.add("untouched" if got == old else "done")
        elif set(got) <= {0x00, 0xFF}:
            kinds.add("prefix" if got[0] == 0x00 else "suffix")
        else:
            kinds.add("bits")
    assert kinds == set(nor.SHAPES)


def test_unsteady_cells_read_differently_until_they_are_erased_or_programmed_to_0():
    cells = io.BytesIO(nor.unsteady_cells(PAGE, b"\x0f" * PAGE))
    file = io.BytesIO(b"\xff" * SIZE)

    def reads(flash, at):
        got = bytearray(PAGE)
        for _ in range(20):
            flash.read(at, got)
            yield bytes(got)

    flash = Flash(file, SIZE, unsteady=cells)
    seen = set(reads(flash, PAGE))
    assert len(seen) == 20
    assert {b | 0x0F for got in seen for b in got} == {0xFF}
    assert set(reads(flash, 0)) == {b"\xff" * PAGE}
    half = next(reads(flash, PAGE // 2))
    assert half[: PAGE // 2] == b"\xff" * (PAGE // 2) and half[PAGE // 2 :] != half[: PAGE // 2]

    flash.program(PAGE, b"\xf5" * PAGE)  # two of the four bits to 0
    cells.seek(0)  # as the next boot finds it
    flash = Flash(file, SIZE, unsteady=cells)
    assert {b | 0x05 for got in reads(flash, PAGE) for b in got} == {0xF5}
    assert len(set(reads(flash, PAGE))) == 20
    flash.erase(0, SECTOR)
    assert set(reads(flash, PAGE)) == {b"\xff" * PAGE}


@pytest.mark.parametrize(
    "fault", [Fault(0, "torn", None, 0), Fault(1, "never", None, 0), Fault(1, "torn", "half", 0)]
)
def test_a_fault_plan_that_means_nothing_is_refused(fault):
    with pytest.raises(FlashError, match="bad fault plan"):
        new_flash(fault=fault)


def test_flipped_bits_ignore_nor_rules(tmp_path):
    path = tmp_path / "flash"
    path.write_bytes(b"\x00\x0f\xff")
    with path.open("r+b") as file:
        nor.flip_bits(file, 0, b"\x01\x10\x80")
    assert path.read_bytes() == b"\x01\x1f\x7f"


def test_micropython_leaves_the_same_flash_as_cpython(tmp_path):
    here, there = tmp_path / "c", tmp_path / "m"
    os.mkdir(here), os.mkdir(there)
    output = run_on_cpython(CASES, "flash", str(here))
    assert run_on_micropython(CASES, "flash", str(there)) == output
    assert "power cut at operation 90" in output
