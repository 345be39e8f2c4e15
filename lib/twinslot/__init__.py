"""Twinslot: over-the-air updates for MicroPython on the ESP32 that never leave a board dead.

Importing this costs next to nothing: a submodule loads when one of its names is first used.
"""

__version__ = "0.1.0"

_HOME = {
    "Agent": "agent",
    "Blink": "blink",
    "OtaError": "errors",
    "confirm": "console",
    "doctor": "doctor",
    "rollback": "console",
    "status": "console",
}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError("module 'twinslot' has no attribute '%s'" % name)
    module = __import__("twinslot." + _HOME[name], None, None, (name,))
    value = getattr(module, name)
    # Cached under its own name. For ``doctor`` that hides the submodule of the same name.
    globals()[name] = value
    return value
