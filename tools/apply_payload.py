"""Apply payloads with the device's own code. Runs under MicroPython, not under CPython.

    micropython apply_payload.py LIB < JOBS

Each line of standard input is a job, a JSON object; each line of output is what became of it:

    payload, base       paths; base may be left out
    encoding, window, patch    as in the manifest
    size                of the image in bytes
    out                 where to write the image (left out: nowhere)
    step                bytes that a read of the network brings at most (left out: as asked)
    resume              [offset in the image, offset in the payload, position in the base]

    {"sha256": of what was written, "from": its offset, "boundaries": [resume, ...]}
    {"error": text, "code": of the OtaError}

An image of 16 MB passes through a few KB of buffers, as on a board.
"""

import asyncio
import binascii
import hashlib
import json
import sys

sys.path.insert(0, sys.argv[1])

from twinslot import payload, release
from twinslot.errors import OtaError


class Body:
    """A file in place of the body of an HTTP answer."""

    def __init__(self, file, step):
        self._file = file
        self._step = step
        self.received = 0

    async def readinto(self, buf):
        if self._step and len(buf) > self._step:
            buf = memoryview(buf)[: self._step]
        n = self._file.readinto(buf)
        self.received += n
        return n


class Sink:
    """Takes the place of the slot."""

    def __init__(self, out):
        self._out = out
        self.hash = hashlib.sha256()

    def write(self, buf):
        self.hash.update(buf)
        if self._out:
            self._out.write(buf)


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
    with open(job["payload"], "rb") as file:
        file.seek(at)
        sink = Sink(out)
        writer = payload.Writer(sink, job["size"], offset)
        state = (at, position) if job.get("resume") else None
        body = Body(file, job.get("step"))
        stage = payload.open_stage(chosen, body, reader(job.get("base")), job["size"], state)
        await payload.pump(
            stage, writer, lambda done, state: boundaries.append((done,) + (state or ()))
        )
    if out:
        out.close()
    digest = binascii.hexlify(sink.hash.digest()).decode()
    return {"sha256": digest, "from": offset, "boundaries": boundaries}


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
