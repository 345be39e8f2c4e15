"""What uvicorn leaves open: deadlines for slow clients, shedding of load, bounded bodies.

uvicorn has no deadline for a request's headers and none for a reader that stops reading; either
lets one client hold a connection (and a file) for ever. Its parser in C (httptools) takes a tenth
of the time of the one in Python, but has no bound for headers.
"""

import asyncio
import json
from collections.abc import Callable, Mapping

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .limits import Limits
from .problems import Problem


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with bounds on headers and on a stalled reader."""

    class Bounded(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None  # for the headers
        _stalled: asyncio.TimerHandle | None = None
        _head = 0  # bytes of headers that are not whole yet

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_headers()

        def _expect_headers(self) -> None:
            self._deadline = self.loop.call_later(limits.header_timeout_s, self.transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = 0
                if self._deadline:
                    self._deadline.cancel()
                    self._deadline = None
                return
            if not self._deadline:  # the next request has begun to trickle in
                self._expect_headers()
            self._head += len(data)
            if self._head > limits.header_bytes and not self.transport.is_closing():
                self.send_400_response(_TOO_LONG)

        def on_headers_complete(self) -> None:
            if len(self.url) + sum(len(n) + len(v) for n, v in self.headers) > limits.header_bytes:
                raise ValueError(_TOO_LONG)  # the parser's error, and so a 400
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(limits.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled:
                self._stalled.cancel()
                self._stalled = None

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing():
                # TLS waits for the other side's goodbye, and an idle client sends none.
                self.loop.call_later(limits.goodbye_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._deadline, self._stalled):
                if timer:
                    timer.cancel()
            super().connection_lost(exc)

    return Bounded


_TOO_LONG = "The headers are too long."


class Server(uvicorn.Server):
    """uvicorn's server that says where it listens, and ends within a bounded time."""

    def __init__(self, config: uvicorn.Config, limits: Limits, on_listen: Callable[[str], None]):
        super().__init__(config)
        self._limits = limits
        self._on_listen = on_listen

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            self._on_listen(
                f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            )

    async def shutdown(self, sockets: list | None = None) -> None:
        def abort_all() -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]

        timer = asyncio.get_running_loop().call_later(self._limits.shutdown_s, abort_all)
        await super().shutdown(sockets)
        timer.cancel()


class Gate:
    """ASGI middleware: at most so many requests at once, and bodies bounded in size and time.

    What is turned away costs no parsing, no database and no thread.
    """

    def __init__(self, app: ASGIApp, limits: Limits, large: Mapping[str, int] | None = None):
        self._app = app
        self._limits = limits
        self._large = large or {}  # bytes of a body by path, where it may be larger
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._busy >= self._limits.requests:
            await refuse(send, overloaded(self._limits))
            return
        self._busy += 1
        try:
            await self._app(scope, self._bounded(scope, receive), send)
        finally:
            self._busy -= 1

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        seen = 0
        whole = False
        limit = self._large.get(scope["path"], self._limits.body_bytes)
        large = limit > self._limits.report_bytes
        wait_s = self._limits.upload_timeout_s if large else self._limits.body_timeout_s
        deadline = asyncio.get_running_loop().time() + wait_s

        async def bounded() -> Message:
            nonlocal seen, whole
            if whole:  # from here on the only news can be the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Problem(408, "timeout", "the body did not arrive in time") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit:
                raise Problem(413, "too_large", f"a body of more than {limit} bytes")
            return message

        return bounded


def overloaded(limits: Limits) -> Problem:
    """Tell a client to come back, not all of them at the same moment."""
    seconds = limits.come_back_s()
    return Problem(503, "busy", "too much at once", {"Retry-After": str(seconds)})


async def refuse(send: Send, problem: Problem) -> None:
    """Answer with a problem below the framework."""
    body = json.dumps(problem.body()).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *((k.lower().encode(), v.encode()) for k, v in (problem.headers or {}).items()),
    ]
    await send({"type": "http.response.start", "status": problem.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
