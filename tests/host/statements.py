"""A copy of the device package that counts its statements, and fails at one that is told.

Before every statement of a function stands a call, ``hit(number)``. The module ``stumble`` of the
copy holds what to do there: count, and at the chosen statement raise, or lock the heap until the
next one, so that the first allocation in between fails. Made on the host with ast, as
MicroPython's unix port has no sys.settrace.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

STUMBLE = """
# Which statements ran, and where to stumble. No dict: two threads come here at once, and the
# unix port has no lock against one that looks while the other makes room.
import micropython
from _thread import get_ident

counts = [0] * %d
target = None  # (number, which time, exception or None: no memory there)
met = False
counting = True
locked = None  # the thread


def unlock():
    global locked
    locked = None
    micropython.heap_unlock()


def hit(number):
    global met, locked
    if locked is not None and locked == get_ident():
        unlock()
    if not counting:
        return
    n = counts[number] + 1
    counts[number] = n
    if target is not None and target[0] == number and target[1] == n:
        met = True
        if target[2] is not None:
            raise target[2]
        locked = get_ident()
        micropython.heap_lock()


def ran():
    return [(number, n) for number, n in enumerate(counts) if n]
"""
# Not part of an update: what a person types, what tells the world; and code with no statements
# of its own in it, or for another emitter.
_LEFT_OUT = ("native.py", "blink.py", "console.py", "doctor.py", "wifi.py")


class _Instrument(ast.NodeTransformer):
    def __init__(self, first: int, name: str):
        self.number = first
        self.name = name
        self.places: dict[int, str] = {}
        self.inside = ""  # the function

    def _function(self, node):
        outer, self.inside = self.inside, node.name
        self.generic_visit(node)
        node.body = self._with_hits(node.body)
        self.inside = outer
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def generic_visit(self, node):
        super().generic_visit(node)
        if self.inside and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    setattr(node, field, self._with_hits(block))
        return node

    def _with_hits(self, block):
        out = []
        for statement in block:
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_text and not isinstance(statement, (ast.Global, ast.Nonlocal)):
                out.append(ast.parse(f"_hit({self.number})").body[0])
                self.places[self.number] = f"{self.name}:{statement.lineno} {self.inside}"
                self.number += 1
            out.append(statement)
        return out


def instrument(source: Path, target: Path) -> dict[int, str]:
    """Copy the package, instrumented, and return {number: "module:line function"}."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    places: dict[int, str] = {}
    for path in sorted(target.rglob("*.py")):
        if path.name in (*_LEFT_OUT, "stumble.py") or path == target / "__init__.py":
            continue
        tree = ast.parse(path.read_text())
        work = _Instrument(len(places), path.relative_to(target).as_posix())
        tree = work.visit(tree)
        at = 1 if ast.get_docstring(tree) is not None else 0
        tree.body.insert(at, ast.parse("from twinslot.stumble import hit as _hit").body[0])
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
        places.update(work.places)
    (target / "stumble.py").write_text(STUMBLE % len(places))
    return places
