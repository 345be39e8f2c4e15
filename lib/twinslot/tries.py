"""Which releases an agent leaves alone for now: one that failed to come several times rests, one
that said what it had to say needs no second look today.

Part of the agent, whose members it uses; of its own so that it can be let go.
"""

import time
from binascii import crc32

from .agent import DAY_S

_TRIES = 3  # downloads of one release, then it rests: flash wears and data costs
_TRIES_IN_ALL = 12  # of whatever releases, within a rest of each other; then all of them rest
_REST_S = 6 * 3600


def look_past(agent, name):
    """Fetch this release no more, for a day: its name is not signed, and who held the server for
    an hour may have given it to another one."""
    agent._done = name
    agent._done_ms = time.ticks_ms()


def is_done(agent, name):
    """True while a release needs no second look."""
    if name != agent._done:
        return False
    return 0 <= time.ticks_diff(time.ticks_ms(), agent._done_ms) < DAY_S * 1000


def rests(agent, name):
    """True while a release that could not be downloaded several times is left alone, also after
    a reboot or deep sleep: for six hours. Where the clock begins anew with the power, which
    perhaps never lasts so long, starts are counted on: the 4th tries, the 8th, ..."""
    tries = _tries(agent, name)
    if tries < _TRIES or agent._counted:  # a mirror is asked in the same poll
        return False
    last, in_all = agent._tried[2:]
    rested = int(time.time()) - last
    if rested < 0:  # the clock began anew with this boot
        rested = time.ticks_ms() // 1000  # pyright: ignore (a number, whatever it wraps at)
    if rested >= _REST_S:
        agent._tried = []
        agent._note(tried=None)
        return False
    if not agent._anew or agent._clock.trusted:
        return True
    agent._anew = False
    agent._tried = [crc32(name.encode()), tries + 1, last, in_all]
    agent._note(tried=agent._tried)
    return tries & (tries + 1) != 0


def count_once(agent, name):
    """Count the polls in which a release was fetched and did not come; mirrors don't count."""
    if not agent._counted:
        agent._counted = True
        count(agent, name)


def count(agent, name):
    """Count a release that was fetched and did not come."""
    agent._anew = False  # this start was a try
    now = int(time.time())
    in_all = 1
    if len(agent._tried) == 4 and 0 <= now - agent._tried[2] < _REST_S:
        in_all += agent._tried[3]
    agent._tried = [crc32(name.encode()), _tries(agent, name) + 1, now, in_all]
    agent._note(tried=agent._tried)


def _tries(agent, name):
    if len(agent._tried) != 4:
        return 0
    if agent._tried[0] == crc32(name.encode()):
        return agent._tried[1]
    return _TRIES if agent._tried[3] >= _TRIES_IN_ALL else 0
