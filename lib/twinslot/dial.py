"""Connect the HTTP client to a server: name lookup, TCP, TLS.

Not for applications; `twinslot.http` is. Loaded for a new connection only.
"""

import gc
import select
import socket
from asyncio import sleep_ms
from errno import EINPROGRESS
from time import ticks_diff, ticks_ms

from micropython import const

from . import errors
from .link import Link, longer
from .lookup import lookup

_ADDRESSES_MAX = const(4)


async def connect(client, url, deadline, since):
    """Open ``client._link`` to the origin of a Url. The wait began at tick ``since``.

    Raises:
        UnreachableError, TimeoutError_, TlsError, ConfigError
    """
    origin = url[:3]
    limit_ms = client._connect_timeout_ms
    if client._addresses[0] != origin:
        left = limit_ms
        if deadline is not None:
            left = min(left, ticks_diff(deadline, since))
        client._addresses = (origin, await lookup(url.host, url.port, limit_ms=left))
    addresses = client._addresses[1][:_ADDRESSES_MAX]
    for i, address in enumerate(addresses):
        client._link = link = Link(origin)
        link.deadline = deadline
        # Each address gets its share of the time that is left.
        now = ticks_ms()
        share = (limit_ms - ticks_diff(now, since)) // (len(addresses) - i)
        try:
            await _dial(link, address, now, share)
            break
        except (errors.UnreachableError, errors.TimeoutError_):
            client._drop()
            if i + 1 == len(addresses):
                client._addresses = (None, None)  # the name may lead elsewhere next time
                raise
    if url.scheme == "https":
        await _secure(link, client._tls, since, limit_ms)


# -- ``since`` and ``limit_ms`` as in ``Link`` ------------------------------------------------


async def _dial(link, address, since, limit_ms):
    """Connect to one address of getaddrinfo. Raises UnreachableError, TimeoutError_."""
    try:
        sock = socket.socket(address[0], address[1], address[2])
        link._raw = link._sock = sock
        sock.setblocking(False)
        try:
            sock.connect(address[-1])
        except OSError as e:
            if e.args[0] != EINPROGRESS:
                raise
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        pause = 1
        while True:
            ready = poller.poll(0)
            if ready:
                break
            link.check(since, limit_ms, "connect")
            await sleep_ms(pause)
            pause = longer(pause)
        if ready[0][1] & (select.POLLERR | select.POLLHUP):
            sock.read(1)  # raises the reason
            raise OSError(0)
    except OSError as e:
        raise errors.UnreachableError(
            "no connection to %s:%d (error %s)" % (link.origin[1], link.origin[2], e.args[0])
        )


async def _secure(link, tls, since, limit_ms):
    """Wrap the connection in TLS; with a pinned fingerprint, shake hands until it was seen."""
    gc.collect()  # a dropped TLS socket frees its buffers only now
    link._tls = tls
    link._sock = tls.wrap(link._raw, link.origin[1])
    byte = bytearray(1)
    pause = 1
    while not tls.pinned:
        try:
            got = link._open().readinto(byte)
        except (OSError, ValueError) as e:
            raise link._error(e, "TLS handshake")
        if got is not None and not tls.pinned:
            raise errors.TlsError("the server spoke before its certificate was checked")
        link.check(since, limit_ms, "TLS handshake")
        await sleep_ms(pause)
        pause = longer(pause)
