"""No function of MicroPython is used on the device that a supported version lacks.

``api_since.json`` lists everything that lib/twinslot, boot.py and main.py use of MicroPython's
modules, with the version that brought it. "1.17" means 1.17 or earlier: as far back as the type
stubs on PyPI go, which were compared version by version (micropython-esp32-stubs 1.17 to 1.29).
A use of something newer than the oldest supported version needs a guard: ``getattr`` with a
default, ``hasattr``, or a ``try`` that catches ImportError or AttributeError.

``python -m twinslot_tools.compat`` asks the stubs of each version themselves (it downloads them).
"""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from twinslot_tools import stock
from twinslot_tools.virtual_esp32.process import find_micropython

ROOT = Path(__file__).parents[2]
TABLE = json.loads((Path(__file__).parent / "api_since.json").read_text())
FILES = [*sorted((ROOT / "lib").rglob("*.py")), ROOT / "boot.py", ROOT / "main.py"]
OWN = "twinslot"
_GUARDS = {"ImportError", "AttributeError", "NameError"}


def release(text):
    return tuple(int(n) for n in text.split("."))


class Uses(ast.NodeVisitor):
    """What a file uses of the modules it imports: ``found`` {dotted name: guarded}, and the
    attribute names of everything else, ``methods``."""

    def __init__(self, tree):
        self.found = {}
        self.methods = set()
        self._scopes = [self._names(tree)]
        self._guarded = False
        self.visit(tree)

    def _names(self, node):
        """{name: dotted name of what it was imported as, or None for anything else}."""
        names = {}
        for child in self._own_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    full = alias.name if alias.asname else alias.name.split(".")[0]
                    names[alias.asname or full] = full
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    full = OWN if child.level else f"{child.module}.{alias.name}"
                    names[alias.asname or alias.name] = full
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.setdefault(child.id, None)
            elif isinstance(child, ast.arg):
                names[child.arg] = None
        return names

    @staticmethod
    def _own_nodes(node):
        """Nodes of a scope without those of the functions in it."""
        left = list(ast.iter_child_nodes(node))
        while left:
            child = left.pop(0)
            yield child
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                left.extend(ast.iter_child_nodes(child))

    def _dotted(self, node):
        if isinstance(node, ast.Name):
            for scope in reversed(self._scopes):
                if node.id in scope:
                    return scope[node.id]
        elif isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return f"{base}.{node.attr}" if base else None
        return None

    def _use(self, name, guarded=False):
        if name.split(".")[0] != OWN:
            self.found[name] = self.found.get(name, True) and (guarded or self._guarded)

    def visit_Import(self, node):
        for alias in node.names:
            self._use(alias.name)

    def visit_ImportFrom(self, node):
        if node.level == 0:
            self._use(node.module)
            for alias in node.names:
                self._use(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node):
        name = self._dotted(node)
        if name:
            self._use(name)
        elif not isinstance(node.ctx, ast.Store):
            self.methods.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            base = self._dotted(node.args[0])
            if base and isinstance(node.args[1], ast.Constant):
                bare = node.func.id == "getattr" and len(node.args) == 2
                self._use(f"{base}.{node.args[1].value}", guarded=not bare)
        self.generic_visit(node)

    def visit_Try(self, node):
        caught = {
            name.id
            for handler in node.handlers
            for name in ast.walk(handler.type or ast.Tuple([]))
            if isinstance(name, ast.Name)
        }
        before = self._guarded
        self._guarded = before or bool(caught & _GUARDS)
        for child in node.body:
            self.visit(child)
        self._guarded = before
        for child in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(child)

    def _visit_function(self, node):
        for outer in [*getattr(node, "decorator_list", []), node.args]:
            self.visit(outer)
        self._scopes.append(self._names(node))
        for child in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(child)
        self._scopes.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function


def uses_of(text):
    return Uses(ast.parse(text))


def problems(uses, table, oldest):
    """Say what may not be used, or not without a guard."""
    for name, guarded in sorted(uses.found.items()):
        if name not in table:
            yield f"{name} is not in api_since.json: look up the version that brought it"
        elif release(table[name]) > oldest and not guarded:
            yield f"{name} came with {table[name]}: it needs a guard"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_device_file_uses_nothing_newer_than_the_oldest_micropython(path):
    uses = uses_of(path.read_text())
    assert list(problems(uses, TABLE["names"], stock.OLDEST)) == []


def defined_names():
    """Names of functions, classes, attributes, fields and constants of the package itself."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "namedtuple":
                fields = ast.literal_eval(node.args[1])
                found.update(fields if not isinstance(fields, str) else fields.split())
    return found


def builtin_methods():
    """Methods of MicroPython's builtin types: asked of MicroPython."""
    kinds = "'', b'', bytearray(1), [], (), {}, set(), 1, memoryview(b''), ValueError(1), len"
    code = f"for o in ({kinds}): print(*dir(o))\nprint(*dir(type('C', (), {{}})))"
    done = subprocess.run(
        [find_micropython(), "-c", code], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_methods_of_platform_objects_are_listed_too():
    """What an object is can't be told from the source; the names of its methods can."""
    known = defined_names() | builtin_methods() | {n.split(".")[-1] for n in TABLE["names"]}
    known |= {"args", "__name__"}  # of exceptions, of classes
    for path in FILES:
        unknown = uses_of(path.read_text()).methods - known
        assert not unknown, (
            f"{path.name}: {unknown}: list them in api_since.json, with their class"
        )


def test_the_table_lists_nothing_that_is_not_used():
    found, methods = set(), set()
    for path in FILES:
        uses = uses_of(path.read_text())
        found |= set(uses.found)
        methods |= uses.methods
    for name in TABLE["names"]:
        used = name in found or ("." in name and name.split(".")[-1] in methods)
        assert used, f"{name} is not used any more"


def test_listed_names_exist_in_micropython(tmp_path):
    """All but those of the ESP32's own modules, which the unix port doesn't have."""
    foreign = ("esp", "esp32", "machine", "network")
    private = ("tls.SSLContext.", "select.poll.", "sys.implementation.", "asyncio.Task.")
    names = [n for n in TABLE["names"] if n.split(".")[0] not in foreign]
    names = [n for n in names if not n.startswith(private)]  # classes without a name there
    names.remove("micropython.viper")  # the compiler's, no attribute
    code = (
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    parts = name.split('.')\n"
        "    obj = __import__(parts[0])\n"
        "    for part in parts[1:]:\n"
        "        obj = getattr(obj, part)\n"
    )
    subprocess.run([find_micropython(), "-c", code, *names], check=True)


# ---- the checker itself


@pytest.mark.parametrize(
    ("code", "name", "guarded"),
    [
        ("import time\ntime.new()", "time.new", False),
        ("from time import new as n", "time.new", False),
        ("def f():\n    import time as t\n    return t.new", "time.new", False),
        ("import sys\nx = sys.implementation.new", "sys.implementation.new", False),
        ("import sys\nx = getattr(sys.implementation, 'new', '')", "sys.implementation.new", True),
        ("import sys\nx = getattr(sys, 'new')", "sys.new", False),
        ("import gc\nif hasattr(gc, 'new'): pass", "gc.new", True),
        ("try:\n    from gc import new\nexcept ImportError:\n    new = None", "gc.new", True),
        ("import gc\ntry:\n    gc.new()\nexcept AttributeError:\n    pass", "gc.new", True),
        ("import gc\ntry:\n    gc.new()\nexcept OSError:\n    pass", "gc.new", False),
        ("import gc\ntry:\n    pass\nexcept AttributeError:\n    gc.new()", "gc.new", False),
        ("import gc\nf = lambda: gc.new()", "gc.new", False),
        ("import gc\n@gc.new\ndef f(): pass", "gc.new", False),
    ],
)
def test_the_checker_sees_a_use_and_its_guard(code, name, guarded):
    assert uses_of(code).found[name] is guarded


def test_one_unguarded_use_counts():
    code = "import gc\nif hasattr(gc, 'new'): pass\ngc.new()"
    assert uses_of(code).found["gc.new"] is False


def test_a_parameter_that_is_called_like_a_module_is_none():
    assert "tls.wrap" not in uses_of("import tls\ndef f(tls): return tls.wrap()").found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import gc\ngc.unheard()", ["gc.unheard is not in api_since.json"]),
        ("import sys\nsys.implementation._build", ["_build came with 1.25: it needs a guard"]),
        ("import sys\ngetattr(sys.implementation, '_build', '')", []),
        ("import deflate\ndeflate.DeflateIO", []),
    ],
)
def test_what_is_newer_or_unknown_is_reported(code, said):
    found = list(problems(uses_of(code), TABLE["names"], (1, 24)))
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))
