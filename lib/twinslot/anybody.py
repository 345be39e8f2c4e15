"""A connection to whoever answers: what `twinslot.trust` fetches signed files over, in the end.

Loaded when only the dates of certificates have stood in the way for several polls.
"""


class Anybody:
    """Takes the place of ``Tls``: a connection to whoever answers."""

    pinned = True
    _seen = None

    def wrap(self, sock, host):
        import tls

        context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
        context.verify_mode = tls.CERT_NONE  # pyright: ignore
        try:
            return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        except (OSError, ValueError) as e:
            from .handshake import tls_error

            raise tls_error(e, host, self)
