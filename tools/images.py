"""Read a firmware file before it is published: the checks of esptool and of the device, both.

Refuses what a device would refuse, and says what to do instead.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from twinslot import espimage
from twinslot.errors import ImageError
from twinslot.release import SIZE_LIMIT

from . import secure_boot, tree
from .virtual_esp32.chip import image as chip_image

_TABLE_FLASH_OFFSET = 0x8000
_BOOTLOADER_OFFSETS = (0x1000, 0x0, 0x2000)  # ESP32 and S2; S3, C3, ...; P4, C5
_RECORD = struct.Struct("<2sBBLL16sL")
_APP_FLASH_OFFSET = 0x10000  # application partitions start at multiples of this


@dataclass(frozen=True)
class Firmware:
    """An application image that passed every check."""

    path: Path
    size: int  # bytes of the file
    sha256: str
    build: str  # the digest appended to the image
    chip_id: int
    chip: str
    project: str
    app_version: str


def load(path: Path) -> Firmware:
    """Check an application image and return what a release says of it.

    Raises:
        ImageError: a combined file, a wrong chip, a damaged image, no digest, trailing bytes.
        OSError: no such file.
    """
    if path.stat().st_size > SIZE_LIMIT:
        seen = f"{path.stat().st_size} bytes"
        raise ImageError(f"{path}: image size", seen, f"at most {SIZE_LIMIT}, as boards boot")
    data = tree.image(path)
    _refuse_combined(path, data)
    try:
        head = espimage.parse(data[: espimage.HEAD_LEN])
        length, build = espimage.identify(reader(data), len(data))
    except ImageError as exc:
        raise ImageError(f"{path}: {exc}") from exc
    if not build:
        raise ImageError(
            f"{path}: no SHA-256 is appended to the image: build it without"
            " esptool's --dont-append-digest"
        )
    _refuse_trailing(path, data, length)
    chip = espimage.chip_name(head["chip_id"])
    check_with_esptool(path.name, chip, data)
    check_as_bootloader(data[:length], chip)
    return Firmware(
        path=path,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        build=build,
        chip_id=head["chip_id"],
        chip=chip,
        project=head["project"],
        app_version=head["version"],
    )


def reader(data: bytes):
    """The ``read(offset, buf)`` that espimage wants, over bytes."""

    def read(offset: int, buf: bytearray) -> None:
        piece = data[offset : offset + len(buf)]
        buf[: len(piece)] = piece

    return read


def check_with_esptool(name: str, chip: str, data: bytes):
    """Read an image with esptool's own reader: an opinion independent of ours.

    Returns:
        esptool's image object, with its ``segments``.

    Raises:
        ImageError: it can't read the image, or checksum or digest don't hold.
    """
    from esptool.bin_image import LoadFirmwareImage
    from esptool.logger import log

    log.set_verbosity("silent")
    try:
        image = LoadFirmwareImage(chip, data)
    except KeyError:
        raise ImageError(f"{name}: chip", chip, "one that esptool knows") from None
    except Exception as exc:  # esptool's readers raise what the damage happens to cause
        raise ImageError(f"{name}: esptool can't read it: {exc}") from exc
    if image.checksum != image.calculate_checksum():
        expected = f"0x{image.calculate_checksum():02x}"
        raise ImageError(f"{name}: image checksum", f"0x{image.checksum:02x}", expected)
    if image.append_digest and image.stored_digest != image.calc_digest:
        raise ImageError(
            f"{name}: appended SHA-256", image.stored_digest.hex(), image.calc_digest.hex()
        )
    return image


def check_as_bootloader(image: bytes, chip: str) -> chip_image.ImageInfo | None:
    """Ask the bootloader model too: an image can pass everything else and still not boot.

    Returns:
        what it found, or None for a chip it has no model of.

    Raises:
        ImageError: it would not boot.
    """
    if chip not in chip_image.CHIPS:
        return None
    # Which revision the boards are is theirs to judge: take the oldest the image runs on.
    revision = int.from_bytes(image[15:17], "little")
    model = chip_image.CHIPS[chip]._replace(rev=revision, blk_rev=None)
    try:
        return chip_image.verify(
            reader(image), len(image), model, _APP_FLASH_OFFSET, in_bootloader=True
        )
    except chip_image.ImageError as exc:
        raise ImageError(f"a bootloader would refuse it: {exc}") from exc


def find_table(data: bytes) -> tuple[int, int] | None:
    """Find the partition table of a combined file or a flash dump.

    Returns:
        ``(file offset of the table, flash offset of the file's first byte)`` or None.
    """
    for start in _BOOTLOADER_OFFSETS:
        position = _TABLE_FLASH_OFFSET - start
        if _is_table(data[position : position + 64]):
            return position, start
    return None


def _is_table(data: bytes) -> bool:
    """Two records in a row, the first of them a partition behind the table: no chance hit."""
    if len(data) < 64 or data[:2] != b"\xaa\x50" or data[32:34] not in (b"\xaa\x50", b"\xeb\xeb"):
        return False
    return _RECORD.unpack(data[:32])[3] >= _TABLE_FLASH_OFFSET + 0x1000


def _refuse_combined(path: Path, data: bytes) -> None:
    found = find_table(data)
    if found is None:
        return
    table, start = found
    message = (
        f"{path}: this is a combined file for flashing by cable (bootloader, partition table and"
        " application): publish the application alone"
    )
    while data[table : table + 2] == b"\xaa\x50":
        _, kind, _, offset, size, _, _ = _RECORD.unpack(data[table : table + 32])
        table += 32
        if kind == 0 and data[offset - start : offset - start + 1] == b"\xe9":
            app = data[offset - start : offset - start + size]
            try:
                length = espimage.identify(reader(app), len(app))[0]
            except ImageError:
                continue
            raise ImageError(
                f"{message}, cut out with:  tail -c +{offset - start + 1} {path.name}"
                f" | head -c {length} > application.bin"
            )
    raise ImageError(f"{message}; MicroPython's build leaves it as micropython.bin")


def _refuse_trailing(path: Path, data: bytes, length: int) -> None:
    """Bytes behind the image would be signed, stored and never looked at by any bootloader."""
    if len(data) == length:
        return
    try:
        signatures = secure_boot.read(data, length)
    except ImageError as exc:
        raise ImageError(f"{path}: {exc}") from exc
    if signatures is not None:
        if any(signature.holds is False for signature in signatures):
            raise ImageError(f"{path}: its Secure Boot signature does not hold")
        return
    extra = len(data) - length
    raise ImageError(f"{path}: {extra} bytes behind the image's end", len(data), length)
