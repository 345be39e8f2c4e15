"""Build the flash of a virtual board: bootloader, partition table, images in their slots.

    flash = make_flash("esp32", 4 << 20, load_layout("4MiB"), {"ota_0": image})

otadata, nvs and everything else stay blank, as on a board flashed for the first time. It makes no
file system; the runner fills the vfs partition.

Source: esptool and ESP-IDF's flasher arguments (what lies where).
"""

from collections.abc import Mapping, Sequence

from .chip import image, otadata, table
from .chip.image import CHIPS, ImageError
from .chip.table import Partition
from .firmware import SIZE_CODES, make_bootloader
from .layout import APP_ALIGN, subtype_name

MAX_FLASH = 32 << 20


class BuildError(ValueError):
    """This flash can't be built; the text says what doesn't fit where."""


def make_flash(
    chip: str,
    flash_size: int,
    partitions: Sequence[Partition],
    slots: Mapping[str, bytes],
    *,
    entries: Sequence[otadata.Entry] = (),
    header_size: int | None = None,
    check: bool = True,
) -> bytearray:
    """Return the whole flash.

    Args:
        chip: a name of ``CHIPS``.
        flash_size: bytes: 1, 2, 4, 8, 16 or 32 MiB.
        partitions: the table, e.g. of `layout.load_layout`.
        slots: image by partition label; a combined release .bin stands for the app in it.
        entries: otadata entries 0 and 1 to begin with; none: blank.
        header_size: flash size in the bootloader's header, if it shall be another (MicroPython's
            releases say 4 MiB on every board).
        check: False puts in images that no board would boot.
    Raises:
        BuildError: what doesn't fit.
    """
    if chip not in CHIPS:
        raise BuildError(f"unknown chip {chip!r}, expected one of {', '.join(CHIPS)}")
    if flash_size not in SIZE_CODES or flash_size > MAX_FLASH:
        raise BuildError(f"flash of {flash_size} bytes, expected 1, 2, 4, 8, 16 or 32 MiB")
    flash = bytearray(b"\xff") * flash_size
    _put(flash, CHIPS[chip].bootloader, make_bootloader(chip, header_size or flash_size))
    _put(flash, table.TABLE_OFFSET, table.build(list(partitions)))
    for part in partitions:
        if part.offset + part.size > flash_size:
            raise BuildError(
                f"partition {part.label} ends at 0x{part.offset + part.size:x}, "
                f"the flash at 0x{flash_size:x}"
            )
    for label, data in slots.items():
        _put_slot(flash, chip, partitions, label, data, check)
    if entries:
        where = table.find(partitions, table.TYPE_DATA, table.DATA_OTA)
        if where is None:
            raise BuildError("otadata entries, but no otadata partition")
        for i, entry in enumerate(entries):
            _put(flash, where.offset + i * otadata.SECTOR, otadata.pack(entry))
    return flash


def app_image(data: bytes, chip: str) -> bytes:
    """Return the application of a combined release .bin; any other image as it is.

    A combined image begins with the bootloader and holds the partition table at 0x8000 and the
    application at 0x10000, less the bootloader's own offset.
    """
    base = CHIPS[chip].bootloader
    at = table.TABLE_OFFSET - base
    if (
        data[at : at + 2] == b"\xaa\x50"
        and data[APP_ALIGN - base : APP_ALIGN - base + 1] == b"\xe9"
    ):
        return data[APP_ALIGN - base :]
    return data


def _put(flash: bytearray, offset: int, data: bytes) -> None:
    flash[offset : offset + len(data)] = data


def _put_slot(
    flash: bytearray,
    chip: str,
    partitions: Sequence[Partition],
    label: str,
    data: bytes,
    check: bool,
) -> None:
    part = next((p for p in partitions if p.label == label), None)
    if part is None or part.type != table.TYPE_APP:
        apps = [p.label for p in partitions if p.type == table.TYPE_APP]
        raise BuildError(f"no slot {label!r} in the table, which has {', '.join(apps) or 'none'}")
    data = app_image(data, chip)
    where = f"{label} ({subtype_name(part.type, part.subtype)})"
    if len(data) > part.size:
        raise BuildError(f"image of {len(data)} bytes doesn't fit {where}: {part.size} bytes")
    padded = data.ljust(part.size, b"\xff")
    if check:

        def read(at: int, buf: bytearray) -> None:
            buf[:] = padded[at : at + len(buf)]

        try:
            image.verify(read, part.size, chip, part.offset)
        except ImageError as e:
            raise BuildError(f"image for {where}: {e}") from e
    _put(flash, part.offset, data)
