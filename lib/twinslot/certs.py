"""Whom to trust over TLS: a CA, a pinned certificate, or a certificate's fingerprint.

Verification has no off switch. What goes wrong in a handshake comes back as a TlsError that says
what to do about it.

Source: MicroPython extmod/modtls_mbedtls.c (verify_callback since 1.23); mbedtls x509.h (texts).
"""

import gc
import sys
from binascii import unhexlify
from hashlib import sha256

from micropython import const

from . import errors

# mbedtls/include/mbedtls/x509.h
_X509_FATAL_ERROR = const(-0x3000)
# Bytes of an SSLContext and of a connection's SSLSocket, with what of mbedTLS lies in them, and
# then some. Measured: 3,048 and 520 on a 64-bit port, 1,928 and 500 on a 32-bit one.
_ROOM = 4096 if sys.maxsize > 1 << 32 else 2560


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
            raise errors.ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
        if bool(client_cert) != bool(client_key):
            raise errors.ConfigError(
                "a client certificate needs its key, and the key its certificate"
            )
        self._pin = None
        if fingerprint:
            digits = fingerprint.replace(":", "").strip()
            try:
                self._pin = unhexlify(digits)
            except ValueError:
                pass
            if self._pin is None or len(self._pin) != 32:
                raise errors.ConfigError(
                    "fingerprint", "%d characters" % len(digits), "64 hex digits"
                )
        from .context import blocks

        # Here, where memory is plenty, not where the context is made.
        what = b"CERTIFICATE"
        try:
            self._sources = (
                blocks(ca, "ca", what) if ca else (),
                blocks(client_cert, "client certificate", what)[0] if client_cert else None,
                blocks(client_key, "client key", b"PRIVATE KEY")[0] if client_key else None,
            )
        except errors.ConfigError as exc:
            # Told at each connection: the agent keeps the network, too, which others want as well.
            # The text alone: an exception that is raised again and again grows by its traceback.
            self._sources = exc.message
        self._context = None
        # Where the context and the first socket will lie, not in the middle of the room that the
        # update needs. It is made once a connection stands: before the radio is on, the ESP32's
        # random numbers, from which mbedTLS takes its seed for the whole boot, are none.
        self._room = bytearray(_ROOM)
        self.pinned = False  # the certificate of the current handshake is the pinned one
        self._seen = None  # SHA-256 of the one that was not

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
        self.pinned = self._pin is None
        self._seen = None
        try:
            if self._context is None:
                if type(self._sources) is str:
                    raise errors.ConfigError(self._sources)
                from . import context

                self._room = None
                gc.collect()
                try:
                    self._context = context.make(
                        *self._sources, check=self._check if self._pin else None
                    )
                except Exception:
                    try:
                        self._room = bytearray(_ROOM)  # for the next try
                    except MemoryError:
                        pass  # what went wrong matters more
                    raise
                self._sources = None
                gc.collect()
            return self._context.wrap_socket(
                sock, server_hostname=host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as e:
            from .handshake import tls_error

            raise tls_error(e, host, self)
