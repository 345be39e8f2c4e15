"""Build payloads: what a device downloads instead of the plain image.

    small = gzip_payload(image)
    smaller = patch_payload(base, image)

**gzip**: ordinary multi-member gzip, `gunzip` restores it. Each member but the last decodes to
exactly the bytes that complete the next 64 KiB of the image, with a small window: a member's end
is where a download that was cut goes on.

**detools**: a sequential patch of the detools package, compression none, inside such members. Its
chunks are split where 64 KiB of the image are complete, so that a member's end is a chunk's end
too; after `gunzip`, `detools apply_patch` restores the image.

Source: RFC 1952; detools' create.py and apply.py (the layout of a sequential patch).
"""

import io
import zlib
from collections.abc import Iterator

import detools

BOUNDARY = 65536  # of the image; lib/twinslot/payload.py has the same
WINDOW = 12  # 4 KiB of window on the device


def member(data: bytes, window: int = WINDOW) -> bytes:
    """One gzip member, the smallest zlib makes with a window of ``2**window`` bytes."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + window, 9)
    return deflate.compress(data) + deflate.flush()


def gzip_payload(image: bytes, window: int = WINDOW) -> bytes:
    """The image in gzip members of 64 KiB."""
    return b"".join(
        member(image[at : at + BOUNDARY], window) for at in range(0, len(image), BOUNDARY)
    )


def varint(value: int) -> bytes:
    """A signed number as detools packs it: sign and 6 bits, then 7 bits each, least first."""
    sign = 0x40 if value < 0 else 0
    value = abs(value)
    out = [sign | (value & 0x3F)]
    value >>= 6
    while value:
        out[-1] |= 0x80
        out.append(value & 0x7F)
        value >>= 7
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return ``(value, offset behind it)``."""
    byte = data[at]
    at += 1
    sign = -1 if byte & 0x40 else 1
    value, shift = byte & 0x3F, 6
    while byte & 0x80:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return sign * value, at


def _chunks(patch: bytes, size: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Take a sequential patch apart: (diff bytes, extra bytes, adjustment) until complete."""
    at, done = 0, 0
    while done < size:
        length, at = read_varint(patch, at)
        diff, at = patch[at : at + length], at + length
        length, at = read_varint(patch, at)
        extra, at = patch[at : at + length], at + length
        adjustment, at = read_varint(patch, at)
        done += len(diff) + len(extra)
        yield diff, extra, adjustment


def _split(chunks: Iterator[tuple[bytes, bytes, int]]) -> Iterator[bytes]:
    """Put the chunks together again, in pieces that each complete 64 KiB of the image."""
    piece, room = bytearray(), BOUNDARY
    for diff, extra, adjustment in chunks:
        while len(diff) + len(extra) >= room:
            head = diff[:room]
            tail = extra[: room - len(head)]
            diff, extra = diff[len(head) :], extra[len(tail) :]
            # The chunk's own adjustment belongs to its last part.
            last = 0 if diff or extra else adjustment
            piece += varint(len(head)) + head + varint(len(tail)) + tail + varint(last)
            yield bytes(piece)
            piece, room = bytearray(), BOUNDARY
            if not diff and not extra:
                adjustment = None
                break
        if adjustment is not None:
            piece += varint(len(diff)) + diff + varint(len(extra)) + extra + varint(adjustment)
            room -= len(diff) + len(extra)
    if piece:
        yield bytes(piece)


def patch_payload(base: bytes, image: bytes, window: int = WINDOW) -> bytes:
    """A patch from ``base`` to ``image``, in gzip members."""
    made = io.BytesIO()
    detools.create_patch(io.BytesIO(base), io.BytesIO(image), made, compression="none")
    patch = made.getvalue()
    if patch[0] != 0:
        raise ValueError(f"detools made a patch of type {patch[0]}, expected 0")
    size, at = read_varint(patch, 1)
    format_size, at = read_varint(patch, at)
    if size != len(image) or format_size:
        raise ValueError("detools made a patch of another shape than expected")
    header = patch[:at]
    pieces = _split(_chunks(patch[at:], size))
    first = next(pieces, b"")
    return member(header + first, window) + b"".join(member(piece, window) for piece in pieces)
