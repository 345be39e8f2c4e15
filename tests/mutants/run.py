"""Break the trusted code, one small thing at a time, and see that a test notices.

    python tests/mutants/run.py [MODULE ...] [--list] [--sample N]          (make mutants)

For each module below: every statement is deleted, every condition negated, every comparison turned
around or moved by one, every `and` made `or`, every number put off by one, every True made False.
Each mutant is run against the module's tests in a process of its own, forked from one that has
collected them, and is killed by the first test that fails (or by a timeout: a mutant that does not
end is noticed too).

Prints the score and the survivors. A survivor that changes nothing that matters is listed, with
the reason, in survivors.toml, by what it does to which line. Exit code 1: one is not explained, or
the score is below 95 %.
"""

import argparse
import ast
import copy
import importlib
import itertools
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HOST = ROOT / "tests" / "host"
TARGET = 0.95
TIMEOUT_S = 60

# What is mutated, and the tests that have to notice: quick ones, all under CPython.
MODULES = {
    "strict": ["test_strict.py"],
    "jws": ["test_jws.py", "test_vectors.py", "test_keyring.py"],
    "keyring": ["test_keyring.py"],
    "release": ["test_release.py", "test_incidents.py", "test_policy.py", "test_semver.py"],
    "espimage": ["test_espimage.py", "test_slot_rules.py"],
    "slot": ["test_slot_rules.py", "test_exhaustive.py", "test_policy.py"],
}
# Parts of a module that are not on the way from a signature to a boot, or not testable here.
SKIPPED = {
    "slot": {"checkpoint", "_resume", "base", "settle", "confirm", "reject", "_way_back"},
    "release": {"in_rollout"},
}
# Slow tests that start processes: mutants of pure code don't need them.
DESELECT = (
    "not micropython and not power_cut and not command and not openssl and not thousands"
    " and not another_library and not publish"
)


@dataclass(frozen=True)
class Mutant:
    module: str
    line: int
    what: str  # what was done
    text: str  # the line, stripped
    whole: ast.Module  # unchanged
    number: int  # of the node, as ast.walk() counts
    change: Callable[[Any], None]

    @property
    def key(self) -> str:
        return f"{self.what}: {self.text}"

    def tree(self) -> ast.Module:
        changed = copy.deepcopy(self.whole)
        self.change(next(itertools.islice(ast.walk(changed), self.number, None)))
        return ast.fix_missing_locations(changed)


_SWAPS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module's functions; its tree is made when it is run."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    for number, node in enumerate(ast.walk(tree)):
        if _counts(node, module):
            for what, change in _changes(node):
                line = node.lineno  # type: ignore[attr-defined]
                yield Mutant(module, line, what, lines[line - 1].strip(), tree, number, change)


def _counts(node: ast.AST, module: str) -> bool:
    """Within a function that matters, and not within a message, a default or a docstring."""
    if not hasattr(node, "lineno"):
        return False
    inside = False
    child = node
    while (parent := getattr(child, "parent", None)) is not None:
        if isinstance(parent, ast.Raise):
            return False
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if parent.name in SKIPPED.get(module, ()) or child in ast.walk(parent.args):
                return False
            inside = True
        child = parent
    return inside


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    parent = node.parent  # type: ignore[attr-defined]
    if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)):
            yield "deleted", _delete
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "negated", _negate
    if isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            for other in _SWAPS.get(type(op), []):
                yield f"{type(op).__name__} -> {other.__name__}", _swap(at, other)
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"-> {other.__name__.lower()}", _set("op", other())
        for at in range(len(node.values)):
            yield f"operand {at + 1} dropped", _drop(at)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", _set("op", ast.UAdd())
    if isinstance(node, ast.Constant) and not isinstance(parent, ast.Expr):
        if isinstance(node.value, bool):
            yield "flipped", _set("value", not node.value)
        elif isinstance(node.value, int):
            yield "+ 1", _set("value", node.value + 1)
            if node.value:
                yield "- 1", _set("value", node.value - 1)


def _delete(node):
    for _, value in ast.iter_fields(node.parent):
        if isinstance(value, list) and node in value:
            value[value.index(node)] = ast.Pass(lineno=node.lineno, col_offset=0)
            return
    raise AssertionError("a statement without a body")


def _negate(node):
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _swap(at, other):
    def change(node):
        node.ops[at] = other()

    return change


def _set(name, value):
    def change(node):
        setattr(node, name, value)

    return change


def _drop(at):
    def change(node):
        del node.values[at]
        if len(node.values) == 1:
            node.values.append(node.values[0])

    return change


# ---- running


def _install(mutant: Mutant) -> None:
    """Put the mutant's functions in the place of the module's own, for all who imported it."""
    module = importlib.import_module(f"twinslot.{mutant.module}")
    classes = {n: v for n, v in vars(module).items() if isinstance(v, type)}
    code = compile(mutant.tree(), module.__file__ or "", "exec")
    exec(code, vars(module))
    for name, old in classes.items():
        new = vars(module)[name]
        if new is old or old.__module__ != module.__name__ or issubclass(old, tuple):
            continue
        for attribute, value in vars(new).items():  # those who hold the class get its methods
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                setattr(old, attribute, value)
        setattr(module, name, old)


class Judge:
    """A pytest plugin: collects once, then runs the tests in a forked child for each mutant."""

    def __init__(self, made: list[Mutant]):
        self.made = made
        self.alive: list[Mutant] = []
        self.sound = False

    def pytest_runtestloop(self, session):
        items = [item for item in session.items if item.get_closest_marker("skip") is None]
        order = self._timed(items)
        if order is None:
            return True
        self.sound = True
        waiting = list(self.made)
        running: dict[int, tuple[Mutant, float]] = {}
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                mutant = waiting.pop(0)
                running[_fork(mutant, order)] = (mutant, time.monotonic())
            for pid in list(running):
                mutant, since = running[pid]
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and time.monotonic() - since > TIMEOUT_S:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    done, status = pid, 1
                if done:
                    del running[pid]
                    if status == 0:
                        self.alive.append(mutant)
            time.sleep(0.005)
        return True

    @staticmethod
    def _timed(items):
        """Run the tests unchanged, in a child; return them quickest first, None if one fails."""
        here, there = os.pipe()
        if os.fork() == 0:
            took = []
            for number, item in enumerate(items):
                start = time.monotonic()
                if not _passes(item, items[number + 1] if number + 1 < len(items) else None):
                    os.write(2, f"mutants: {item.nodeid} fails without a mutation\n".encode())
                    os._exit(1)
                took.append(time.monotonic() - start)
            with os.fdopen(there, "w") as pipe:
                pipe.write(" ".join(map(str, took)))
            os._exit(0)
        os.close(there)
        with os.fdopen(here) as pipe:
            took = [float(t) for t in pipe.read().split()]
        os.wait()
        if len(took) != len(items):
            return None
        return [item for _, item in sorted(zip(took, items, strict=True), key=lambda p: p[0])]


def _passes(item, following) -> bool:
    from _pytest.runner import runtestprotocol

    reports = runtestprotocol(item, log=False, nextitem=following)
    return not any(report.failed for report in reports)


def _fork(mutant: Mutant, items: list) -> int:
    """Judge a mutant in a child; its exit status is 0 if the mutant lives."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.setrecursionlimit(800)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _install(mutant)
        for number, item in enumerate(items):
            if not _passes(item, items[number + 1] if number + 1 < len(items) else None):
                os._exit(1)
        os._exit(0)
    except BaseException:
        os._exit(2)


def _warm_up() -> None:
    """Make the keys and import the heavy things before the first fork."""
    sys.path.insert(0, str(HOST))
    os.chdir(ROOT)
    import hypothesis
    import trust

    hypothesis.settings.register_profile(
        "mutants", database=None, deadline=None, max_examples=60, derandomize=True
    )
    for name in ("root", "release", "first", "second", "third", "stranger", "other"):
        trust.key(name)


def judge(module: str) -> Judge:
    """Run every mutant of a module against its tests."""
    import pytest

    judge = Judge(_ALL[module])
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--assert=plain", "--no-header"]
    options += ["-p", "no:xdist", "-k", DESELECT]
    pytest.main([*options, *[str(HOST / test) for test in existing(module)]], plugins=[judge])
    return judge


def existing(module: str) -> list[str]:
    return [test for test in MODULES[module] if (HOST / test).exists()]


def explained() -> dict[str, dict[str, str]]:
    return tomllib.loads((HERE / "survivors.toml").read_text())


_ALL: dict[str, list[Mutant]] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=[])
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--sample", type=int, default=0, help="of each module, this many")
    options = parser.parse_args()
    names = options.modules or list(MODULES)
    for name in names:
        source = (ROOT / "lib" / "twinslot" / f"{name}.py").read_text()
        made = list(mutants(name, source))
        if options.sample:
            made = made[:: max(1, len(made) // options.sample)]
        _ALL[name] = made
    if options.list:
        for name in names:
            for mutant in _ALL[name]:
                print(f"{name}:{mutant.line}: {mutant.key}")
        return 0
    _warm_up()
    known = explained()
    start = time.monotonic()
    bad = total = killed = 0
    for name in names:
        verdict = judge(name)
        if not verdict.sound:
            print(f"mutants: the tests of {name} don't pass as they are", file=sys.stderr)
            return 2
        alive, count = verdict.alive, len(verdict.made)
        harmless = [m for m in alive if m.key in known.get(name, {})]
        unexplained = [m for m in alive if m.key not in known.get(name, {})]
        total += count
        killed += count - len(alive)
        bad += len(unexplained)
        print(
            f"{name:<9} {count:>4} mutants, {count - len(alive):>4} killed,"
            f" {len(harmless)} harmless and explained, {len(unexplained)} not",
            flush=True,
        )
        for mutant in sorted(unexplained, key=lambda m: m.line):
            print(f"    {name}:{mutant.line}: {mutant.key}", flush=True)
    score = killed / total if total else 1.0
    took = time.monotonic() - start
    print(f"score {score:.1%} of {total} mutants, {bad} survivors not explained, {took:.0f} s")
    return bool(bad) or score < TARGET


if __name__ == "__main__":
    sys.exit(main())
