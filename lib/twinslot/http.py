"""Streaming HTTP/1.1 client on asyncio: verified TLS, Range, chunked, ETag, deadlines.

    client = Client(Tls(ca=certificate), token="...", origin="https://updates.example")
    answer = await client.get(url, etag=known, deadline_ms=60000)
    text = await answer.read(4096)              # or: n = await answer.readinto(block)
    await client.close()

What it does not do: proxies, cookies, authentication other than Bearer, compression, HTTP/2,
bodies without a length, more than one request at a time (one client is one connection).

Memory: one buffer of 1 KiB per client for header lines; a body goes from the socket straight into
the caller's buffer. TLS buffers (20 KiB on the ESP32) are outside the Python heap: close() what
is not in use. What holds the event loop: see `twinslot.link`.

Every error that leaves is an OtaError: TimeoutError_, TlsError, HttpError, NetworkError,
UnreachableError, FormatError (a URL), ConfigError, BusyError. A token is in none of them, nor
is the query of a URL (it may be a signature). After any error the connection is closed.

Source: RFC 9110, RFC 9112 section 7 (chunks).
"""

import json
from asyncio import current_task, sleep_ms
from time import ticks_add, ticks_diff, ticks_ms

from micropython import const

from . import errors
from .certs import Tls  # noqa: F401 (for users)
from .link import HEAD_MAX, LINE_MAX, Link, longer, lookup

_EXTENSION_MAX = const(128)  # a chunk-size line
LENGTH_MAX = 0x7FFFFFFF
_FIELD_MAX = const(512)
_ETAG_MAX = const(128)
_ADDRESSES_MAX = const(4)
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
        from .url import hexadecimal

        size = hexadecimal(line.split(b";")[0].rstrip(b" \t"), LENGTH_MAX)
        if size is None or len(line) > _EXTENSION_MAX:
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


def is_visible(value):
    if len(value) > _FIELD_MAX:
        return False
    for c in value:
        if not 33 <= c <= 126:
            return False
    return True


def clip(value):
    # What a server sent, for a message: short and printable.
    return "".join(chr(c) if 32 <= c <= 126 else "?" for c in value[:40])


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
            if not is_visible(token.encode()):
                raise errors.ConfigError("token: only visible ASCII characters")
            self._token = token
            self._token_for = parse(origin)[:3]
        self._buf = bytearray(LINE_MAX)
        self._link = None
        self._asker = None  # the task that waits for an answer
        self._addresses = (None, None)

    async def get(self, url, etag=None, start=None, if_range=None, deadline_ms=None, redirects=0):
        """Ask for a document.

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
        extra = []
        if etag:
            extra.append("If-None-Match: " + _field(etag))
        if if_range and if_range.startswith("W/"):
            start = None
        if start:
            extra.append("Range: bytes=%d-" % start)
            if if_range:
                extra.append("If-Range: " + _field(if_range))
        url = _parsed(url)
        deadline = _deadline(deadline_ms)
        answer = await self._request("GET", url, extra, None, deadline, start, if_range)
        if not redirects or answer.status not in (301, 302, 303, 307, 308):
            return answer
        url = self._redirect(url, answer)
        await answer.close()
        answer = await self._request("GET", url, extra, None, deadline, start, if_range)
        if answer.status in (301, 302, 303, 307, 308):
            await answer.close()
            raise errors.HttpError("redirected twice", status=answer.status)
        return answer

    async def post_json(self, url, obj, deadline_ms=None):
        """Send ``obj`` as JSON; returns Response, never follows a redirect.

        Sent a second time when the kept connection turns out closed: give reports an identity.
        """
        body = json.dumps(obj).encode()
        extra = ["Content-Type: application/json", "Content-Length: %d" % len(body)]
        url = _parsed(url)
        return await self._request("POST", url, extra, body, _deadline(deadline_ms))

    async def close(self):
        """Close the connection; the client can be used again."""
        self._drop()

    def _drop(self):
        if self._link is not None:
            self._link.close()
            self._link = None

    def _redirect(self, url, answer):
        from .url import parse, resolve

        if not answer.location:
            raise errors.HttpError("redirect without a usable Location", status=answer.status)
        try:
            return parse(resolve(url, answer.location, self._allow_hosts))
        except errors.FormatError as e:
            raise errors.HttpError("redirect refused: %s" % e.message, status=answer.status)

    def _head(self, method, url, extra):
        from .url import host_of

        lines = [
            "%s %s HTTP/1.1" % (method, url.path),
            "Host: " + host_of(url),
            "User-Agent: twinslot",
            "Accept-Encoding: identity",
        ]
        if self._token and url[:3] == self._token_for:
            lines.append("Authorization: Bearer " + self._token)
        return ("\r\n".join(lines + extra) + "\r\n\r\n").encode()

    async def _request(self, method, url, extra, body, deadline, start=None, if_range=None):
        if url.scheme != "https" and not self._allow_http:
            from .url import shown

            raise errors.ConfigError("plain http is not allowed here", shown(url), "https")
        if url.scheme == "https" and self._tls is None:
            raise errors.ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
        task = current_task()
        # The task and not a mark: a mark could be left behind, and close the client for ever.
        if self._asker not in (None, task) and not self._asker.done():
            raise errors.BusyError("the client waits for another answer")
        data = self._head(method, url, extra) + (body or b"")
        try:
            self._asker = task
            status, minor, found = await self._exchange(url, data, deadline)
            answer = Response(self._link, self, status, minor, found, start, if_range)
        except BaseException:  # cancelled, too: the stream is in an unknown state
            self._drop()
            raise
        finally:
            self._asker = None
        if self._on_date and answer.secure and answer.date is not None:
            self._on_date(answer.date)
        return answer

    async def _exchange(self, url, data, deadline):
        """Send a request and return the head of its answer, over the kept connection or anew."""
        link = self._link
        kept = (
            link is not None and link.origin == url[:3] and link.owner is None and link.is_quiet()
        )
        while True:
            since = ticks_ms()
            limit_ms = self.read_timeout_ms
            if not kept:
                limit_ms = self._connect_timeout_ms
                self._drop()
                await self._connect(url, deadline, since)
            link = self._link
            link.deadline = deadline
            link.heard = False
            try:
                await link.send(data, since, limit_ms)
                from . import head

                return await head.read(link, ticks_ms(), self.read_timeout_ms)
            except errors.NetworkError as e:
                # A kept connection that the server closed meanwhile: once more on a new one.
                if not kept or link.heard or isinstance(e, errors.TimeoutError_):
                    raise
                kept = False

    async def _connect(self, url, deadline, since):
        origin = url[:3]
        limit_ms = self._connect_timeout_ms
        if self._addresses[0] != origin:
            left = limit_ms
            if deadline is not None:
                left = min(left, ticks_diff(deadline, since))
            self._addresses = (origin, await lookup(url.host, url.port, limit_ms=left))
        addresses = self._addresses[1][:_ADDRESSES_MAX]
        for i, address in enumerate(addresses):
            self._link = link = Link(origin, self._buf)
            link.deadline = deadline
            # Each address gets its share of the time that is left.
            now = ticks_ms()
            share = (limit_ms - ticks_diff(now, since)) // (len(addresses) - i)
            try:
                await link.dial(address, now, share)
                break
            except (errors.UnreachableError, errors.TimeoutError_):
                self._drop()
                if i + 1 == len(addresses):
                    self._addresses = (None, None)  # the name may lead elsewhere next time
                    raise
        if url.scheme == "https":
            await link.secure(self._tls, since, limit_ms)


def _parsed(url):
    from .url import parse  # which goes while a body comes

    return parse(url) if isinstance(url, str) else url


def _deadline(ms):
    return None if ms is None else ticks_add(ticks_ms(), min(ms, _DEADLINE_MAX_MS))


def _field(value):
    # A header injected through a stored ETag would be a request of somebody else's making.
    if not is_visible(value.encode()) or len(value) > _ETAG_MAX:
        raise errors.FormatError(
            "ETag", clip(value.encode()), "visible characters, %d" % _ETAG_MAX
        )
    return value
