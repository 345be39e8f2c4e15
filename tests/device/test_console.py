"""What a person types at the prompt."""

import machine
import workbench as bench
from harness import raises
from workbench import BLOCK, PENDING, VALID

import twinslot
from twinslot import console, health
from twinslot.errors import PartitionError, RollbackError
from twinslot.slot import FirmwareSlot

HEAP = "768K"
OWN = FirmwareSlot().status()["build"]
_other = bench.make_image(2 * BLOCK, version="2.0.0")
OTHER = bench.signed(_other).build


def board(*entries, **journal):
    bench.otadata(*entries)
    bench.put(_other)
    return bench.new_journal(**journal)


class Resets:
    """Notes machine.reset() in the place of it."""

    def __enter__(self):
        self._kept = machine.reset
        self.count = 0
        machine.reset = self._reset
        return self

    def _reset(self):
        self.count += 1

    def __exit__(self, *_):
        machine.reset = self._kept
        return False


def test_status_tells_slots_versions_and_failures():
    board(
        (1, VALID),
        (2, bench.ABORTED),
        versions={OWN: "1.4.0", OTHER: "2.0.0"},
        failed=[[OTHER, "2.0.0", "it crashed", 3]],
    )
    facts = twinslot.status()
    assert facts["running"] == "ota_0" and facts["inactive"] == "ota_1"
    assert facts["build"] == OWN and facts["inactive_build"] == OTHER
    assert facts["versions"][OTHER] == "2.0.0"
    assert facts["failed"][0][2] == "it crashed"
    assert facts["trial"] == {}


def test_status_of_an_empty_slot_and_an_empty_journal():
    board((1, VALID))
    bench.erase()
    facts = console.status()
    assert facts["inactive_build"] == "" and facts["failed"] == []


def test_confirm_ends_a_trial():
    journal = board((3, PENDING), (2, VALID), trial={"build": OWN, "version": "1.4.0", "boots": 1})
    twinslot.confirm()
    assert bench.states()[0] == VALID
    assert journal.get("trial") == {} and journal.get("confirmed", str) == OWN


def test_confirm_is_refused_where_otadata_names_another_slot():
    board((1, VALID), (2, VALID))
    raises(PartitionError, twinslot.confirm)


def test_rollback_returns_to_the_other_slot_and_remembers_why():
    journal = board((1, VALID), versions={OWN: "1.4.0"}, confirmed=OWN)
    with Resets() as resets:
        twinslot.rollback()
    assert resets.count == 1
    assert bench.states()[1] == bench.NEW
    assert health.failed_builds(journal) == [OWN]
    assert journal.get("failed", list)[0][1] == "1.4.0"
    assert journal.get("reports", list)[0]["status"] == "rolledback"


def test_rollback_with_nothing_to_go_back_to_stays():
    journal = board((1, VALID))
    bench.erase()
    with Resets() as resets:
        raises(RollbackError, twinslot.rollback)
    assert resets.count == 0
    assert bench.states() == {0: VALID} and journal.get("failed", list) == []


def test_rollback_to_the_very_same_image_is_none():
    board((1, VALID))
    own = bench.read(8 * BLOCK, label="ota_0")
    bench.put(own)
    with Resets() as resets:
        raises(RollbackError, twinslot.rollback)
    assert resets.count == 0


def test_the_log_tells_the_newest_attempts():
    journal = board((1, VALID))
    journal.add_to_log("1.0.0", "confirmed")
    journal.add_to_log("1.1.0", "rolledback", "it crashed")
    entries = console.log()
    assert [entry[1:] for entry in entries] == [
        ["1.0.0", "confirmed", ""],
        ["1.1.0", "rolledback", "it crashed"],
    ]
