"""Streaming HTTP/1.1 client on asyncio: verified TLS, Range, chunked, ETag, deadlines.

    client = Client(Tls(ca=certificate), token="...", origin="https://updates.example")
    answer = await client.get(url, etag=known, deadline_ms=60000)
    text = await answer.read(4096)              # or: n = await answer.readinto(block)
    await client.close()

What it does not do: proxies, cookies, authentication other than Bearer, compression, HTTP/2,
bodies without a length, more than one request at a time (one client is one connection).

Blocking: a socket is never waited for; a read that has nothing sleeps and tries again (1 to 15 ms),
which costs no task, no timer and no entry in asyncio's poller, and finds the bytes that a TLS
stream holds while its socket polls unreadable. What can't be split holds the loop: the public
key steps of a TLS handshake, and the name lookup on ports without safe threads (unix).

Memory: one buffer of 1 KiB per client for header lines; a body goes from the socket straight into
the caller's buffer. TLS buffers (20 KiB on the ESP32) are outside the Python heap: close() what
is not in use.

Every error that leaves is an OtaError: TimeoutError_, TlsError, HttpError, NetworkError,
UnreachableError, FormatError (a URL), ConfigError, BusyError. A token is in none of them, nor
is the query of a URL (it may be a signature). After any error the connection is closed.

Source: RFC 9110, RFC 9112 (message framing), RFC 3986 section 5 (references); MicroPython
extmod/modtls_mbedtls.c, extmod/asyncio/stream.py, py/stream.c.
"""

import gc
import json
import select
import socket
import sys
from asyncio import sleep_ms
from binascii import a2b_base64, hexlify, unhexlify
from collections import namedtuple
from hashlib import sha256
from time import ticks_add, ticks_diff, ticks_ms

from micropython import const

from .errors import (
    BusyError,
    ConfigError,
    FormatError,
    HttpError,
    NetworkError,
    TimeoutError_,
    TlsError,
    UnreachableError,
)

_URL_MAX = const(512)
_LINE_MAX = const(1024)  # a header line with its CRLF
_LINES_MAX = const(64)
_HEAD_MAX = const(8192)
_INTERIM_MAX = const(8)  # 1xx answers before the real one
_EXTENSION_MAX = const(128)  # a chunk-size line
_LENGTH_MAX = const(0x7FFFFFFF)
_RETRY_AFTER_MAX = const(21600)  # 6 h: no server may silence a device for longer
_ETAG_MAX = const(128)
_ADDRESSES_MAX = const(4)
_DEADLINE_MAX_MS = const(0x1FFFFFFF)  # half the period of ticks_ms on 32-bit ports: 6.2 days
_PAUSE_MAX_MS = const(15)
_LOOKUP_STACK = const(8192)

# mbedtls/include/mbedtls/{ssl,x509,pk}.h
_SSL_ALLOC_FAILED = const(-0x7F00)
_X509_ALLOC_FAILED = const(-0x2880)
_PK_ALLOC_FAILED = const(-0x3F80)
_SSL_FATAL_ALERT = const(-0x7780)
_SSL_CONN_EOF = const(-0x7280)
_X509_FATAL_ERROR = const(-0x3000)
_ENOMEM = const(12)

# ---- URLs ------------------------------------------------------------------------------------

Url = namedtuple("Url", ("scheme", "host", "port", "path"))


def _check_text(text):
    if not isinstance(text, str) or not text:
        raise FormatError("URL", type(text).__name__ if text else "nothing", "text")
    if len(text) > _URL_MAX:
        raise FormatError("URL too long", len(text), "at most %d characters" % _URL_MAX)
    for c in text:
        if not "!" <= c <= "~" or c in '\\"<>^`{|}#':
            raise FormatError("URL with a forbidden character", "code %d" % ord(c))


def _check_path(path):
    # Percent-encoded dots and slashes are what the server will make of them.
    plain = path.split("?")[0].lower()
    plain = plain.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/")
    for segment in plain.split("/"):
        if segment in ("..", "."):
            raise FormatError("URL with a dot segment", segment)


def parse(url):
    """Split an absolute http(s) URL into ``Url(scheme, host, port, path)``.

    Raises:
        FormatError: another scheme, a user name, dot segments, forbidden characters, too long.
    """
    _check_text(url)
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    if not mark or scheme not in ("http", "https"):
        # What stands before a stray "@" could be a password: not shown.
        raise FormatError("URL scheme", scheme.split(":")[0][:16], "https")
    end = len(rest)
    for c in "/?":
        at = rest.find(c)
        if 0 <= at < end:
            end = at
    authority = rest[:end].lower()
    path = rest[end:]
    if not path.startswith("/"):
        path = "/" + path
    _check_path(path)
    if "@" in authority:
        raise FormatError("URL with a user name or password")
    if authority.startswith("["):
        host, mark, port = authority[1:].partition("]")
        allowed = "0123456789abcdef:."
        if not mark or (port and not port.startswith(":")):
            raise FormatError("URL with a malformed IPv6 address")
    else:
        host, mark, port = authority.partition(":")
        port = mark + port
        allowed = "abcdefghijklmnopqrstuvwxyz0123456789-._"
    if not host or len(host) > 253:
        raise FormatError("URL with a host of %d characters" % len(host))
    for c in host:
        if c not in allowed:
            raise FormatError("URL host", host[:64])
    if not port:
        number = 443 if scheme == "https" else 80
    else:
        number = _decimal(port[1:].encode(), 65535)
        if not number:
            raise FormatError("URL port", port[1:17], "1 to 65535")
    return Url(scheme, host, number, path)


def resolve(base, reference, allow_hosts=()):
    """Return the ``Url`` that ``reference`` means in the document at ``base``.

    Args:
        base: a Url, or the text of one.
        reference: relative ("r/1.4.0.jws"), path-absolute ("/a/b") or absolute on an allowed host.
        allow_hosts: further hosts that may be named: "cdn.example" or "cdn.example:8443".

    Raises:
        FormatError: other scheme than the base's, foreign host, or anything parse() refuses.
    """
    if isinstance(base, str):
        base = parse(base)
    _check_text(reference)
    head = reference.split("?")[0].split("/")[0]
    if ":" in head:
        url = parse(reference)
    elif reference.startswith("//"):
        url = parse(base.scheme + ":" + reference)
    else:
        own = base.path.split("?")[0]
        if reference.startswith("/"):
            path = reference
        elif reference.startswith("?"):
            path = own + reference
        else:
            path = own[: own.rfind("/") + 1] + reference
        _check_path(path)
        if len(path) > _URL_MAX:
            raise FormatError("URL too long", len(path), "at most %d characters" % _URL_MAX)
        return Url(base.scheme, base.host, base.port, path)
    if url.scheme != base.scheme:
        raise FormatError("URL scheme", url.scheme, base.scheme)
    if url[:3] != base[:3] and not (
        url.host in allow_hosts or "%s:%d" % (url.host, url.port) in allow_hosts
    ):
        raise FormatError("URL on a foreign host", _host(url), _host(base))
    return url


def _host(url):
    host = "[%s]" % url.host if ":" in url.host else url.host
    if url.port == (443 if url.scheme == "https" else 80):
        return host
    return "%s:%d" % (host, url.port)


def _shown(url):
    # For messages: without the query, which may carry a signature.
    return "%s://%s%s" % (url.scheme, _host(url), url.path.split("?")[0][:80])


# ---- Small parsers ---------------------------------------------------------------------------


def _decimal(text, limit):
    """Return the value of ``text`` (bytes, digits only, at most ``limit``), or None."""
    if not text or len(text) > 10:
        return None
    for c in text:
        if not 48 <= c <= 57:
            return None
    value = int(text)
    return value if value <= limit else None


def _hexadecimal(text, limit):
    if not text or len(text) > 8:
        return None
    for c in text:
        if not (48 <= c <= 57 or 65 <= c <= 70 or 97 <= c <= 102):
            return None
    value = int(text, 16)
    return value if value <= limit else None


_DAYS = b"MonTueWedThuFriSatSun"
_MONTHS = b"JanFebMarAprMayJunJulAugSepOctNovDec"


def http_date(text):
    """Return the Unix seconds of an HTTP date (bytes), or None where it is not one.

    Only IMF-fixdate, ``Sun, 06 Nov 1994 08:49:37 GMT``, the one form that may be sent
    (RFC 9110 section 5.6.7). Computed without the time module: its epoch differs by port.
    """
    if len(text) != 29 or text[3:5] != b", " or text[25:] != b" GMT":
        return None
    if text[7:8] + text[11:12] + text[16:17] + text[19:20] + text[22:23] != b"   ::":
        return None
    month = _MONTHS.find(text[8:11])
    weekday = _DAYS.find(text[:3])
    day = _decimal(text[5:7], 31)
    year = _decimal(text[12:16], 9999)
    hour = _decimal(text[17:19], 23)
    minute = _decimal(text[20:22], 59)
    second = _decimal(text[23:25], 60)
    if month < 0 or month % 3 or weekday < 0 or weekday % 3 or not day:
        return None
    if year is None or year < 1970 or hour is None or minute is None or second is None:
        return None
    month = month // 3 + 1
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if day > (29 if leap else 28) and month == 2 or day > 30 and month in (4, 6, 9, 11):
        return None
    # Days since 1970-01-01 with years that begin in March (leap day last).
    y = year - (month <= 2)
    m = (month + 9) % 12
    days = 365 * y + y // 4 - y // 100 + y // 400 + (153 * m + 2) // 5 + day - 719469
    if (days + 3) % 7 != weekday // 3:
        return None
    return days * 86400 + hour * 3600 + minute * 60 + second


# ---- Name lookup -----------------------------------------------------------------------------

_asking = [()]  # the answer of the lookup thread: None while it runs, a list, or an exception


def _ask(answer, host, port, kind):
    # Runs in a thread of its own: touches nothing but its own list.
    try:
        answer[0] = socket.getaddrinfo(host, port, 0, kind)
    except Exception as e:
        answer[0] = e


async def lookup(host, port, kind=socket.SOCK_STREAM, limit_ms=10000):
    """Return the addresses of a host as getaddrinfo gives them, not empty.

    getaddrinfo blocks (5 s for a .local name), so it runs in a thread on the ESP32, whose threads
    take turns under one lock. The unix port's do not, so there it is called directly.

    Raises:
        UnreachableError: no such name, or no DNS server answers.
        TimeoutError_: after ``limit_ms``. The thread ends by itself; until then no other starts.
    """
    global _asking
    since = ticks_ms()
    answer = [None]
    threaded = sys.platform == "esp32" and ":" not in host and not host[-1].isdigit()
    while _asking[0] is None:
        await sleep_ms(10)
        if ticks_diff(ticks_ms(), since) >= limit_ms:
            raise TimeoutError_("name lookup: the one before still hangs")
    if threaded:
        import _thread

        before = _thread.stack_size(_LOOKUP_STACK)
        try:
            _thread.start_new_thread(_ask, (answer, host, port, kind))
            _asking = answer
        except OSError:
            threaded = False  # no memory for a thread: ask here
        finally:
            _thread.stack_size(before)
    if not threaded:
        _ask(answer, host, port, kind)
    while answer[0] is None:
        await sleep_ms(10)
        if ticks_diff(ticks_ms(), since) >= limit_ms:
            raise TimeoutError_("name lookup of %s: no answer in %d ms" % (host, limit_ms))
    found = answer[0]
    if isinstance(found, MemoryError):
        raise found
    if isinstance(found, Exception) or not found:
        raise UnreachableError("name lookup of %s failed (%s)" % (host, found))
    return found


# ---- TLS -------------------------------------------------------------------------------------


def _der_of(data, what, label):
    """Return the DER blocks named ``label`` in ``data``: PEM text, or DER already."""
    if isinstance(data, str):
        data = data.encode()
    data = bytes(data)
    if b"-----BEGIN " not in data:
        return [data]
    # Not every port's mbedTLS parses PEM (unix does not), so none has to.
    blocks = []
    for part in data.split(b"-----BEGIN ")[1:]:
        name, _, rest = part.partition(b"-----")
        if name.endswith(label):
            try:
                blocks.append(a2b_base64(rest.split(b"-----END ")[0]))
            except ValueError:
                raise ConfigError("%s: not base64 between the PEM lines" % what)
    if not blocks:
        raise ConfigError("%s: no PEM block" % what, "none", label.decode())
    return blocks


class Tls:
    """Whom to trust, and the TLS context made from it once, when first needed.

    Args:
        ca: certificate(s), DER or PEM: the CA that signs the server's, or the server's own
            self-signed one. Chain, name and dates are verified, so the clock must be set
            (at least to a time within the certificates' dates).
        fingerprint: SHA-256 of the server's certificate (64 hex digits, colons allowed). Compared
            during the handshake, before a byte of any request is sent. Name and dates of a
            certificate pinned this way don't matter: it works without a clock.
        client_cert, client_key: for servers that ask for one; DER or PEM.

    With both, both must hold. With neither: ConfigError; nothing turns verification off.
    """

    def __init__(self, ca=None, fingerprint=None, client_cert=None, client_key=None):
        if not ca and not fingerprint:
            raise ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
        if bool(client_cert) != bool(client_key):
            raise ConfigError("a client certificate needs its key, and the key its certificate")
        self._pin = None
        if fingerprint:
            digits = fingerprint.replace(":", "").strip()
            try:
                self._pin = unhexlify(digits)
            except ValueError:
                pass
            if self._pin is None or len(self._pin) != 32:
                raise ConfigError("fingerprint", "%d characters" % len(digits), "64 hex digits")
        self._sources = (ca, client_cert, client_key)
        self._context = None
        self.pinned = False  # the certificate of the current handshake is the pinned one
        self._seen = None  # SHA-256 of the one that was not

    def _make_context(self):
        import tls

        ca, cert, key = self._sources
        context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
        what = "ca"
        try:
            # OPTIONAL without a CA goes on after a failed chain; then _check decides alone.
            context.verify_mode = tls.CERT_REQUIRED if ca else tls.CERT_OPTIONAL
            if ca:
                for der in _der_of(ca, what, b"CERTIFICATE"):
                    context.load_verify_locations(der)
            what = "client certificate"
            if cert:
                context.load_cert_chain(
                    _der_of(cert, what, b"CERTIFICATE")[0],
                    _der_of(key, "client key", b"PRIVATE KEY")[0],
                )
        except ValueError as e:
            raise ConfigError("%s: mbedTLS can't read it (%s)" % (what, e))
        except OSError as e:
            raise _tls_error(e, "", self)
        if self._pin:
            try:
                context.verify_callback = self._check
            except AttributeError:
                raise TlsError("no fingerprints on this port: pin the certificate itself (ca)")
        self._sources = None
        return context

    def _check(self, der, depth):
        # Called by mbedTLS within the handshake, for each certificate of the chain.
        if depth:
            return 0
        digest = sha256(der).digest()
        different = 0
        for i in range(32):
            different |= digest[i] ^ self._pin[i]
        if not different:
            self.pinned = True
            return 0
        self._seen = digest
        # A positive value would reach the reader as a count of bytes read (modtls socket_read).
        return _X509_FATAL_ERROR

    def wrap(self, sock, host):
        """Return ``sock`` wrapped, its handshake not begun; it runs in the first reads and writes.

        Raises:
            TlsError, ConfigError
        """
        if self._context is None:
            self._context = self._make_context()
        self.pinned = self._pin is None
        self._seen = None
        try:
            return self._context.wrap_socket(
                sock, server_hostname=host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as e:
            raise _tls_error(e, host, self)


def _tls_error(e, host, tls):
    """Return the TlsError for an exception of the handshake, with what to do about it."""
    if tls._seen:
        return TlsError("certificate fingerprint", hexlify(tls._seen).decode(), "the pinned one")
    text = str(e.args[-1] if e.args else e).replace("\n", " ").strip()
    if isinstance(e, OSError):
        code = e.args[0]
        if code in (_ENOMEM, _SSL_ALLOC_FAILED, _X509_ALLOC_FAILED, _PK_ALLOC_FAILED):
            return TlsError("out of memory for TLS: it needs about 40 KB outside the Python heap")
        if code == _SSL_CONN_EOF or isinstance(code, int) and code > 0:
            return TlsError("the connection closed during the TLS handshake (%s)" % text)
        if code == _SSL_FATAL_ALERT:
            return TlsError("the server refused the TLS handshake (alert)")
        return TlsError("TLS handshake failed (%s)" % text)
    if "not correctly signed" in text:
        why = "not signed by the pinned CA: is it the right server, the right ca?"
    elif "does not match" in text:
        why = "for another name than %s: use the name in the certificate" % host
    elif "in the future" in text:
        why = "not valid yet: is the clock set?"
    elif "has expired" in text:
        why = "expired: renew it, or correct the clock"
    else:
        why = "refused"
    return TlsError("the server's certificate is %s (%s)" % (why, text))


# ---- One connection --------------------------------------------------------------------------


class _Link:
    """A connection and the bytes read ahead of it. Every wait is bounded.

    ``since`` and ``limit_ms`` below: the wait began at tick ``since`` and fails ``limit_ms`` later;
    ``deadline`` (a tick, or None) bounds all of them.
    """

    def __init__(self, origin, buf):
        self.origin = origin
        self.deadline = None
        self.owner = None  # the Response whose body is still to be read
        self.heard = False  # bytes came since the last request
        self.greeted = False  # the TLS handshake is through
        self.ended = False
        self._sock = None
        self._raw = None
        self._tls = None
        self._buf = buf
        self._mv = memoryview(buf)
        self._from = 0
        self._to = 0

    def check(self, since, limit_ms, doing):
        now = ticks_ms()
        if self.deadline is not None and ticks_diff(self.deadline, now) <= 0:
            raise TimeoutError_("%s: the deadline passed" % doing)
        if ticks_diff(now, since) >= limit_ms:
            raise TimeoutError_("%s: gave up after %d ms" % (doing, limit_ms))

    def close(self):
        # After a failed handshake the TLS socket no longer closes the one below: close both.
        for sock in (self._sock, self._raw):
            if sock is not None:
                try:
                    sock.close()
                except OSError:
                    pass
        self._sock = self._raw = self.owner = None

    def _error(self, e, doing):
        if self._tls and not self.greeted:
            return _tls_error(e, self.origin[1], self._tls)
        code = e.args[0] if e.args else e
        if code == _SSL_CONN_EOF:
            return NetworkError("%s: the connection closed" % doing)
        if isinstance(code, int) and code < 0:
            return TlsError("%s: TLS failed (%s)" % (doing, e.args[-1]))
        return NetworkError("%s: the connection broke (error %s)" % (doing, code))

    async def dial(self, address, since, limit_ms):
        """Connect to one address of getaddrinfo. Raises UnreachableError, TimeoutError_."""
        try:
            sock = socket.socket(address[0], address[1], address[2])
            self._raw = self._sock = sock
            sock.setblocking(False)
            try:
                sock.connect(address[-1])
            except OSError as e:
                # EINPROGRESS: 115 on Linux, 119 on the ESP32, 36 on macOS.
                if e.args[0] not in (115, 119, 36):
                    raise
            poller = select.poll()
            poller.register(sock, select.POLLOUT)
            pause = 1
            while True:
                ready = poller.poll(0)
                if ready:
                    break
                self.check(since, limit_ms, "connect")
                await sleep_ms(pause)
                pause = min(pause * 2, _PAUSE_MAX_MS)
            if ready[0][1] & (select.POLLERR | select.POLLHUP):
                sock.read(1)  # raises the reason
                raise OSError(0)
        except OSError as e:
            raise UnreachableError(
                "no connection to %s:%d (error %s)" % (self.origin[1], self.origin[2], e.args[0])
            )

    async def secure(self, tls, since, limit_ms):
        """Wrap the connection in TLS; with a pinned fingerprint, shake hands until it was seen."""
        gc.collect()  # a dropped TLS socket frees its buffers only now
        self._tls = tls
        self._sock = tls.wrap(self._raw, self.origin[1])
        pause = 1
        while not tls.pinned:
            try:
                got = self._sock.readinto(self._mv, 1)
            except (OSError, ValueError) as e:
                raise self._error(e, "TLS handshake")
            if got is not None and not tls.pinned:
                raise TlsError("the server spoke before its certificate was checked")
            self.check(since, limit_ms, "TLS handshake")
            await sleep_ms(pause)
            pause = min(pause * 2, _PAUSE_MAX_MS)

    async def send(self, data, since, limit_ms):
        left = memoryview(data)
        pause = 1
        while len(left):
            doing = "request" if self.greeted or not self._tls else "TLS handshake"
            try:
                n = self._sock.write(left)
            except (OSError, ValueError) as e:
                raise self._error(e, doing)
            if n:
                self.greeted = True
                left = left[n:]
                pause = 1
            else:
                self.check(since, limit_ms, doing)
                await sleep_ms(pause)
                pause = min(pause * 2, _PAUSE_MAX_MS)

    async def receive(self, buf, n, since, limit_ms, doing):
        """Read 1 to ``n`` bytes into ``buf``; 0 at the end of the stream."""
        pause = 0  # lets other tasks run even while bytes keep coming
        while True:
            await sleep_ms(pause)
            try:
                got = self._sock.readinto(buf, n)
            except (OSError, ValueError) as e:
                raise self._error(e, doing)
            if got is not None:
                return got
            self.check(since, limit_ms, doing)
            pause = min(pause * 2 + 1, _PAUSE_MAX_MS)

    def take(self, buf, n):
        """Move up to ``n`` bytes that were read ahead into ``buf``; return how many."""
        n = min(n, self._to - self._from)
        if n:
            buf[:n] = self._mv[self._from : self._from + n]
            self._from += n
        return n

    def is_quiet(self):
        """Tell whether the connection is open and nothing unasked has come over it."""
        if self._sock is None or self._from != self._to:
            return False
        try:
            return self._sock.readinto(self._mv, 1) is None
        except (OSError, ValueError):
            return False

    async def line(self, since, limit_ms, doing):
        """Return the next line (bytes, without its CRLF)."""
        at = self._from
        buf = self._buf
        while True:
            while at < self._to:
                c = buf[at]
                at += 1
                if c == 10:
                    line = bytes(self._mv[self._from : at - 1])
                    self._from = at
                    if not line.endswith(b"\r") or line.find(b"\r") != len(line) - 1:
                        raise HttpError("%s: a line that does not end with CRLF" % doing)
                    return line[:-1]
                if c < 32 and c != 13 and c != 9 or c == 127:
                    raise HttpError("%s: control character" % doing, c)
            if self._from:
                kept = self._to - self._from
                self._mv[:kept] = self._mv[self._from : self._to]
                self._from = 0
                self._to = at = kept
            if self._to == _LINE_MAX:
                raise HttpError("%s: line too long" % doing, "more", "%d bytes" % _LINE_MAX)
            got = await self.receive(
                self._mv[self._to :], _LINE_MAX - self._to, since, limit_ms, doing
            )
            if not got:
                raise NetworkError("%s: the connection closed" % doing)
            self.heard = True
            self._to += got

    async def fields(self, since, limit_ms, doing, room, wanted=()):
        """Read header fields up to the empty line: ({wanted name: value}, room left).

        A wanted field that is repeated is refused, all others are only counted.
        """
        found = {}
        for _ in range(_LINES_MAX + 1):
            line = await self.line(since, limit_ms, doing)
            room -= len(line) + 2
            if room < 0:
                raise HttpError("%s: too long" % doing, "more", "%d bytes" % _HEAD_MAX)
            if not line:
                return found, room
            name, colon, value = line.partition(b":")
            if not colon or not name or b" " in name or b"\t" in name:
                raise HttpError("%s: not a field" % doing)
            name = name.lower()
            if name in wanted:
                if name in found:
                    raise HttpError("%s: field twice" % doing, name.decode())
                found[name] = value.strip(b" \t")
        raise HttpError("%s: too many fields" % doing, "more", _LINES_MAX)

    async def head(self, since, limit_ms):
        """Return (status, minor version, fields) of the answer; 1xx are passed over."""
        room = _HEAD_MAX
        for _ in range(_INTERIM_MAX + 1):
            line = await self.line(since, limit_ms, "header")
            room -= len(line) + 2
            status = _decimal(line[9:12], 599)
            if line[:7] != b"HTTP/1." or line[7:9] not in (b"0 ", b"1 ") or line[12:13].strip():
                status = None
            if not status or status < 100 or status == 101:
                raise HttpError("not an HTTP/1.1 answer")
            found, room = await self.fields(since, limit_ms, "header", room, _WANTED)
            if status >= 200:
                return status, line[7] - 48, found
        raise HttpError("interim answers", "more", _INTERIM_MAX)


_WANTED = (
    b"age",
    b"connection",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"date",
    b"etag",
    b"location",
    b"retry-after",
    b"transfer-encoding",
)


# ---- Answers ---------------------------------------------------------------------------------


class Response:
    """The head of an answer, and its body as a stream.

    status: 200 to 599.
    length: bytes of the body, or None (chunked).
    etag: with its quotes, or None.
    date: what the server's clock showed (Unix seconds; a cache's Age added), or None.
    secure: the answer came over a verified connection.
    retry_after: seconds, at most 6 h, or None.
    start, total: of a 206, the offset of the body's first byte and the size of the whole (or None);
        start is 0 for every other status: a 200 to a Range request begins at the beginning.
    location: text of the field, or None.
    """

    def __init__(self, link, client, status, minor, found, start, if_range):
        self.status = status
        self.secure = link.origin[0] == "https"
        self.start = 0
        self.total = None
        self._client = client
        self._link = link
        self._chunked = False
        self._in_chunk = False
        self._got = 0
        self._waited_ms = 0
        self._arrived = 0
        self._keep = minor == 1 and b"close" not in found.get(b"connection", b"").lower()
        self._read_head(found)
        self._frame(found, minor)
        if status == 206:
            self._check_range(found, start, if_range)
        elif status == 416:
            self.total = _decimal(found.get(b"content-range", b"").split(b"/")[-1], _LENGTH_MAX)
        link.owner = self
        self._left = self.length or 0  # of the body, or of the current chunk
        if not self._chunked and not self._left:
            self._end()

    def _read_head(self, found):
        etag = found.get(b"etag")
        self.etag = etag.decode() if etag and _is_visible(etag) else None
        location = found.get(b"location")
        self.location = location.decode() if location and _is_visible(location) else None
        self.date = http_date(found.get(b"date", b""))
        wish = found.get(b"retry-after", b"")
        after = None
        if wish.isdigit():
            after = _decimal(wish.lstrip(b"0")[:10] or b"0", 9999999999)
        elif self.date is not None:
            until = http_date(wish)
            after = None if until is None else max(0, until - self.date)
        self.retry_after = None if after is None else min(after, _RETRY_AFTER_MAX)
        if self.date is not None:
            self.date += _decimal(found.get(b"age", b""), _LENGTH_MAX) or 0

    def _frame(self, found, minor):
        """Decide how long the body is (RFC 9112 section 6.3); what is ambiguous is refused."""
        length = found.get(b"content-length")
        coding = found.get(b"transfer-encoding")
        self.length = 0
        if coding is not None and length is not None:
            raise self._refuse("Content-Length and Transfer-Encoding together")
        if length is not None:
            self.length = _decimal(length, _LENGTH_MAX)
            if self.length is None:
                raise self._refuse("Content-Length", _clip(length), "0 to %d" % _LENGTH_MAX)
        if self.status in (204, 304):
            # No body, whatever the fields say; a server that sends one has spoiled the stream.
            self._keep = self._keep and not coding and (self.status == 304 or not self.length)
            self.length = 0
            return
        if coding is not None:
            if coding.lower() != b"chunked" or minor == 0:
                raise self._refuse("Transfer-Encoding", _clip(coding), "chunked, of HTTP/1.1")
            self._chunked = True
            self.length = None
        elif length is None:
            if self.status < 300:
                raise self._refuse("no Content-Length: the end of the body would be a guess")
            self._keep = False  # the status says enough; its body is not read
        coding = found.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity" and self.status < 300:
            raise self._refuse("Content-Encoding", _clip(coding), "identity")

    def _check_range(self, found, start, if_range):
        field = found.get(b"content-range")
        if not start or field is None:
            raise self._refuse("206 without %s" % ("Content-Range" if start else "being asked"))
        unit, _, rest = field.partition(b" ")
        span, _, total = rest.partition(b"/")
        first, _, last = span.partition(b"-")
        first = _decimal(first, _LENGTH_MAX)
        last = _decimal(last, _LENGTH_MAX)
        if total != b"*":
            self.total = _decimal(total, _LENGTH_MAX)
        if (
            unit.lower() != b"bytes"
            or first is None
            or last is None
            or last < first
            or (total != b"*" and (self.total is None or last >= self.total))
        ):
            raise self._refuse("Content-Range", _clip(field))
        if first != start:
            raise self._refuse("Content-Range starts elsewhere", first, start)
        if self.length is not None and self.length != last - first + 1:
            raise self._refuse("Content-Length of the range", self.length, last - first + 1)
        if if_range and self.etag and self.etag != if_range:
            raise self._refuse("206 of another version", self.etag, if_range)
        self.start = first

    def _refuse(self, message, seen=None, expected=None):
        return HttpError(message, seen, expected, status=self.status)

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
        link = self._link
        if link is None:
            return 0
        if link.owner is not self:
            raise NetworkError("body: the client has given this answer up")
        client = self._client
        since = ticks_ms()
        try:
            if self._chunked and not self._left and not await self._next_chunk(link, since):
                return 0
            n = min(len(buf), self._left)
            got = link.take(buf, n)
            if not got:
                got = await link.receive(buf, n, since, client.read_timeout_ms, "body")
                if not got:
                    raise NetworkError(
                        "the body ends early", self._got, self.length or "more in its chunk"
                    )
            self._waited_ms += ticks_diff(ticks_ms(), since)
            self._arrived += got
            if self._waited_ms >= client.rate_window_ms:
                self._check_rate(client)
        except BaseException:
            link.close()
            raise
        self._got += got
        self._left -= got
        if not self._left and not self._chunked:
            self._end()
        return got

    def _check_rate(self, client):
        # Only time spent waiting counts: flash writes between two reads are not the server's.
        rate = self._arrived * 1000 // self._waited_ms
        if rate < client.min_rate:
            raise TimeoutError_("body too slow", "%d B/s" % rate, "%d B/s" % client.min_rate)
        self._waited_ms = self._arrived = 0

    async def _next_chunk(self, link, since):
        """Read up to the data of the next chunk; False after the last chunk and its trailers."""
        limit_ms = self._client.read_timeout_ms
        if self._in_chunk and await link.line(since, limit_ms, "chunk"):
            raise self._refuse("chunk: data goes on past its size")
        line = await link.line(since, limit_ms, "chunk")
        size = _hexadecimal(line.split(b";")[0].rstrip(b" \t"), _LENGTH_MAX)
        if size is None or len(line) > _EXTENSION_MAX:
            raise self._refuse("chunk size", _clip(line))
        self._in_chunk = True
        self._left = size
        if size:
            return True
        await link.fields(since, limit_ms, "trailer", _HEAD_MAX)
        self._end()
        return False

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


def _is_visible(value):
    if len(value) > _URL_MAX:
        return False
    for c in value:
        if not 33 <= c <= 126:
            return False
    return True


def _clip(value):
    # What a server sent, for a message: short and printable.
    return "".join(chr(c) if 32 <= c <= 126 else "?" for c in value[:40])


# ---- The client ------------------------------------------------------------------------------


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
    ):
        self.read_timeout_ms = read_timeout_ms
        self.min_rate = min_rate
        self.rate_window_ms = rate_window_ms
        self._connect_timeout_ms = connect_timeout_ms
        self._tls = tls
        self._allow_http = allow_http
        self._allow_hosts = allow_hosts
        self._token = None
        self._token_for = None
        if token:
            if not origin or parse(origin).scheme != "https":
                raise ConfigError("a token needs the https origin it belongs to")
            if not _is_visible(token.encode()):
                raise ConfigError("token: only visible ASCII characters")
            self._token = token
            self._token_for = parse(origin)[:3]
        self._buf = bytearray(_LINE_MAX)
        self._link = None
        self._busy = False
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
        url = parse(url) if isinstance(url, str) else url
        deadline = _deadline(deadline_ms)
        answer = await self._request("GET", url, extra, None, deadline, start, if_range)
        if not redirects or answer.status not in (301, 302, 303, 307, 308):
            return answer
        url = self._redirect(url, answer)
        await answer.close()
        answer = await self._request("GET", url, extra, None, deadline, start, if_range)
        if answer.status in (301, 302, 303, 307, 308):
            await answer.close()
            raise HttpError("redirected twice", status=answer.status)
        return answer

    async def post_json(self, url, obj, deadline_ms=None):
        """Send ``obj`` as JSON; returns Response, never follows a redirect.

        Sent a second time when the kept connection turns out closed: give reports an identity.
        """
        body = json.dumps(obj).encode()
        extra = ["Content-Type: application/json", "Content-Length: %d" % len(body)]
        url = parse(url) if isinstance(url, str) else url
        return await self._request("POST", url, extra, body, _deadline(deadline_ms))

    async def close(self):
        """Close the connection; the client can be used again."""
        self._drop()

    def _drop(self):
        if self._link is not None:
            self._link.close()
            self._link = None

    def _redirect(self, url, answer):
        if not answer.location:
            raise HttpError("redirect without a usable Location", status=answer.status)
        try:
            return resolve(url, answer.location, self._allow_hosts)
        except FormatError as e:
            raise HttpError("redirect refused: %s" % e.message, status=answer.status)

    def _head(self, method, url, extra):
        lines = [
            "%s %s HTTP/1.1" % (method, url.path),
            "Host: " + _host(url),
            "User-Agent: twinslot",
            "Accept-Encoding: identity",
        ]
        if self._token and url[:3] == self._token_for:
            lines.append("Authorization: Bearer " + self._token)
        return ("\r\n".join(lines + extra) + "\r\n\r\n").encode()

    async def _request(self, method, url, extra, body, deadline, start=None, if_range=None):
        if url.scheme != "https" and not self._allow_http:
            raise ConfigError("plain http is not allowed here", _shown(url), "https")
        if url.scheme == "https" and self._tls is None:
            raise ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
        if self._busy:
            raise BusyError("the client waits for another answer")
        data = self._head(method, url, extra) + (body or b"")
        self._busy = True
        try:
            status, minor, found = await self._exchange(url, data, deadline)
            return Response(self._link, self, status, minor, found, start, if_range)
        except BaseException:  # cancelled, too: the stream is in an unknown state
            self._drop()
            raise
        finally:
            self._busy = False

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
                return await link.head(ticks_ms(), self.read_timeout_ms)
            except NetworkError as e:
                # A kept connection that the server closed meanwhile: once more on a new one.
                if not kept or link.heard or isinstance(e, TimeoutError_):
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
            self._link = link = _Link(origin, self._buf)
            link.deadline = deadline
            # Each address gets its share of the time that is left.
            now = ticks_ms()
            share = (limit_ms - ticks_diff(now, since)) // (len(addresses) - i)
            try:
                await link.dial(address, now, share)
                break
            except (UnreachableError, TimeoutError_):
                self._drop()
                if i + 1 == len(addresses):
                    self._addresses = (None, None)  # the name may lead elsewhere next time
                    raise
        if url.scheme == "https":
            await link.secure(self._tls, since, limit_ms)


def _deadline(ms):
    return None if ms is None else ticks_add(ticks_ms(), min(ms, _DEADLINE_MAX_MS))


def _field(value):
    # A header injected through a stored ETag would be a request of somebody else's making.
    if not _is_visible(value.encode()) or len(value) > _ETAG_MAX:
        raise FormatError(
            "ETag", _clip(value.encode()), "at most %d visible characters" % _ETAG_MAX
        )
    return value
