"""Look up a name without holding the event loop, where threads allow it.

Loaded for a new connection, or to ask a time server.
"""

import socket
import sys
from asyncio import sleep_ms
from time import ticks_diff, ticks_ms

from micropython import const

from . import errors, link

_STACK = const(8192)


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
        TimeoutError_: after ``limit_ms``. The thread ends by itself; for as long as that again no
            other starts.
    """
    since = ticks_ms()
    answer = [None]
    # An address needs no asking.
    threaded = sys.platform == "esp32" and ":" not in host and bool(host.strip("0123456789."))
    while link.asking[0] is None:
        await sleep_ms(10)
        if ticks_diff(ticks_ms(), since) >= limit_ms:
            link.asking = [()]  # it may have died, and must not stand in the way for ever
            raise errors.TimeoutError_("name lookup: the one before still hangs")
    if threaded:
        import _thread

        before = _thread.stack_size(_STACK)
        try:
            _thread.start_new_thread(_ask, (answer, host, port, kind))
            link.asking = answer
        except OSError:
            threaded = False  # no memory for a thread: ask here
        finally:
            _thread.stack_size(before)
    if not threaded:
        _ask(answer, host, port, kind)
    while answer[0] is None:
        await sleep_ms(10)
        if ticks_diff(ticks_ms(), since) >= limit_ms:
            raise errors.TimeoutError_("name lookup of %s: no answer in %d ms" % (host, limit_ms))
    found = answer[0]
    if isinstance(found, MemoryError):
        raise found
    if isinstance(found, Exception) or not found:
        raise errors.UnreachableError("name lookup of %s failed (%s)" % (host, found))
    return found
