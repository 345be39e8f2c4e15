"""Talk to a Twinslot server: one call at a time for people, many for simulated fleets."""

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from twinslot.release import SIZE_LIMIT

from . import tree

T = TypeVar("T")
_ANSWER_LIMIT = 1 << 30  # bytes: an export of a million boards
_PROBLEM_LIMIT = 65536


class ApiError(ValueError):
    """The server refused, or did not answer."""


@dataclass(frozen=True)
class Api:
    """The server's API with an operator's token; ``ca`` is its certificate's file."""

    url: str
    token: str
    ca: Path | None = None

    def call(
        self, method: str, path: str, body: Any = None, raw: bytes | None = None, kind: str = ""
    ) -> Any:
        """Return the answer's JSON, or its text where it is none.

        Raises:
            ApiError: with the server's own words.
        """
        data = json.dumps(body).encode() if body is not None else raw
        headers = {"Authorization": f"Bearer {self.token}"}
        if data is not None:
            headers["Content-Type"] = kind or "application/json"
        url = f"{self._home()}api/v1/{path}"
        request = urllib.request.Request(url, data, headers, method=method)
        content, is_json, _ = self._open(request)
        return json.loads(content) if is_json else content.decode()

    def fetch(self, path: str) -> bytes:
        """Return an image, wherever on the web the server says it is; the token goes to the
        server only.

        Raises:
            ApiError: it can't be had, or is larger than an image.
        """
        url = f"{self._home()}api/v1/{path}"
        for _ in range(3):
            at_home = url.startswith(self._home())
            if not at_home and urllib.parse.urlsplit(url).scheme not in ("https", "http"):
                raise ApiError(f"{self.url}: moved to {url[:80]!r}")
            headers = {"Authorization": f"Bearer {self.token}"} if at_home else {}
            request = urllib.request.Request(url, headers=headers)
            content, _, moved = self._open(request, SIZE_LIMIT)
            if not moved:
                return content
            url = urllib.parse.urljoin(url, moved)
        raise ApiError(f"{self.url}: redirected too often")

    def _home(self) -> str:
        return f"{self.url.rstrip('/')}/"

    def _open(
        self, request: urllib.request.Request, limit: int = _ANSWER_LIMIT
    ) -> tuple[bytes, bool, str | None]:
        """Send a request; return content of at most ``limit`` bytes, whether it is JSON, and
        where it says to go instead."""
        at_home = request.full_url.startswith(self._home())
        context = self.tls() if at_home else ssl.create_default_context()
        opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), _NoRedirect
        )
        try:
            with opener.open(request, timeout=60) as answer:
                is_json = "json" in answer.headers.get("Content-Type", "")
                content = answer.read(limit + 1)
                if len(content) > limit:
                    raise ApiError(f"{self.url}: an answer of more than {limit} bytes")
                return content, is_json, None
        except urllib.error.HTTPError as exc:
            with exc:
                if 300 < exc.code < 400 and (moved := exc.headers.get("Location")):
                    return b"", False, moved
                raise ApiError(_said(exc)) from None
        except (urllib.error.URLError, OSError) as exc:
            where = self.url if at_home else request.host
            raise ApiError(f"{where}: {getattr(exc, 'reason', exc)}") from None

    def tls(self) -> ssl.SSLContext | None:
        if not self.url.startswith("https:"):
            return None
        return ssl.create_default_context(cafile=str(self.ca) if self.ca else None)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib's own would send the token along, to whatever host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _said(exc: urllib.error.HTTPError) -> str:
    try:
        problem = json.loads(exc.read(_PROBLEM_LIMIT))
        return f"{problem['code']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the server answered {exc.code}"


def multipart(fields: dict[str, str], files: list[tuple[str, Path]]) -> tuple[bytes, str]:
    """A form's body and content type, RFC 7578."""
    mark = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value.encode() + b"\r\n")
    for name, path in files:
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}";'
            f' filename="{path.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        parts.append(head.encode() + tree.image(path) + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


@dataclass
class Pool:
    """Keep-alive connections that many simulated boards share.

    ``close_each`` opens one for every request instead, as boards do.
    """

    url: str
    size: int = 64
    tls: ssl.SSLContext | None = None
    close_each: bool = False
    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._idle: list[_Line] = []
        self._free = asyncio.Semaphore(self.size)

    async def request(
        self, method: str, path: str, token: str = "", body: Any = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; a connection that was closed meanwhile is replaced once.

        Raises:
            OSError: the server is not there.
        """
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: fleet", f"Content-Length: {len(data)}"]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        message = "\r\n".join([*lines, "", ""]).encode() + data
        async with self._free:
            started = time.perf_counter()
            for last in (False, True):
                fresh = not self._idle
                line = await self._open() if fresh else self._idle.pop()
                try:
                    status, headers, content = await line.ask(message)
                except OSError:
                    if last or fresh:
                        raise
                    continue
                if self.close_each or headers.get("connection") == "close":
                    line.close()
                else:
                    self._idle.append(line)
                break
            self.seconds.append(time.perf_counter() - started)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        return status, headers, content

    async def _open(self) -> "_Line":
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(_Line, self._host, self._port, ssl=self.tls)
        return line

    async def close(self) -> None:
        for line in self._idle:
            line.close()
        self._idle.clear()


class _Line(asyncio.Protocol):
    """One connection: a request, then its answer. A stream takes three times as long."""

    def __init__(self) -> None:
        self._got = b""
        self._need = 0
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    async def ask(self, message: bytes) -> tuple[int, dict[str, str], bytes]:
        if self._transport.is_closing():
            raise OSError(_CLOSED)
        self._got, self._need = b"", 0
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        await self._waiter
        head, _, content = self._got.partition(b"\r\n\r\n")
        status, headers = _headers(head)
        return status, headers, content

    def data_received(self, data: bytes) -> None:
        self._got += data
        if not self._need:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            self._need = end + 4 + int(_headers(self._got[:end])[1].get("content-length", 0))
        if len(self._got) >= self._need and self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(OSError(_CLOSED))

    def close(self) -> None:
        self._transport.close()


_CLOSED = "the server closed the connection"


def _headers(head: bytes) -> tuple[int, dict[str, str]]:
    lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


def run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, on the faster loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
