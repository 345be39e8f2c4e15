"""Whom to trust over TLS: a CA, a pinned certificate, or a certificate's fingerprint.

Verification has no off switch. What goes wrong in a handshake comes back as a TlsError that says
what to do about it.

Source: MicroPython extmod/modtls_mbedtls.c (verify_callback since 1.23); mbedtls x509.h (texts).
"""

from binascii import a2b_base64, hexlify, unhexlify
from errno import ENOMEM
from hashlib import sha256

from micropython import const

from .errors import ConfigError, TlsError

# mbedtls/include/mbedtls/{ssl,x509,pk}.h
_SSL_ALLOC_FAILED = const(-0x7F00)
_X509_ALLOC_FAILED = const(-0x2880)
_PK_ALLOC_FAILED = const(-0x3F80)
_SSL_FATAL_ALERT = const(-0x7780)
_SSL_CONN_EOF = const(-0x7280)
_SSL_BAD_CERTIFICATE = const(-0x7A00)
_X509_FATAL_ERROR = const(-0x3000)

# mbedtls/include/mbedtls/x509.h, X509_CRT_ERROR_INFO_LIST: one line for each thing that is wrong
_EXPIRED = "The certificate validity has expired"
_FUTURE = "The certificate validity starts in the future"


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
            context.verify_mode = tls.CERT_REQUIRED if ca else tls.CERT_OPTIONAL  # pyright: ignore
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
            raise tls_error(e, "", self)
        if self._pin:
            try:
                context.verify_callback = self._check  # pyright: ignore (not in the stubs)
            except AttributeError:
                raise TlsError("no fingerprints on this port: pin the certificate itself (ca)")
        self._sources = (None, None, None)
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
            raise tls_error(e, host, self)


def tls_error(e, host, tls):
    """Return the TlsError for an exception of the handshake, with what to do about it."""
    if tls._seen:
        return TlsError("certificate fingerprint", hexlify(tls._seen).decode(), "the pinned one")
    lines = str(e.args[-1] if e.args else e).strip().split("\n")
    text = " ".join(lines)
    if isinstance(e, OSError):
        code = e.args[0]
        if code in (ENOMEM, _SSL_ALLOC_FAILED, _X509_ALLOC_FAILED, _PK_ALLOC_FAILED):
            return TlsError("out of memory for TLS: it needs about 40 KB outside the Python heap")
        if code == _SSL_CONN_EOF or (isinstance(code, int) and code > 0):
            return TlsError("the connection closed during the TLS handshake (%s)" % text)
        if code == _SSL_BAD_CERTIFICATE:
            return TlsError("the server's certificate is not fit for a server (key usage)")
        if code == _SSL_FATAL_ALERT:
            why = "does it ask for a client certificate, or for another TLS version?"
            return TlsError("the server refused the TLS handshake (alert): " + why)
        return TlsError("TLS handshake failed (%s)" % text)
    if "not correctly signed" in text:
        why = "not signed by the pinned CA: is it the right server, the right ca?"
    elif "does not match" in text:
        why = "for another name than %s: use the name in the certificate" % host
    elif _FUTURE in text:
        why = "not valid yet: is the clock set?"
    elif _EXPIRED in text:
        why = "expired: renew it, or correct the clock"
    else:
        why = "refused"
    error = TlsError("the server's certificate is %s (%s)" % (why, text))
    error.dates = all(line.strip() in (_FUTURE, _EXPIRED) for line in lines)
    return error
