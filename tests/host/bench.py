"""A virtual board without a chip: a flash in memory, the bootloader, and what software would do.

Application-side steps (`set_boot`, `confirm`) write otadata as ESP-IDF's functions do: one erase,
one program.
"""

import io
import subprocess
import sys
from functools import cache
from pathlib import Path

from hypothesis import settings

from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.build import make_flash
from twinslot_tools.virtual_esp32.chip import otadata, table
from twinslot_tools.virtual_esp32.chip.flash import SECTOR, Fault, Flash, PowerCut, Stats
from twinslot_tools.virtual_esp32.firmware import make_firmware
from twinslot_tools.virtual_esp32.layout import load_layout, parse_size

# The same examples in every run, however busy the machine is.
settings.register_profile("bench", deadline=None, derandomize=True)
settings.load_profile("bench")

CHIP_FOLDER = Path(bootloader.__file__).parent / "chip"


@cache
def firmware(version: str = "1.0.0", chip: str = "esp32", size: int | None = None) -> bytes:
    return make_firmware(None, chip=chip, version=version, project="bench", size=size)


class Board:
    """A board with `layout`, holding another firmware in each of `slots`."""

    def __init__(self, layout="4MiB", slots=("ota_0", "ota_1"), entries=(), chip="esp32"):
        self.chip = chip
        self.size = parse_size(layout.split("-")[0])
        self.partitions = load_layout(layout, self.size)
        images = {label: firmware(label, chip) for label in slots}
        data = make_flash(chip, self.size, self.partitions, images, entries=entries)
        self.file = io.BytesIO(data)
        self.stats = Stats(None, self.size)
        self.rtc = bytearray(bootloader.RTC_RECORD_SIZE)
        self.fault: Fault | None = None
        self.log: list[str] = []

    @property
    def data(self) -> bytes:
        return self.file.getvalue()

    def flash(self) -> Flash:
        """The powered flash: a new one after every loss of power."""
        return Flash(self.file, self.size, stats=self.stats, fault=self.fault)

    def part(self, label: str) -> table.Partition:
        return next(p for p in self.partitions if p.label == label)

    def boot(self, reset_cause=bootloader.HARD_RESET) -> str | None:
        """Reset; return the label of what runs, or None."""
        if reset_cause == bootloader.PWRON_RESET:
            self.rtc = bytearray(bootloader.RTC_RECORD_SIZE)
        self.log = []
        self.result = bootloader.boot(
            self.flash(), self.chip, reset_cause=reset_cause, rtc=self.rtc, log=self.log
        )
        return self.result.partition.label if self.result.partition else None

    def cut(self, action, op=1, mode="torn", shape=None, seed=0):
        """Do `action()`, in which the power fails at its op-th flash operation."""
        self.fault = Fault(self.stats.ops + op, mode, shape, seed)
        try:
            action()
        except PowerCut:
            return
        finally:
            self.fault = None
        raise AssertionError(f"{action} ended before its flash operation {op}")

    def entries(self) -> list[otadata.Entry]:
        return otadata.read_entries(self.flash().read, self.part("otadata").offset)

    def states(self) -> list[tuple[int, str] | str]:
        """[(seq, state), ...] of the two entries, "blank" and "bad crc" for what doesn't count."""
        return [
            "blank"
            if otadata.pack(e) == b"\xff" * 32
            else (e.seq, otadata.state_name(e.state))
            if otadata.crc_ok(e)
            else "bad crc"
            for e in self.entries()
        ]

    def write_entry(self, i: int, entry: otadata.Entry) -> None:
        flash = self.flash()
        flash.erase(self.part("otadata").offset + i * SECTOR, SECTOR)
        flash.program(self.part("otadata").offset + i * SECTOR, otadata.pack(entry))

    def put_entries(self, *entries: otadata.Entry) -> None:
        """Set both entries from outside, uncounted."""
        for i, entry in enumerate(entries):
            self.put(self.part("otadata").offset + i * SECTOR, otadata.pack(entry))

    def set_boot(self, label: str) -> None:
        part = self.part(label)
        if part.subtype == table.APP_FACTORY:
            self.flash().erase(self.part("otadata").offset, 2 * SECTOR)
            return
        slots = len(table.ota_slots(self.partitions))
        target = part.subtype - table.APP_OTA_0
        self.write_entry(*otadata.next_entry(self.entries(), target, slots))

    def confirm(self) -> None:
        write = otadata.confirm_entry(self.entries(), len(table.ota_slots(self.partitions)))
        if write:
            self.write_entry(*write)

    def put(self, offset: int, data: bytes) -> None:
        """Change flash from outside, against all rules."""
        self.file.seek(offset)
        self.file.write(data)

    def damage(self, label: str) -> None:
        """Flip a bit in the middle of a slot's image."""
        at = self.part(label).offset + len(firmware(label, self.chip)) // 2
        self.put(at, bytes([self.data[at] ^ 0x10]))


def run_on_micropython(script: Path, *args: str) -> str:
    """Run a script under MicroPython with the chip's modules on its path; return its output."""
    return _run([str(Path(sys.executable).with_name("micropython")), str(script), *args])


def run_on_cpython(script: Path, *args: str) -> str:
    """The same under CPython, modules loaded the same way."""
    return _run([sys.executable, str(script), *args])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        [*command, str(CHIP_FOLDER)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
