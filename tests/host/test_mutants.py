"""The mutation run itself: it makes what it says, and its explanations are not stale."""

import ast
import collections
import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mutants"))
import boardjudge
import making
import run


@pytest.mark.parametrize("module", run.MODULES)
def test_every_explained_survivor_is_a_mutant_that_can_be_made(module):
    keys = [mutant.key for mutant in run.made(module)]
    assert len(keys) == len(set(keys)), "each has a name of its own"
    assert set(run.explained().get(module, {})) <= set(keys)


def test_every_explanation_is_of_a_module_that_is_mutated():
    assert set(run.explained()) <= set(run.MODULES)


@pytest.mark.parametrize("module", run.MODULES)
def test_a_module_gives_mutants_and_its_tests_exist(module):
    assert len(run.made(module)) > 5
    assert run.MODULES[module].paths()
    for path in run.MODULES[module].paths():
        assert path.exists()


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
    for mutant in making.mutants("jws", SOURCE):
        text = ast.unparse(mutant.tree())
        assert text != whole, mutant.key
        seen[mutant.key.split(": ")[1]] = text
    assert set(seen) >= {"deleted", "negated", "Lt -> LtE", "Lt -> GtE", "-> or", "3 + 1", "3 - 1"}
    assert set(seen) >= {"operand 1 dropped", "operand 2 dropped", "not dropped", "flipped"}
    assert '"""Text."""' in seen["negated"]
    assert all("% 7" in text or "pass" in text for text in seen.values()), (
        "messages are left alone"
    )


def test_a_mutants_name_holds_wherever_its_function_stands():
    names = [mutant.key for mutant in making.mutants("jws", SOURCE)]
    moved = [mutant.key for mutant in making.mutants("jws", "X = 1\n\n" + SOURCE)]
    assert moved == names
    twice = SOURCE.replace("a < 3", "3 < a < 3")
    keys = [mutant.key for mutant in making.mutants("jws", twice)]
    assert "f: 3 + 1: if 3 < a < 3 and not b: #2" in keys


def test_verdicts_outlive_the_run_until_what_they_rest_on_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KEPT", tmp_path)
    made = run.made("journal")
    noticed, lives, *rest = made
    test = "test_journal.py::test_true_is_no_number"
    verdicts = run.Verdicts("journal")
    verdicts.add(noticed, test)
    verdicts.add(lives, "")
    again = run.Verdicts("journal")
    assert again.recall(made) == rest
    assert again.all == {noticed.key: test, lives.key: ""}
    monkeypatch.setattr(run, "_functions", lambda path: {})  # the test is not there any more
    assert run.Verdicts("journal").recall(made) == [noticed, *rest]
    monkeypatch.setattr(run, "_source", lambda module: "")
    assert lives in run.Verdicts("journal").recall(made)
    assert run.Verdicts("journal", fresh=True).recall(made) == made


def test_a_board_notices_what_is_broken_and_nothing_else():
    key = "Journal.get: deleted: return kind()"
    broken = next(m for m in run.made("journal") if m.key == key)
    whole = dataclasses.replace(broken, key="unchanged", change=lambda node: None)
    said = {}
    tests = list(run.MODULES["journal"].board)
    kills = collections.defaultdict(collections.Counter)
    verdict = lambda m, by: said.update({m.key: by})  # noqa: E731
    assert boardjudge.judge([whole, broken], tests, verdict, kills)
    assert said["unchanged"] == ""
    assert said[key].startswith("test_journal.py::test_")
