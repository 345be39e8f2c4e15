"""Twinslot: over-the-air updates for MicroPython on the ESP32 that never leave a board dead.

Importing this costs next to nothing: a submodule loads when one of its names is first used.
"""

import gc
import sys

__version__ = "0.1.0"

_HOME = {
    "Agent": "agent",
    "Blink": "blink",
    "OtaError": "errors",
    "confirm": "console",
    "doctor": "doctor",
    "log": "console",
    "rollback": "console",
    "status": "console",
}
# One text, a space behind each name: as texts of their own they would take 1 KB of heap where the
# package is no part of the interpreter itself.
_RARE = (
    "base64url config context dial digits espimage handshake head health jws keyring "
    "keyset lastgood lookup ntp payload plan release request semver sources "
    "sources.server sources.static startup strict trial tries url walk "
)


def _rare():
    at = 0
    while at < len(_RARE):
        end = _RARE.find(" ", at)
        yield _RARE[at:end]
        at = end + 1


def unload():
    """Let go of the submodules that have something to do now and then, not during a download. The
    next import loads them again; what still refers to one keeps it. (Where the package is not
    frozen a function is 50 to 100 bytes of heap, and its code.)"""
    for name in _rare():
        globals().pop(name, None)
        sys.modules.pop("twinslot." + name, None)


def reserve():
    """Let the tables of modules grow to what they will be: in an update they would split the
    room for something larger."""
    absent = [name for name in _rare() if "twinslot." + name not in sys.modules]
    try:
        for name in absent:
            globals()[name] = sys.modules["twinslot." + name] = sys
    finally:  # also where there is no memory for it
        for name in absent:
            globals().pop(name, None)
            sys.modules.pop("twinslot." + name, None)


def tidy():
    """Unload, and collect what that leaves: what is made next finds its place there."""
    unload()
    gc.collect()


def __getattr__(name):
    # MicroPython asks here before it looks for a submodule: ``from . import health`` too.
    try:
        module = __import__("twinslot." + _HOME.get(name, name), None, None, (name,))
    except ImportError:
        if name in _HOME:
            raise  # a submodule that is broken or left out: say which
        raise AttributeError("module 'twinslot' has no attribute '%s'" % name)
    # Cached under its own name. For ``doctor`` that hides the submodule of the same name.
    value = globals()[name] = getattr(module, name) if name in _HOME else module
    return value
