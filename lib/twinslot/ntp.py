"""Ask an NTP server what time it is. What to make of the answer is the clock's matter.

    unix = await ntp.ask("pool.ntp.org", 123, 2000)

Loaded when there is something to ask, and unloaded for a download. Nothing waits for a socket; the
name lookup as in `twinslot.lookup`.

Source: RFC 5905 sections 6, 7.3 and 7.4 (header, kiss codes), RFC 4330 section 5 (what a client
checks), RFC 2030 (eras: times after 2036).
"""

import os
import socket
import time
from asyncio import sleep_ms

from micropython import const

from . import errors
from .lookup import lookup

_TRIES = const(2)
_UNIX = const(2208988800)  # seconds from 1900 to 1970


class KissError(errors.ClockError):
    """The NTP server has sent a kiss of death (RFC 5905 section 7.4)."""


def parse(reply, nonce):
    """Return the Unix seconds in an NTP server's reply.

    Args:
        reply: 48 bytes.
        nonce: the 8 bytes sent as transmit timestamp, which the reply must give back.

    Raises:
        ClockError: not a synchronised server's answer to this question; KissError where the
            server asks to be left alone.
    """
    leap, version, mode = reply[0] >> 6, reply[0] >> 3 & 7, reply[0] & 7
    if mode != 4 or version not in (3, 4):
        raise errors.ClockError("ntp: mode and version", (mode, version), "(4, 4)")
    if bytes(reply[24:32]) != nonce:
        raise errors.ClockError("ntp: the reply is not to this question")
    if not reply[1]:
        raise KissError("ntp: the server declines", bytes(reply[12:16]))
    if reply[1] > 15 or leap == 3:
        raise errors.ClockError("ntp: the server is not synchronised")
    seconds = int.from_bytes(reply[40:44], "big")
    if not seconds:
        raise errors.ClockError("ntp: no time in the reply")
    if seconds < 0x80000000:  # era 1: 2036-02-07 and later
        seconds += 1 << 32
    return seconds - _UNIX


async def ask(host, port, timeout_ms):
    """Return what an NTP server says, in Unix seconds.

    Args:
        timeout_ms: for the name lookup, and for each of two requests.

    Raises:
        KissError: it asks to be left alone; ClockError: no good answer.
        UnreachableError, TimeoutError_: as ``lookup.lookup``.
    """
    found = await lookup(host, port, socket.SOCK_DGRAM, timeout_ms)
    for i in range(_TRIES):
        unix = await _exchange(found[i % len(found)], timeout_ms)
        if unix is not None:
            return unix
    raise errors.ClockError("ntp: no answer from %s" % host)


async def _exchange(address, timeout_ms):
    """Ask one address once; return Unix seconds, or None where no good answer came in time."""
    nonce = os.urandom(8)
    request = bytearray(48)
    request[0] = 4 << 3 | 3  # version 4, client
    request[40:48] = nonce
    reply = bytearray(48)
    sock = socket.socket(address[0], socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.connect(address[-1])  # from here on only this peer is heard
        sock.write(request)
        began = time.ticks_ms()
        while time.ticks_diff(time.ticks_ms(), began) < timeout_ms:
            await sleep_ms(10)
            # Anything that is not the answer is passed over: it may come from a stranger.
            if sock.readinto(reply) == 48:
                try:
                    return parse(reply, nonce)
                except KissError:
                    raise
                except errors.ClockError:
                    pass
    except OSError:
        pass  # refused, unreachable, no network: no answer
    finally:
        sock.close()
    return None
