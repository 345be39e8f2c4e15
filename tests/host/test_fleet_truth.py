"""What the server believes of an update is what became of it: rules, and the rules on the wire."""

import pytest
from fleet import Board, running
from hypothesis import given
from hypothesis import strategies as st

from twinslot_server import offers, truth
from twinslot_server.truth import Attempt

OLD, NEW = "0" * 64, "1" * 64


@pytest.fixture
def fleet(tmp_path):
    with running(tmp_path) as found:
        found.publish("1.1.0")
        yield found


# ---- the rules alone


def after(*news, attempt=None):
    """Feed reports by name and polls as "old", "new" and "waits" (old, with the new one staged),
    one second apart."""
    attempt = attempt or Attempt(build=NEW, version="1.1.0", from_build=OLD)
    for now, word in enumerate(news, 1):
        if word in ("old", "new", "waits"):
            build = NEW if word == "new" else OLD
            staged = NEW if word == "waits" else None
            attempt = truth.after_poll(attempt, build, "", now, staged)
        else:
            attempt = truth.after_report(attempt, word, now, None)
    return attempt


def test_done_needs_the_word_of_the_board_and_a_poll_of_the_new_build():
    assert after("staging", "staged", "confirmed").state == "trial"
    assert after("staging", "staged", "new").state == "trial"
    assert after("staging", "staged", "new", "confirmed").state == "confirmed"
    assert after("staging", "staged", "confirmed", "new").state == "confirmed"


def test_a_board_that_comes_back_old_is_rolled_back_though_it_says_nothing():
    done = after("staging", "staged", "new", "old")
    assert (done.state, done.reason, done.presumed) == ("rolledback", "came_back_old", True)


def test_what_the_board_says_later_replaces_what_was_presumed():
    done = truth.after_report(after("staged", "old"), "failed", 9, "checksum")
    assert (done.state, done.reason, done.presumed) == ("failed", "checksum", False)


def test_a_board_that_waits_for_its_window_has_not_come_back():
    assert after("staging", "staged", "waits", "waits").state == "staged"
    assert after("staging", "waits").state == "staged"
    assert after("staging", "staged", "waits", "new", "confirmed").state == "confirmed"
    assert after("staging", "staged", "waits", "new", "old").state == "rolledback"


def test_an_interrupted_download_is_still_open():
    assert after("staging", "old").state == "downloading"


def test_another_build_by_cable_ends_an_offer():
    done = truth.after_poll(Attempt(build=NEW, from_build=OLD), "2" * 64, "", 5)
    assert (done.state, done.reason) == ("failed", "superseded")


def test_a_new_build_that_polls_for_an_hour_without_a_word_counts():
    attempt = truth.after_poll(after("staged"), NEW, "", 10)
    assert truth.after_poll(attempt, NEW, "", 10 + truth.SILENT_S - 1).state == "trial"
    done = truth.after_poll(attempt, NEW, "", 10 + truth.SILENT_S)
    assert (done.state, done.presumed) == ("confirmed", True)


def test_a_build_that_counts_by_its_silence_counts_no_more_when_the_board_comes_back_old():
    silent = truth.after_poll(after("staged", "new"), NEW, "", 9 + truth.SILENT_S)
    assert (silent.state, silent.reason) == ("confirmed", "silent")
    back = truth.after_poll(silent, OLD, "", 10 + truth.SILENT_S)
    assert (back.state, back.reason) == ("rolledback", "came_back_old")
    by_cable = truth.after_poll(silent, "2" * 64, "", 10 + truth.SILENT_S)
    assert by_cable == silent


NEWS = st.sampled_from(
    ["staging", "staged", "trial", "confirmed", "rolledback", "failed", "old", "new", "waits"]
)


@given(st.lists(NEWS, max_size=8))
def test_whatever_comes_in_whatever_order_the_rules_hold(news):
    attempt = Attempt(build=NEW, version="1.1.0", from_build=OLD)
    polled_new = said = False
    for now, word in enumerate(news, 1):
        before = attempt
        attempt = after(word, attempt=attempt)
        polled_new |= word == "new"
        said |= word == "confirmed"
        if before.state in truth.ENDED and not before.presumed:
            assert attempt == before  # the board's own word stands
        if attempt.state == "confirmed":
            assert polled_new and said
        if word in ("staging", "staged", "trial", "confirmed"):
            assert after(word, attempt=attempt) == attempt  # a report twice is a report once
        assert (attempt.ended is None) == attempt.is_open, now


# ---- on the wire


def test_a_board_that_updates_is_confirmed(fleet):
    board = Board(fleet, "b1")
    assert board.update() == "1.1.0"
    (attempt,) = board.attempts()
    assert (attempt["state"], attempt["origin"]) == ("confirmed", "channel")
    assert attempt["attempt"] == board.attempt
    assert board.poll() == {"update_available": False, "poll": 300, "reason": "up_to_date"}


def test_a_confirmed_report_alone_is_a_trial(fleet):
    board = Board(fleet, "b1")
    board.fetch()
    board.report("confirmed", "1.1.0")
    assert board.attempts()[0]["state"] == "trial"
    board.version = "1.1.0"
    board.poll()
    assert board.attempts()[0]["state"] == "confirmed"


def test_silence_after_a_crash_is_told_from_success(fleet):
    board = Board(fleet, "b1")
    board.update(good=False, silent=True)
    newest = next(a for a in board.attempts() if a["attempt"])
    assert (newest["state"], newest["reason"]) == ("rolledback", "came_back_old")
    assert fleet.api("GET", "devices/b1")["status"] == "rolledback"


def test_polling_again_is_no_new_attempt(fleet):
    board = Board(fleet, "b1")
    for _ in range(3):
        assert board.poll()["update_available"]
    assert [a["state"] for a in board.attempts()] == ["offered"]


def test_a_download_begun_anew_is_another_attempt(fleet):
    board = Board(fleet, "b1")
    board.poll()
    board.attempt = "first"
    board.report("staging", "1.1.0")
    board.poll()
    board.attempt = "second"
    board.report("staging", "1.1.0")
    states = {a["attempt"]: (a["state"], a["reason"]) for a in board.attempts()}
    assert states == {"first": ("failed", "interrupted"), "second": ("downloading", None)}


def test_a_release_that_fails_three_times_in_a_day_is_left_alone(fleet):
    board = Board(fleet, "b1")
    for number in range(3):
        assert board.poll()["update_available"]
        board.attempt = f"try-{number}"
        board.report("failed", "1.1.0", {"code": "checksum", "message": ""})
    assert board.poll()["reason"] == "tries"
    sentence = fleet.api("GET", "devices/b1/explain")["sentence"]
    assert "3 attempts failed" in sentence
    fleet.publish("1.2.0")
    assert board.poll()["release"].endswith("1.2.0.jws")


def test_a_download_that_breaks_off_for_a_whole_day_is_left_alone(fleet):
    board = Board(fleet, "b1")
    begun = 0
    while board.poll()["update_available"]:
        begun += 1
        board.attempt = f"try-{begun}"
        board.report("staging", "1.1.0")
        assert begun <= 2 * offers.MOST_TRIES.broken_off
    assert begun == offers.MOST_TRIES.broken_off + 1, "the last one is under way"
    assert "broke off" in fleet.api("GET", "devices/b1/explain")["sentence"]
    board.report("staged", "1.1.0")
    board.version = "1.1.0"
    board.poll()
    board.report("confirmed", "1.1.0")
    assert board.attempts()[0]["state"] == "confirmed"


def test_offers_that_are_withdrawn_are_no_failures_of_the_build(fleet):
    board = Board(fleet, "b1")
    for _ in range(offers.MOST_TRIES.failed):
        assert board.poll()["update_available"]
        fleet.api("PATCH", "devices/b1", {"enrolment": "pending"})
        fleet.api("PATCH", "devices/b1", {"enrolment": "accepted"})
    assert {a["reason"] for a in board.attempts()} == {"withdrawn"}
    assert board.update() == "1.1.0"


def test_a_report_for_nothing_that_was_offered_is_kept_as_the_boards_own(fleet):
    board = Board(fleet, "b1", version="1.1.0")
    board.attempt = "usb"
    board.report("confirmed", "1.1.0")
    assert board.attempts()[0]["origin"] == "board"
