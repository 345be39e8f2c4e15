"""Run a virtual board: power supply, reset logic, watchdog and console of a flash file.

    board = Board("flash.bin", heap="128K")
    result = board.run(max_boots=3, timeout=10, on_console=print)
    result.boots[0].partition, result.boots[-1].outcome

With `port` (see `port.py`) the board has a UART, and its prompt is there after main.py, or after a
Ctrl-C; without one its stdin is closed and it only prints.

Each boot is the bootloader model, then a process of MicroPython's unix port that runs what the
flash holds (`chip/start.py`). That process tells over a pipe what ends the boot and then stands
still until it is killed here, so a reset is as final as on a board. Deep sleep is not slept: the
board's clock is put forward instead.

Outcomes of a boot:
    reset, soft-reset, deepsleep, wdt, panic    as on a board; another boot follows
    power-cut   at the flash operation of the fault plan, or by `cut_power`; another boot follows
    idle        boot.py and main.py are done (or failed: see `error`) and nothing else can happen
    stopped     by `stop`, by `until`, or because it was the last of `max_boots`
    timeout     the time was up
    no-boot     the bootloader found nothing to boot
    crash       the chip's process died: a fault of the simulator or of the interpreter
"""

import hashlib
import json
import os
import queue
import re
import selectors
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import show
from .bootloader import RTC_RECORD_SIZE, BootResult
from .bootloader import boot as run_bootloader
from .chip import image, table
from .chip.flash import Fault, Flash, PowerCut, Stats
from .port import Port
from .process import BoardError, Process, find_micropython

PWRON_RESET = 1
HARD_RESET = 2
WDT_RESET = 3
DEEPSLEEP_RESET = 4
SOFT_RESET = 5

# What the chip says when a boot ends, and the cause of the reset that follows.
_NEXT_CAUSE = {
    "reset": HARD_RESET,
    "panic": HARD_RESET,
    "wdt": WDT_RESET,
    "deepsleep": DEEPSLEEP_RESET,
    "soft-reset": SOFT_RESET,
    "power-cut": PWRON_RESET,
}
CAUSE_NAMES = {1: "power-on", 2: "hard", 3: "wdt", 4: "deep sleep", 5: "soft"}

# Objects of the 64-bit unix port are about twice as large as the ESP32's: this stands for some
# 128 KiB, what a board without PSRAM has left once Wi-Fi is up.
DEFAULT_HEAP = 256 * 1024

EPOCH_2000 = 946684800  # seconds from 1970 to 2000
_RTC_FILE_SIZE = 8 + 2 + 2048 + 2  # see chip/soc.py
_INTERRUPT, _NO_NETWORK = 2058, 2059

# What waits heeds Ctrl-C at once; code that has computed for so long gets a signal. A machine
# with much to do must not come to that: see `heed` in chip/soc.py.
_PATIENCE_S = 3.0

# Build name and sys.implementation._machine of MicroPython's generic boards.
HARDWARE = {
    "esp32": ("ESP32_GENERIC", "Generic ESP32 module with ESP32"),
    "esp32s3": ("ESP32_GENERIC_S3", "Generic ESP32S3 module with ESP32S3"),
    "esp32c3": ("ESP32_GENERIC_C3", "Generic ESP32C3 module with ESP32C3"),
    "esp32c5": ("ESP32_GENERIC_C5", "ESP32C5 module with ESP32-C5"),
}

# (total, free, largest, lowest free) of the IDF heap's data regions with Wi-Fi up.
_IDF_HEAP = [
    (7288, 0, 0, 0),
    (16648, 4, 0, 4),
    (79912, 36712, 35840, 36712),
    (15072, 15036, 14848, 15036),
    (113840, 69980, 65536, 62104),
]


@dataclass
class Boot:
    """One boot, from reset to what ended it.

    Attributes:
        partition: label of the slot that ran; None if the bootloader didn't get that far.
        reset_cause: machine.reset_cause() of this boot.
        outcome: see the module's text.
        why: the bootloader's reason for the slot; for a panic or crash, what happened.
        error: traceback of an uncaught exception in boot.py or main.py.
        console: what was printed.
        bootloader_log: its lines.
        heap: {"start": {"alloc", "free"}, "end": {...}} in bytes, as far as known.
        seconds: how long it ran.
    """

    partition: str | None
    reset_cause: int
    outcome: str = ""
    why: str = ""
    error: str | None = None
    console: str = ""
    bootloader_log: list[str] = field(default_factory=list)
    heap: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "reset_cause": CAUSE_NAMES[self.reset_cause]}


@dataclass
class RunResult:
    """Boots of a run, flash counters of that run (`Stats.as_dict`), and heap figures in bytes."""

    boots: list[Boot]
    flash: dict[str, int]
    heap: dict[str, int]

    @property
    def outcome(self) -> str:
        return self.boots[-1].outcome

    @property
    def console(self) -> str:
        return "".join(boot.console for boot in self.boots)

    def as_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "boots": [boot.as_dict() for boot in self.boots],
            "flash": self.flash,
            "heap": self.heap,
        }


def parse_size(text: int | str) -> int:
    """Bytes from 131072, "128K" or "2M"."""
    match = re.fullmatch(r"(\d+)\s*([KM]?)(i?B)?", str(text).strip(), re.IGNORECASE)
    if not match:
        raise BoardError(f"size {text!r}: expected a number of bytes, or e.g. 128K")
    return int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2].upper()]


class _Rtc:
    """The RTC domain: clock, user memory, and the bootloader's note of what it booted."""

    def __init__(self, path: Path, clock: str | float | None, network: bool, speed: int):
        self.path = path
        self.clock = clock
        self.network = network
        self.speed = speed
        self.origin = time.time()
        self.bootloader = bytearray(RTC_RECORD_SIZE)
        self.lose_power()

    def lose_power(self) -> None:
        """Memory gone, clock at 2000-01-01 (or as the board was configured)."""
        now = time.time()
        now += (now - self.origin) * (self.speed - 1)
        base = now - EPOCH_2000
        if self.clock == "host":
            base = 0.0
        elif self.clock is not None:
            base = now - float(self.clock)
        start = int((base + EPOCH_2000) * 1e6)
        data = struct.pack("<q", start).ljust(_NO_NETWORK, b"\0")
        self.path.write_bytes(data + bytes([not self.network]))
        self.bootloader[:] = bytes(len(self.bootloader))

    def put(self, offset: int, value: int) -> None:
        """Write a byte, also while the chip runs."""
        with self.path.open("r+b", buffering=0) as f:
            f.seek(offset)
            f.write(bytes([value]))

    def sleep(self, ms: int) -> None:
        """Put the clock forward."""
        data = bytearray(self.path.read_bytes())
        struct.pack_into("<q", data, 0, struct.unpack_from("<q", data)[0] - ms * 1000)
        self.path.write_bytes(data)


class Board:
    """A board whose flash is a file.

    Args:
        flash_path: the whole flash; it is written to.
        chip: name, where the bootloader's header can't tell.
        heap: what user code may allocate: bytes, or e.g. "128K".
        clock: None: unset at power-on (2000-01-01); "host": set; a number: Unix time at power-on.
        hardware: sys.implementation._build, e.g. "ESP32_GENERIC".
        mac: 6 bytes; by default Espressif's prefix and three bytes of the file name's hash.
        network: False: no Wi-Fi in reach, until `set_network`.
        strict: True: programming a 0 bit back to 1 is an error; False: the flash ANDs.
        unsteady: file of flash cells whose reads differ, see `chip/flash.py`, or None.
        idf6: set_boot of the active slot as IDF 6 does it.
        idf_heap: regions that esp32.idf_heap_info(HEAP_DATA) tells.
        speed: how many seconds of the board pass in one of the host's.
        wrap_in_ms: the ticks of each boot start so long before the 2**30 at which those of a
            32-bit port start again from 0; None: as those of the host.
        micropython: the interpreter's path.
    """

    def __init__(
        self,
        flash_path: Path | str,
        *,
        chip: str | None = None,
        heap: int | str | None = None,
        clock: str | float | None = None,
        hardware: str | None = None,
        mac: bytes | None = None,
        network: bool = True,
        strict: bool = True,
        unsteady: Path | None = None,
        idf6: bool = False,
        idf_heap: list[tuple[int, int, int, int]] | None = None,
        speed: int = 1,
        wrap_in_ms: int | None = None,
        micropython: str | None = None,
    ):
        self.path = Path(flash_path).resolve()
        if not self.path.is_file():
            raise BoardError(f"no flash file {flash_path}")
        self.size = self.path.stat().st_size
        self.chip = chip or self._identify_chip()
        self.heap = parse_size(heap) if heap is not None else DEFAULT_HEAP
        self.interpreter = micropython or find_micropython()
        build, machine = HARDWARE[self.chip]
        tail = hashlib.sha256(str(self.path).encode()).digest()[:3]
        self._config = {
            "flash_size": self.size,
            "chip": self.chip,
            "hardware": hardware or build,
            "machine": machine if hardware in (None, build) else f"{hardware} with {self.chip}",
            "mac": list(mac or b"\x24\x0a\xc4" + tail),
            "strict": strict,
            "unsteady": unsteady and str(unsteady),
            "idf6": idf6,
            "idf_heap": idf_heap or _IDF_HEAP,
            "speed": speed,
            "wrap_in_ms": wrap_in_ms,
        }
        self._scratch = Path(tempfile.mkdtemp(prefix="virtual-esp32-", dir=memory()))
        self._rtc = _Rtc(self._scratch / "rtc", clock, network, speed)
        self._config["origin"] = int(self._rtc.origin * 1e6)
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._bell = os.pipe()
        os.set_blocking(self._bell[0], False)
        weakref.finalize(self, _dispose, self._scratch, self._bell)

    def _identify_chip(self) -> str:
        with self.path.open("rb") as f:
            known = show.identify_chip(f.read(table.TABLE_OFFSET))
        if known is None:
            raise BoardError(f"{self.path.name}: no bootloader of a known chip; is it a flash?")
        return known.name

    @property
    def mac(self) -> bytes:
        return bytes(self._config["mac"])

    # ---- buttons; any thread, also from within a callback

    def stop(self) -> None:
        """End the run; the boot's outcome is "stopped"."""
        self._press("stopped")

    def press_reset(self) -> None:
        """Press the reset button (EN). On the ESP32 that reads as a power-on reset."""
        self._press("reset-button")

    def cut_power(self) -> None:
        """Take the power away and give it back."""
        self._press("power-cut")

    def set_network(self, in_reach: bool) -> None:
        """Switch the Wi-Fi network on or off; the board is in it, or is not, at once."""
        self._rtc.network = in_reach
        self._rtc.put(_NO_NETWORK, not in_reach)

    def _press(self, what: str) -> None:
        self._commands.put(what)
        os.write(self._bell[1], b"!")

    # ---- running

    def run(
        self,
        max_boots: int | None = None,
        timeout: float = 60.0,
        *,
        on_event: Callable[[dict[str, Any]], object] | None = None,
        on_console: Callable[[str], object] | None = None,
        until: Callable[[dict[str, Any]], object] | None = None,
        fault: Fault | None = None,
        trace: Path | None = None,
        reset_cause: int = PWRON_RESET,
        stop_when_idle: bool = True,
        port: Port | None = None,
    ) -> RunResult:
        """Switch the board on and let it run.

        Args:
            max_boots: stop after so many boots (soft resets count).
            timeout: seconds for the whole run.
            on_event: called with each event: {"event": name, ...}. Names: boot, boot-end, and
                what the chip tells (heap, wdt, pin, idle, reset ...).
            on_console: called with each line printed.
            until: called with each event and with {"event": "console", "line": text}; a true
                answer stops the run.
            fault: where to cut the power; operations are counted from the start of this run.
            trace: file that every flash operation is appended to, see `chip/flash.py`.
            reset_cause: of the first boot. Anything but power-on finds the RTC as it was left.
            stop_when_idle: False: a board at its prompt goes on until the time is up.
            port: the board's UART; with one it never counts as idle.
        """
        stop_when_idle = stop_when_idle and port is None
        run = _Run(self, timeout, on_event, on_console, until, fault, trace, stop_when_idle, port)
        cause = reset_cause
        part: BootResult | None = None
        while True:
            if cause == PWRON_RESET:
                self._rtc.lose_power()
            if cause != SOFT_RESET or part is None:
                part = run.bootloader(cause)
            if part is not None and part.partition is not None:
                run.chip(part, cause)
            last = run.boots[-1]
            run.tell({"event": "boot-end", "outcome": last.outcome, "partition": last.partition})
            if run.stopping or last.outcome not in _NEXT_CAUSE:
                break
            if last.outcome == "deepsleep" and not run.sleep_ms:
                break
            if max_boots is not None and len(run.boots) >= max_boots:
                break
            cause = run.next_cause
        return run.result()

    def _tree_size(self, booted: BootResult) -> int:
        """Bytes of the Python tree in the image that boots; 0 for a genuine one."""
        with self.path.open("rb", buffering=0) as f:
            found = image.find_tree(_at(f, booted.partition.offset), booted.image)
        return found[1] if found else 0


@cache
def memory() -> str | None:
    """Where small files are made and deleted fast; None: where all temporary files go."""
    shm = "/dev/shm"
    return shm if os.access(shm, os.W_OK) else None


def _dispose(scratch: Path, pipe: tuple[int, int]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    for fd in pipe:
        os.close(fd)


def _at(file, start: int) -> Callable[[int, bytearray], None]:
    def read(offset: int, buf: bytearray) -> None:
        file.seek(start + offset)
        file.readinto(buf)

    return read


class _Lines:
    """Whole lines out of chunks."""

    def __init__(self):
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return lines

    def rest(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class _Run:
    """State of one `Board.run`."""

    def __init__(
        self, board, timeout, on_event, on_console, until, fault, trace, stop_when_idle, port
    ):
        self.board = board
        self.port: Port | None = port
        self.deadline = time.monotonic() + timeout
        self.on_event = on_event
        self.on_console = on_console
        self.until = until
        self.fault = fault
        self.trace: Path | None = trace
        self.stop_when_idle = stop_when_idle
        self.boots: list[Boot] = []
        self.stopping = False
        self.next_cause = HARD_RESET
        self.sleep_ms = 0
        self.heap_taken = 0
        self.stats_path = board._scratch / "stats"
        self.stats_path.unlink(missing_ok=True)
        with self.stats_path.open("w+b", buffering=0) as f:
            Stats(f, board.size)
        self.wdt_ms = 0  # 0: not armed
        self.wdt_deadline = 0.0
        self.repl_mode = "friendly"
        self.at_prompt = False
        self.interrupt_at: float | None = None  # when to send a signal for a Ctrl-C

    def tell(self, event: dict[str, Any]) -> None:
        if self.on_event and event["event"] != "console":
            self.on_event(event)
        if self.until and self.until(event):
            self.stopping = True

    def result(self) -> RunResult:
        with self.stats_path.open("rb", buffering=0) as f:
            flash = Stats(f).as_dict()
        heap = {"limit": self.board.heap, "fakes": self.heap_taken}
        return RunResult(self.boots, flash, heap)

    # ---- the bootloader

    def bootloader(self, cause: int) -> BootResult | None:
        """Run it. On a power cut, or with nothing to boot, that was this boot."""
        board = self.board
        self.wdt_ms = 0
        log: list[str] = []
        boot = Boot(None, cause, bootloader_log=log)
        unsteady = board._config["unsteady"]
        with (
            board.path.open("r+b", buffering=0) as f,
            self.stats_path.open("r+b", buffering=0) as s,
            self.trace.open("ab", buffering=0) if self.trace else nullcontext() as trace,
            open(unsteady, "r+b", buffering=0) if unsteady else nullcontext() as cells,
        ):
            flash = Flash(
                f,
                board.size,
                stats=Stats(s, board.size),
                strict=board._config["strict"],
                fault=self.fault,
                trace=trace,
                unsteady=cells,
            )
            try:
                found = run_bootloader(
                    flash, board.chip, reset_cause=cause, rtc=board._rtc.bootloader, log=log
                )
            except PowerCut as cut:
                boot.outcome, boot.why = "power-cut", f"in the bootloader: {cut}"
                self.boots.append(boot)
                self.next_cause = PWRON_RESET
                return None
            finally:
                flash.stats.save()
        if found.partition is None:
            boot.outcome, boot.why = "no-boot", found.why
            self.boots.append(boot)
        return found

    # ---- the chip

    def chip(self, booted: BootResult, cause: int) -> None:
        """Run one boot of the chip, to its end."""
        boot = Boot(booted.partition.label, cause, why=booted.why, bootloader_log=list(booted.log))
        self.boots.append(boot)
        self.tell({"event": "boot", "partition": boot.partition, "reset_cause": cause})
        if self.stopping:
            boot.outcome = "stopped"
            return
        board = self.board
        config = {
            **board._config,
            "flash": str(board.path),
            "stats": str(self.stats_path),
            "trace": str(self.trace) if self.trace else None,
            "repl": self.repl_mode if self.port else None,
            "rtc": str(board._rtc.path),
            "running": booted.partition.offset,
            "reset_cause": cause,
            "fault": None if self.fault is None else list(self.fault),
        }
        if self.port and cause != SOFT_RESET:
            self.port.drain()
        started = time.monotonic()
        self.at_prompt = False
        self.interrupt_at = None
        with open(os.devnull, "rb") as nothing:
            process = Process(
                board.interpreter,
                board.heap,
                board._tree_size(booted),
                config,
                self.port.stdin if self.port else nothing.fileno(),
            )
        try:
            self.watch(process, boot)
        except BaseException:
            process.kill()
            raise
        boot.seconds = round(time.monotonic() - started, 3)

    def watch(self, process: Process, boot: Boot) -> None:
        """Carry console and events until the boot ends, then kill the chip."""
        console, wire = _Lines(), _Lines()
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ, "console")
        selector.register(process.wire, selectors.EVENT_READ, "wire")
        selector.register(self.board._bell[0], selectors.EVENT_READ, "bell")
        if self.port:
            selector.register(self.port, selectors.EVENT_READ, "port")
        printed: list[bytes] = []
        with selector:
            while not boot.outcome:
                wait = min(self.deadline - time.monotonic(), 3600.0)
                if self.wdt_ms:
                    wait = min(wait, self.wdt_deadline - time.monotonic())
                if self.interrupt_at:
                    wait = min(wait, self.interrupt_at - time.monotonic())
                for key, _ in selector.select(max(0.0, wait)):
                    if key.data == "bell":
                        self.obey(boot)
                        continue
                    if key.data == "port":
                        self.typed(self.port.receive())
                        continue
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        selector.unregister(key.fileobj)
                        if key.data == "wire" and not boot.outcome:
                            boot.outcome = "crash"
                    elif key.data == "console":
                        printed.append(chunk)
                        if self.port:
                            self.port.send(chunk)
                        self.print(console.feed(chunk))
                    else:
                        for line in wire.feed(chunk):
                            self.hear(line, boot)
                if self.stopping and not boot.outcome:
                    boot.outcome = "stopped"
                self.check_clocks(boot)
                if self.interrupt_at and time.monotonic() >= self.interrupt_at:
                    self.interrupt_at = None
                    if not boot.outcome:
                        process.interrupt()
        status, rest = process.kill_and_drain(boot.outcome == "crash")
        printed.append(rest)
        if self.port:
            self.port.send(rest)
        self.print(console.feed(rest) + console.rest())
        boot.console = b"".join(printed).decode(errors="replace")
        if boot.outcome == "crash":
            boot.why = (
                f"the chip's process ended with status {status}: "
                + (boot.console.strip().splitlines() or ["no output"])[-1]
            )

    def typed(self, data: bytes) -> None:
        """Hand over what somebody types. Ctrl-C is a character at the prompt only."""
        if not self.at_prompt and b"\x03" in data:
            data = data.replace(b"\x03", b"")
            self.board._rtc.put(_INTERRUPT, 1)
            self.interrupt_at = time.monotonic() + _PATIENCE_S
        self.port.feed(data)

    def print(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if self.on_console:
                self.on_console(text)
            if self.until:
                self.tell({"event": "console", "line": text})

    def obey(self, boot: Boot) -> None:
        """A button was pressed."""
        try:
            os.read(self.board._bell[0], 4096)
        except BlockingIOError:
            pass
        while not self.board._commands.empty():
            command = self.board._commands.get()
            if command == "reset-button":
                boot.outcome = "reset"
                # On the ESP32 the EN pin is a power-on reset; later chips know an external one.
                self.next_cause = PWRON_RESET if self.board.chip == "esp32" else HARD_RESET
            else:
                boot.outcome = command
                self.next_cause = _NEXT_CAUSE.get(command, HARD_RESET)
                self.stopping = self.stopping or command == "stopped"

    def hear(self, line: bytes, boot: Boot) -> None:
        """Act on a line from the chip. An empty one says that the watchdog was fed."""
        if boot.outcome:
            return
        if not line:
            self.wdt_deadline = time.monotonic() + self.wdt_ms / 1000
            return
        event = json.loads(line)
        name = event["event"]
        if name == "wdt":
            self.wdt_ms = event["timeout"]
            self.wdt_deadline = time.monotonic() + self.wdt_ms / 1000
        elif name == "heap":
            boot.heap[event["at"]] = {"alloc": event["alloc"], "free": event["free"]}
            self.heap_taken = event.get("fakes", self.heap_taken)
        elif name == "idle":
            boot.error = event["error"]
            if self.stop_when_idle and not self.wdt_ms and not event.get("busy"):
                boot.outcome = "idle"
        elif name == "prompt":
            self.at_prompt = event["open"]
            self.interrupt_at = None
        elif name in _NEXT_CAUSE:
            boot.outcome = name
            self.next_cause = _NEXT_CAUSE[name]
            self.repl_mode = event.get("repl") or "friendly"
            if name == "panic":
                boot.why = event["why"]
            if name == "deepsleep":
                self.sleep_ms = event["ms"]
                self.board._rtc.sleep(self.sleep_ms)
        self.tell(event)

    def check_clocks(self, boot: Boot) -> None:
        now = time.monotonic()
        if boot.outcome:
            return
        if self.wdt_ms and now >= self.wdt_deadline:
            boot.outcome = "wdt"
            self.next_cause = WDT_RESET
            self.tell({"event": "wdt-expired", "timeout": self.wdt_ms})
        elif now >= self.deadline:
            boot.outcome = "timeout"
            self.stopping = True
