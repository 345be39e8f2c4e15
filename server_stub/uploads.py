"""Judge an upload before a byte of it lies where it could be offered, as a board would.

The signature and the manifest come first. Then each payload is turned into the image, in small
pieces, and the image is judged by the board's own code: header, chip, app descriptor, segments,
checksum, appended SHA-256, and the size, hash and build that were signed. A patch is applied where
the image that it is for lies in the tree; where not, its structure is walked to the end, and the
bytes that it would add stay unknown. Every board must find a payload that needs no other image.

Source: lib/twinslot/slot.py, inflate.py and patch.py, whose order and bounds these are.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from twinslot import base64url, espimage, jws
from twinslot import release as rules
from twinslot.errors import ChecksumError, FormatError, HardwareError, ImageError, OtaError
from twinslot.walk import Walk

from .problems import Problem
from .site import ChannelError, Site

PIECE = 1024
"""Bytes read or inflated at a time. zlib sees as far back as the window and what it has put out in
this very call, so that a window larger than the release says is noticed."""

_IDLE_MEMBERS = 16  # of gzip, without content, in a row
_DIGITS = 64  # bytes of a patch's numbers without a byte of the image between them
_NUMBER = 1 << 30  # a patch's numbers are smaller

BaseOf = Callable[[str], Path | None]
"""Where the plain image of a build lies, if it is known here."""


def verify(site: Site, token: bytes) -> rules.Release:
    """What a signed release says.

    Raises:
        Problem: the server has no keys, or a board would refuse it.
    """
    try:
        product = rules.parse(base64url.b64url_decode(token.split(b".")[1])).product
        trusted = site.trusted(product)
        if trusted is None:
            raise Problem(409, "no_keys", "started without --keys, the server can't verify")
        return rules.parse(jws.verify(token, trusted, rules.TYPE))
    except (ChannelError, OtaError) as exc:
        raise _refused("release", exc.code, str(exc)) from None
    except (IndexError, ValueError):
        raise Problem(422, "format", "release: expected a compact JWS") from None


def judge(
    site: Site, release: rules.Release, files: Mapping[str, BinaryIO], limit: int, base_of: BaseOf
) -> dict[str, BinaryIO]:
    """Judge the payloads of a release; return them by URL. Takes a second for some megabytes.

    Args:
        site: where they would go.
        release: verified.
        files: uploaded payloads by SHA-256.
        limit: bytes of an image or a payload.
        base_of: finds the images that patches are for.

    Raises:
        Problem: refused, and why.
    """
    image = release.firmware
    if image.size > limit:
        raise Problem(413, "too_large", f"image of {image.size} bytes, at most {limit}")
    found = {p.url: _file_of(site, p, files, limit) for p in image.payloads}
    if all(payload.patch is not None for payload in image.payloads):
        raise Problem(
            422, "payload", "every payload is a patch: expected one that needs no other image"
        )
    for payload in image.payloads:
        try:
            _judge(found[payload.url], payload, image, base_of)
        except OtaError as exc:
            raise _refused(payload.url, exc.code, exc.message) from None
    return found


def _refused(what: str, code: str, why: str) -> Problem:
    return Problem(422, code, " ".join(f"{what}: {why}".split()))


def _file_of(
    site: Site, payload: rules.Payload, files: Mapping[str, BinaryIO], limit: int
) -> BinaryIO:
    if not site.is_payload(payload.url):
        raise Problem(422, "payload", f"{payload.url}: not a name in the tree")
    if payload.size > limit:
        raise Problem(413, "too_large", f"payload of {payload.size} bytes, at most {limit}")
    file = files.get(Path(payload.url).stem)
    if file is None:
        raise Problem(422, "payload", f"{payload.url} was not uploaded with it")
    size = file.seek(0, os.SEEK_END)
    if size != payload.size:
        raise Problem(422, "size", f"{payload.url}: saw {size} bytes, expected {payload.size}")
    return file


def _judge(file: BinaryIO, payload: rules.Payload, image: rules.Image, base_of: BaseOf) -> None:
    """Raises OtaError."""
    file.seek(0)
    if payload.encoding == "gzip":
        pieces = inflated(file, payload.window)
    elif payload.encoding == "identity":
        pieces = iter(lambda: file.read(PIECE), b"")
    else:
        raise FormatError("payload encoding", payload.encoding, "identity or gzip")
    if payload.patch is None:
        judge_image(pieces, image)
        return
    if payload.patch != "detools":
        raise FormatError("payload patch", payload.patch, "detools")
    base = base_of(payload.base)
    if base is None:
        for _ in patched(pieces, None, image.size):
            pass
        return
    with base.open("rb") as old:
        judge_image(patched(pieces, old, image.size), image)


def judge_image(pieces: Iterator[bytes], image: rules.Image) -> None:
    """Judge an image as a board's slot does, before its first erase and after the last byte.

    Args:
        pieces: the image's bytes, in order.
        image: what the release says of it.

    Raises:
        ImageError, HardwareError, ChecksumError: as the slot.
    """
    head = b""
    size = 0
    digest, walk = hashlib.sha256(), Walk()
    for piece in pieces:
        if len(head) < espimage.HEAD_LEN <= len(head) + len(piece):
            _judge_head(head + piece, image)
        if len(head) < espimage.HEAD_LEN:
            head += piece
        size += len(piece)
        if size > image.size:
            raise ImageError("size of the image", f"more than {image.size} bytes", image.size)
        digest.update(piece)
        walk.feed(piece)
    if size != image.size:
        raise ImageError("size of the image", f"{size} bytes", image.size)
    if size < espimage.HEAD_LEN:
        _judge_head(head, image)
    if digest.hexdigest() != image.sha256:
        raise ChecksumError("SHA-256 of the image", digest.hexdigest(), image.sha256)
    build = walk.finish()
    if build != image.build:
        raise ImageError("build of the image", build, image.build)


def _judge_head(head: bytes, image: rules.Image) -> None:
    found = espimage.parse(head)
    if found["chip_id"] != image.chip_id:
        chip, expected = map(espimage.chip_name, (found["chip_id"], image.chip_id))
        raise HardwareError("image is for", chip, f"{expected}, as the release says")
    if not found["hash_appended"]:
        raise ImageError("the image has no appended SHA-256, so its checksum is 8 bits")


# ---- the forms a payload can have


def inflated(file: BinaryIO, window: int) -> Iterator[bytes]:
    """Inflate gzip members, one after the other, in pieces of at most ``PIECE`` bytes.

    Raises:
        FormatError: malformed, cut short, a larger window, or members without content.
    """
    idle = 0
    data = file.read(PIECE)
    while data:
        member = zlib.decompressobj(16 + window)
        idle += 1
        while not member.eof:
            data = data or file.read(PIECE)
            if not data:
                raise FormatError("gzip: the payload is cut short")
            try:
                piece = member.decompress(data, PIECE)
            except zlib.error as exc:
                raise FormatError(f"gzip: malformed payload ({exc})") from None
            data = member.unconsumed_tail
            if piece:
                idle = 0
                yield piece
        data = member.unused_data or file.read(PIECE)
        if idle >= _IDLE_MEMBERS:
            raise FormatError("gzip", f"{idle} members without content", "an image")


class _Reader:
    """Bytes of a patch by number, from pieces of any length."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._piece = b""
        self._at = 0
        self._digits = 0  # bytes of numbers since the last byte of the image

    def take(self, n: int) -> bytes:
        """1 to ``n`` bytes."""
        while self._at == len(self._piece):
            self._piece, self._at = next(self._pieces, b""), 0
            if not self._piece:
                raise FormatError("patch: cut short")
        taken = self._piece[self._at : self._at + n]
        self._at += len(taken)
        self._digits = 0
        return taken

    def left(self) -> int:
        """Bytes of the piece under way."""
        return len(self._piece) - self._at

    def number(self) -> int:
        """A signed number: sign and 6 bits first, then 7 bits each, least first."""
        byte = self._digit()
        negative, value, shift = byte & 0x40, byte & 0x3F, 6
        while byte & 0x80:
            byte = self._digit()
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 34 or value >= _NUMBER:
                raise FormatError("patch: a number above 30 bits")
        return -value if negative else value

    def _digit(self) -> int:
        digits = self._digits + 1
        if digits > _DIGITS:
            raise FormatError("patch", f"{_DIGITS} bytes without content", "an image")
        byte = self.take(1)[0]
        self._digits = digits
        return byte


def patched(pieces: Iterator[bytes], base: BinaryIO | None, size: int) -> Iterator[bytes]:
    """Apply a sequential detools patch. Without its base, what it adds to that is left as it is.

    Args:
        pieces: the patch.
        base: the image that it is for; None: one of any size.
        size: bytes of the image.

    Raises:
        FormatError: malformed, cut short, for an image of another size, or it leaves the base.
    """
    patch = _Reader(pieces)
    first = patch.take(1)[0]
    if first:
        raise FormatError("patch type", first, "0: sequential, not compressed")
    seen = patch.number()
    if seen != size:
        raise FormatError("patch: size of its image", seen, size)
    if patch.number():
        raise FormatError("patch: a data format is not supported")
    room = rules.SIZE_LIMIT if base is None else base.seek(0, os.SEEK_END)
    position = done = 0
    while done < size:
        diff = _length(patch.number(), size - done)
        if position + diff > room:
            raise FormatError("patch: reads beyond the base image")
        if base is not None:
            base.seek(position)
        for data in _pieces(patch, diff):
            yield data if base is None else _sum(data, base.read(len(data)))
        extra = _length(patch.number(), size - done - diff)
        yield from _pieces(patch, extra)
        done += diff + extra
        position += diff + patch.number()
        if not 0 <= position <= room and done < size:
            raise FormatError("patch: leaves the base image")
    if next(pieces, b"") or patch.left():
        raise FormatError("patch: bytes behind the image")


def _length(n: int, left: int) -> int:
    if not 0 <= n <= left:
        raise FormatError("patch: a size", n, f"0 to {left}, what is left of the image")
    return n


def _pieces(patch: _Reader, n: int) -> Iterator[bytes]:
    while n:
        piece = patch.take(n)
        n -= len(piece)
        yield piece


def _sum(one: bytes, other: bytes) -> bytes:
    """Byte by byte, modulo 256: all at once, the carries out of each byte's top bit left out."""
    n = len(one)
    a, b = int.from_bytes(one, "big"), int.from_bytes(other, "big")
    low = int.from_bytes(b"\x7f" * n, "big")
    return ((a & low) + (b & low) ^ (a ^ b) & ~low & (1 << 8 * n) - 1).to_bytes(n, "big")
