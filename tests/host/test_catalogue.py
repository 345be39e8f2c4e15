"""The fault catalogue: every row has a test or a reason, and what it claims exists."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_attacks import ROWS

from twinslot_tools import coverage_of_faults as faults
from twinslot_tools.attacks import ATTACKS

SCRIPT = Path(faults.__file__)


@pytest.fixture(scope="module")
def collected():
    return faults.collect()


def test_every_row_of_the_catalogue_has_a_test_or_a_reason(collected):
    catalogue, covered = collected
    assert len(catalogue) == 147
    assert faults.problems(catalogue, covered, faults.names_of_tests()) == []


@pytest.mark.parametrize("row", [f"I{n}" for n in range(1, 21)])
def test_each_incident_is_a_test_by_its_name(collected, row):
    names = collected[1][row]
    assert [name for name in names if row in faults.rows_in(name)], names


def test_every_attack_of_the_demo_has_its_row():
    assert set(ROWS) == {name for name, _, _, _ in ATTACKS}


def test_the_command_lists_every_row_and_counts(collected):
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for row in collected[0]:
        assert any(line.startswith(f"{row} ") for line in lines), row
    assert "rows covered by" in lines[-1]


def test_numbers_are_found_where_they_are_written():
    assert faults.rows_in("test_F12_a_thing") == {"F12"}
    assert faults.rows_in("# F45 to F48, I11") == {"F45", "F46", "F47", "F48", "I11"}
    assert faults.rows_in("noqa: F401x, CF1, I32, HALF2") == set()


def test_a_row_without_test_and_reason_is_a_problem():
    catalogue = {"F1": {"text": "x"}, "F2": {"text": "y", "left": "why"}}
    assert len(faults.problems(catalogue, {}, set())) == 1
    assert len(faults.problems(catalogue, {"F1": {"a"}, f"F{200}": {"b"}}, set())) == 1
    catalogue["F2"]["tests"] = ["nowhere.py::test_nothing"]
    assert "no test" in faults.problems(catalogue, {"F1": {"a"}}, set())[0]
