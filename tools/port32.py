"""What an update needs on a MicroPython of 32 bits, whose objects are as large as an ESP32's.

    python -m twinslot_tools.port32        # or  make bench32

The unix port from PyPI has 64 bits. Debian builds it for i386 too: its package and the libraries
that needs are fetched from Debian's archive, checked against the archive's index and unpacked
under build/; nothing is installed. They run where the kernel runs 32-bit x86 programs.

Figures as item 3 of `make bench`: the smallest heap of an update from the poll to the
confirmation, and the live heap beyond what is imported.

Exit code 1: the port can't be had, or doesn't run here.
"""

import hashlib
import lzma
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import bench

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "port32"
ARCHIVE = "https://deb.debian.org/debian/"
_INDEX = "dists/trixie/main/binary-i386/Packages.xz"
_PACKAGES = (
    "micropython",
    "libc6",
    "libffi8",
    "libgcc-s1",
    "libmbedcrypto16",
    "libmbedtls21",
    "libmbedx509-7",
)
_TIMEOUT_S = 60
_LOWEST, _HIGHEST = 24, 96  # KiB of heap between which an update is sure to begin to complete
_RUNS = 3  # with holes here and there an update may complete once and not again


class PortError(RuntimeError):
    """The port can't be had, or doesn't run here; the text says why."""


def fetch(folder: Path = CACHE) -> Path:
    """Return the command ``micropython`` of 32 bits, from ``folder`` or from Debian.

    Raises:
        PortError
    """
    command = folder / "micropython"
    if not command.exists():
        root = folder / "root"
        root.mkdir(parents=True, exist_ok=True)
        index = _index(lzma.decompress(_get(_INDEX)).decode())
        for name in _PACKAGES:
            if name not in index:
                raise PortError(f"{ARCHIVE}{_INDEX}: no package {name}")
            _unpack(index[name], folder, root)
        lib = root / "usr" / "lib" / "i386-linux-gnu"
        words = [lib / "ld-linux.so.2", "--argv0", "micropython", "--library-path", lib]
        line = shlex.join(str(word) for word in [*words, root / "usr" / "bin" / "micropython"])
        command.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        command.chmod(0o755)
    ask = [str(command), "-c", "import sys; print(sys.maxsize)"]
    done = subprocess.run(ask, check=False, capture_output=True, text=True)
    if done.stdout.strip() != str(2**31 - 1):
        said = (done.stderr or done.stdout).strip()
        raise PortError(f"no port of 32 bits here: {said or f'exit code {done.returncode}'}")
    return command


def _get(path: str) -> bytes:
    try:
        with urllib.request.urlopen(ARCHIVE + path, timeout=_TIMEOUT_S) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as exc:
        raise PortError(f"{ARCHIVE}{path}: {exc}") from exc


def _index(text: str) -> dict[str, dict[str, str]]:
    """Return the fields of each package that is needed (Debian policy, section 5.1)."""
    found = {}
    for paragraph in text.split("\n\n"):
        lines = [
            line.partition(": ") for line in paragraph.split("\n") if line[:1] not in ("", " ")
        ]
        fields = {name: value for name, _, value in lines}
        if fields.get("Package") in _PACKAGES:
            found[fields["Package"]] = fields
    return found


def _unpack(fields: dict[str, str], folder: Path, root: Path) -> None:
    data = _get(fields["Filename"])
    seen = hashlib.sha256(data).hexdigest()
    if seen != fields["SHA256"]:
        raise PortError(f"{fields['Filename']}: saw SHA-256 {seen}, expected {fields['SHA256']}")
    package = folder / "package.deb"
    package.write_bytes(data)
    try:
        command = ["dpkg-deb", "-x", str(package), str(root)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as exc:
        raise PortError(f"dpkg-deb: {exc}") from exc
    finally:
        package.unlink()
    if done.returncode:
        raise PortError(f"{fields['Filename']}: {done.stderr.strip()}")


def smallest(form: str) -> int:
    """Return the KiB of heap from which on a board takes a form each time, and confirms it.

    Raises:
        PortError: none up to 96 KiB.
    """
    low, high = _LOWEST, _HIGHEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bench.completes(form, middle) else (middle, high)
    while high <= _HIGHEST:
        if all(bench.completes(form, high) for _ in range(_RUNS)):
            return high
        high += 1
    raise PortError(f"no {form} update completes with up to {_HIGHEST} KiB of heap")


def main() -> None:
    try:
        os.environ["MICROPYTHON"] = str(fetch())
        live = [f"{figure.value:,.0f} B" for figure in bench.live_heap()]
        forms = track(bench.FORMS, "smallest heap", console=Console(stderr=True))
        heaps = [f"{smallest(form)} KiB" for form in forms]
    except PortError as exc:
        sys.exit(f"port32: {exc}")
    table = Table("a port of 32 bits", *bench.FORMS)
    table.add_row("smallest heap that completes", *heaps)
    table.add_row("live heap beyond import", *live)
    Console().print(table)


if __name__ == "__main__":
    main()
