"""List every row of the fault catalogue with the tests that cover it, and what is left over.

    python tools/coverage_of_faults.py [--left]          or:  make faults

The catalogue is tests/catalogue.toml: a short text for each fault, attack (F) and incident (I),
and for those that have no test the reason. A test covers a row when the row's number stands in
its name, its docstring, its decorators, a comment of it, or a table of the module that it names,
or when the catalogue names the test. Exit code 1: a row has neither test nor reason, a test names
a row that does not exist, or the catalogue a test that does not.
"""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ABOUT_THE_CATALOGUE = ("test_catalogue.py", "test_faults_page.py")  # they name rows, test none
_ROW = re.compile(r"(?<![A-Za-z0-9])(F[0-9]{1,3}|I[1-9]|I1[0-9]|I20)(?![A-Za-z0-9])")
_RANGE = re.compile(r"(?<![A-Za-z0-9])([FI])([0-9]{1,3}) to \1?([0-9]{1,3})(?![A-Za-z0-9])")


def rows_in(text: str) -> set[str]:
    """Numbers of rows in a piece of source; ``F45 to F48`` counts for four."""
    text = text.replace("_", " ")
    found = set(_ROW.findall(text))
    for kind, first, last in _RANGE.findall(text):
        found |= {f"{kind}{n}" for n in range(int(first), int(last) + 1)}
    return found


def tests_of(path: Path) -> dict[str, set[str]]:
    """{row: names of tests} of one test module."""
    source = path.read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    tables = _tables(tree, lines)
    found: dict[str, set[str]] = defaultdict(set)
    for name, text, used in _tests(tree, lines):
        rows = rows_in(text)
        for table in used & tables.keys():
            rows |= tables[table]
        for row in rows:
            found[row].add(f"{path.name}::{name}")
    # Cases that a call at the top level makes: case("F53_content_length_missing", ...).
    for node in tree.body:
        for inner in ast.walk(node) if not isinstance(node, ast.FunctionDef) else ():
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                if re.match(r"[FI][0-9]+_", inner.value):
                    for row in rows_in(inner.value):
                        found[row].add(f"{path.name}::{inner.value}")
    return found


def _tests(tree: ast.Module, lines: list[str]):
    """Yield (name, text, names used) of each test, decorators and comments above included."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not node.name.startswith("test"):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        text = "\n".join(lines[first : node.end_lineno])
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        yield node.name, text, used


def _tables(tree: ast.Module, lines: list[str]) -> dict[str, set[str]]:
    """{name: rows} of what is assigned at the top level."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            rows = rows_in("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if rows and isinstance(target, ast.Name):
                    found[target.id] = rows
    return found


def collect(root: Path = ROOT) -> tuple[dict[str, dict], dict[str, set[str]]]:
    """The catalogue, and {row: tests}."""
    catalogue = tomllib.loads((root / "tests" / "catalogue.toml").read_text())
    covered: dict[str, set[str]] = defaultdict(set)
    for path in sorted((root / "tests").rglob("test_*.py")):
        if path.name in _ABOUT_THE_CATALOGUE:
            continue
        for row, names in tests_of(path).items():
            covered[row] |= names
    for row, entry in catalogue.items():
        covered[row] |= set(entry.get("tests", ()))
    return catalogue, covered


def names_of_tests(root: Path = ROOT) -> set[str]:
    found = set()
    for path in (root / "tests").rglob("test_*.py"):
        source = path.read_text()
        found |= {
            f"{path.name}::{name}" for name, _, _ in _tests(ast.parse(source), source.splitlines())
        }
    return found


def problems(
    catalogue: dict[str, dict], covered: dict[str, set[str]], existing: set[str]
) -> list[str]:
    """What is wrong with the claim that every row is covered or explained."""
    found = []
    for row, entry in catalogue.items():
        if not covered.get(row) and not entry.get("left"):
            found.append(f"{row} has neither a test nor a reason: {entry['text']}")
        for name in set(entry.get("tests", ())) - existing:
            found.append(f"{row} names {name}, which is no test")
    for row in sorted(covered.keys() - catalogue.keys()):
        found.append(f"{row}, named by {sorted(covered[row])[0]}, is not in the catalogue")
    return found


def main(arguments: list[str]) -> int:
    catalogue, covered = collect()
    left = {row for row, entry in catalogue.items() if not covered.get(row)}
    for row, entry in catalogue.items():
        if "--left" in arguments and row not in left:
            continue
        print(f"{row:<5} {entry['text']}")
        names = sorted(covered.get(row, ()))
        for name in names[:3]:
            print(f"        {name}")
        if len(names) > 3:
            print(f"        and {len(names) - 3} more")
        if names and "left" in entry:
            print(f"        in part: {entry['left']}")
        if not names:
            print(f"        LEFT OVER: {entry.get('left', 'no reason given')}")
    tests = len(set().union(*covered.values())) if covered else 0
    print(
        f"\n{len(catalogue) - len(left)} of {len(catalogue)} rows covered by {tests} tests,"
        f" {len(left)} left over."
    )
    wrong = problems(catalogue, covered, names_of_tests())
    for line in wrong:
        print(f"faults: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
