"""What a boot is, from the facts in flash; how a trial is proven, and how it ends.

Each test writes otadata, slots and journal as some history leaves them, and asks for the verdict.
The board runs ota_0; its image is OWN, the other one's is OTHER.
"""

import asyncio
import gc

import workbench as bench
from harness import raises
from workbench import ABORTED, BLANK, BLOCK, INVALID, NEW, PENDING, TORN, VALID

from twinslot import health
from twinslot import trial as proving
from twinslot.errors import HealthError, PartitionError, RollbackError, SpaceError
from twinslot.slot import FirmwareSlot

HEAP = "1M"
PWRON, HARD, WDT, DEEPSLEEP, SOFT = 1, 2, 3, 4, 5

_other = bench.make_image(2 * BLOCK, version="2.0.0")
OTHER = bench.signed(_other).build
OWN = FirmwareSlot().status()["build"]
STRANGER = "5a" * 32


def board(*entries, other=True, **journal):
    """A board with these otadata entries; return its slot and journal."""
    bench.otadata(*entries)
    if other:
        if bench.read(len(_other)) != _other:
            bench.put(_other)
    else:
        bench.erase()
    return FirmwareSlot(), bench.new_journal(**journal)


def record(build, **more):
    found = {"build": build, "version": "2.0.0", "attempt": "a77e", "security": 6, "back": OTHER}
    found.update(more)
    return found


def failure(journal, build):
    """Return (reason, tries) of a build that failed; there is one entry for it, or None."""
    entries = [f for f in journal.get("failed", list) if f[0] == build]
    assert len(entries) <= 1, entries
    return (entries[0][2], entries[0][3]) if entries else None


# -- nothing special


def test_F16_an_ordinary_boot_is_idle_and_writes_nothing():
    for cause in (PWRON, HARD, WDT, DEEPSLEEP, SOFT):
        slot, journal = board((1, VALID), confirmed=OWN)
        assert health.reconcile(slot, journal, cause) == "idle"
        assert bench.states() == {0: VALID}
        assert journal.get("failed", list) == journal.get("reports", list) == []


def test_a_board_that_knows_nothing_yet_is_idle():
    slot, journal = board((1, VALID), other=False)
    assert health.reconcile(slot, journal, PWRON) == "idle"


def test_F28_a_lost_journal_is_idle_where_the_bootloader_is_content():
    slot, journal = board((1, VALID), (2, ABORTED))
    assert health.reconcile(slot, journal, HARD) == "idle"


# -- the new image runs


def test_the_first_boot_of_an_activated_image_is_a_trial():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN), confirmed=OTHER)
    assert health.reconcile(slot, journal, HARD) == "trial"
    assert journal.get("trial")["boots"] == 1
    assert bench.states()[0] == PENDING, "nothing is confirmed yet"


def test_a_wake_from_deep_sleep_is_no_second_boot():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1))
    assert health.reconcile(slot, journal, DEEPSLEEP) == "trial"
    assert health.reconcile(slot, journal, DEEPSLEEP) == "trial"
    assert journal.get("trial")["boots"] == 1


def test_F30_a_trial_that_only_sleeps_or_resets_softly_goes_back_after_ten_times():
    """The bootloader sees nothing of either, and each arms the watchdog anew."""
    for cause in (DEEPSLEEP, SOFT):
        slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN), confirmed=OTHER)
        assert health.reconcile(slot, journal, HARD) == "trial"
        for wakes in range(1, 11):
            assert health.reconcile(slot, journal, cause) == "trial"
            assert journal.get("trial")["wakes"] == wakes
        assert health.reconcile(slot, journal, cause) == "rejected"
        assert journal.get("trial") == {}
        reason = "reset before it was confirmed (cause %d)" % cause
        assert failure(journal, OWN) == (reason, 1), "perhaps somebody at the cable"


def test_F8_a_trial_that_the_bootloader_does_not_watch_ends_with_its_second_boot():
    for state in (TORN, VALID, 0xFFFFFFFF):
        slot, journal = board((3, state), (2, VALID), trial=record(OWN), confirmed=OTHER)
        assert health.reconcile(slot, journal, HARD) == "trial"
        assert health.reconcile(slot, journal, HARD) == "rejected"
        assert bench.states()[1] == NEW, "the other slot boots next"
        assert journal.get("trial") == {}
        assert failure(journal, OWN) == ("reset before it was confirmed (cause 2)", health.TRIES)
        report = journal.get("reports", list)[-1]
        assert (report["attempt"], report["status"]) == ("a77e", "rolledback")


def test_F11_power_cuts_in_an_unwatched_trial_count_one_by_one():
    slot, journal = board((3, TORN), (2, VALID), trial=record(OWN, boots=1), confirmed=OTHER)
    assert health.reconcile(slot, journal, PWRON) == "rejected"
    assert failure(journal, OWN) == ("power failed during the trial", 1)
    assert health.failed_builds(journal) == []


def test_a_torn_entry_that_reads_valid_is_not_taken_for_a_confirmation():
    slot, journal = board((3, VALID), (2, VALID), trial=record(OWN), confirmed=OTHER)
    assert health.reconcile(slot, journal, PWRON) == "trial"
    assert journal.get("confirmed", str) == OTHER
    assert journal.get("floor", int) == 0


def test_F7_a_confirmation_that_was_cut_short_is_completed():
    # The intent is in the journal; otadata may hold anything that boots this slot.
    for state in (VALID, TORN, ABORTED):
        slot, journal = board(
            (3, state), (2, ABORTED), trial=record(OWN, boots=1, confirming=True), floor=5
        )
        assert health.reconcile(slot, journal, PWRON) == "idle"
        assert bench.states()[0] == VALID
        assert journal.get("confirmed", str) == OWN
        assert journal.get("floor", int) == 6
        assert journal.get("trial") == {}
        assert journal.get("reports", list)[-1]["status"] == "confirmed"


def test_F17_a_trial_with_nothing_to_go_back_to_stays_for_good():
    slot, journal = board((3, TORN), other=False, trial=record(OWN, boots=1), confirmed=OTHER)
    assert health.reconcile(slot, journal, HARD) == "idle"
    assert bench.states()[0] == VALID
    assert journal.get("confirmed", str) == OWN
    reason, _ = failure(journal, OWN)
    assert "no image to roll back to" in reason
    assert journal.get("reports", list)[-1]["status"] == "failed"
    assert journal.get("floor", int) == 0, "it has proven nothing"


def test_an_image_activated_by_somebody_else_is_on_trial_too():
    slot, journal = board((3, PENDING), (2, VALID))
    assert health.reconcile(slot, journal, HARD) == "trial"


def test_F28_a_full_nvs_does_not_keep_a_trial_from_being_one():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN), confirmed=OTHER)
    journal.update = lambda **changes: _full()
    assert health.reconcile(slot, journal, HARD) == "trial"


def _full():
    raise SpaceError("full")


# -- the old image runs


def test_F5_power_failed_before_set_boot_took():
    # Blank, torn, or what the slot's former life left there.
    for other in (BLANK, (2, NEW, 0x1234), (2, ABORTED), (2, VALID)):
        slot, journal = board((3, VALID), other, trial=record(OTHER), confirmed=OWN)
        assert health.reconcile(slot, journal, PWRON) == "idle"
        assert journal.get("trial") == {}
        reason, tries = failure(journal, OTHER)
        assert tries == 1, reason
        assert health.failed_builds(journal) == [], "it may be tried again"


def test_F6_power_failed_in_the_bootloaders_mark():
    slot, journal = board((3, VALID), BLANK, trial=record(OTHER), confirmed=OWN)
    assert health.reconcile(slot, journal, PWRON) == "idle"
    assert failure(journal, OTHER)[1] == 1
    assert bench.states() == {0: VALID}


def test_F6_a_release_that_loses_its_trial_again_and_again_is_left_alone():
    slot, journal = board((3, VALID), (2, ABORTED), confirmed=OWN)
    for n in range(1, health.TRIES + 1):
        journal.update(trial=record(OTHER))
        assert health.failed_builds(journal) == []
        health.reconcile(slot, journal, PWRON)
        assert failure(journal, OTHER)[1] == n
    assert health.failed_builds(journal) == [OTHER]


def test_a_reset_between_the_record_and_set_boot_does_not_condemn_the_image():
    # A hardware watchdog may strike while set_boot hashes; the entry is of an older trial.
    slot, journal = board((3, VALID), (2, ABORTED), trial=record(OTHER), confirmed=OWN)
    assert health.reconcile(slot, journal, WDT) == "idle"
    assert health.failed_builds(journal) == []


def test_F12_a_trial_that_ended_in_a_reset_condemns_the_image():
    for cause in (HARD, WDT):
        slot, journal = board((3, VALID), (2, ABORTED), trial=record(OTHER, boots=1))
        health.reconcile(slot, journal, cause)
        reason, tries = failure(journal, OTHER)
        assert tries == health.TRIES
        assert str(cause) in reason
        assert health.failed_builds(journal) == [OTHER]
        report = journal.get("reports", list)[-1]
        assert report["error"]["code"] == "health"
        assert report["build"] == OTHER


def test_F11_a_power_cut_in_the_trial_does_not_condemn_the_image():
    slot, journal = board((3, VALID), (2, ABORTED), trial=record(OTHER, boots=1))
    health.reconcile(slot, journal, PWRON)
    assert failure(journal, OTHER) == ("power failed during the trial", 1)


def test_F7_power_failed_while_it_was_confirmed():
    for other in (BLANK, (2, INVALID), (2, ABORTED), (2, VALID, 0x99)):
        slot, journal = board(
            (3, VALID), other, trial=record(OTHER, boots=1, confirming=True), floor=5
        )
        assert health.reconcile(slot, journal, PWRON) == "idle"
        assert failure(journal, OTHER) == ("power failed while it was confirmed", 1)
        assert journal.get("floor", int) == 5, "I10: not raised before it is confirmed"


def test_the_bootloader_refused_the_image_and_fell_back():
    slot, journal = board((1, VALID), (2, PENDING), trial=record(OTHER), confirmed=OWN)
    bench.flip(BLOCK + 3)
    assert health.reconcile(slot, journal, HARD) == "idle"
    assert failure(journal, OTHER) == ("the bootloader refused the image", health.TRIES)
    assert slot.is_settled(), "or it would be tried first at every reset"
    assert bench.states()[0] == VALID
    bench.erase()


def test_what_runs_is_settled_on_even_when_nothing_is_known_of_it():
    # Otherwise no update could ever be activated again.
    slot, journal = board((1, ABORTED), (2, VALID), other=False)
    assert not slot.is_settled()
    assert health.reconcile(slot, journal, PWRON) == "idle"
    assert slot.is_settled()
    assert bench.states()[0] == VALID


def test_the_old_image_activated_again_by_a_rollback_is_confirmed_at_once():
    slot, journal = board((3, PENDING), (2, TORN), confirmed=OWN)
    assert health.reconcile(slot, journal, HARD) == "idle"
    assert bench.states()[0] == VALID


def test_an_activated_slot_that_waits_for_its_reset():
    # Deep sleep wakes what slept, without a look at otadata.
    slot, journal = board((1, VALID), (2, NEW), trial=record(OTHER), confirmed=OWN)
    assert health.reconcile(slot, journal, DEEPSLEEP) == "armed"
    assert journal.get("trial") == record(OTHER)
    assert bench.states() == {0: VALID, 1: NEW}


# -- what nobody watches


def test_F9_an_image_never_confirmed_that_boots_by_default_is_on_trial():
    # Both entries were lost; the bootloader seeded ota_0 as valid.
    slot, journal = board((1, VALID), confirmed=OTHER)
    assert health.reconcile(slot, journal, PWRON) == "trial"
    assert health.reconcile(slot, journal, HARD) == "rejected"
    assert bench.states()[1] == NEW


def test_a_rejected_image_that_comes_back_goes_again():
    for entry in ((3, TORN), (3, ABORTED), (3, VALID)):
        slot, journal = board(entry, failed=[[OWN, "2.0.0", "it crashed", 3]])
        assert health.reconcile(slot, journal, HARD) == "trial"
        assert health.reconcile(slot, journal, HARD) == "rejected"
        assert bench.states()[1] == NEW
        assert len(journal.get("failed", list)) == 1


def test_an_image_from_the_cable_is_idle():
    # Nothing confirmed lies in the other slot: there is nothing better to return to.
    slot, journal = board((1, VALID), confirmed=STRANGER)
    assert health.reconcile(slot, journal, PWRON) == "idle"


# -- confirm and reject by name


def test_confirm_books_version_floor_and_report():
    slot, journal = board(
        (3, PENDING),
        (2, VALID),
        trial=record(OWN, boots=1),
        versions={OTHER: "1.9.0", STRANGER: "0.1.0"},
        floor=4,
        failed=[[OWN, "2.0.0", "power", 1], [STRANGER, "1.5.0", "crash", 3]],
    )
    health.confirm(slot, journal)
    assert bench.states()[0] == VALID
    assert journal.get("confirmed", str) == OWN
    assert journal.get("versions") == {OWN: "2.0.0", OTHER: "1.9.0"}
    assert journal.get("floor", int) == 6
    assert failure(journal, OWN) is None
    assert health.failed_builds(journal) == [STRANGER]
    assert journal.get("reports", list)[-1] == {
        "attempt": "a77e",
        "version": "2.0.0",
        "build": OWN,
        "status": "confirmed",
        "error": None,
    }


def test_I10_a_floor_never_falls():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1), floor=9)
    health.confirm(slot, journal)
    assert journal.get("floor", int) == 9


def test_F16_confirm_twice_and_without_a_trial():
    slot, journal = board((1, VALID))
    health.confirm(slot, journal)
    health.confirm(slot, journal)
    assert journal.get("confirmed", str) == OWN
    assert journal.get("reports", list) == []


def test_confirm_while_otadata_names_another_slot_changes_nothing():
    slot, journal = board((1, VALID), (2, VALID), other=False, trial=record(OWN, boots=1))
    raises(PartitionError, health.confirm, slot, journal)
    assert journal.get("trial") == record(OWN, boots=1)
    assert bench.states() == {0: VALID, 1: VALID}


def test_reject_without_a_way_back_changes_nothing():
    slot, journal = board((3, PENDING), (2, VALID), other=False, trial=record(OWN, boots=1))
    raises(RollbackError, health.reject, slot, journal, "by hand")
    assert journal.get("trial") == record(OWN, boots=1)
    assert failure(journal, OWN) is None


def test_F28_reject_works_though_the_journal_is_full():
    slot, journal = board((3, TORN), (2, VALID), trial=record(OWN, boots=1))
    journal.update = lambda **changes: _full()
    health.reject(slot, journal, "it failed")
    assert bench.states()[1] == NEW


def test_F103_a_reason_is_kept_short_and_printable():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1))
    health.reject(slot, journal, "\x1b[31mdriver\n" + "x" * 10000)
    reason, _ = failure(journal, OWN)
    assert reason.startswith("?[31mdriver?xxx") and len(reason) <= 200
    message = journal.get("reports", list)[-1]["error"]["message"]
    assert message == reason


# -- the trial itself


def trial(*checks, stable=0, deadline=0, fed=None):
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1), confirmed=OTHER)
    feed = (lambda: fed.append(1)) if fed is not None else lambda: None
    return proving.Trial(slot, journal, list(checks), stable, deadline, feed), journal


async def ends(kind, proof):
    try:
        await proof.prove()
    except kind as exc:
        return str(exc)
    raise AssertionError("nothing raised, expected %s" % kind.__name__)


async def test_a_healthy_image_is_confirmed():
    async def later():
        await asyncio.sleep_ms(1)
        return True

    proof, journal = trial(("lamp", lambda: True), ("sensor", later))
    await proof.prove()
    assert bench.states()[0] == VALID
    assert journal.get("confirmed", str) == OWN


async def test_no_checks_are_no_complaint():
    proof, journal = trial()
    await proof.prove()
    assert journal.get("confirmed", str) == OWN


def boom():
    raise OSError("no driver")


async def async_boom():
    raise ValueError("no answer")


async def async_false():
    return False


async def test_F102_a_check_that_fails_raises_or_lies_ends_the_trial():
    for check, words in (
        (lambda: False, "failed"),
        (lambda: None, "failed"),
        (lambda: 0, "failed"),
        (boom, "OSError: no driver"),
        (async_boom, "ValueError: no answer"),
        (async_false, "failed"),
        (lambda: 1 // 0, "ZeroDivisionError"),
    ):
        proof, journal = trial(("first", lambda: True), ("lamp", check))
        text = await ends(HealthError, proof)
        assert "lamp" in text and words in text, text
        assert bench.states()[0] == PENDING, "the bootloader takes it back at the reset"
        reason, tries = failure(journal, OWN)
        assert "lamp" in reason and tries == health.TRIES


async def test_F102_a_check_that_hangs_counts_as_failed_and_does_not_starve_the_watchdog():
    waits = []

    async def hang():
        waits.append(1)
        await asyncio.sleep(3600)

    fed = []
    limit = asyncio.wait_for

    def hurried(coroutine, seconds):
        assert seconds == 10
        return limit(coroutine, 1)

    proof, _ = trial(("lamp", hang), fed=fed)
    asyncio.wait_for = hurried  # the story without ten seconds of waiting
    try:
        text = await ends(HealthError, proof)
    finally:
        asyncio.wait_for = limit
    assert waits == [1] and "did not answer" in text
    assert len(fed) >= 2


async def test_a_check_may_fail_until_the_deadline():
    tries = []

    def third_time():
        tries.append(1)
        return len(tries) == 3

    proof, journal = trial(("lamp", third_time), deadline=20)
    await proof.prove()
    assert len(tries) == 3
    assert journal.get("confirmed", str) == OWN


async def test_an_image_is_not_asked_before_it_has_run_for_a_while():
    import time

    asked = []
    proof, _ = trial(("lamp", lambda: asked.append(1) or True), stable=1)
    start = time.ticks_ms()
    await proof.prove()
    assert time.ticks_diff(time.ticks_ms(), start) >= 1000
    assert asked == [1]


async def test_F14_an_unreachable_source_may_not_be_the_images_fault():
    proof, journal = trial(("source", boom))
    await ends(HealthError, proof)
    assert failure(journal, OWN)[1] == 1
    assert health.failed_builds(journal) == []


async def test_F17_a_trial_that_fails_with_no_way_back_stays_and_can_be_updated():
    proof, journal = trial(("lamp", boom))
    bench.erase()
    await ends(RollbackError, proof)
    assert bench.states()[0] == VALID
    assert journal.get("confirmed", str) == OWN
    assert "no driver" in failure(journal, OWN)[0]
    assert await FirmwareSlot().begin(bench.signed(_other)) == 0
    bench.put(_other)


async def test_F28_an_image_that_leaves_no_room_for_the_journal_is_rejected():
    proof, journal = trial()
    journal.update = lambda **changes: _full()
    assert "confirmed" in await ends(HealthError, proof)
    assert bench.states()[0] == PENDING


async def test_the_watchdog_is_fed_no_longer_than_the_trial_lasts():
    fed = []
    proof, _ = trial(fed=fed)
    await proof.prove()
    gc.collect()
    count = len(fed)
    await asyncio.sleep_ms(1200)
    assert len(fed) == count


def test_a_soft_reset_is_no_end_of_a_trial():
    # Ctrl-D, or a tool that enters the raw REPL: the bootloader does not run.
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1), confirmed=OTHER)
    assert health.reconcile(slot, journal, SOFT) == "trial"
    assert journal.get("trial").get("boots") == 1
    assert bench.states()[0] == PENDING


def test_a_bootloader_that_leaves_a_new_slot_aside_has_refused_it():
    # Before rollback came (1.21) the bootloader left NEW as it was when an image did not verify.
    slot, journal = board((1, VALID), (2, NEW), trial=record(OTHER), confirmed=OWN)
    assert health.reconcile(slot, journal, HARD) == "idle"
    assert journal.get("trial") == {}
    assert "refused" in journal.get("failed", list)[-1][2]


# -- what is written down


def test_what_a_journal_may_hold_of_trials_and_failures():
    fits = health.fits
    assert fits("trial", {}) and fits("trial", record(OWN, hang=3, boots=1))
    for wrong in ([], None, 7, "x", {"build": 7}, {"version": None}, {"security": "4"}):
        assert fits("trial", wrong) is False
    for name in ("security", "hang", "boots"):
        assert not fits("trial", {name: None}) and not fits("trial", {name: True})
    row = [OWN, "2.0.0", "it crashed", 3]
    assert fits("failed", []) and fits("failed", [row, row])
    for wrong in ({}, "", None, (row,), [row, []], [row[:3]], [row + [1]], [row[:3] + ["3"]]):
        assert fits("failed", wrong) is False
    assert fits("versions", {OWN: "1.0.0"})
    assert not fits("versions", {OWN: 1}) and not fits("versions", [])


def test_a_failure_leaves_those_of_other_builds_as_they_are_and_is_logged():
    others = [[STRANGER, "1.5.0", "crash", 3], ["77" * 32, "1.6.0", "power", 1]]
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1), failed=others)
    health.reject(slot, journal, "the lamp is dark")
    failed = journal.get("failed", list)
    assert failed == others + [[OWN, "2.0.0", "the lamp is dark", health.TRIES]]
    assert journal.log()[-1][1:] == ["2.0.0", "rolledback", "the lamp is dark"]


def test_a_confirmation_is_logged_and_needs_no_security_version():
    slot, journal = board((3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"})
    health.confirm(slot, journal)
    assert journal.log()[-1][1:3] == ["2.0.0", "confirmed"]
    assert journal.get("floor", int) == 0


def test_I10_the_intent_to_confirm_is_written_before_otadata():
    slot, journal = board((3, PENDING), (2, VALID), trial=record(OWN, boots=1))
    seen = []
    keep = slot.confirm

    def noted():
        seen.append((journal.get("trial").get("confirming"), bench.states()[0]))
        keep()

    slot.confirm = noted
    health.confirm(slot, journal)
    assert seen == [(True, PENDING)]


def test_confirming_an_image_nobody_installed_leaves_anothers_trial_alone():
    slot, journal = board((1, VALID), trial=record(OTHER, boots=1))
    health.confirm(slot, journal)
    assert journal.get("trial") == record(OTHER, boots=1)
    assert (journal.get("confirmed", str), journal.get("floor", int)) == (OWN, 0)


def test_a_rejected_image_is_called_by_the_name_it_was_known_by():
    for versions, name in (({OWN: "1.7.0"}, "1.7.0"), ({}, FirmwareSlot().status()["version"])):
        slot, journal = board((3, PENDING), (2, VALID), versions=versions)
        health.reject(slot, journal, "by hand")
        assert journal.get("failed", list)[-1][1] == name
    slot, journal = board((3, PENDING), (2, VALID))
    status = slot.status
    slot.status = lambda: dict(status(), version="0.4.0")
    health.reject(slot, journal, "by hand")
    assert journal.get("failed", list)[-1][1] == "0.4.0"


def test_a_reset_of_unknown_cause_may_be_somebodys_cable():
    slot, journal = board((3, VALID), (2, ABORTED), trial=record(OTHER, boots=1))
    health.reconcile(slot, journal, 0)
    assert failure(journal, OTHER) == ("reset before it was confirmed (cause 0)", 1)


def test_a_trial_that_never_reached_the_guard_is_told_from_one_that_never_began():
    for state, words, status in (
        (ABORTED, "before the boot guard ran", "rolledback"),
        (VALID, "before the trial began", "failed"),
    ):
        slot, journal = board((3, VALID), (2, state), trial=record(OTHER), confirmed=OWN)
        health.reconcile(slot, journal, HARD)
        assert words in failure(journal, OTHER)[0]
        assert journal.get("reports", list)[-1]["status"] == status


def test_only_a_slot_that_waits_for_its_first_boot_is_armed():
    # A wake-up finds otadata naming another slot for other reasons, too.
    slot, journal = board((1, VALID), (2, VALID), confirmed=OWN)
    assert health.reconcile(slot, journal, DEEPSLEEP) == "idle"
    assert slot.is_settled()
    slot, journal = board((2, NEW), (3, VALID), confirmed=OWN)
    assert health.reconcile(slot, journal, SOFT) == "idle", "and one that was passed over is not"


def test_a_board_whose_image_has_no_name_confirms_nothing_by_mistake():
    slot, journal = board((3, PENDING), (2, VALID))
    status = slot.status
    slot.status = lambda: dict(status(), build="")
    assert health.reconcile(slot, journal, HARD) == "trial"
    assert bench.states()[0] == PENDING


# -- the pace of a trial


class Wall:
    """The clock of a trial that does not wait; notes for how many seconds it slept."""

    def __init__(self):
        self.now = 5000
        self.slept = []

    def ticks_ms(self):
        return self.now

    def ticks_diff(self, a, b):
        return a - b


async def at_pace(proof):
    """Run a proof; return (what it raised, seconds slept, milliseconds between feedings)."""
    wall = Wall()
    real = asyncio.sleep, asyncio.sleep_ms, proving.time
    fed = []

    async def sleep(seconds):
        wall.slept.append(seconds)
        wall.now += seconds * 1000
        await real[1](0)

    async def sleep_ms(ms):
        fed.append(ms)
        await real[0](3600)

    asyncio.sleep, asyncio.sleep_ms, proving.time = sleep, sleep_ms, wall
    try:
        await proof.prove()
        ended = None
    except HealthError as exc:
        ended = exc
    finally:
        asyncio.sleep, asyncio.sleep_ms, proving.time = real
    return ended, wall.slept, fed


async def test_a_check_is_asked_every_second_until_the_deadline_is_reached():
    asked = []
    proof, _ = trial(("lamp", lambda: asked.append(1)), stable=2, deadline=5)
    ended, slept, fed = await at_pace(proof)
    assert "lamp" in str(ended)
    assert slept == [2, 1, 1, 1] and len(asked) == 4, "at 2, 3, 4 and 5 seconds"
    assert fed == [500]


async def test_want_of_memory_is_no_reason_to_give_an_image_up():
    proof, journal = trial(deadline=5)
    update, errors = journal.update, [MemoryError("no room")]

    def short(**changes):
        if errors:
            raise errors.pop()
        update(**changes)

    journal.update = short
    ended, slept, _ = await at_pace(proof)
    assert ended is None and slept == [0, 1]
    assert bench.states()[0] == VALID and journal.get("confirmed", str) == OWN


async def test_a_confirmation_by_hand_ends_the_trial():
    proof, journal = trial(("lamp", lambda: journal.update(confirmed=OWN)), deadline=60)
    ended, slept, _ = await at_pace(proof)
    assert ended is None and slept == [0]
    assert bench.states()[0] == PENDING, "whoever did that has seen to it"


async def test_an_image_without_a_name_is_not_taken_for_confirmed():
    proof, journal = trial(("lamp", lambda: False))
    journal.update(confirmed="")
    status = proof._slot.status
    proof._slot.status = lambda: dict(status(), build="")
    ended, _, _ = await at_pace(proof)
    assert "lamp" in str(ended)
