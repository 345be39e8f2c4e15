"""Make mutants: copies of a module of lib/twinslot with one small thing broken.

Every statement of every function is deleted, every condition negated, every comparison turned
around or moved by one, every `and` made `or`, each of their operands dropped, every number put off
by one, every True made False. Left alone: what is printed, the text of exceptions, docstrings and
default arguments.
"""

import ast
import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ENDLESS = "it does not end"  # a verdict
# {a mutant's key, a function, "" for all: {test that noticed: how often}}
Kills = defaultdict[str, Counter[str]]


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        key: ``function: what was done: the line it was done to``, with `` #2`` at the end where
            that is not the first such change. It holds as long as the code does, wherever it is.
        function: e.g. ``Journal.update``.
        line: where in the file, for people.
        body: the function's source.
    """

    module: str
    key: str
    function: str
    line: int
    body: str
    whole: ast.Module  # unchanged
    number: int  # of the node, as ast.walk() counts
    change: Callable[[Any], None]

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
    places = [(n.lineno, n.col_offset, i, n) for i, n in enumerate(ast.walk(tree)) if _counts(n)]
    seen: Counter[str] = Counter()
    for line, _, number, node in sorted(places, key=lambda place: place[:3]):
        around = _around(node)
        function = ".".join(f.name for f in reversed(around))
        outmost = [f for f in around if not isinstance(f, ast.ClassDef)][-1]
        body = "\n".join(lines[outmost.lineno - 1 : outmost.end_lineno])
        for what, change in _changes(node):
            key = f"{function}: {what}: {lines[line - 1].strip()}"
            seen[key] += 1
            if seen[key] > 1:
                key += f" #{seen[key]}"
            yield Mutant(module, key, function, line, body, tree, number, change)


def _counts(node: ast.AST) -> bool:
    return hasattr(node, "lineno") and bool(_around(node))


def _around(node: ast.AST) -> list[Any]:
    """Functions and classes around a node, inmost first; none where it does not count."""
    if _is_print(node):
        return []
    around = []
    child = node
    while (parent := getattr(child, "parent", None)) is not None:
        if isinstance(parent, ast.Raise) or _is_print(parent):
            return []
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if child in ast.walk(parent.args) or child in parent.decorator_list:
                return []
            around.append(parent)
        elif isinstance(parent, ast.ClassDef) and around:
            around.append(parent)
        child = parent
    return around


def _is_print(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func) in ("print", "sys.print_exception")
    return False


def _changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    parent = node.parent  # type: ignore[attr-defined]
    if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)):
            if not isinstance(node, (ast.Global, ast.Nonlocal, ast.AsyncFunctionDef)):
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
        yield "not dropped", _set("operand", ast.UnaryOp(ast.Not(), node.operand))
    if isinstance(node, ast.Constant) and not isinstance(parent, ast.Expr):
        if isinstance(node.value, bool):
            yield "flipped", _set("value", not node.value)
        elif isinstance(node.value, int):
            yield f"{node.value} + 1", _set("value", node.value + 1)
            if node.value:
                yield f"{node.value} - 1", _set("value", node.value - 1)


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
