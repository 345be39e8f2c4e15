"""docs/faults.md is what the tests say."""

import re

from twinslot_tools import faults_page


def test_the_page_is_up_to_date():
    text = faults_page.PAGE.read_text()
    assert text == faults_page.page(), "run  .venv/bin/python tools/faults_page.py"


def test_the_page_tells_how_each_test_has_ended():
    for line in faults_page.page().splitlines():
        if not line.startswith(("- ", "| ")):
            continue
        told = line.rstrip(" |)")
        run = "run  make faults-page, or pytest --results FILE, then tools/faults_page.py"
        assert not told.endswith(faults_page.NOT_RUN), f"{line}\n{run}"
    kept = faults_page.results()
    outcomes = {case["outcome"] for module in kept.values() for case in module.values()}
    assert outcomes == {"passed"}


def test_each_section_has_tests_and_each_test_a_line():
    text = faults_page.PAGE.read_text()
    for title in faults_page.SECTIONS:
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert re.search(r"^(- |\| )", section, re.M), title
    assert int(re.search(r"\| all \| \| (\d+) \|", text)[1]) >= 300


def test_outcomes_of_cases_are_added_up():
    cases = {
        "test_it[a]": {"outcome": "passed", "ended": {"lives": 3, "bricked": 0}},
        "test_it[b]": {"outcome": "passed", "ended": {"lives": 4}},
    }
    assert faults_page.ended(cases) == "2 passed: lives 7, bricked 0"
    assert faults_page.ended({"test_it": {"outcome": "passed"}}) == "passed"
    assert faults_page.ended({}) == faults_page.NOT_RUN


def test_a_name_becomes_a_sentence():
    assert faults_page.sentence("test_F24_full_disk_is_told") == "Full disk is told (F24)"
    assert faults_page.sentence("test_it_works") == "It works"
