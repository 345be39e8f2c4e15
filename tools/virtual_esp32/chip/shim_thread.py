"""`_thread` that knows how many threads run: a board at its prompt is not done while they do."""

import _thread
from _thread import *  # noqa: F403

import soc

# What is 4 KiB of stack on the ESP32, where lwIP resolves names in a task of its own, is not
# enough for the C library of a 64-bit host: its getaddrinfo alone takes 16 KiB.
_STACK = 256 * 1024
_thread.stack_size(_STACK)
_asked = 0

# Not a number in a module: two threads may end at once, and pop() is one step.
_LIVE = soc.threads


def start_new_thread(function, args, kwargs=None):
    def run():
        try:
            function(*args, **(kwargs or {}))
        finally:
            _LIVE.pop()

    _LIVE.append(1)
    try:
        return _thread.start_new_thread(run, ())
    except:
        _LIVE.pop()
        raise


def stack_size(size=0):
    """Remember the size; the threads get the host's. Returns the one before."""
    global _asked
    before, _asked = _asked, size
    return before
