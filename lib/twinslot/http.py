"""Streaming HTTP/1.1 client on asyncio: verified TLS, Range, chunked, ETag, deadlines.

    client = Client(Tls(ca=certificate), token="...", origin="https://updates.example")
    answer = await client.get(url, etag=known, deadline_ms=60000)
    text = await answer.read(4096)              # or: n = await answer.readinto(block)
    await client.close()

What it does not do: proxies, cookies, authentication other than Bearer, compression, HTTP/2,
bodies without a length, more than one request at a time (one client is one connection).

Memory: a buffer of 256 bytes, for a longer line of 1 KiB, while header lines or those between
chunks are read; a body goes from the socket straight into the caller's buffer. What asks
(`twinslot.request`) need not be loaded by then. TLS buffers (20 KiB on the ESP32) are outside the
Python heap: close() what is not in use.
What holds the event loop: see `twinslot.link` and `twinslot.lookup`.

Every error that leaves is an OtaError: TimeoutError_, TlsError, HttpError, NetworkError,
UnreachableError, FormatError (a URL), ConfigError, BusyError. A token is in none of them, nor
is the query of a URL (it may be a signature). After any error the connection is closed.

Source: RFC 9110, RFC 9112 section 7 (chunks).
"""

import json
from asyncio import sleep_ms
from time import ticks_add, ticks_diff, ticks_ms

from micropython import const

from . import errors
from .certs import Tls  # noqa: F401 (for users)
from .link import HEAD_MAX, longer

_EXTENSION_MAX = const(128)  # a chunk-size line
LENGTH_MAX = 0x7FFFFFFF
ETAG_MAX = 128  # characters; a longer ETag is none: it would have to be kept, and sent again
_DEADLINE_MAX_MS = const(0x1FFFFFFF)  # half the period of ticks_ms on 32-bit ports: 6.2 days


class Response:
    """The head of an answer, and its body as a stream.

    status: 200 to 599.
    length: bytes of the body, or None (chunked).
    etag: with its quotes, or None.
    date: what the server's clock showed (Unix seconds; a cache's Age added), or None.
    secure: the answer came over a verified connection.
    retry_after: seconds, at most 6 h, or None.
    start, total: of a 206, the offset of the body's first byte and the size of the whole (or
        None). start is 0 for every other status: a 200 to a Range request begins at 0.
    location: text of the field, or None.
    received: bytes of the body given so far.
    """

    def __init__(self, link, client, status, minor, found, start, if_range):
        self.status = status
        self.secure = link.origin[0] == "https"
        self._client = client
        self._link = link
        self._chunked = False
        self._in_chunk = False
        self.received = 0
        self._waited_ms = self._arrived = 0
        self._pause = self._since = 0  # ms of the next pause, and when the first one began
        self._keep = False
        self.start = self.length = 0
        self.etag = self.location = self.date = self.retry_after = self.total = None
        from . import head

        head.tell(self, found, minor, start, if_range)
        link.owner = self
        link.lines = self._chunked
        self._left = self.length or 0  # of the body, or of the current chunk
        if not self._chunked and not self._left:
            self._end()

    def _refuse(self, message, seen=None, expected=None):
        return errors.HttpError(message, seen, expected, status=self.status)

    def _end(self):
        link = self._link
        self._link = None
        link.owner = None
        # Bytes past the announced end belong to nobody: such a connection is not used again.
        if not self._keep or not link.is_quiet():
            link.close()

    async def readinto(self, buf):
        """Read the next bytes of the body into ``buf`` (bytearray or memoryview, not empty).

        Returns:
            1 to len(buf) bytes; 0 at the end of the body.

        Raises:
            NetworkError: the body ends early or the connection breaks.
            TimeoutError_: a stall, the deadline, or less than the minimum rate.
            HttpError: malformed chunks.
        """
        while True:
            await sleep_ms(0)  # lets other tasks run even while bytes keep coming
            n = self.take(buf, len(buf))
            if n != 0:
                return n or 0
            await self.wait()

    def take(self, buf, n):
        """Read up to ``n`` bytes of what is there; the rest as ``readinto``. Allocates nothing.

        Returns:
            1 to n bytes; 0: await ``wait()`` first; None at the end of the body.
        """
        link = self._link
        if link is None:
            return None
        if link.owner not in (self, None):
            raise errors.NetworkError("body: the client has given this answer up")
        n = min(n, self._left)
        if not n:
            return 0
        try:
            got = link.take(buf, n) or link.read(buf, n, "body")
            if got is None:
                return 0
            if not got:
                raise errors.NetworkError(
                    "the body ends early", self.received, self.length or "more in its chunk"
                )
        except BaseException:
            link.close()
            raise
        self._pause = 0
        self._arrived += got
        self.received += got
        self._left -= got
        if not self._left and not self._chunked:
            self._end()
        return got

    async def wait(self):
        """Let other tasks run until ``take`` may find something. Raises as ``readinto``."""
        link = self._link
        if link is None or link.owner is not self:
            return
        client = self._client
        now = ticks_ms()
        try:
            if self._left:
                if not self._pause:
                    self._since = now
                link.check(self._since, client.read_timeout_ms, "body")
                await sleep_ms(self._pause)
                self._pause = longer(self._pause)
            else:
                await self._next_chunk(link, now)
            # Only time spent waiting counts: flash writes between two reads are not the server's.
            self._waited_ms += ticks_diff(ticks_ms(), now)
            if self._waited_ms >= client.rate_window_ms:
                self._check_rate(client)
        except BaseException:
            link.close()
            raise

    def _check_rate(self, client):
        rate = self._arrived * 1000 // self._waited_ms
        if rate < client.min_rate:
            raise errors.TimeoutError_(
                "body too slow", "%d B/s" % rate, "%d B/s" % client.min_rate
            )
        self._waited_ms = self._arrived = 0

    async def _next_chunk(self, link, since):
        """Read up to the data of the next chunk, or past the last one and its trailers."""
        limit_ms = self._client.read_timeout_ms
        if self._in_chunk and await link.line(since, limit_ms, "chunk"):
            raise self._refuse("chunk: data goes on past its size")
        line = await link.line(since, limit_ms, "chunk")
        from .digits import hexadecimal

        size = hexadecimal(line.split(b";")[0].rstrip(b" \t"), LENGTH_MAX)
        if size is None or len(line) > _EXTENSION_MAX:
            from .head import clip

            raise self._refuse("chunk size", clip(line))
        self._in_chunk = True
        self._left = size
        if not size:
            from .head import fields

            await fields(link, since, limit_ms, "trailer", HEAD_MAX)
            self._end()

    async def read(self, limit):
        """Return the whole body, which must not be longer than ``limit`` bytes.

        Raises:
            HttpError: it is longer. And what readinto() raises.
        """
        if self.length is not None:
            if self.length > limit:
                await self.close()
                raise self._refuse("body too long", self.length, "at most %d bytes" % limit)
            data = bytearray(self.length)
            view = memoryview(data)
            at = 0
            while at < len(data):
                at += await self.readinto(view[at:])
            return bytes(data)
        data = b""
        part = bytearray(min(limit + 1, 512))
        view = memoryview(part)
        while True:
            n = await self.readinto(part)
            if not n:
                return data
            data += view[:n]
            if len(data) > limit:
                await self.close()
                raise self._refuse("body too long", "more", "at most %d bytes" % limit)

    async def close(self):
        """Let go of the answer; a body not read to its end costs the connection."""
        link = self._link
        self._link = None
        if link is not None and link.owner is self:
            link.close()


class Client:
    """One connection at a time to one server or another, reused while it may be.

    Args:
        tls: Tls(...); without it only plain http works.
        token: sent as ``Authorization: Bearer`` to ``origin`` (an https URL) and to nobody else.
        allow_http: permit http:// URLs. Never with a token.
        allow_hosts: hosts besides a URL's own that a redirect may lead to, as in resolve().
        connect_timeout_ms: for name lookup, connect and TLS handshake together.
        read_timeout_ms: for the request, for the whole head of the answer, for every read of the
            body.
        min_rate: bytes per second a body must bring on average over ``rate_window_ms`` of waiting.
        on_date: called with ``Response.date`` of each answer over a verified connection:
            ``clock.observe``.

    A request while another one waits for its answer raises BusyError; one while a body is unread
    gives that body up.
    """

    def __init__(
        self,
        tls=None,
        token=None,
        origin=None,
        allow_http=False,
        allow_hosts=(),
        connect_timeout_ms=15000,
        read_timeout_ms=15000,
        min_rate=256,
        rate_window_ms=60000,
        on_date=None,
    ):
        self.read_timeout_ms = read_timeout_ms
        self.min_rate = min_rate
        self.rate_window_ms = rate_window_ms
        self._connect_timeout_ms = connect_timeout_ms
        self._on_date = on_date
        self._tls = tls
        self._allow_http = allow_http
        self._allow_hosts = allow_hosts
        self._token = None
        self._token_for = None
        if token:
            from .url import parse

            if not origin or parse(origin).scheme != "https":
                raise errors.ConfigError("a token needs the https origin it belongs to")
            from .head import is_visible

            if not is_visible(token.encode()):
                raise errors.ConfigError("token: only visible ASCII characters")
            self._token = token
            self._token_for = parse(origin)[:3]
        self._link = None
        self._asker = None  # the task that waits for an answer
        self._addresses = (None, None)

    def get(self, url, etag=None, start=None, if_range=None, deadline_ms=None, redirects=0):
        """Ask for a document; to be awaited.

        Args:
            url: text or Url.
            etag: of the copy at hand; an unchanged document answers 304.
            start: offset of the first byte wanted; with it, 206 or 200 (see Response.start).
            if_range: strong ETag the part must belong to; a weak one asks for the whole.
            deadline_ms: for everything up to the last byte of the body, redirects included.
            redirects: 0, or 1 to follow one: same scheme, same origin or one of allow_hosts.

        Returns:
            Response, whatever its status (also 3xx, where not followed).

        Raises:
            any error of the module docstring
        """
        from . import request

        return request.get(self, url, etag, start, if_range, _deadline(deadline_ms), redirects)

    def post_json(self, url, obj, deadline_ms=None):
        """Send ``obj`` as JSON; await a Response. Never follows a redirect.

        Sent a second time when the kept connection turns out closed: give reports an identity.
        """
        from . import request

        return request.post(self, url, json.dumps(obj).encode(), _deadline(deadline_ms))

    async def close(self):
        """Close the connection; the client can be used again."""
        self._drop()

    def _drop(self):
        if self._link is not None:
            self._link.close()
            self._link = None


def _deadline(ms):
    return None if ms is None else ticks_add(ticks_ms(), min(ms, _DEADLINE_MAX_MS))
