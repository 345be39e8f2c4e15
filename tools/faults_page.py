"""Write docs/faults.md: what can go wrong and what happens then, out of the tests themselves.

    python tools/faults_page.py            # --check: exit code 1 where the page is out of date

Each line is the name of a test, or a row of faults with the number of its cases, and how they
ended when they last ran: what is not tested is not on the page, and a test that goes takes its
line with it. How they ended is kept in docs/faults.json by `pytest --results`; `make faults-page`
runs them all.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "tests" / "host"
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "docs" / "faults.json"
ROWS = "test_F44_F51_F57_F65_network_fault"  # the rows of a table, not a line
NOT_RUN = "not run"
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

Made from the tests by `tools/faults_page.py`; a line stands for a test that `make test` runs, and
says how it ended when it was last run for this page, in how many cases, and what was counted. On
each of these boards the rule is the same: whatever happens, it boots the old image or the new one,
complete and verified; when the trouble is over the update gets there, or is refused for a reason
that a `failed` event tells. `twinslot log` keeps the reason of what was refused or failed once its
release was asked for, and want of memory.

The proofs run on the virtual board (see its limits in the README). `make test` cuts the power some
3,000 times; `make powercut` does so before, in and after every flash operation of 24 stories, torn
in every shape (of two stories; in the others the many alike that fill a slot are torn in one);
twice (all pairs of clean cuts of one story, a sample in seven more, and pairs that both tear) and
thrice (a sample). No image may rest on a cell that an interrupted operation was to change and
nothing has written since: it may read differently tomorrow. One case is replayed by the command
that it prints, or on any board file by `twinslot board run flash.bin --cut-at 40 --torn half`.
`make faults-long` takes each fault at many more places, the connection cut at every byte among
them, and at every statement an exception and a heap that has nothing left; `make soak N=1000
SEED=1` updates one board a thousand times under faults and power cuts. A seed is printed, and
plays the same faults again.
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


def results() -> dict[str, dict[str, dict]]:
    """How tests ended: {module: {test: {"outcome": text, "ended": {what: how often}}}}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(found: dict[str, dict[str, dict]]) -> None:
    """Keep how tests ended; of tests that are gone nothing is kept."""
    left = {}
    for module, mine in sorted(found.items()):
        names = {name for name, _ in tests(module)}
        left[module] = {k: v for k, v in sorted(mine.items()) if k.split("[")[0] in names}
    RESULTS.write_text(json.dumps(left, indent=1) + "\n")


def ended(cases: dict[str, dict]) -> str:
    """How cases of a test ended: "passed", "4 passed: lives 812, bricked 0"."""
    if not cases:
        return NOT_RUN
    outcomes = Counter(case["outcome"] for case in cases.values())
    told = ", ".join(f"{n} {what}" if len(cases) > 1 else what for what, n in outcomes.items())
    met: Counter[str] = Counter()
    for case in cases.values():
        met.update(case.get("ended", {}))
    more = ", ".join(f"{what} {n}" for what, n in met.items())
    return f"{told}: {more}" if more else told


def network(found: dict[str, dict]) -> list[str]:
    """The rows of network faults, as lines of a table."""
    sys.path.insert(0, str(HOST))
    try:
        cases = importlib.import_module("network_cases")
    finally:
        sys.path.remove(str(HOST))
    count = Counter(case.row for case in cases.cases())
    lines = [
        "| what goes wrong | what happens then | cases | how the polls ended |",
        "| --- | --- | --- | --- |",
    ]
    for row, n in count.items():
        name = f"{ROWS}[{row.replace(' ', '-')}]"
        told = ended({k: v for k, v in found.items() if k == name})
        lines.append(f"| {row} | {cases.THEN[row]} | {n} | {told} |")
    return [*lines, f"| all | | {sum(count.values())} | |", ""]


def page() -> str:
    parts, kept = [HEAD], results()
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n")
        lines = []
        for module in modules:
            found = kept.get(module, {})
            lines += network(found) if module == "test_network_faults" else []
            for name, more in tests(module):
                if name != ROWS:
                    cases = {k: v for k, v in found.items() if k.split("[")[0] == name}
                    told = f"{sentence(name)}{': ' + more if more else ''}"
                    lines.append(f"- {told} ({ended(cases)})")
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
