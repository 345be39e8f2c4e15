"""Send one file of the published tree: ETag, conditional requests, Range, in bounded pieces.

Source: RFC 9110 sections 8.8.3 (ETag), 13 (conditional), 14 (Range); RFC 8246 (immutable).
"""

import re
from asyncio import to_thread
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .site import File

CHUNK_BYTES = 65536
_IMMUTABLE = "public, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})", re.ASCII | re.IGNORECASE)


class Unsatisfiable(Exception):
    """The range asked for lies behind the end."""


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Turn a Range header into ``(first, last)``, both inclusive.

    Returns None where the header is to be ignored: another unit, several ranges (which nobody
    needs here, and a thousand of which would be an attack), or nonsense.

    Raises:
        Unsatisfiable: well-formed, but nothing of the file lies in it.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[0].endswith("=-"):
        return None
    first, last = match[1], match[2]
    if not first:  # the last N bytes
        if not int(last) or not size:
            raise Unsatisfiable
        return max(0, size - int(last)), size - 1
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        raise Unsatisfiable
    return int(first), min(int(last), size - 1) if last else size - 1


def etag_matches(header: str, etag: str) -> bool:
    """Weak comparison of an If-None-Match list, as RFC 9110 section 13.1.2 asks for."""
    if header.strip() == "*":
        return True
    return etag in [part.strip().removeprefix("W/") for part in header.split(",")]


def respond(request: Request, file: File) -> Response:
    """Answer GET or HEAD for ``file``."""
    headers = {
        "ETag": file.etag,
        "Cache-Control": _IMMUTABLE if file.immutable else "no-cache",
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }
    if etag_matches(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    size = file.path.stat().st_size if file.content is None else len(file.content)
    first, last, status = 0, size - 1, 200
    wanted = request.headers.get("range")
    if wanted and request.method == "GET" and _range_applies(request, file):
        try:
            span = byte_range(wanted, size)
        except Unsatisfiable:
            del headers["Cache-Control"]
            headers["Content-Range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        if span is not None:
            first, last, status = *span, 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    headers["Content-Type"] = file.media_type
    if request.method == "HEAD":
        headers["Content-Length"] = str(size)
        return Response(status_code=200, headers=headers)
    if file.content is not None:
        return Response(file.content[first : last + 1], status, headers)
    return Slice(file.path, first, last + 1 - first, status, headers)


def _range_applies(request: Request, file: File) -> bool:
    """If-Range: a range of another version of the file is no use to anybody."""
    condition = request.headers.get("if-range")
    return condition is None or condition.strip() == file.etag


class Slice(Response):
    """Stream ``length`` bytes of a file from ``offset``, one chunk in memory at a time."""

    def __init__(self, path: Path, offset: int, length: int, status: int, headers: dict[str, str]):
        super().__init__(status_code=status, headers={**headers, "Content-Length": str(length)})
        self._path = path
        self.offset = offset
        self.sent = 0
        self._length = length

    @property
    def complete(self) -> bool:
        return self.sent == self._length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        start = {"status": self.status_code, "headers": self.raw_headers}
        with self._path.open("rb") as file:
            file.seek(self.offset)
            await send({"type": "http.response.start", **start})
            left = self._length
            while left and not await request.is_disconnected():
                chunk = await to_thread(file.read, min(CHUNK_BYTES, left))
                if not chunk:
                    raise OSError(f"{self._path.name} became shorter while it was sent")
                left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})
                self.sent += len(chunk)
        if not self._length:
            await send({"type": "http.response.body", "body": b""})
