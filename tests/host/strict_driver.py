"""Run by MicroPython: read each line of a file (hex) as strict JSON; print what came of it.

micropython strict_driver.py LIB CASES
"""

import json
import sys

sys.path.insert(0, sys.argv[1])

from twinslot import strict


def canonical(value):
    """One text for one value, whatever the order of a dict: pairs sorted by name."""
    if isinstance(value, dict):
        return ["d"] + [[k, canonical(value[k])] for k in sorted(value)]
    if isinstance(value, list):
        return ["l"] + [canonical(v) for v in value]
    if isinstance(value, str):
        return ["s"] + [ord(c) for c in value]
    return value


with open(sys.argv[2]) as f:
    for line in f:
        raw = bytes.fromhex(line.strip())
        try:
            print(json.dumps(canonical(strict.loads(raw))))
        except ValueError as exc:
            print("!", exc)
