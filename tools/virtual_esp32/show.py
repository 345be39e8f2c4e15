"""Describe a flash: table, otadata, slots, who boots next and why.

    description = describe(Path("flash.bin").read_bytes())   # JSON-able
    rich.print(render(description))

Works on the file of a virtual board and on a dump of a real one (the whole flash from address 0,
`esptool read-flash 0 ALL flash.bin`). It changes nothing; "who boots next" is the bootloader model
run on a copy.
"""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import bootloader, layout
from .chip import image, otadata, table
from .chip.image import CHIPS, Chip, ImageError
from .chip.table import Partition, TableError


class ShowError(ValueError):
    """This is no flash; the text says what was looked for."""


def identify_chip(data: bytes) -> Chip | None:
    """Tell by the bootloader's header which chip this flash is of; None if there is none."""
    for chip in CHIPS.values():
        head = data[chip.bootloader : chip.bootloader + image.HEADER_SIZE]
        if head[:1] == b"\xe9" and int.from_bytes(head[12:14], "little") == chip.chip_id:
            return chip
    return None


def describe(data: bytes, chip: str | None = None) -> dict[str, Any]:
    """Describe a flash as plain dicts and lists.

    Args:
        data: the whole flash from address 0.
        chip: name, where the bootloader's header can't tell.
    Returns:
        chip, flash_size (of the file), header_flash_size (of the bootloader's header),
        table_error, partitions [{label, type, subtype, offset, size, flags}],
        otadata [{seq, state, crc_ok, slot}] or None, active (index of the entry that counts or
        None), slots [{label, offset, size, valid, error, version, project, build, length, state,
        tree}], boots (label or None), why, log.
    Raises:
        ShowError: no bootloader header where one should be, or a cut-off file.
    """
    known = CHIPS.get(chip) if chip else identify_chip(data)
    if chip and known is None:
        raise ShowError(f"unknown chip {chip!r}, expected one of {', '.join(CHIPS)}")
    if known is None:
        raise ShowError(
            "no bootloader of a known chip at 0x0, 0x1000 or 0x2000: "
            "expected a whole flash from address 0, of " + ", ".join(CHIPS)
        )
    if len(data) % 4096 or len(data) < table.TABLE_OFFSET + 0x1000:
        raise ShowError(f"{len(data)} bytes, expected a whole flash (a multiple of 4096)")
    head = data[known.bootloader : known.bootloader + image.HEADER_SIZE]
    header_size = bootloader.flash_size_of_header(head)
    partitions, table_error = _read_table(data, header_size)
    entries = _entries(data, partitions)
    slots = table.ota_slots(partitions)
    next_boot = bootloader.predict(data, known)
    return {
        "chip": known.name,
        "flash_size": len(data),
        "header_flash_size": header_size,
        "table_error": table_error,
        "partitions": [_partition(p) for p in partitions],
        "otadata": None if entries is None else describe_entries(entries, len(slots)),
        "active": _active(entries),
        "slots": [
            _slot(data, p, known, entries, len(slots))
            for p in partitions
            if p.type == table.TYPE_APP
        ],
        "boots": next_boot.partition.label if next_boot.partition else None,
        "why": next_boot.why,
        "log": next_boot.log,
    }


def describe_entries(entries: list[otadata.Entry], n: int) -> list[dict[str, Any]]:
    """Describe otadata's entries, for a table with n OTA slots (slot None: entry is empty)."""
    return [
        {
            "seq": e.seq,
            "state": otadata.state_name(e.state),
            "crc_ok": otadata.crc_ok(e),
            "slot": f"ota_{otadata.slot(e.seq, n)}" if n and e.seq != 0xFFFFFFFF else None,
        }
        for e in entries
    ]


def _read_table(data: bytes, header_size: int) -> tuple[list[Partition], str | None]:
    raw = data[table.TABLE_OFFSET : table.TABLE_OFFSET + table.TABLE_SIZE]
    try:
        return table.parse(raw, chip_size=header_size), None
    except TableError as e:
        error = str(e)
    try:
        return table.parse(raw), error  # too big for the header, but readable
    except TableError:
        return table.parse(raw, require_md5=True), error


def _entries(data: bytes, partitions: list[Partition]) -> list[otadata.Entry] | None:
    part = table.find(partitions, table.TYPE_DATA, table.DATA_OTA)
    if part is None or part.offset + 2 * otadata.SECTOR > len(data):
        return None
    return [otadata.unpack(data[part.offset + i * otadata.SECTOR :][:32]) for i in range(2)]


def _active(entries: list[otadata.Entry] | None) -> int | None:
    active = otadata.active(entries) if entries else -1
    return None if active < 0 else active


def _partition(part: Partition) -> dict[str, Any]:
    return {
        "label": part.label,
        "type": layout.type_name(part.type),
        "subtype": layout.subtype_name(part.type, part.subtype),
        "offset": part.offset,
        "size": part.size,
        "flags": [name for name, bit in layout.FLAGS.items() if part.flags & bit],
    }


def _slot(
    data: bytes, part: Partition, chip: Chip, entries: list[otadata.Entry] | None, n: int
) -> dict[str, Any]:
    content = memoryview(data)[part.offset : part.offset + part.size]

    def read(at: int, buf: bytearray) -> None:
        buf[:] = content[at : at + len(buf)]

    row: dict[str, Any] = {"label": part.label, "offset": part.offset, "size": part.size}
    row |= dict.fromkeys(("error", "version", "project", "build", "length"))
    row |= {"valid": False, "tree": False, "state": _state(part, entries, n)}
    try:
        info = image.verify(read, len(content), chip, part.offset, in_bootloader=True)
    except ImageError as e:
        row["error"] = "empty" if _is_blank(content) else str(e)
        return row
    desc = image.read_desc(read, info)
    row |= {
        "valid": True,
        "version": desc.version if desc else None,
        "project": desc.project if desc else None,
        "build": info.digest.hex() if info.digest else None,
        "length": info.length,
        "tree": image.find_tree(read, info) is not None,
    }
    return row


def _state(part: Partition, entries: list[otadata.Entry] | None, n: int) -> str | None:
    number = part.subtype - table.APP_OTA_0
    if entries is None or not 0 <= number < n:
        return None
    state = otadata.slot_state(entries, number, n)
    return None if state is None else otadata.state_name(state)


def _is_blank(content: memoryview) -> bool:
    return bytes(content[:4096]) == b"\xff" * min(4096, len(content))


def render(description: dict[str, Any]) -> RenderableType:
    """Return what `describe` found as tables for a terminal."""
    d = description
    head = Text(f"{d['chip']}, {_size(d['flash_size'])} flash")
    if d["header_flash_size"] != d["flash_size"]:
        head.append(f" (bootloader header: {_size(d['header_flash_size'])})", "yellow")
    parts: list[RenderableType] = [head]
    if d["table_error"]:
        parts.append(Text(f"partition table: {d['table_error']}", "red"))
    parts.append(_render_partitions(d["partitions"]))
    if d["otadata"] is not None:
        parts.append(_render_otadata(d["otadata"], d["active"]))
    parts.append(_render_slots(d["slots"], d["boots"]))
    verdict = Text("boots next: ")
    verdict.append(d["boots"] or "nothing", "bold green" if d["boots"] else "bold red")
    parts.append(verdict.append(f" ({d['why']})"))
    return Group(*parts)


def _render_partitions(rows: list[dict[str, Any]]) -> Table:
    out = Table("partition", "type", "subtype", title="Partition table", title_justify="left")
    out.add_column("offset", justify="right")
    out.add_column("size", justify="right")
    out.add_column("flags")
    for p in rows:
        flags = ":".join(p["flags"])
        out.add_row(
            p["label"], p["type"], p["subtype"], f"0x{p['offset']:x}", _size(p["size"]), flags
        )
    return out


def _render_otadata(rows: list[dict[str, Any]], active: int | None) -> Table:
    out = Table("entry", "seq", "slot", "state", "crc", title="otadata", title_justify="left")
    for i, e in enumerate(rows):
        if e["seq"] == 0xFFFFFFFF:
            out.add_row(str(i), "empty", "", "", "")
            continue
        crc = "ok" if e["crc_ok"] else Text("wrong", "red")
        mark = " (active)" if i == active else ""
        out.add_row(f"{i}{mark}", str(e["seq"]), e["slot"] or "", e["state"], crc)
    return out


def _render_slots(rows: list[dict[str, Any]], boots: str | None) -> Table:
    out = Table("slot", "image", "version", "build", "bytes", "state", title="Slots")
    out.title_justify = "left"
    for s in rows:
        valid = Text("ok", "green") if s["valid"] else Text(s["error"], "dim red")
        version = " ".join(filter(None, (s["project"], s["version"]))) or (
            "-" if s["valid"] else ""
        )
        name = Text(s["label"], "bold" if s["label"] == boots else "")
        length = f"{s['length']:,}" if s["length"] else ""
        out.add_row(name, valid, version, (s["build"] or "")[:16], length, s["state"] or "")
    return out


def _size(n: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if n % unit == 0 and n:
            return f"{n // unit} {name}"
    return f"{n} B"
