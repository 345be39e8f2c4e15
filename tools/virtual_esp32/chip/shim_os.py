"""`os` as an ESP32 has it: `uname` and `sync`, nothing of the host, no sign of the mount point of
the frozen modules."""

import os as _os
import sys
from os import *  # noqa: F403

import soc

FROZEN = "frozen:"  # where the firmware's Python tree is mounted

for _name in ("getenv", "putenv", "unsetenv", "system", "VfsPosix", "errno"):
    globals().pop(_name, None)

_EPOCH_2000 = 946684800


def uname():
    chip = soc.config["chip"]
    release = ".".join([str(n) for n in sys.implementation.version[:3]])
    return _Uname(chip, chip, release, "v" + release, soc.config["machine"])


def sync():
    """Everything is in flash already: files sync when they are closed or flushed."""


def _at_root(path):
    return (path in ("/", "") and _os.getcwd() == "/") or path == "/"


def ilistdir(path=""):
    entries = _os.ilistdir(path) if path else _os.ilistdir()
    if _at_root(path):
        return iter([e for e in entries if e[0] != FROZEN])
    return entries


def listdir(path=""):
    names = _os.listdir(path) if path else _os.listdir()
    if _at_root(path):
        return [n for n in names if n != FROZEN]
    return names


def stat(path):
    found = _os.stat(path)
    return found[:7] + tuple([max(0, t - _EPOCH_2000) for t in found[7:]])


def _make_uname():
    from collections import namedtuple

    return namedtuple("uname", ("sysname", "nodename", "release", "version", "machine"))


_Uname = _make_uname()
