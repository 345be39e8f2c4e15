"""`sys` as an ESP32 has it: platform and build name; everything else is the interpreter's own."""

import sys as _sys
from collections import namedtuple
from sys import *  # noqa: F403

import soc

path = _sys.path
argv = []
platform = "esp32"

for _name in ("executable", "atexit"):
    globals().pop(_name, None)

_own = _sys.implementation
implementation = namedtuple(
    "implementation", ("name", "version", "_machine", "_mpy", "_build", "_thread")
)(_own.name, _own.version, soc.config["machine"], _own._mpy, soc.config["hardware"], "GIL")
