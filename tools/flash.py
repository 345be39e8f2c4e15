"""Make a board: stock firmware, two slots, and a volume with Twinslot, the user's files and keys.

    plan = make_plan(Path("ESP32_GENERIC-….bin"), Path("ota.json"), flash_size=4 << 20)
    Path("flash.bin").write_bytes(plan.flash)            # the whole flash, or
    with Chip.connect("/dev/ttyUSB0") as chip:           # the same onto a board
        install(plan, chip)

A board gets what the file holds, with what is blank in it erased: otadata, so that the first slot
boots; NVS, because a flashed board begins anew (and another layout's NVS pages lie where otadata
goes); the first sector of the slots that hold nothing; the volume. Partitions of a user's own type
stay as they are.

Source: MicroPython ports/esp32/makeimg.py, modules/flashbdev.py, modules/inisetup.py; ESP-IDF
bootloader_utility.c (which partition boots), flash_partitions.c (the header's flash size counts).
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import device_files, stock
from .stock import Stock
from .virtual_esp32 import layout, vfs
from .virtual_esp32.chip import table as tables
from .virtual_esp32.chip.table import Partition

SECTOR = 0x1000
_LITTLEFS_AT = 8  # of the magic in a superblock: littlefs SPEC.md
_FAT_AT = 510
_VOLUME_LABELS = ("vfs", "ffat")
_FILESYSTEMS = (0x81, 0x82, 0x83)  # fat, spiffs, littlefs


class FlashError(ValueError):
    """This board can't be made of these files; the text says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What a board will hold.

    Attributes:
        table: name or file of the layout.
        slot: the partition that gets the firmware, and boots.
        volume: the partition with the files.
        files: {absolute path: contents}.
        notes: what a user should know.
        flash: all of it, as `--to-file` writes it.
    """

    stock: Stock
    flash_size: int
    table: str
    partitions: list[Partition]
    slot: Partition
    volume: Partition
    files: dict[str, bytes]
    notes: list[str]
    flash: bytes


class Target(Protocol):
    """What `install` writes to: `download_mode.Chip`, or a test's stand-in."""

    def erase(self, offset: int, size: int, progress: Callable[[int, int], object]) -> None: ...

    def write(self, offset: int, data: bytes, progress: Callable[[int, int], object]) -> None: ...


@dataclass(frozen=True)
class Step:
    """Erase ``size`` bytes at ``offset``, or write ``data`` there."""

    what: str
    offset: int
    size: int
    data: bytes | None = None


# ---- what a board gets


def make_plan(
    firmware: Path,
    config: Path,
    *,
    flash_size: int,
    table: str = "auto",
    extra: Path | None = None,
    chip: str | None = None,
    arch: str | None = None,
) -> Plan:
    """Read and check everything; nothing is written.

    Args:
        firmware: a combined file of micropython.org.
        config: the board's ota.json.
        flash_size: bytes.
        table: "auto", the name of a built-in layout, or a CSV or binary table.
        extra: folder with the user's own files.
        chip: that of the board, to be compared with the firmware's.
        arch: mpy-cross's -march, if it shall not be the chip's.
    Raises:
        FlashError, StockError, LayoutError, FilesError, VolumeError, ConfigError, OSError.
    """
    source = stock.load(firmware)
    if chip and chip != source.chip:
        raise FlashError(
            f"the board has an {chip}, {firmware.name} is for an {source.chip}: take the .bin"
            " of your board from https://micropython.org/download/?port=esp32"
        )
    name, partitions = choose_table(table, flash_size, len(source.application))
    files, notes = device_files.volume(
        source.chip, config, extra, tells_its_name=source.tells_its_name, arch=arch
    )
    if not source.micropython:
        notes.append(f"{firmware.name} doesn't say that it is MicroPython")
    slot, volume = first_application(partitions), find_volume(partitions, flash_size)
    flash = bytearray(b"\xff") * flash_size
    for step in _images(source, partitions, slot, flash_size):
        flash[step.offset : step.offset + step.size] = step.data
    return Plan(
        stock=source,
        flash_size=flash_size,
        table=name,
        partitions=partitions,
        slot=slot,
        volume=volume,
        files=files,
        notes=notes,
        flash=_with_files(bytes(flash), files, volume),
    )


def choose_table(name: str, flash_size: int, image_size: int) -> tuple[str, list[Partition]]:
    """Return a layout for this flash that the image fits, by name.

    Raises:
        FlashError, LayoutError: none does, or the one asked for has no room or no two slots.
    """
    if name == "auto":
        name = max(
            (n for n in layout.builtin_layouts() if "-" not in n and flash_of(n) <= flash_size),
            key=flash_of,
            default="",
        )
        if not name:
            raise FlashError(f"{flash_size >> 20} MiB of flash hold no two slots; 4 MiB do")
    partitions = layout.load_layout(name, flash_size)
    try:
        _check_table(partitions, flash_size)
    except FlashError as exc:
        raise FlashError(f"table {name}: {exc}") from exc
    for part in partitions:
        if part.type == tables.TYPE_APP and part.size < image_size:
            raise FlashError(
                f"the firmware has {image_size:,} bytes, {part.label} of the table {name}"
                f" {part.size:,}: {_roomier(image_size, flash_size)}"
            )
    return name, partitions


def flash_of(layout_name: str) -> int:
    """Return the bytes of flash that a built-in layout is for."""
    return layout.parse_size(layout_name.split("-", maxsplit=1)[0])


def _roomier(image_size: int, flash_size: int) -> str:
    """Name the built-in tables that the image fits."""
    fits = [
        name
        for name in layout.builtin_layouts()
        if min(p.size for p in layout.load_layout(name) if p.type == tables.TYPE_APP) >= image_size
    ]
    here = [name for name in fits if flash_of(name) <= flash_size]
    if here:
        return f"use --table {here[0]}"
    if fits:
        return f"it fits {', '.join(fits)}, which need a larger flash; or take a smaller variant"
    return "no table has room for it"


def _check_table(partitions: list[Partition], flash_size: int) -> None:
    """Refuse a table that can't be updated, or that MicroPython can't run with."""
    slots = tables.ota_slots(partitions)
    if len(slots) < 2:
        raise FlashError(f"{len(slots)} OTA slots, an update needs ota_0 and ota_1")
    if tables.find(partitions, tables.TYPE_DATA, tables.DATA_OTA) is None:
        raise FlashError("no otadata partition, so nothing says which slot boots")
    if not any(p.type == tables.TYPE_DATA and p.label == "nvs" for p in partitions):
        raise FlashError("no partition with the label nvs, where MicroPython opens it")
    find_volume(partitions, flash_size)


def first_application(partitions: list[Partition]) -> Partition:
    """Return what boots while otadata is blank: factory, else ota_0."""
    factory = tables.find(partitions, tables.TYPE_APP, tables.APP_FACTORY)
    return factory or tables.ota_slots(partitions)[0]


def find_volume(partitions: list[Partition], flash_size: int) -> Partition:
    """Return the partition with the files, as MicroPython finds it: by its label.

    Raises:
        FlashError: there is none. (Since 1.26 MicroPython takes what is left behind the last
            partition; up to 1.25 it needs the partition.)
    """
    for part in partitions:
        if part.type == tables.TYPE_DATA and part.label == "vfs":
            return part
    if any(p.label == "ffat" for p in partitions):
        raise FlashError("a volume labelled ffat is FAT, which a power cut can damage: use vfs")
    end = max(part.offset + part.size for part in partitions)
    raise FlashError(
        f"no partition with the label vfs: add vfs, data, fat, 0x{end:x}, 0x{flash_size - end:x}"
    )


def _images(
    source: Stock, partitions: list[Partition], slot: Partition, flash_size: int
) -> list[Step]:
    bootloader = stock.with_flash_size(source.bootloader, flash_size)
    table = tables.build(partitions)
    return [
        Step("bootloader", source.start, len(bootloader), bootloader),
        Step("partition table", tables.TABLE_OFFSET, len(table), table),
        Step("firmware", slot.offset, len(source.application), source.application),
    ]


def _with_files(flash: bytes, files: dict[str, bytes], volume: Partition) -> bytes:
    """Return the flash with a volume made by MicroPython's own littlefs, as a board makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flash.bin"
        path.write_bytes(flash)
        try:
            vfs.write_files(path, files)
        except vfs.VolumeError as exc:
            used = sum(len(data) for data in files.values())
            raise FlashError(
                f"{exc}: {len(files)} files of {used:,} bytes, a volume of {volume.size:,}"
            ) from exc
        return path.read_bytes()


# ---- putting it onto a board


def steps(plan: Plan) -> list[Step]:
    """Return what turns any board into the planned one, in order of address."""
    found = _images(plan.stock, plan.partitions, plan.slot, plan.flash_size)
    for part in plan.partitions:
        if part.type == tables.TYPE_DATA and part != plan.volume:
            found.append(Step(f"erase {part.label}", part.offset, part.size))
        elif part.type == tables.TYPE_APP and part != plan.slot:
            found.append(Step(f"empty {part.label}", part.offset, SECTOR))
    volume = plan.volume
    # All of it: littlefs reads both blocks of a pair, and takes an old one for the newer.
    found.append(Step("erase the volume", volume.offset, volume.size))
    for offset, data in _runs(plan.flash, volume.offset, volume.offset + volume.size):
        found.append(Step("files", offset, len(data), data))
    return sorted(found, key=lambda step: step.offset)


def _runs(flash: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the runs of sectors that aren't blank."""
    blank = b"\xff" * SECTOR
    run = start
    for offset in range(start, end + SECTOR, SECTOR):
        if offset >= end or flash[offset : offset + SECTOR] == blank:
            if run < offset:
                yield run, flash[run:offset]
            run = offset + SECTOR


def install(
    plan: Plan, target: Target, progress: Callable[[Step, int, int], object] | None = None
) -> None:
    """Carry out the plan.

    Args:
        target: `download_mode.Chip`.
        progress: called with the step, units done and units in all.
    """
    for step in steps(plan):

        def show(done: int, total: int, step: Step = step) -> None:
            if progress:
                progress(step, done, total)

        if step.data is None:
            target.erase(step.offset, step.size, show)
        else:
            target.write(step.offset, step.data, show)


def contents(read: Callable[[int, int], bytes], flash_size: int) -> list[str]:
    """Say what is on a board that flashing would lose: its volumes that hold something.

    Args:
        read: ``read(offset, size)`` of the flash.
    """
    try:
        # By the application's rules: what the bootloader thinks of the table doesn't matter.
        partitions = tables.parse(read(tables.TABLE_OFFSET, tables.TABLE_SIZE), require_md5=True)
    except tables.TableError:
        return []
    if not partitions:
        return []
    volumes = [
        p
        for p in partitions
        if p.type == tables.TYPE_DATA and (p.label in _VOLUME_LABELS or p.subtype in _FILESYSTEMS)
    ]
    end = max(part.offset + part.size for part in partitions)
    if not any(p.label in _VOLUME_LABELS for p in volumes) and end < flash_size:
        volumes.append(Partition("vfs", tables.TYPE_DATA, 0x81, end, flash_size - end, 0))
    found = []
    for part in volumes:
        if part.offset + 2 * SECTOR <= flash_size:
            kind = _filesystem(read(part.offset, 2 * SECTOR))
            if kind:
                found.append(f"{part.label}: {kind} of {part.size >> 10:,} KiB")
    return found


def _filesystem(head: bytes) -> str | None:
    """Name the filesystem that begins with these two blocks; None if they are blank."""
    if head == b"\xff" * len(head):
        return None
    for block in (0, SECTOR):  # either of the first pair may hold the superblock
        if head[block + _LITTLEFS_AT :][:8] == b"littlefs":
            return "a littlefs filesystem"
    return "a FAT filesystem" if head[_FAT_AT : _FAT_AT + 2] == b"\x55\xaa" else "data"
