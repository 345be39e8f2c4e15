"""Talk to a Twinslot server: one call at a time for people, many for simulated fleets."""

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
        """Return a file, wherever the server says it is; the token goes to the server only.

        Raises:
            ApiError: it can't be had.
        """
        url = f"{self._home()}api/v1/{path}"
        for _ in range(3):
            at_home = url.startswith(self._home())
            headers = {"Authorization": f"Bearer {self.token}"} if at_home else {}
            content, _, moved = self._open(urllib.request.Request(url, headers=headers))
            if not moved:
                return content
            url = urllib.parse.urljoin(url, moved)
        raise ApiError(f"{self.url}: redirected too often")

    def _home(self) -> str:
        return f"{self.url.rstrip('/')}/"

    def _open(self, request: urllib.request.Request) -> tuple[bytes, bool, str | None]:
        """Send a request; return content, whether it is JSON, and where it says to go instead."""
        at_home = request.full_url.startswith(self._home())
        context = self.tls() if at_home else ssl.create_default_context()
        opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), _NoRedirect
        )
        try:
            with opener.open(request, timeout=60) as answer:
                is_json = "json" in answer.headers.get("Content-Type", "")
                return answer.read(), is_json, None
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
        problem = json.loads(exc.read())
        return f"{problem['code']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
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
        parts.append(head.encode() + path.read_bytes() + b"\r\n")
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
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
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
                reader, writer = await self._open() if fresh else self._idle.pop()
                try:
                    writer.write(message)
                    status, headers, content = await _answer(reader)
                except (OSError, asyncio.IncompleteReadError):
                    writer.close()
                    if last or fresh:
                        raise OSError("the server closed the connection") from None
                    continue
                if self.close_each or headers.get("connection") == "close":
                    writer.close()
                else:
                    self._idle.append((reader, writer))
                break
            self.seconds.append(time.perf_counter() - started)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        return status, headers, content

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, ssl=self.tls)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, content


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
