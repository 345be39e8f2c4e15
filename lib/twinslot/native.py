"""The loops over single bytes, in native code. ``patch`` and ``walk`` hold their twins in
plain Python.

Alone in this module because compiling it fails where a port has no native code emitter, and
because as ``.mpy`` it is made for one architecture.
"""

import micropython


@micropython.viper
def add(out: ptr8, at: int, diff: ptr8, base: ptr8, mask: int, n: int):  # noqa: F821 # pyright: ignore
    """``out[at + i] = diff[i] + (base[i] & mask)`` modulo 256 for ``n`` bytes. No bounds are
    checked."""
    for i in range(n):
        out[at + i] = diff[i] + (base[i] & mask)


@micropython.viper
def xor(buf: ptr8, n: int) -> int:  # noqa: F821 # pyright: ignore
    """Return the XOR of ``n`` bytes. No bounds are checked."""
    result = 0
    for i in range(n):
        result ^= buf[i]
    return result
