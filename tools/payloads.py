"""Build payloads: what a device downloads instead of the plain image.

    small = gzip_payload(image)
    smaller = patch_payload(base, image)

**gzip**: ordinary multi-member gzip, `gunzip` restores it. Each member but the last decodes to
exactly the bytes that complete the next 64 KiB of the image, with a small window: a member's end
is where a download that was cut goes on.

**detools**: a sequential patch as the detools package applies it, compression none, inside such
members. Its chunks are split where 64 KiB of the image are complete, so that a member's end is a
chunk's end too; after `gunzip`, `detools apply_patch` restores the image. What is alike is found
by bsdiff, as detools does it; the module bsdiff4 needs no compiler to install.

`build` makes all payloads of a release, over the machine's cores, and lets the device's own code
apply each to prove it.

Source: RFC 1952; detools' create.py and apply.py (the layout of a sequential patch); bsdiff.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsdiff4 import core as bsdiff

import twinslot
from twinslot.errors import ChecksumError

from .files import Progress, quiet
from .virtual_esp32.process import find_micropython

BOUNDARY = 65536  # of the image; lib/twinslot/payload.py has the same
WINDOW = 12  # 4 KiB of window on the device
# Above these a payload is not worth a board's trouble: a gzip, of the image; a delta, of the gzip.
GZIP_LIMIT = 0.9
DELTA_LIMIT = 0.8
PAYLOADS_MAX = 16  # in a manifest, lib/twinslot/release.py
DELTAS_MAX = PAYLOADS_MAX - 2  # beside the plain image and its gzip
_APPLY = Path(__file__).parent / "apply_payload.py"
_APPLY_TIMEOUT_S = 120


@dataclass(frozen=True)
class Base:
    """An image that boards run, to build a delta from."""

    name: str  # for people
    build: str  # its appended digest: what a board says of itself
    image: bytes


@dataclass(frozen=True)
class Payload:
    """One form in which an image can be fetched.

    ``kept`` is False for one that is not worth it; it is in no release then.
    """

    content: bytes
    encoding: str
    patch: str | None = None
    base: Base | None = None
    kept: bool = True

    @property
    def url(self) -> str:
        """Its content address, relative to the product."""
        digest = hashlib.sha256(self.content).hexdigest()
        ending = "bin" if self.encoding == "identity" else "gz"
        return f"blobs/{digest[:2]}/{digest}.{ending}"

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        entry: dict[str, Any] = {"url": self.url, "encoding": self.encoding}
        if self.encoding == "gzip":
            entry["window"] = WINDOW
        entry["size"] = len(self.content)
        if self.base:
            entry |= {"patch": self.patch, "base": self.base.build}
        return entry


def build(image: bytes, bases: Iterable[Base] = (), progress: Progress = quiet) -> list[Payload]:
    """Return the payloads of an image, the plain one first, each proven by the device's code.

    One that saves too little (``GZIP_LIMIT``, ``DELTA_LIMIT``) is in the list with ``kept`` False.

    Raises:
        ChecksumError: what the device's code made of a payload is not the image.
        ValueError: more payloads than a manifest holds.
    """
    bases = list({base.build: base for base in bases}.values())
    if len(bases) > DELTAS_MAX:
        raise ValueError(f"{len(bases)} bases: a release holds {DELTAS_MAX} deltas at most")
    packed, *deltas = _make_all(image, [None, *bases], progress)
    found = [Payload(image, "identity")]
    found.append(Payload(packed, "gzip", kept=len(packed) <= GZIP_LIMIT * len(image)))
    limit = DELTA_LIMIT * min(len(packed), len(image))
    for base, delta in zip(bases, deltas, strict=True):
        found.append(Payload(delta, "gzip", "detools", base, len(delta) <= limit))
    return found


def _make_all(image: bytes, jobs: Sequence[Base | None], progress: Progress) -> list[bytes]:
    """Do the jobs, several at a time: each in a process of its own, one per core."""
    if len(jobs) == 1:
        return [_make(image, jobs[0])]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        new = Path(folder) / "image"
        new.write_bytes(image)
        futures = [pool.submit(_make_apart, new, base, i) for i, base in enumerate(jobs)]
        for done, _ in enumerate(as_completed(futures), 1):
            progress("packing", done * len(image), len(jobs) * len(image))
        return [future.result() for future in futures]


def _make_apart(image: Path, base: Base | None, number: int) -> bytes:
    """Do a job in another process."""
    out = image.with_name(f"payload-{number}")
    command = [sys.executable, "-m", __spec__.name, str(image), str(out)]
    if base:
        old = image.with_name(f"base-{number}")
        old.write_bytes(base.image)
        command += [str(old), base.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChecksumError(done.stderr.strip().splitlines()[-1])
    return out.read_bytes()


def _make(image: bytes, base: Base | None) -> bytes:
    """One job of ``build``: make a payload and prove it."""
    content = gzip_payload(image) if base is None else patch_payload(base.image, image)
    prove(content, image, base)
    return content


def prove(content: bytes, image: bytes, base: Base | None = None) -> None:
    """Apply a gzip payload with the device's own code, under MicroPython.

    Raises:
        ChecksumError: the result is not the image.
    """
    name = f"the delta from {base.name}" if base else "the gzip payload"
    with tempfile.TemporaryDirectory() as folder:
        paths = {"payload": Path(folder) / "payload", "base": Path(folder) / "base"}
        paths["payload"].write_bytes(content)
        paths["base"].write_bytes(base.image if base else b"")
        job = {
            **{key: str(path) for key, path in paths.items()},
            "encoding": "gzip",
            "window": WINDOW,
            "patch": "detools" if base else None,
            "size": len(image),
        }
        [result] = apply([job])
    digest = hashlib.sha256(image).hexdigest()
    if result.get("sha256") != digest:
        seen = result.get("error") or result["sha256"]
        raise ChecksumError(f"{name}, applied by the device's code", seen, digest)
    if any(len(mark) == 1 for mark in result["boundaries"][:-1]):
        raise ChecksumError(f"{name} can't be resumed at each 64 KiB of the image")


def apply(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run ``apply_payload.py`` under MicroPython; return what it says of each job.

    Raises:
        RuntimeError: the interpreter died; with the end of its output.
    """
    command = [find_micropython(), "-X", "heapsize=8M", str(_APPLY)]
    done = subprocess.run(
        [*command, str(Path(twinslot.__path__[0]).parent)],
        input="\n".join(json.dumps(job) for job in jobs) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=_APPLY_TIMEOUT_S,
    )
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(jobs):
        text = (done.stdout + done.stderr)[-800:]
        raise RuntimeError(f"micropython ended with {done.returncode}: {text}")
    return [json.loads(line) for line in lines]


# ---- the formats


def member(data: bytes, window: int = WINDOW) -> bytes:
    """One gzip member, the smallest zlib makes with a window of ``2**window`` bytes."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + window, 9)
    return deflate.compress(data) + deflate.flush()


def gzip_payload(image: bytes, window: int = WINDOW) -> bytes:
    """The image in gzip members of 64 KiB."""
    return b"".join(
        member(image[at : at + BOUNDARY], window) for at in range(0, len(image), BOUNDARY)
    )


def patch_payload(base: bytes, image: bytes, window: int = WINDOW) -> bytes:
    """A patch from ``base`` to ``image``, in gzip members."""
    header = b"\0" + varint(len(image)) + varint(0)
    pieces = _split(_chunks(base, image))
    first = next(pieces, b"")
    return member(header + first, window) + b"".join(member(piece, window) for piece in pieces)


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


Chunk = tuple[bytes, bytes, int]
"""Bytes to add to the base, bytes to take as they are, and where to go on in the base."""


def _chunks(base: bytes, image: bytes) -> Iterator[Chunk]:
    """What bsdiff finds alike, piece by piece, until the image is complete."""
    control, diff, extra = bsdiff.diff(base, image)
    diff_at = extra_at = position = 0
    for words in struct.iter_unpack("<QQQ", control):
        # bsdiff's numbers have their sign in the highest bit.
        add, copy, seek = (-(w & ~(1 << 63)) if w >> 63 else w for w in words)
        adjustment = seek
        if extra_at + copy == len(extra) and diff_at + add == len(diff):
            adjustment = -position - add  # of no use, but must not lead outside: back to 0
        yield diff[diff_at : diff_at + add], extra[extra_at : extra_at + copy], adjustment
        diff_at, extra_at = diff_at + add, extra_at + copy
        position += add + adjustment


def _split(chunks: Iterator[Chunk]) -> Iterator[bytes]:
    """Write chunks down in pieces that each complete 64 KiB of the image."""
    piece, room = bytearray(), BOUNDARY
    for chunk in chunks:
        diff, extra, adjustment = chunk
        while len(diff) + len(extra) >= room:
            head = diff[:room]
            tail = extra[: room - len(head)]
            diff, extra = diff[len(head) :], extra[len(tail) :]
            whole = not diff and not extra
            # The chunk's own adjustment belongs to its last part.
            piece += _pack(head, tail, adjustment if whole else 0)
            yield bytes(piece)
            piece, room = bytearray(), BOUNDARY
            if whole:
                break
        else:
            piece += _pack(diff, extra, adjustment)
            room -= len(diff) + len(extra)
    if piece:
        yield bytes(piece)


def _pack(diff: bytes, extra: bytes, adjustment: int) -> bytes:
    return varint(len(diff)) + diff + varint(len(extra)) + extra + varint(adjustment)


def main(image: str, out: str, old: str = "", name: str = "") -> None:
    """One job of `build`, in a process of its own."""
    base = Base(name, "", Path(old).read_bytes()) if old else None
    Path(out).write_bytes(_make(Path(image).read_bytes(), base))


if __name__ == "__main__":
    main(*sys.argv[1:])
