"""Say what a file is and whether it holds: image, release, pointer, keys, table, flash dump.

Recognised by content, never by name. Everything is looked at as untrusted: whatever a file says is
shown as data, and a private key is named as one, never printed.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinslot import base64url, espimage, jws, keyring, keyset, release
from twinslot.errors import FormatError, ImageError, OtaError, SignatureError
from twinslot.sources import parse_offer

from . import images, secure_boot, tree
from .virtual_esp32.chip import image as chip_image
from .virtual_esp32.chip import table
from .virtual_esp32.layout import subtype_name, type_name

_LARGEST = 128 << 20  # bytes: the largest flash an ESP32 takes
_SECTOR = 4096
_RECORD = 32  # bytes of a partition table's entry


def inspect(
    path: Path, keys: dict[str, bytes] | None = None, roots: dict[str, bytes] | None = None
) -> dict[str, Any]:
    """Describe a file.

    Args:
        path: the file.
        keys: trusted public keys, ``{kid: modulus}``; None: signatures are not judged.
        roots: those that sign keyrings.

    Returns:
        dict with ``kind``, ``ok`` (False: something in it does not hold) and what was found,
        ready for JSON.

    Raises:
        FormatError: nothing known here.
        OSError: no such file.
    """
    data = tree.read(path, _LARGEST)
    if data[:1] == b"\xe9" and images.find_table(data) is None:
        return _image(data)
    if data[:2] == b"\xaa\x50":
        return _table(data)
    if (found := images.find_table(data)) is not None:
        return _flash(data, *found)
    text = data.strip()
    if text[:1] == b"{":
        return _json(path, text)
    if text.count(b".") == 2 and text[:3] == b"eyJ" and text.isascii():
        return _signed(text, keys, roots)
    raise FormatError(
        f"{path}: not an ESP image, release, pointer, key set, partition table or flash dump:"
        f" it starts with {data[:8].hex(' ') or 'nothing, it is empty'}"
    )


# ---- ESP image


def _image(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "image", "ok": False, "size": len(data)}
    try:
        head = espimage.parse(data[: espimage.HEAD_LEN])
        length, build = espimage.identify(images.reader(data), len(data))
    except OtaError as exc:
        return {**found, "why": str(exc)}
    chip = espimage.chip_name(head["chip_id"])
    found |= {"chip": chip, **head, "length": length, "build": build}
    try:
        checked = images.check_with_esptool("image", chip, data)
        found["checksum"] = f"{checked.checksum:02x}"
        found["segment_table"] = [
            {"address": f"{s.addr:#010x}", "length": len(s.data), "offset": s.file_offs}
            for s in checked.segments
        ]
        info = images.check_as_bootloader(data[:length], chip)
        found["app"] = _app(data, info)
        found["tree"] = _tree(data, info)
        signatures = secure_boot.read(data, length)
        if signatures is not None:
            found["secure_boot"] = [asdict(signature) for signature in signatures]
        found["ok"] = bool(build) and all(s.holds is not False for s in signatures or ())
        if not found["ok"] and build:
            found["why"] = "its Secure Boot signature does not hold"
        if not build:
            found["why"] = "no SHA-256 is appended: it can't be published"
    except OtaError as exc:
        found["why"] = str(exc)
    return found


def _app(data: bytes, info: chip_image.ImageInfo | None) -> dict[str, Any] | None:
    desc = info and chip_image.read_desc(images.reader(data), info)
    if not desc:
        return None
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in desc._asdict().items()}


def _tree(data: bytes, info: chip_image.ImageInfo | None) -> dict[str, Any] | None:
    """The Python tree of a virtual firmware, if it carries one."""
    place = info and chip_image.find_tree(images.reader(data), info)
    if not place:
        return None
    romfs = data[place[0] : place[0] + place[1]]
    try:
        # The three bytes of magic are the record's kind, written as a number.
        names = sorted(_files(_record(romfs, 0)[1], ""))
    except (IndexError, RecursionError):
        raise ImageError(f"the Python tree at {place[0]} is damaged") from None
    return {"offset": place[0], "bytes": place[1], "files": names}


def _uint(data: bytes, at: int) -> tuple[int, int]:
    """A ROMFS number: big-endian groups of 7 bits (MicroPython docs, reference/romfs)."""
    value = 0
    while True:
        value = value << 7 | data[at] & 0x7F
        at += 1
        if data[at - 1] < 0x80:
            return value, at


def _record(data: bytes, at: int) -> tuple[int, bytes, int]:
    """``(kind, payload, end)`` of the record at ``at``."""
    kind, at = _uint(data, at)
    length, at = _uint(data, at)
    return kind, data[at : at + length], at + length


def _files(payload: bytes, folder: str) -> Iterator[str]:
    at = 0
    while at < len(payload):
        kind, inner, at = _record(payload, at)
        if kind in (4, 5):
            length, start = _uint(inner, 0)
            name = folder + inner[start : start + length].decode("utf-8", "replace")
            if kind == 5:
                yield name
            else:
                yield from _files(inner[start + length :], name + "/")


# ---- release, pointer, keys


def _signed(
    token: bytes, keys: dict[str, bytes] | None, roots: dict[str, bytes] | None
) -> dict[str, Any]:
    header, payload, _ = token.split(b".")
    found: dict[str, Any] = {"kind": "release", "ok": False}
    try:
        found["header"] = json.loads(base64url.b64url_decode(header))
        raw = base64url.b64url_decode(payload)
        content = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        return {**found, "signature": "bad", "why": f"not a JWS around JSON: {exc}"}
    if isinstance(found["header"], dict) and found["header"].get("typ") == keyring.TYPE:
        return _keyring(token, content, found["header"], roots)
    found["manifest"] = content
    found["signature"] = _signature(token, keys)
    try:
        release.parse(raw)
        found["ok"] = found["signature"] in ("good", "not checked")
    except OtaError as exc:
        found["why"] = str(exc)
    return found


def _keyring(
    token: bytes, content: Any, header: Any, roots: dict[str, bytes] | None
) -> dict[str, Any]:
    signature = _signature(token, roots)
    found = {"kind": "keyring", "ok": False, "header": header, "signature": signature}
    try:
        kids = list(keyset.load(content, demo=True))
        members = ("product", "version", "expires", "security_floor")
        found |= {k: content.get(k) for k in members} | {"keys": kids}
        found["ok"] = signature in ("good", "not checked")
    except OtaError as exc:
        found["why"] = str(exc)
    return found


def _signature(token: bytes, keys: dict[str, bytes] | None) -> str:
    """``good``, ``unknown`` (by none of the keys), ``bad``, or ``not checked``."""
    if keys is None:
        return "not checked"
    try:
        jws.verify(token, keys)
    except SignatureError as exc:
        return "unknown" if str(exc).startswith("signing key") else "bad"
    return "good"


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: not JSON: {exc}") from exc
    if "release" in content:
        return _pointer(content)
    if content.get("kty") or "keys" in content or "root" in content:
        return _keys(content)
    raise FormatError(f"{path}: JSON, but neither a pointer nor a key set")


def _pointer(content: dict[str, Any]) -> dict[str, Any]:
    found = {"kind": "pointer", "ok": True, "offer": content}
    try:
        parse_offer(content, "", lambda _base, url: url)
    except OtaError as exc:
        found |= {"ok": False, "why": str(exc)}
    return found


def _keys(content: dict[str, Any]) -> dict[str, Any]:
    if "d" in content:
        return {"kind": "private key", "ok": True, "kid": content.get("kid")}
    key_set = {"keys": [content]} if "kty" in content else content
    try:
        roots, loaded = keyring.load(json.dumps(key_set).encode(), demo=True)
    except OtaError as exc:
        return {"kind": "key set", "ok": False, "why": str(exc)}
    found: dict[str, Any] = {"kind": "key set", "ok": True}
    for name, keys in (("root", roots), ("keys", loaded)):
        if keys:
            found[name] = [{"kid": kid, "bits": len(n) * 8} for kid, n in keys.items()]
    return found


# ---- partition table, flash


def _table(data: bytes) -> dict[str, Any]:
    try:
        if len(data) % _RECORD:
            raise table.TableError(f"cut off: {len(data)} bytes, expected records of {_RECORD}")
        data = data.ljust(table.TABLE_SIZE, b"\xff")
        partitions = table.parse(data)
    except table.TableError as exc:
        return {"kind": "partition table", "ok": False, "why": str(exc)}
    return {"kind": "partition table", "ok": True, "partitions": [_row(p) for p in partitions]}


def _row(partition: table.Partition) -> dict[str, Any]:
    row = partition._asdict()
    row["subtype"] = subtype_name(partition.type, partition.subtype)
    row["type"] = type_name(partition.type)
    return row


def _flash(data: bytes, at: int, start: int) -> dict[str, Any]:
    """A file with a bootloader in front: a whole flash, or a combined file that starts later."""
    whole = start == 0 and len(data) % _SECTOR == 0 and len(data) >= 1 << 20
    if whole:
        from .virtual_esp32 import show

        found = show.describe(data)
        return {"kind": "flash", "ok": found["boots"] is not None, **found}
    result = _table(data[at : at + table.TABLE_SIZE])
    return {**result, "kind": "combined file", "flash_offset": start, "size": len(data)}
