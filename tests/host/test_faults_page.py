"""docs/faults.md is what the tests say."""

import re

from twinslot_tools import faults_page


def test_the_page_is_up_to_date():
    text = faults_page.PAGE.read_text()
    assert text == faults_page.page(), "run  .venv/bin/python tools/faults_page.py"


def test_each_section_has_tests_and_each_test_a_line():
    text = faults_page.PAGE.read_text()
    for title in faults_page.SECTIONS:
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert re.search(r"^(- |\| )", section, re.M), title
    assert int(re.search(r"\| all \| \| (\d+) \|", text)[1]) >= 300


def test_a_name_becomes_a_sentence():
    assert faults_page.sentence("test_F24_full_disk_is_told") == "Full disk is told (F24)"
    assert faults_page.sentence("test_it_works") == "It works"
