"""`_thread` that knows how many threads run: a board at its prompt is not done while they do."""

import _thread
from _thread import *  # noqa: F403

import soc

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
