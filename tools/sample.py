"""Make content that compresses, and changes from build to build, as machine code does.

    old = code(1_500_000)
    new = code(1_500_000, changes=40)

A genuine image is functions of few different instructions, tables of addresses that all shift when
anything before them grows, and texts. So is this one, with shares set such that gzip and deltas
come out near what genuine MicroPython images for the ESP32 give (gzip 0.67, a neighbouring build
0.15, a year apart 0.5). The same arguments give the same bytes.
"""

import random
import struct
from functools import cache

_LOAD_ADDRESS = 0x400D0000
_WORDS = (
    b"error invalid memory value index buffer socket network object module function string bytes"
    b" integer range timeout address file stream device driver task event config state expected"
).split()
_IDIOMS = [random.Random(i).randbytes(random.Random(i).randint(2, 6) * 3) for i in range(48)]


@cache
def code(size: int, *, changes: int = 0, seed: int = 1) -> bytes:
    """Return ``size`` bytes of a program.

    Args:
        changes: functions rewritten since the program without changes.
        seed: another one is another program.
    """
    source = random.Random(seed)
    functions = _functions(source, size)
    edit = random.Random(f"{seed}/{changes}")
    for i in edit.sample(range(len(functions)), min(changes, len(functions))):
        functions[i] = _function(edit, len(functions))
    starts, at = [], _LOAD_ADDRESS
    for body, calls, text in functions:
        starts.append(at)
        at += len(body) + 4 * len(calls) + len(text)
    out = bytearray()
    for body, calls, text in functions:
        out += body
        for callee in calls:
            out += struct.pack("<I", starts[callee % len(starts)])
        out += text
    return bytes(out[:size])


def _functions(source: random.Random, size: int) -> list[tuple[bytes, list[int], bytes]]:
    count = size // 200 + 1
    functions, total = [], 0
    while total < size + 4096:
        function = _function(source, count)
        functions.append(function)
        total += len(function[0]) + 4 * len(function[1]) + len(function[2])
    return functions


def _function(source: random.Random, count: int) -> tuple[bytes, list[int], bytes]:
    """Return instructions of three bytes each, few kinds of which are
    frequent, among them sequences that recur; functions it names; its text."""
    body = bytearray()
    for _ in range(source.randint(8, 60)):
        if source.random() < 0.14:
            body += source.choice(_IDIOMS)
            continue
        kind = int(source.paretovariate(0.5)) & 0x3F
        registers = min(int(source.expovariate(0.25)), 15) << 4 | source.getrandbits(3)
        body += bytes((kind << 2, registers, int(source.paretovariate(0.22)) & 0xFF))
    calls = [int(source.random() ** 3 * count) for _ in range(source.randint(2, 12))]
    text = b""
    if source.random() < 0.2:
        text = b" ".join(source.choice(_WORDS) for _ in range(source.randint(2, 8))) + b"\0"
    body += bytes(-(len(body) + len(text)) % 4)
    return bytes(body), calls, text
