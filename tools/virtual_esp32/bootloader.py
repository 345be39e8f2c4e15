"""The second-stage bootloader of ESP-IDF, as stock MicroPython builds configure it.

    result = boot(flash, "esp32", reset_cause=PWRON_RESET, rtc=rtc_record)
    if result.partition is None: the board resets and tries again, for ever

Rollback is on, deep-sleep wakes skip verification, and there is no anti-rollback, secure boot,
encryption or factory-reset pin. It writes otadata as the real one does, every write being one
erase and one program on the flash it is given, so that counters and power cuts apply.

Source: ESP-IDF 5.5 bootloader_start.c, bootloader_utility.c, bootloader_common_loader.c,
flash_partitions.c, spi_flash_init (flash size). Texts in the log are those of the sources.
"""

import io
import struct
from dataclasses import dataclass, field
from zlib import crc32

from .chip import image, otadata, table
from .chip.flash import SECTOR, Flash
from .chip.image import CHIPS, Chip, ImageError, ImageInfo
from .chip.table import Partition, TableError

# machine.reset_cause(); the bootloader tells only the wake from deep sleep from the others.
PWRON_RESET = 1
HARD_RESET = 2
WDT_RESET = 3
DEEPSLEEP_RESET = 4

FACTORY = -1
TEST = -2

# What the bootloader keeps in RTC memory: offset and size of the partition it booted, CRC-32.
# The board holds these bytes over resets and deep sleep, and zeroes them at power-on.
RTC_RECORD_SIZE = 12


@dataclass(frozen=True)
class BootResult:
    """What the bootloader did.

    Attributes:
        partition: what runs now; None: nothing bootable, and `why` says what the matter is.
        index: OTA slot number, FACTORY, TEST, or None.
        image: of that partition.
        why: one line, for people.
        log: the bootloader's own lines.
    """

    partition: Partition | None
    index: int | None
    image: ImageInfo | None
    why: str
    log: list[str] = field(default_factory=list)


class _Stop(Exception):
    """The bootloader gives up: it resets, and will meet the same again."""


def boot(
    flash: Flash,
    chip: str | Chip,
    *,
    reset_cause: int = PWRON_RESET,
    rtc: bytearray | None = None,
    log: list[str] | None = None,
) -> BootResult:
    """Run the bootloader once.

    Args:
        flash: is read, and written where otadata changes.
        chip: a Chip or its name.
        reset_cause: only DEEPSLEEP_RESET makes a difference.
        rtc: RTC_RECORD_SIZE bytes that the board keeps for the bootloader; None: none.
        log: a list to write the log into, for a caller that wants it even after a power cut.
    Raises:
        PowerCut: the flash's fault plan struck.
    """
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    return _Bootloader(flash, chip, [] if log is None else log).run(reset_cause, rtc)


def predict(data: bytes, chip: str | Chip) -> BootResult:
    """Say what the next ordinary reset would boot from this flash, which is not changed."""
    return boot(Flash(io.BytesIO(data), len(data)), chip)


def flash_size_of_header(header: bytes) -> int:
    """Flash size in bytes that an image header names (high nibble of byte 3)."""
    code = header[3] >> 4
    # bootloader_flash takes 2 MiB for codes it doesn't know.
    return (1 << code if code < 8 else 2) << 20


class _Bootloader:
    def __init__(self, flash: Flash, chip: Chip, log: list[str]):
        self.flash = flash
        self.chip = chip
        self.log = log
        self.failures: list[str] = []
        # As the bootloader counts: the last of several wins, and every OTA record counts.
        self.factory: Partition | None = None
        self.test: Partition | None = None
        self.otadata: Partition | None = None
        self.ota: dict[int, Partition] = {}
        self.app_count = 0
        self.seed = False

    def run(self, reset_cause: int, rtc: bytearray | None) -> BootResult:
        try:
            chip_size = self.start()
            if reset_cause == DEEPSLEEP_RESET:
                woken = self.wake(rtc)
                if woken:
                    return woken
            self.load_table(chip_size)
            index, why = self.select()
            result = self.load(index, why)
        except _Stop as stop:
            return BootResult(None, None, None, str(stop), self.log)
        if rtc is not None:
            record = struct.pack("<II", result.partition.offset, result.partition.size)
            rtc[:] = record + struct.pack("<I", crc32(record))
        if chip_size > self.flash.size:
            # The application's flash driver finds out, before any Python runs.
            self.error(
                "spi_flash",
                f"Detected size({self.flash.size >> 10}k) smaller than the size in the binary "
                f"image header({chip_size >> 10}k). Probe failed.",
            )
            return BootResult(None, None, None, "flash is smaller than the bootloader's header "
                              f"says ({chip_size >> 20} MiB)", self.log)  # fmt: skip
        return result

    def info(self, tag: str, text: str) -> None:
        self.log.append(f"I {tag}: {text}")

    def error(self, tag: str, text: str) -> None:
        self.log.append(f"E {tag}: {text}")

    def start(self) -> int:
        """The ROM loads the bootloader itself. Return the flash size that its header names."""
        offset = self.chip.bootloader
        header = bytearray(image.HEADER_SIZE)
        self.flash.read(offset, header)
        try:
            image.verify(
                lambda at, buf: self.flash.read(offset + at, buf),
                table.TABLE_OFFSET - offset,
                self.chip,
                offset,
                digest=False,
            )
        except ImageError as e:
            self.error("rom", f"invalid header: 0x{int.from_bytes(header[:4], 'little'):08x}")
            raise _Stop(f"no bootloader at 0x{offset:x}: {e}") from e
        return flash_size_of_header(header)

    def wake(self, rtc: bytearray | None) -> BootResult | None:
        """Boot what slept, without checking it and without a look at otadata."""
        if rtc and struct.unpack_from("<I", rtc, 8)[0] == crc32(rtc[:8]):
            offset, size = struct.unpack_from("<II", rtc)
            part = Partition("", table.TYPE_APP, 0, offset, size, 0)
            try:
                info = self.check(part, data=False)
            except ImageError as e:
                self.error("esp_image", str(e))
            else:
                part, index = self.name_of(part)
                return BootResult(part, index, info, "woke from deep sleep", self.log)
        self.error("boot", "Fast booting is not successful")
        self.info("boot", "Try to load an app as usual with all validations")
        return None

    def name_of(self, part: Partition) -> tuple[Partition, int | None]:
        """Find the table's row for what RTC memory knows by offset only (the application does)."""
        data = bytearray(table.TABLE_SIZE)
        self.flash.read(table.TABLE_OFFSET, data)
        for row in table.parse(data, require_md5=True):
            if row.type == table.TYPE_APP and row.offset == part.offset:
                index = {table.APP_FACTORY: FACTORY, table.APP_TEST: TEST}.get(row.subtype)
                return row, row.subtype - table.APP_OTA_0 if index is None else index
        return part, None

    def load_table(self, chip_size: int) -> None:
        data = bytearray(table.TABLE_SIZE)
        self.flash.read(table.TABLE_OFFSET, data)
        try:
            rows = table.parse(data, chip_size=chip_size)
        except TableError as e:
            self.error("flash_parts", str(e))
            self.error("boot", "Failed to verify partition table")
            self.error("boot", "load partition table error!")
            raise _Stop(f"partition table: {e}") from e
        self.info("boot", "Partition Table:")
        for row in rows:
            self.info(
                "boot",
                f"{row.label:16} {row.type:02x} {row.subtype:02x} {row.offset:08x} {row.size:08x}",
            )
            kind = (row.type, row.subtype)
            if kind == (table.TYPE_APP, table.APP_FACTORY):
                self.factory = row
            elif kind == (table.TYPE_APP, table.APP_TEST):
                self.test = row
            elif kind == (table.TYPE_DATA, table.DATA_OTA):
                self.otadata = row
            elif row.type == table.TYPE_APP and row.subtype & 0xF0 == table.APP_OTA_0:
                self.ota[row.subtype & 0x0F] = row
                self.app_count += 1

    def select(self) -> tuple[int, str]:
        """Choose where to begin, by otadata; mark trials. Return (index, why)."""
        if self.otadata is None:
            return FACTORY, "no otadata partition"
        if self.otadata.size < 2 * SECTOR:
            self.error("boot", f"ota_info partition size {self.otadata.size} is too small "
                       f"(minimum {2 * SECTOR} bytes)")  # fmt: skip
            raise _Stop(f"otadata has {self.otadata.size} bytes, expected {2 * SECTOR}")
        entries = otadata.read_entries(self.flash.read, self.otadata.offset)
        aborted = []
        for i in range(2):
            if entries[i].state == otadata.PENDING_VERIFY:
                self.info("boot", f"otadata[{i}] is marking as ABORTED")
                entries[i] = entries[i]._replace(state=otadata.ABORTED)
                self.write_entry(i, entries[i])
                aborted.append(i)
        note = "".join(f"; entry {i} was on trial and not confirmed: aborted" for i in aborted)
        if (otadata.is_invalid(entries[0]) and otadata.is_invalid(entries[1])) or (
            self.app_count == 0
        ):
            return self.select_default(entries, note)
        i = otadata.active(entries)
        if i < 0:
            where = (
                "falling back to factory"
                if self.factory
                else "no factory, will try all partitions"
            )
            self.error("boot", f"ota data partition invalid, {where}")
            return FACTORY, "no otadata entry has a right CRC" + note
        index = otadata.slot(entries[i].seq, self.app_count)
        state = otadata.state_name(entries[i].state)
        if entries[i].state == otadata.NEW:
            self.info("boot", f"otadata[{i}] is selected as new and marked PENDING_VERIFY state")
            entries[i] = entries[i]._replace(state=otadata.PENDING_VERIFY)
            self.write_entry(i, entries[i])
            state = "NEW, now on trial"
        return index, f"otadata entry {i}: seq {entries[i].seq}, {state}{note}"

    def select_default(self, entries: list[otadata.Entry], note: str) -> tuple[int, str]:
        why = "both otadata entries are empty or given up" if self.app_count else "no OTA slots"
        if self.factory:
            self.info("boot", "Defaulting to factory image")
            return FACTORY, why + note
        self.info("boot", "No factory image, trying OTA 0")
        self.seed = all(e.seq == 0xFFFFFFFF or not otadata.crc_ok(e) for e in entries)
        return 0, f"{why}, no factory slot{note}"

    def load(self, start: int, why: str) -> BootResult:
        """Load from `start` down to factory, then up from it, then the test app."""
        for index in [*range(start, FACTORY - 1, -1), *range(start + 1, self.app_count)]:
            info = self.try_load(index)
            if info is None:
                continue
            part = self.partition(index)
            if self.seed and index > FACTORY:
                self.write_entry(0, otadata.entry(index + 1, otadata.VALID))
            return self.loaded(part, index, info, why)
        info = self.try_load(TEST)
        if info is not None:
            self.info("boot", "Falling back to test app as only bootable partition")
            return self.loaded(self.test, TEST, info, why)
        self.error("boot", "No bootable app partitions in the partition table")
        raise _Stop("; ".join(["no bootable app partition", *self.failures]))

    def loaded(self, part: Partition, index: int, info: ImageInfo, why: str) -> BootResult:
        self.info("boot", f"Loaded app from partition at offset 0x{part.offset:x}")
        return BootResult(part, index, info, "; ".join([why, *self.failures]), self.log)

    def partition(self, index: int) -> Partition | None:
        if index == TEST:
            return self.test
        if index == FACTORY:
            return self.factory
        return self.ota.get(index)

    def try_load(self, index: int) -> ImageInfo | None:
        part = self.partition(index)
        if part is None or part.size == 0:
            return None
        try:
            return self.check(part)
        except ImageError as e:
            self.error("esp_image", f"image at 0x{part.offset:x}: {e}")
            if index == FACTORY:
                self.error("boot", "Factory app partition is not bootable")
            elif index != TEST:
                self.error("boot", f"OTA app partition slot {index} is not bootable")
            self.failures.append(f"{part.label} is not bootable: {e}")
            return None

    def check(self, part: Partition, data: bool = True) -> ImageInfo:
        if part.offset + part.size > self.flash.size:
            raise ImageError(f"partition ends beyond the flash (0x{self.flash.size:x})")
        return image.verify(
            lambda at, buf: self.flash.read(part.offset + at, buf),
            part.size,
            self.chip,
            part.offset,
            in_bootloader=True,
            data=data,
        )

    def write_entry(self, i: int, entry: otadata.Entry) -> None:
        """Two flash operations, between which the power may fail."""
        offset = self.otadata.offset + i * SECTOR
        self.flash.erase(offset, SECTOR)
        self.flash.program(offset, otadata.pack(entry))
