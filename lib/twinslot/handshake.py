"""A TLS handshake that failed: what to do about it.

Source: MicroPython extmod/modtls_mbedtls.c; mbedtls x509.h (texts).
"""

from binascii import hexlify
from errno import ENOMEM

from micropython import const

from . import errors

# mbedtls/include/mbedtls/{ssl,x509,pk}.h
_SSL_ALLOC_FAILED = const(-0x7F00)
_X509_ALLOC_FAILED = const(-0x2880)
_PK_ALLOC_FAILED = const(-0x3F80)
_SSL_FATAL_ALERT = const(-0x7780)
_SSL_CONN_EOF = const(-0x7280)
_SSL_BAD_CERTIFICATE = const(-0x7A00)

# mbedtls/include/mbedtls/x509.h, X509_CRT_ERROR_INFO_LIST: one line for each thing that is wrong
_EXPIRED = "The certificate validity has expired"
_FUTURE = "The certificate validity starts in the future"


def tls_error(e, host, tls):
    """Return the TlsError for an exception of the handshake, with what to do about it."""
    if tls._seen:
        return errors.TlsError(
            "certificate fingerprint", hexlify(tls._seen).decode(), "the pinned one"
        )
    lines = str(e.args[-1] if e.args else e).strip().split("\n")
    text = " ".join(lines)
    if isinstance(e, OSError):
        code = e.args[0]
        if code in (ENOMEM, _SSL_ALLOC_FAILED, _X509_ALLOC_FAILED, _PK_ALLOC_FAILED):
            return errors.TlsError(
                "out of memory for TLS: it needs about 40 KB outside the Python heap"
            )
        if code == _SSL_CONN_EOF or (isinstance(code, int) and code > 0):
            return errors.TlsError("the connection closed during the TLS handshake (%s)" % text)
        if code == _SSL_BAD_CERTIFICATE:
            return errors.TlsError("the server's certificate is not fit for a server (key usage)")
        if code == _SSL_FATAL_ALERT:
            why = "does it ask for a client certificate, or for another TLS version?"
            return errors.TlsError("the server refused the TLS handshake (alert): " + why)
        return errors.TlsError("TLS handshake failed (%s)" % text)
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
    error = errors.TlsError("the server's certificate is %s (%s)" % (why, text))
    error.dates = all(line.strip() in (_FUTURE, _EXPIRED) for line in lines)
    return error
