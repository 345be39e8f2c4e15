"""Read the firmware files that micropython.org offers: bootloader, partition table, application.

    stock = load(Path("ESP32_GENERIC-20241025-v1.24.0.bin"))
    stock.chip, stock.micropython, len(stock.application)
    bootloader = with_flash_size(stock.bootloader, 8 << 20)

Such a file begins at the flash offset of its chip's bootloader and ends with the application. It
is read with esptool's own readers and checked by the bootloader model as well; nothing is written.

Source: MicroPython ports/esp32/makeimg.py (how the file is made), py/mpconfig.h (the banner),
ESP-IDF esp_image_format.c and esptool's bin_image.py (header, digest).
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from twinslot import espimage
from twinslot.errors import ImageError

from . import images
from .virtual_esp32.chip import table
from .virtual_esp32.chip.table import Partition
from .virtual_esp32.firmware import SIZE_CODES

OLDEST = (1, 24)  # MicroPython that the library runs on
TELLS_ITS_NAME = (1, 25)  # sys.implementation._build: micropython/micropython#16843

_DOWNLOAD = "the .bin file of your board from https://micropython.org/download/?port=esp32"
_BANNER = re.compile(
    rb"MicroPython (?:\(with v2\.0 preview\) )?v(\d+)\.(\d+)([\w.+-]*) on 2\d{3}-"
)
_LARGEST = 32 << 20


class StockError(ValueError):
    """This is no firmware file to flash a board with; the text says what to take instead."""


@dataclass(frozen=True)
class Stock:
    """A firmware file taken apart; every part has passed its checks.

    Attributes:
        chip: as esptool spells it, e.g. esp32s3.
        start: flash offset of the bootloader, and of the file's first byte.
        bootloader, application: images, without what is padding in the file.
        build: the digest appended to the application, in hex: its identity.
        partitions: of the table in the file.
        micropython: e.g. 1.24.0, or "" where the application doesn't say.
    """

    path: Path
    chip: str
    start: int
    bootloader: bytes
    application: bytes
    build: str
    partitions: list[Partition]
    micropython: str

    @property
    def release(self) -> tuple[int, int] | None:
        """MicroPython's version as (1, 24); None where the application doesn't say."""
        numbers = re.match(r"(\d+)\.(\d+)", self.micropython)
        return (int(numbers[1]), int(numbers[2])) if numbers else None

    @property
    def tells_its_name(self) -> bool:
        """Whether the running board knows its name (``sys.implementation._build``)."""
        return self.release is None or self.release >= TELLS_ITS_NAME


def load(path: Path) -> Stock:
    """Read a combined firmware file.

    Raises:
        StockError: another kind of file, a damaged one, or a MicroPython that is too old.
        OSError: no such file.
    """
    if path.stat().st_size > _LARGEST:
        raise StockError(f"{path}: {path.stat().st_size} bytes: no firmware; take {_DOWNLOAD}")
    data = path.read_bytes()
    found = images.find_table(data)
    if found is None:
        raise StockError(f"{path}: {_what_else(data)}: take {_DOWNLOAD}")
    position, start = found
    chip = _chip(path, data, start)
    try:
        partitions = table.parse(data[position : position + table.TABLE_SIZE])
        bootloader = _image(data[:position], chip, "bootloader")
        application = _application(data, start, partitions, chip)
        images.check_as_bootloader(application, chip)
    except (ImageError, table.TableError, StockError) as exc:
        raise StockError(f"{path}: {exc}: the file is damaged; download it again") from exc
    stock = Stock(
        path=path,
        chip=chip,
        start=start,
        bootloader=bootloader,
        application=application,
        build=espimage.identify(images.reader(application), len(application))[1],
        partitions=partitions,
        micropython=_version(application),
    )
    if stock.release and stock.release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise StockError(f"{path}: MicroPython {stock.micropython}: needs {oldest} or newer")
    return stock


def with_flash_size(bootloader: bytes, size: int) -> bytes:
    """Return the bootloader image with another flash size in its header, its digest put right.

    The header is in the appended SHA-256 but not in the checksum, which covers segments only.

    Raises:
        StockError: a size that the header has no code for.
    """
    if size not in SIZE_CODES:
        known = ", ".join(f"{n >> 20}" for n in SIZE_CODES)
        raise StockError(f"flash of {size} bytes: expected one of {known} MiB")
    patched = bytearray(bootloader)
    patched[3] = SIZE_CODES[size] << 4 | patched[3] & 0x0F
    if patched[23]:
        patched[-32:] = hashlib.sha256(patched[:-32]).digest()
    return bytes(patched)


def _what_else(data: bytes) -> str:
    """Say what a file without partition table is."""
    if data[:1] == b"\xe9":
        try:
            head = espimage.parse(data[: espimage.HEAD_LEN])
        except ImageError:
            return "an image without partition table (a bootloader?)"
        chip = espimage.chip_name(head["chip_id"])
        return f"an application for {chip} alone (.app-bin, micropython.bin), no bootloader"
    if data[:4] == b"UF2\n":
        return "a UF2 file"
    if data[:4] == b"\x7fELF":
        return "an ELF file"
    return "no firmware file of an ESP32"


def _chip(path: Path, data: bytes, start: int) -> str:
    """Tell the chip by the bootloader's header, and check that the file begins where it belongs.

    Raises:
        StockError: no bootloader at its place.
    """
    from esptool.targets import CHIP_DEFS

    if data[:1] != b"\xe9":
        raise StockError(f"{path}: a flash dump, or no bootloader in front: take {_DOWNLOAD}")
    chip = espimage.CHIP_IDS.get(int.from_bytes(data[12:14], "little"))
    if chip is None or chip not in CHIP_DEFS:
        number = int.from_bytes(data[12:14], "little")
        raise StockError(f"{path}: for chip 0x{number:04x}, which is not known")
    expected = CHIP_DEFS[chip].BOOTLOADER_FLASH_OFFSET
    if start != expected:
        raise StockError(
            f"{path}: begins at 0x{start:x}, an {chip} file at 0x{expected:x}: take {_DOWNLOAD}"
        )
    return chip


def _image(data: bytes, chip: str, what: str) -> bytes:
    """Cut an image to its length and check it.

    Raises:
        ImageError, StockError: it doesn't hold.
    """
    length, build = espimage.identify(images.reader(data), len(data))
    image = data[:length]
    images.check_with_esptool(what, chip, image)
    if not build and what == "application":
        raise StockError("no SHA-256 is appended to the application")
    return image


def _application(data: bytes, start: int, partitions: list[Partition], chip: str) -> bytes:
    for part in partitions:
        content = data[part.offset - start : part.offset - start + part.size]
        if part.type == table.TYPE_APP and content[:1] == b"\xe9":
            return _image(content, chip, "application")
    raise StockError("no application in any partition of its table")


def _version(application: bytes) -> str:
    found = _BANNER.search(application)
    return (b"%b.%b%b" % found.groups()).decode() if found else ""
