"""Apply payloads with the device's own code. Runs under MicroPython, not under CPython.

    micropython apply_payload.py LIB < JOBS

Each line of standard input is a job, a JSON object; each line of output is what became of it:

    payload, base       paths; base may be left out
    encoding, window, patch    as in the manifest
    size                of the image in bytes
    out                 where to write the image (left out: nowhere)
    step                bytes that a read of the network brings at most (left out: as asked)
    resume              [offset in the image, offset in the payload, position in the base]
    measure             "garbage" or "live": see below (left out: neither)

    {"sha256": of what was written, "from": its offset, "boundaries": [resume, ...], "ms": time}
    "garbage": bytes allocated per 4 KiB block between two boundaries of 64 KiB
    "live": bytes of live objects at most, those before the payload was opened taken off
    {"error": text, "code": of the OtaError}

An image of 16 MB passes through a few KB of buffers, as on a board.
"""

import asyncio
import binascii
import gc
import hashlib
import json
import sys
import time

sys.path.insert(0, sys.argv[1])

from twinslot import inflate, native, patch, payload, release  # noqa: F401
from twinslot.errors import OtaError

_PER_MEMBER = payload.BOUNDARY // payload.BLOCK


class Body:
    """A file in place of the body of an HTTP answer."""

    def __init__(self, file, step):
        self._file = file
        self._step = step
        self.received = 0

    def take(self, buf, n):
        n = self._file.readinto(buf, min(n, self._step) if self._step else n)
        self.received += n
        return n or None

    async def wait(self):
        """A file is always ready."""


class Sink:
    """Takes the place of the slot."""

    def __init__(self, out, measure):
        self._out = out
        self._measure = measure
        self.hash = hashlib.sha256()
        self.blocks = self.counted = 0
        self.live = 0
        self.garbage = self.last = 0

    def write(self, block):
        for piece in block:
            self.hash.update(piece)
            if self._out:
                self._out.write(piece)
        if self._measure == "live":
            gc.collect()
            self.live = max(self.live, gc.mem_alloc())
        elif self._measure:
            now = gc.mem_alloc()
            # Not the first of a member: at its beginning a checkpoint is kept, and gc runs.
            if self.blocks % _PER_MEMBER:
                self.garbage += now - self.last
                self.counted += 1
            self.last = now
            self.blocks += 1


def reader(path):
    """Return ``(read, size)`` of a file, as ``FirmwareSlot.base`` does of the running slot."""
    if not path:
        return None, 0
    file = open(path, "rb")

    def read(offset, buf):
        file.seek(offset)
        if file.readinto(buf) != len(buf):
            raise ValueError("a patch read beyond its base")

    return read, file.seek(0, 2)


async def apply(job):
    encoding = job["encoding"]
    chosen = release.Payload("", encoding, 0, job.get("window", 0), job.get("patch"), "")
    offset, at, position = job.get("resume") or (0, 0, 0)
    out = job.get("out")
    out = open(out, "wb") if out else None
    boundaries = []
    measure = job.get("measure")
    gc.collect()
    if measure == "garbage":
        gc.disable()
    before = gc.mem_alloc()
    since = time.ticks_ms()
    with open(job["payload"], "rb") as file:
        file.seek(at)
        sink = Sink(out, measure)
        writer = payload.Writer(sink, job["size"], offset)
        state = (at, position) if job.get("resume") else None
        body = Body(file, job.get("step"))
        stage = payload.open_stage(chosen, body, reader(job.get("base")), job["size"], state)

        def boundary(done, state):
            if not measure:
                boundaries.append((done,) + (state or ()))

        await payload.pump(stage, writer, boundary)
    if out:
        out.close()
    result = {"ms": time.ticks_diff(time.ticks_ms(), since)}
    if measure == "garbage":
        gc.enable()
        result["garbage"] = sink.garbage / max(1, sink.counted)
    elif measure == "live":
        result["live"] = sink.live - before
    digest = binascii.hexlify(sink.hash.digest()).decode()
    result.update({"sha256": digest, "from": offset, "boundaries": boundaries})
    return result


def main():
    for line in sys.stdin:
        try:
            result = asyncio.run(apply(json.loads(line)))
        except OtaError as exc:
            result = {"error": str(exc), "code": exc.code}
        except (ValueError, OSError, MemoryError, IndexError) as exc:
            result = {"error": repr(exc), "code": "crash"}
        print(json.dumps(result))


main()
