"""`tls` as an ESP32 has it, where the unix port's mbedTLS differs.

- Validity dates are judged by the host's clock in there. Here the dates of every certificate given
  to `load_verify_locations` are held against the board's clock; the handshake fails with mbedTLS's
  words. A leaf certificate below a loaded CA is not looked at.
- A socket of a client context with CERT_NONE has `getpeercert(True)`: the certificate is read off
  the handshake, which TLS 1.2 sends in the clear. With CERT_REQUIRED the real socket is handed
  out, so nothing stands in the way of the data.

Source: MicroPython extmod/modtls_mbedtls.c; mbedTLS x509.h (texts); RFC 5280 4.1.2.5 (dates);
RFC 5246 6.2.1, 7.4 (records, handshake messages).
"""

import binascii
import io
import select

import shim_time
import tls as _tls
from tls import (  # noqa: F401
    CERT_NONE,
    CERT_OPTIONAL,
    CERT_REQUIRED,
    MBEDTLS_VERSION,
    PROTOCOL_DTLS_CLIENT,
    PROTOCOL_DTLS_SERVER,
    PROTOCOL_TLS_CLIENT,
    PROTOCOL_TLS_SERVER,
)

_POLL = 3  # MP_STREAM_POLL
_CLOSE = 4  # MP_STREAM_CLOSE
_READ_FIRST = 0x10000  # the sniffer gives up on a certificate message longer than this


def _der_length(data, at):
    """Return (length, offset of the contents) of the DER element at `at`."""
    length = data[at + 1]
    if length < 0x80:
        return length, at + 2
    n = length & 0x7F
    return int.from_bytes(data[at + 2 : at + 2 + n], "big"), at + 2 + n


def _skip(data, at):
    length, at = _der_length(data, at)
    return at + length


def _when(data, at):
    """Seconds since 2000 of the UTCTime or GeneralizedTime at `at`."""
    length, start = _der_length(data, at)
    text = data[start : start + length].decode()
    if data[at] == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    fields = [int(text[:4])] + [int(text[i : i + 2]) for i in range(4, 14, 2)]
    return shim_time.mktime(tuple(fields) + (0, 0))


def _validity(der):
    """Return (not before, not after) of a certificate, seconds since 2000."""
    at = _der_length(der, 0)[1]  # Certificate
    at = _der_length(der, at)[1]  # TBSCertificate
    if der[at] == 0xA0:  # version
        at = _skip(der, at)
    for _ in range(3):  # serial number, signature algorithm, issuer
        at = _skip(der, at)
    at = _der_length(der, at)[1]
    return _when(der, at), _when(der, _skip(der, at))


def _certificates(data):
    """Yield the DER of each certificate in PEM or DER data."""
    data = data.encode() if isinstance(data, str) else bytes(data)
    if data[:1] == b"\x30":
        yield data
        return
    begin = b"-----BEGIN CERTIFICATE-----"
    at = data.find(begin)
    while at >= 0:
        end = data.find(b"-----END", at)
        yield binascii.a2b_base64(data[at + len(begin) : end].replace(b"\r", b"").strip())
        at = data.find(begin, end)


class SSLContext:
    def __init__(self, protocol):
        self._own = _tls.SSLContext(protocol)
        self._client = protocol in (PROTOCOL_TLS_CLIENT, PROTOCOL_DTLS_CLIENT)
        self._dates = []

    @property
    def verify_mode(self):
        return self._own.verify_mode

    @verify_mode.setter
    def verify_mode(self, mode):
        self._own.verify_mode = mode

    @property
    def verify_callback(self):
        return self._own.verify_callback

    @verify_callback.setter
    def verify_callback(self, callback):
        self._own.verify_callback = callback

    def load_verify_locations(self, cadata):
        found = list(_certificates(cadata))
        for der in found or (cadata,):  # the unix port is built without PEM
            self._own.load_verify_locations(der)
        for der in found:
            self._dates.append(_validity(der))

    def load_cert_chain(self, cert, key):
        self._own.load_cert_chain(cert, key)

    def get_ciphers(self):
        return self._own.get_ciphers()

    def set_ciphers(self, ciphers):
        self._own.set_ciphers(ciphers)

    def wrap_socket(self, sock, **kw):
        mode = self._own.verify_mode
        if not self._client or mode == CERT_OPTIONAL:
            return self._own.wrap_socket(sock, **kw)
        if mode == CERT_NONE:
            sniffer = _Sniffer(sock)
            return _Peer(self._own.wrap_socket(sniffer, **kw), sniffer)
        why = self._date_problem()
        if why is None or kw.get("server_hostname") is None:  # mbedTLS complains of the latter
            return self._own.wrap_socket(sock, **kw)
        if kw.get("do_handshake_on_connect", True):
            raise ValueError(why)
        return _Refused(sock, why)

    def _date_problem(self):
        now = shim_time.time()
        for start, end in self._dates:
            if now < start:
                return "\nThe certificate validity starts in the future\n"
            if now > end:
                return "\nThe certificate validity has expired\n"
        return None


class _Refused(io.IOBase):
    """A connection whose handshake fails, at the first read or write."""

    def __init__(self, sock, why):
        self._sock = sock
        self._why = why

    def _fail(self, *_):
        raise ValueError(self._why)

    read = readinto = readline = write = _fail

    def setblocking(self, flag):
        self._sock.setblocking(flag)

    def ioctl(self, op, arg):
        if op == _POLL:
            return arg
        if op == _CLOSE:
            self._sock.close()
        return 0

    def close(self):
        self._sock.close()


class _Sniffer(io.IOBase):
    """Between TLS and the socket: keeps the server's certificate as it passes."""

    def __init__(self, sock):
        self._sock = sock
        self._raw = b""  # what came so far; None once the certificate is known or out of reach
        self.certificate = None

    def readinto(self, buf):
        n = self._sock.readinto(buf)
        if n and self._raw is not None:
            self._raw += bytes(memoryview(buf)[:n])
            self._look()
        return n

    def write(self, data):
        return self._sock.write(data)

    def ioctl(self, op, arg):
        if op == _POLL:
            return _poll(self._sock, arg)
        if op == _CLOSE:
            self._sock.close()
        return 0

    def setblocking(self, flag):
        self._sock.setblocking(flag)

    def _look(self):
        """Find the Certificate message in the handshake records that are complete."""
        raw = self._raw
        messages = b""
        at = 0
        while at + 5 <= len(raw):
            size = raw[at + 3] << 8 | raw[at + 4]
            if raw[at] != 22:
                self._raw = None
                return
            if at + 5 + size > len(raw):
                break
            messages += raw[at + 5 : at + 5 + size]
            at += 5 + size
        at = 0
        while at + 4 <= len(messages):
            size = int.from_bytes(messages[at + 1 : at + 4], "big")
            if at + 4 + size > len(messages):
                break
            if messages[at] == 11:
                first = int.from_bytes(messages[at + 7 : at + 10], "big")
                self.certificate = messages[at + 10 : at + 10 + first]
                self._raw = None
                return
            at += 4 + size
        if len(raw) > _READ_FIRST:
            self._raw = None


class _Peer(io.IOBase):
    """A TLS socket with getpeercert."""

    def __init__(self, own, sniffer):
        self._own = own
        self._sniffer = sniffer
        self.read = own.read
        self.readline = own.readline
        self.setblocking = own.setblocking

    def readinto(self, buf, *size):
        return self._own.readinto(buf, *size)

    def write(self, data):
        return self._own.write(data)

    def cipher(self):
        return self._own.cipher()

    def getpeercert(self, binary_form=False):
        if not binary_form:
            raise NotImplementedError
        return self._sniffer.certificate

    def ioctl(self, op, arg):
        if op == _POLL:
            return _poll(self._own, arg)
        if op == _CLOSE:
            self._own.close()
        return 0

    def close(self):
        self._own.close()


def _poll(stream, flags):
    """The events of a stream that are there now."""
    poll = select.poll()
    poll.register(stream, flags)
    for found in poll.ipoll(0):
        return found[1]
    return 0
