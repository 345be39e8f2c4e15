"""The chip's process: a clone of a mother is what a new process would be, and dies with us."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boards import new_board
from powercut import STORIES, make_board, run_to_rest, switch_on
from sweep import read_trace

from twinslot_tools.virtual_esp32 import process

cloned = pytest.mark.skipif(process._mothers() is None, reason="no clones on this machine")


def life(path, base, folder, name):
    """A whole life: what it did to flash, what it said, and the heap it found and left."""
    path.write_bytes(base)
    trace = folder / name
    result = run_to_rest(switch_on(path), STORIES["crash-down"], trace=trace)
    operations = [(op.at, op.size, op.data is None) for op in read_trace(trace)]
    boots = [(b.partition, b.reset_cause, b.outcome, b.error, b.console) for b in result.boots]
    return operations, boots, [b.heap["start"] for b in result.boots]


@cloned
def test_a_clone_lives_as_a_new_process_does_whatever_was_cloned_before(tmp_path, monkeypatch):
    path = make_board(tmp_path / "board", STORIES["crash-down"])
    base = path.read_bytes()
    clones = [life(path, base, tmp_path, f"clone{i}") for i in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(process, "_mothers", lambda: None)
        new = life(path, base, tmp_path, "new")
    assert len(new[1]) == 3
    for operations, boots, heaps in clones:
        assert operations == new[0]
        assert [b[:4] for b in boots] == [b[:4] for b in new[1]]
        assert words(boots) == words(new[1])
        for heap, wanted in zip(heaps, new[2], strict=True):
            assert heap["alloc"] + heap["free"] == wanted["alloc"] + wanted["free"]
            assert abs(heap["free"] - wanted["free"]) <= 64  # a block or two that found no plug


def words(boots):
    """What was said, but how long it took."""
    return [word for b in boots for word in b[4].split() if not word.startswith("ms=")]


@cloned
def test_a_board_runs_on_when_its_mother_is_dead(tmp_path):
    path = make_board(tmp_path / "board", STORIES["good"])
    base = path.read_bytes()
    assert run_to_rest(switch_on(path), STORIES["good"]).outcome == "idle"
    for mother in process._mothers()._known.values():
        mother._popen.kill()
    path.write_bytes(base)
    assert run_to_rest(switch_on(path), STORIES["good"]).outcome == "idle"


HANGS = """
import sys
from pathlib import Path
from twinslot_tools.virtual_esp32 import vfs
from twinslot_tools.virtual_esp32.board import Board

path = Path(sys.argv[1])
vfs.write_files(path, {"/main.py": b"print('busy')\\nwhile True: pass"})

def say(line):
    tasks = Path("/proc/self/task").glob("*/children")
    print(*(pid for task in tasks for pid in task.read_text().split()), flush=True)

Board(path).run(on_console=say)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("clone", ["0", "1"])
def test_the_chip_dies_with_its_board(tmp_path, clone, monkeypatch):
    if clone == "0" and not process._leash():
        pytest.skip("no setpriv here")
    monkeypatch.setenv("TWINSLOT_CLONE", clone)
    path = make_board(tmp_path / "board", STORIES["good"])
    board = subprocess.Popen([sys.executable, "-c", HANGS, path], stdout=subprocess.PIPE)
    children = board.stdout.readline().split()
    assert children
    board.send_signal(signal.SIGKILL)
    board.wait()
    board.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a chip runs without its board"
        time.sleep(0.02)


def alive(pid):
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


COLLECTING = """
import _thread, gc, time
done = []
def collect():
    gc.collect()
    done.append(1)
for n in range(20):
    _thread.start_new_thread(collect, ())
    while len(done) <= n:
        time.sleep_ms(1)
print("collected", len(done))
"""


@cloned
def test_a_thread_of_a_clone_can_collect_garbage(tmp_path):
    """The collector stops the other threads by the numbers libc knows them by."""
    result = new_board(tmp_path, COLLECTING).run(timeout=30)
    assert "collected 20" in result.console
