"""docs/security.md is true: each test that it names exists, and no threat is left out."""

import re
from pathlib import Path

from test_errors import kinds

from twinslot_tools import coverage_of_faults as faults

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "security.md").read_text()

THREATS = """IMG.EXPIRED IMG.EXPIRED.OFFLINE IMG.INCOMPATIBLE IMG.FORMAT IMG.LOCATION NET.REDIRECT
NET.ONPATH IMG.REPLACE IMG.NON_AUTH UPD.WRONG_PRECURSOR UPD.UNAPPROVED IMG.DISCLOSURE
MFST.OVERRIDE MFST.EXPOSURE IMG.EXTRA KEY.EXPOSURE MFST.MODIFICATION MFST.TOCTOU""".split()


def table(title):
    """Rows of the table under a heading, as lists of cells."""
    section = TEXT.split(f"\n## {title}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_test_that_the_page_names_exists():
    existing = {name.split("::")[1] for name in faults.names_of_tests()}
    modules = {name.split("::")[0] for name in faults.names_of_tests()}
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 20
    assert named - existing == set()
    assert set(re.findall(r"`(test_\w+\.py)`", TEXT)) <= modules


def test_every_threat_of_RFC_9124_has_a_row_and_a_test_or_an_admission():
    rows = {row[0].removeprefix("THREAT."): row[2] for row in table("RFC 9019")}
    assert list(rows) == THREATS and len(THREATS) == 18
    for threat, test in rows.items():
        assert "`test_" in test or "not covered" in test, threat


def test_every_provision_of_EN_303_645_has_a_row_and_a_test_or_whose_it_is():
    rows = {row[0].split()[0]: row[2] for row in table("ETSI")}
    assert list(rows) == [f"5.3-{n}" for n in range(1, 17)]
    for provision, test in rows.items():
        assert "`test_" in test or "left to" in test, provision


def test_the_page_knows_only_codes_that_exist():
    codes = {kind.code for kind in kinds()}
    for row in table("What is checked"):
        assert set(re.findall(r"`(\w+)`", row[3])) <= codes, row


def test_links_between_the_pages_lead_somewhere():
    for page in (DOCS / "keys.md", DOCS / "security.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
