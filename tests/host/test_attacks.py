"""`twinslot demo --attacks`, once, and what became of each attack. F67, I13: the whole server."""

import json
import os
import subprocess
import sys

import pytest

from twinslot_tools.attacks import ATTACKS, judged
from twinslot_tools.lab import Event

# The row of the fault catalogue that each attack of the demo stands for.
ROWS = {
    "replayed": "F76",
    "downgraded": "F82",
    "expired": "F84",
    "not yet": "F84",
    "wrong key": "F72",
    "revoked key": "F97",
    "old keyring": "F96",
    "stolen server": "I13 F97",
    "no signature": "F69 F74",
    "wrong product": "F81",
    "wrong model": "F80 I15",
    "wrong chip": "F80",
    "same version": "F77",
    "failed before": "F110",
    "swapped image": "F79 I3",
    "truncated": "F52",
    "tampered in flight": "F60",
    "endless body": "F52 F61",
    "megabyte of brackets": "F89",
    "nested brackets": "F89",
    "captive portal": "F44",
    "redirect to http": "F45 I11",
    "foreign host": "F46",
    "path": "F88 I5",
}


@pytest.fixture(scope="module")
def played():
    done = subprocess.run(
        [sys.executable, "-m", "twinslot_tools.cli", "demo", "--attacks", "--json"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", ROWS)
def test_I13_F67_attack_is_refused_for_its_own_reason(played, name):
    codes = next(codes for attack, _, _, codes in ATTACKS if attack == name)
    row = next(r for r in played[0]["attacks"] if r["attack"] == name)
    assert row["held"] and row["code"] in codes, row


def test_I13_a_board_is_well_after_all_of_them(played):
    found, table = played
    assert found["running_slot_untouched"] is True
    assert found["resets"] == 0, "refusing something is no reason to reset"
    assert found["version_after"].startswith("1.2."), "a genuine release still comes through"
    assert f"{len(ATTACKS)} of {len(ATTACKS)} attacks refused" in table
    assert "NOT REFUSED" not in table


def told(name, code=""):
    return Event(name, {"code": code, "message": f"no: {code}"}, boot=1)


REFUSED = [told("failed", "keyring"), told("failed", "signature")]


@pytest.mark.parametrize(
    ("events", "held"),
    [
        (REFUSED, True),
        (REFUSED[:1], False),
        (REFUSED[1:], False),
        ([*REFUSED[:1], told("staging"), told("staged")], False),
        ([*REFUSED, told("trial")], False),
        ([*REFUSED, told("failed", "checksum")], False),
        ([], False),
    ],
    ids=["both", "keyring", "release", "staged", "tried", "downloaded", "silent"],
)
def test_I13_a_refused_keyring_does_not_excuse_taking_the_release(events, held):
    codes = next(codes for attack, _, _, codes in ATTACKS if attack == "stolen server")
    assert judged(events, codes)[2] is held
