"""The last configuration that worked, and the files it names: copies beside them, for the day on
which one of them is damaged.

Not a part of `twinslot.config`, which is let go before keys are looked at: they take much memory.
"""

import json
import os

from . import errors, tidy

GOOD = ".good"  # behind the name of a file: its copy


def keep(path):
    """Keep a copy of a configuration that has just worked, and of the files it names. Costs a
    write only when one changed; never raises: a full filesystem is no reason not to update.

    Source: littlefs replaces a file by rename in one commit.
    """
    try:
        for name, file in _keep_configuration(path):
            tidy()  # what the file before took
            if is_whole(name, file):
                _copy(file)
    except (OSError, ValueError, MemoryError, errors.ConfigError) as exc:
        print("twinslot: no copy of the configuration:", exc)


def _keep_configuration(path):
    """Return the files it names, ``[(member, path)]``."""
    from .config import FILES, check
    from .keyring import read

    found = check(json.loads(read(path)))  # a good copy may be what works
    _copy(path)
    return [(name, found[name]) for name in FILES if found[name]]


def _copy(path):
    from .keyring import read

    text = read(path)
    try:
        if read(path + GOOD) == text:
            return
    except errors.ConfigError:
        pass
    with open(path + ".new", "wb") as f:
        f.write(text)
    os.rename(path + ".new", path + GOOD)


def is_whole(name, file):
    """True if a file is what it should be, as far as can be told without a server.

    Args:
        name: member of the configuration that names it.
    """
    from .keyring import load, read

    try:
        text = read(file)
        if name == "keys":
            load(text, True)
            return True
        from .context import blocks

        kind = b"PRIVATE KEY" if name == "client_key" else b"CERTIFICATE"
        for der in blocks(text, name, kind):
            n, more = der[1], 0
            if n > 127:  # the length's own length
                more = n & 127
                n = int.from_bytes(der[2 : 2 + more], "big")
            if len(der) != 2 + more + n:
                return False
        return True
    except (IndexError, errors.ConfigError):
        return False
