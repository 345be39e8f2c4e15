"""Partition layouts: the CSV that people write, by the rules of ESP-IDF's generator.

    parts = parse_csv(Path("partitions/4MiB.csv").read_text())
    table = table.build(parts)

It doesn't know the flash size unless told, and it writes no files.

Source: ESP-IDF components/partition_table/gen_esp32part.py.
"""

import re
from importlib import resources
from pathlib import Path

from .chip import table
from .chip.table import Partition

TYPES = {"app": 0, "data": 1, "bootloader": 2, "partition_table": 3}

SUBTYPES = {
    0: {
        "factory": 0x00,
        **{f"ota_{i}": 0x10 + i for i in range(16)},
        "test": 0x20,
        "tee_0": 0x30,
        "tee_1": 0x31,
    },
    1: {
        "ota": 0x00,
        "phy": 0x01,
        "nvs": 0x02,
        "coredump": 0x03,
        "nvs_keys": 0x04,
        "efuse": 0x05,
        "undefined": 0x06,
        "esphttpd": 0x80,
        "fat": 0x81,
        "spiffs": 0x82,
        "littlefs": 0x83,
        "tee_ota": 0x90,
    },
    2: {"primary": 0, "ota": 1, "recovery": 2},
    3: {"primary": 0, "ota": 1},
}

FLAGS = {"encrypted": table.FLAG_ENCRYPTED, "readonly": table.FLAG_READONLY}

# The table's own sector ends here; the first partition can't begin before.
FIRST_OFFSET = table.TABLE_OFFSET + 0x1000
APP_ALIGN = 0x10000
SECTOR = 0x1000
OTADATA_SIZE = 0x2000
NVS_MIN_SIZE = 0x3000


class LayoutError(ValueError):
    """The CSV is no usable layout; the text begins with the line number."""


def parse_size(text: str) -> int:
    """Read a number of bytes: ``0x1c0000``, ``4096``, ``64K``, ``4M``, ``4MiB``, ``4MB``.

    Raises:
        LayoutError: it is none of these.
    """
    match = re.fullmatch(r"(-?(?:0x[0-9a-f]+|[0-9]+))\s*([km]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise LayoutError(f"{text!r} is no size; expected e.g. 0x1c0000, 4096, 64K or 4M")
    number = match[1]
    value = int(number, 16 if "x" in number else 10)
    return value * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]]


def type_name(type_: int) -> str:
    """Keyword of a partition type, or its number in hex."""
    return next((name for name, value in TYPES.items() if value == type_), f"0x{type_:02x}")


def subtype_name(type_: int, subtype: int) -> str:
    """Keyword of a subtype, or its number in hex."""
    names = SUBTYPES.get(type_, {})
    return next((name for name, value in names.items() if value == subtype), f"0x{subtype:02x}")


def builtin_layouts() -> list[str]:
    """Names of the layouts that come with the package, e.g. ``4MiB``, ``8MiB-factory``."""
    files = resources.files("twinslot_tools.partitions").iterdir()
    return sorted(f.name.removesuffix(".csv") for f in files if f.name.endswith(".csv"))


def load_layout(name: str | Path, flash_size: int | None = None) -> list[Partition]:
    """Read a layout: a CSV file, a binary partition table, or the name of a built-in layout.

    Raises:
        LayoutError: no such file or name, or what is wrong in it.
    """
    path = Path(name)
    if path.is_file():
        data = path.read_bytes()
        if data[:2] == b"\xaa\x50":
            try:
                return table.parse(data, chip_size=flash_size)
            except table.TableError as e:
                raise LayoutError(f"{path.name}: {e}") from e
        try:
            return parse_csv(data.decode(), flash_size)
        except (LayoutError, UnicodeDecodeError) as e:
            raise LayoutError(f"{path.name}: {e}") from e
    if str(name) in builtin_layouts():
        csv = resources.files("twinslot_tools.partitions") / f"{name}.csv"
        return parse_csv(csv.read_text(), flash_size)
    raise LayoutError(
        f"no file {name}, and the built-in layouts are {', '.join(builtin_layouts())}"
    )


def parse_csv(text: str, flash_size: int | None = None) -> list[Partition]:
    """Read a layout and check it.

    Args:
        text: the CSV.
        flash_size: bytes; None leaves open what it must fit into.
    Raises:
        LayoutError: with the line number, what was seen and what was expected.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()  # noqa: PLW2901
        if line and not line.startswith("#"):
            try:
                rows.append((number, *_parse_row(line)))
            except LayoutError as e:
                raise LayoutError(f"line {number}: {e}") from e
    if not rows:
        raise LayoutError("no partitions in it")
    return _check(_place(rows), flash_size)


def _parse_row(line: str) -> tuple[str, int, int, int | None, int, int]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) > 6 and any(fields[6:]):
        raise LayoutError(f"{len(fields)} columns, expected at most 6")
    name, type_text, subtype_text, offset_text, size_text, flags_text = (fields + [""] * 6)[:6]
    if not name:
        raise LayoutError("the name is blank")
    type_ = _keyword("type", type_text, TYPES, 0xFE)
    if subtype_text:
        subtype = _keyword("subtype", subtype_text, SUBTYPES.get(type_, {}), 0xFE)
    elif type_ == table.TYPE_APP:
        raise LayoutError("an app partition needs a subtype (factory, ota_0 ... ota_15, test)")
    else:
        subtype = SUBTYPES[1]["undefined"]
    if not size_text:
        raise LayoutError("the size is blank")
    flags = 0
    for flag in filter(None, flags_text.split(":")):
        if flag not in FLAGS:
            raise LayoutError(f"unknown flag {flag!r}, expected {' or '.join(FLAGS)}")
        flags |= FLAGS[flag]
    offset = parse_size(offset_text) if offset_text else None
    if offset is not None and offset < 0:
        raise LayoutError(f"negative offset {offset_text}")
    return name, type_, subtype, offset, parse_size(size_text), flags


def _keyword(what: str, text: str, names: dict[str, int], highest: int) -> int:
    if not text:
        raise LayoutError(f"the {what} is blank")
    if text in names:
        return names[text]
    try:
        value = parse_size(text)
    except LayoutError:
        known = ", ".join(names) or "none"
        raise LayoutError(
            f"unknown {what} {text!r}, expected a number or one of: {known}"
        ) from None
    if not 0 <= value <= highest:
        raise LayoutError(f"{what} {text} is not within 0 and 0x{highest:02x}")
    return value


def _place(rows: list[tuple]) -> list[tuple[int, Partition]]:
    """Fill in blank offsets and negative sizes ("ends at")."""
    placed = []
    end = FIRST_OFFSET
    for number, name, type_, subtype, given, size_, flags in rows:
        offset, size = given, size_
        if offset is None:
            align = APP_ALIGN if type_ == table.TYPE_APP else SECTOR
            offset = -(-end // align) * align
        elif offset < end:
            before = "the partition table" if not placed else f"{placed[-1][1].label!r} before it"
            raise LayoutError(
                f"line {number}: {name!r} begins at 0x{offset:x}, but {before} ends at 0x{end:x}"
            )
        if size < 0:
            size = -size - offset
        if size <= 0:
            raise LayoutError(f"line {number}: {name!r} has no size left (0x{offset:x} on)")
        end = offset + size
        label = name.encode()[:16].decode(errors="ignore")
        placed.append((number, Partition(label, type_, subtype, offset, size, flags)))
    return placed


def _check(placed: list[tuple[int, Partition]], flash_size: int | None) -> list[Partition]:
    seen: dict[str, int] = {}
    otadata = None
    for number, part in placed:
        problem = _problem(part, flash_size)
        if part.label in seen:
            problem = f"the same name as line {seen[part.label]}"
        if (part.type, part.subtype) == (table.TYPE_DATA, table.DATA_OTA):
            if otadata:
                problem = f"a second otadata partition (line {otadata} is one already)"
            otadata = number
        if problem:
            raise LayoutError(f"line {number}: {part.label!r}: {problem}")
        seen[part.label] = number
    if len(placed) > table.TABLE_SIZE // 32 - 2:
        raise LayoutError(f"{len(placed)} partitions, at most {table.TABLE_SIZE // 32 - 2} fit")
    return [part for _, part in placed]


def _problem(part: Partition, flash_size: int | None) -> str | None:
    """Say what the generator would refuse in one partition, or None."""
    is_app = part.type == table.TYPE_APP
    align = APP_ALIGN if is_app else SECTOR
    if part.offset % align:
        return f"offset 0x{part.offset:x}, expected a multiple of 0x{align:x}"
    if is_app and part.size % SECTOR:
        return f"size 0x{part.size:x}, expected a multiple of 0x{SECTOR:x}"
    if flash_size and part.offset + part.size > flash_size:
        return f"ends at 0x{part.offset + part.size:x}, the flash ends at 0x{flash_size:x}"
    if part.type != table.TYPE_DATA:
        return None
    readonly = part.flags & table.FLAG_READONLY
    if part.subtype == table.DATA_OTA and part.size != OTADATA_SIZE:
        return f"size 0x{part.size:x}, otadata has 0x{OTADATA_SIZE:x}"
    if part.subtype == table.DATA_NVS and part.size < NVS_MIN_SIZE and not readonly:
        return f"size 0x{part.size:x}, nvs needs 0x{NVS_MIN_SIZE:x} unless it is readonly"
    if readonly and part.subtype in (table.DATA_OTA, SUBTYPES[1]["coredump"]):
        return "can't be readonly"
    return None
