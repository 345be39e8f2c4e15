"""The one loop over bytes of a patch, in native code. ``payload`` holds its twin in plain Python.

Alone in its module because compiling it fails where a port has no native code emitter, and
because as ``.mpy`` it is made for one architecture.
"""

import micropython


@micropython.viper
def add(out: ptr8, base: ptr8, n: int):  # noqa: F821 # pyright: ignore
    """``out[i] += base[i]`` modulo 256 for ``n`` bytes, in place. No bounds are checked."""
    for i in range(n):
        out[i] = out[i] + base[i]
