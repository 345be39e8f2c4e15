"""One connection of the HTTP client, and what it is read by: bounded reads, lines.

Not for applications; `twinslot.http` is. A socket here is never waited for: a read that finds
nothing sleeps 1 to 15 ms and tries again. That costs no task, no timer and no entry in asyncio's
poller, and finds the bytes that a TLS stream holds while its socket polls unreadable. What can't
be split holds the event loop: the public key steps of a TLS handshake.

Source: MicroPython extmod/modtls_mbedtls.c, extmod/asyncio/stream.py, py/stream.c;
RFC 9112 sections 2 to 5 (lines and fields).
"""

from asyncio import sleep_ms
from time import ticks_diff, ticks_ms

from micropython import const

from . import errors

_LINE_MAX = const(1024)  # bytes of a header line with its CRLF
_LINE_MOST = const(256)  # of nearly all of them: what the buffer holds until one does not fit
HEAD_MAX = 8192
_PAUSE_MAX_MS = const(15)

_SSL_CONN_EOF = const(-0x7280)  # mbedtls/include/mbedtls/ssl.h

# Of `twinslot.lookup`, here because that module comes and goes: the answer of its thread, None
# while it runs, a list, or an exception.
asking = [()]


def longer(pause):
    """Return the next of the pauses between two looks at a socket: 0, 1, 3, 7, 15, 15... ms."""
    return min(pause * 2 + 1, _PAUSE_MAX_MS)


class Link:
    """A connection and the bytes read ahead of it. Every wait is bounded.

    ``since``, ``limit_ms`` below: the wait began at tick ``since`` and fails ``limit_ms`` later;
    ``deadline`` (a tick, or None) bounds all of them. The buffer is there while lines are read.
    """

    def __init__(self, origin):
        self.origin = origin
        self.deadline = None
        self.owner = None  # the Response whose body is still to be read
        self.heard = False  # bytes came since the last request
        self.greeted = False  # the TLS handshake is through
        self.lines = False  # more of them come between the bytes of a body
        self._sock = None
        self._raw = None
        self._tls = None
        self._buf = None
        self._from = 0
        self._to = 0

    def check(self, since, limit_ms, doing):
        now = ticks_ms()
        if self.deadline is not None and ticks_diff(self.deadline, now) <= 0:
            raise errors.TimeoutError_("%s: the deadline passed" % doing)
        if ticks_diff(now, since) >= limit_ms:
            raise errors.TimeoutError_("%s: gave up after %d ms" % (doing, limit_ms))

    def close(self):
        # After a failed handshake the TLS socket no longer closes the one below: close both.
        for sock in (self._sock, self._raw):
            if sock is not None:
                try:
                    sock.close()
                except OSError:
                    pass
        self._sock = self._raw = self.owner = None

    def _open(self):
        # Another task may have closed the client while this one slept.
        if self._sock is None:
            raise errors.NetworkError("the connection was closed by this side")
        return self._sock

    def _error(self, e, doing):
        if self._tls and not self.greeted:
            from .handshake import tls_error

            return tls_error(e, self.origin[1], self._tls)
        code = e.args[0] if e.args else e
        if code == _SSL_CONN_EOF:
            return errors.NetworkError("%s: the connection closed" % doing)
        if isinstance(code, int) and code < 0:
            return errors.TlsError("%s: TLS failed (%s)" % (doing, e.args[-1]))
        return errors.NetworkError("%s: the connection broke (error %s)" % (doing, code))

    def read(self, buf, n, doing):
        """Read up to ``n`` bytes into ``buf``, now: None where there are none, 0 at the end."""
        try:
            return self._open().readinto(buf, n)
        except (OSError, ValueError) as e:
            raise self._error(e, doing)

    def take(self, buf, n):
        """Move up to ``n`` bytes that were read ahead into ``buf``; return how many."""
        if self._buf is None:
            return 0
        n = min(n, self._to - self._from)
        if n:
            buf[:n] = self._buf[self._from : self._from + n]
            self._from += n
        elif not self.lines:
            self._buf = None
        return n

    def is_quiet(self):
        """Tell whether the connection is open and nothing unasked has come over it."""
        if self._sock is None or self._from != self._to:
            return False
        self._buf = None
        try:
            return self._sock.readinto(bytearray(1)) is None
        except (OSError, ValueError):
            return False

    async def line(self, since, limit_ms, doing):
        """Return the next line (bytes, without its CRLF)."""
        if self._buf is None:
            self._buf = memoryview(bytearray(_LINE_MOST))
            self._from = self._to = 0
        at = self._from
        buf = self._buf
        pause = 0
        while True:
            while at < self._to:
                c = buf[at]
                at += 1
                if c == 10:
                    line = bytes(buf[self._from : at - 1])
                    self._from = at
                    if not line.endswith(b"\r") or line.find(b"\r") != len(line) - 1:
                        raise errors.HttpError("%s: a line that does not end with CRLF" % doing)
                    return line[:-1]
                if (c < 32 and c not in (9, 13)) or c == 127:
                    raise errors.HttpError("%s: control character" % doing, c)
            if self._from:
                kept = self._to - self._from
                buf[:kept] = buf[self._from : self._to]
                self._from = 0
                self._to = at = kept
            if self._to == _LINE_MAX:
                raise errors.HttpError("%s: line too long" % doing, "more", "%d bytes" % _LINE_MAX)
            if self._to == _LINE_MOST and len(buf) == _LINE_MOST:
                self._buf = memoryview(bytearray(_LINE_MAX))
                self._buf[:_LINE_MOST] = buf
                buf = self._buf
            got = self.read(buf[self._to :], len(buf) - self._to, doing)
            if got:
                self.heard = True
                self._to += got
                pause = 0
            elif got is None:
                self.check(since, limit_ms, doing)
                await sleep_ms(pause)
                pause = longer(pause)
            else:
                raise errors.NetworkError("%s: the connection closed" % doing)
