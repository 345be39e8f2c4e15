"""The TLS context, and the DER blocks it is made from.

Loaded when an agent is made and for the first connection of a boot, see `twinslot.certs`.

Source: MicroPython extmod/modtls_mbedtls.c (verify_callback since 1.23).
"""

from binascii import a2b_base64

from . import errors


def blocks(data, what, label):
    """Return the DER blocks named ``label`` in ``data``: PEM text, or DER already.

    Raises:
        ConfigError: there is none in the text, or it is not base64; ``what`` says whose.
    """
    if isinstance(data, str):
        data = data.encode()
    data = bytes(data)
    if b"-----BEGIN " not in data:
        return [data]
    # Not every port's mbedTLS parses PEM (unix does not), so none has to.
    found = []
    for part in data.split(b"-----BEGIN ")[1:]:
        name, _, rest = part.partition(b"-----")
        if name.endswith(label):
            try:
                found.append(a2b_base64(rest.split(b"-----END ")[0]))
            except ValueError:
                raise errors.ConfigError("%s: not base64 between the PEM lines" % what)
    if not found:
        raise errors.ConfigError("%s: no PEM block" % what, "none", label.decode())
    return found


def make(ca, cert, key, check):
    """Return an SSLContext that verifies servers.

    Args:
        ca: list of DER certificates, or empty.
        cert, key: DER, or None.
        check: mbedTLS' callback for each certificate, or None. Without a CA it decides alone.

    Raises:
        ConfigError, TlsError; OSError: see ``handshake.tls_error``.
    """
    import tls

    context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    what = "ca"
    try:
        # OPTIONAL without a CA goes on after a failed chain.
        context.verify_mode = tls.CERT_REQUIRED if ca else tls.CERT_OPTIONAL  # pyright: ignore
        for der in ca:
            context.load_verify_locations(der)
        what = "client certificate"
        if cert is not None:
            context.load_cert_chain(cert, key)
    except ValueError as e:
        raise errors.ConfigError("%s: mbedTLS can't read it (%s)" % (what, e))
    if check:
        try:
            context.verify_callback = check  # pyright: ignore (not in the stubs)
        except AttributeError:
            raise errors.TlsError("no fingerprints on this port: pin the certificate itself (ca)")
    return context
