"""Write docs/faults.md: what can go wrong and what happens then, out of the tests themselves.

    python tools/faults_page.py            # --check: exit code 1 where the page is out of date

Each line is the name of a test, or a row of faults with the number of its cases: what is not
tested is not on the page, and a test that goes takes its line with it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "tests" / "host"
PAGE = ROOT / "docs" / "faults.md"
SECTIONS = {
    "The power fails": ("test_power_cut",),
    "The network fails": ("test_network_faults",),
    "Time, memory and storage fail": ("test_time_and_space",),
    "The code itself fails": ("test_statements",),
    "The new software is no good": ("test_update",),
    "The application or its configuration is broken": ("test_safe_mode",),
    "All of it, again and again": ("test_soak",),
}
HEAD = """\
# What can go wrong and what happens then

Made from the tests by `tools/faults_page.py`; a line stands for a test that `make test` runs. On
each of these boards the rule is the same: whatever happens, it boots the old image or the new one,
complete and verified; when the trouble is over the update gets there, or is refused for a reason
that a `failed` event tells.

The proofs run on the virtual board (see its limits in the README). `make test` cuts the power some
3,000 times; `make powercut` does so before, in and after every flash operation of 24 stories, torn
in every shape; twice (all pairs of clean cuts of one story, a sample in four more, and pairs that
both tear) and thrice (a sample). One case is replayed by the command that it prints, or on any
board file by `twinslot board run flash.bin --cut-at 40 --torn half`. `make faults-long` takes each
fault at many more places, the connection cut at every byte and an exception at every statement
among them; `make soak N=1000 SEED=1` updates one board a thousand times under faults and power
cuts. A seed is printed, and plays the same faults again.
"""


def sentence(name: str) -> str:
    """``test_F24_full_disk_is_told`` as "Full disk is told (F24)"."""
    words = name.removeprefix("test_").split("_")
    rows = [w for w in words if re.fullmatch(r"[FIC]\d+", w)]
    text = " ".join(w for w in words if w not in rows)
    return text[:1].upper() + text[1:] + (f" ({', '.join(rows)})" if rows else "")


def tests(module: str) -> list[tuple[str, str]]:
    """[(name, first sentence of its docstring or "")] of a test module."""
    tree = ast.parse((HOST / f"{module}.py").read_text())
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = " ".join((ast.get_docstring(node) or "").split())
            found.append((node.name, text.split(". ")[0].rstrip(".") if text else ""))
    return found


def network() -> list[str]:
    """The rows of network faults, as lines of a table."""
    sys.path.insert(0, str(HOST))
    try:
        cases = importlib.import_module("network_cases")
    finally:
        sys.path.remove(str(HOST))
    count = Counter(case.row for case in cases.cases())
    lines = ["| what goes wrong | what happens then | cases |", "| --- | --- | --- |"]
    for row, n in count.items():
        lines.append(f"| {row} | {cases.THEN[row]} | {n} |")
    return [*lines, f"| all | | {sum(count.values())} |", ""]


def page() -> str:
    parts = [HEAD]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n")
        lines = network() if "test_network_faults" in modules else []
        for module in modules:
            for name, more in tests(module):
                if name != "test_F44_F51_F57_F65_network_fault":
                    lines.append(f"- {sentence(name)}{': ' + more if more else ''}")
        source = ", ".join(f"tests/host/{module}.py" for module in modules)
        parts.append("\n".join(lines) + f"\n\nProved by {source}.\n")
    return "\n".join(parts)


def main() -> None:
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != page():
            print("docs/faults.md is out of date: python tools/faults_page.py", file=sys.stderr)
            sys.exit(1)
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
