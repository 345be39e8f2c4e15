"""The mutation run itself: it makes what it says, and its explanations are not stale."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "mutants" / "run.py"
_spec = importlib.util.spec_from_file_location("mutants_run", RUN)
run = importlib.util.module_from_spec(_spec)
sys.modules["mutants_run"] = run
_spec.loader.exec_module(run)

LIB = Path(__file__).parents[2] / "lib" / "twinslot"


def made(module):
    return list(run.mutants(module, (LIB / f"{module}.py").read_text()))


@pytest.mark.parametrize("module", run.MODULES)
def test_every_explained_survivor_is_a_mutant_that_can_be_made(module):
    keys = {mutant.key for mutant in made(module)}
    assert set(run.explained().get(module, {})) <= keys


@pytest.mark.parametrize("module", run.MODULES)
def test_a_module_gives_many_mutants_and_its_tests_exist(module):
    assert len(made(module)) > 100
    assert run.existing(module) == run.MODULES[module]


SOURCE = '''
def f(a, b):
    """Text."""
    if a < 3 and not b:
        return True
    raise ValueError("what %d" % 7)
'''


def test_each_kind_of_change_is_made_once_and_really_changes_the_code():
    whole = ast.unparse(ast.parse(SOURCE))
    seen = {}
    for mutant in run.mutants("jws", SOURCE):
        text = ast.unparse(mutant.tree())
        assert text != whole, mutant.key
        seen[mutant.what] = text
    assert set(seen) >= {"deleted", "negated", "Lt -> LtE", "Lt -> GtE", "-> or", "+ 1", "- 1"}
    assert set(seen) >= {"operand 1 dropped", "operand 2 dropped", "not dropped", "flipped"}
    assert '"""Text."""' in seen["negated"]
    assert all("% 7" in text or "pass" in text for text in seen.values()), (
        "messages are left alone"
    )
