"""Staged rollouts: the rules alone, and rollouts of small fleets to their end."""

import datetime as dt
import hashlib
import itertools
import json
import time

import pytest
import servers
from fleet import Board, build_of, running
from hypothesis import given, settings
from hypothesis import strategies as st

from twinslot import release as rules
from twinslot_server import attempts, course, offers, schema, stages, windows
from twinslot_server.background import Background
from twinslot_server.stages import Counts, Policy, Progress
from twinslot_server.windows import Window, WindowError

# ---- the rules alone

IDS = st.lists(st.text("abcdef0123456789", min_size=1, max_size=12), unique=True, max_size=60)
PERCENT = st.integers(0, 10000).map(lambda n: n / 100)


@given(IDS, PERCENT, PERCENT, st.text(max_size=8))
def test_a_larger_share_only_adds_boards(ids, one, other, seed):
    low, high = sorted((one or 0.01, other or 0.01))
    boards = [(i, {}) for i in ids]
    few = stages.members(boards, [{"percent": low}], 0, seed)
    many = stages.members(boards, [{"percent": high}], 0, seed)
    assert few <= many
    assert stages.members(boards, [{"percent": 100}], 0, seed) == set(ids)


@given(IDS, PERCENT, st.text(max_size=8))
def test_the_server_and_the_board_agree_who_is_in(ids, percent, seed):
    chosen = stages.members([(i, {}) for i in ids], [{"percent": percent or 0.01}], 0, seed)
    by_board = {i for i in ids if rules.in_rollout(percent or 0.01, seed, i, hashlib.sha256)}
    assert chosen == by_board


@given(IDS, st.lists(st.integers(1, 100), min_size=1, max_size=5), st.text(max_size=8))
def test_each_stage_holds_those_before_it(ids, counts, seed):
    plan = [{"label": "ring=pilot"}, *({"count": c} for c in sorted(counts)), {"percent": 100}]
    boards = [(i, {"ring": "pilot"} if i < "4" else {}) for i in ids]
    sizes = [stages.members(boards, plan, n, seed) for n in range(len(plan))]
    assert all(a <= b for a, b in itertools.pairwise(sizes))


COUNTS = st.builds(
    lambda c, f, r, i, w, z: Counts(c + f + r + i + w, c, f, r, i, z),
    *[st.integers(0, 40)] * 6,
)
POLICY = st.builds(
    Policy,
    success_percent=st.integers(0, 100),
    failure_percent=st.integers(0, 100),
    min_sample=st.integers(1, 20),
    bake_s=st.integers(0, 100),
    max_concurrent=st.integers(1, 50),
    gate=st.booleans(),
)


NOBODY = st.just(Counts()) | st.builds(Counts, asleep=st.integers(1, 9))


@given(
    COUNTS | NOBODY, POLICY, st.integers(0, 3), st.booleans(), st.integers(0, 200), st.booleans()
)
def test_whatever_the_counts_the_verdict_is_safe(
    counts, policy, stage, gate_open, passed, is_share
):
    progress = Progress("expand", stage, 4, counts, passed or None, gate_open, is_share)
    verdict = stages.judge(progress, policy, 150)
    bad_share = counts.bad / counts.finished * 100 if counts.finished else 0
    enough = counts.finished >= policy.min_sample
    if enough and bad_share > policy.failure_percent:
        assert verdict.action == "pause"
    if verdict.action in ("advance", "complete"):
        assert (verdict.action == "complete") == (stage == 3)
        assert stage == 3 or not policy.gate or gate_open
    if verdict.action == "advance" and is_share and counts == Counts():
        return  # a share too small for one board, not even one that sleeps
    if verdict.action in ("advance", "complete", "passed"):
        assert counts.confirmed > 0, "nobody has run it"
        assert counts.confirmed * 100 >= policy.success_percent * counts.members
        assert not (enough and bad_share > policy.failure_percent)
    if verdict.action in ("advance", "complete"):
        assert passed and passed + policy.bake_s <= 150
    assert 0 <= stages.free_places(counts, policy) <= policy.max_concurrent


def test_nothing_passes_unrun_though_no_success_is_asked_for():
    nobody_yet = Progress("pilot", 0, 2, Counts(3, in_flight=1), passed_at=1)
    assert stages.judge(nobody_yet, Policy(success_percent=0, bake_s=0), 150).action == "hold"


def test_a_small_sample_does_not_pause_and_a_finished_stage_does():
    policy = Policy(min_sample=5, failure_percent=5)
    assert not stages.failing(Counts(20, confirmed=2, failed=1), policy)
    assert stages.failing(Counts(20, confirmed=4, failed=1), policy)
    assert stages.failing(Counts(2, rolledback=2), policy)


@pytest.mark.parametrize(
    "plan",
    [
        [],
        [{}],
        [{"percent": 0}],
        [{"percent": 101}],
        [{"percent": 50}, {"percent": 10}],
        [{"count": 3, "percent": 5}],
        [{"label": "pilot"}],
        [{"percent": "5"}],
        [{"percent": True}],
    ],
)
def test_stages_that_mean_nothing_are_refused(plan):
    with pytest.raises(ValueError):
        stages.check_stages(plan)


def at(text):
    return int(dt.datetime.fromisoformat(text).timestamp())


NIGHT = Window("site=berlin", "install", "Europe/Berlin", (0, 1, 2, 3, 4), "22:00", "04:00")


@pytest.mark.parametrize(
    ("moment", "open_in"),
    [
        ("2026-11-20T20:59:00+00:00", 60),  # Friday 21:59 in Berlin
        ("2026-11-20T21:00:00+00:00", 0),
        ("2026-11-21T02:59:59+00:00", 0),  # Saturday 03:59: opened on Friday
        ("2026-11-21T03:00:00+00:00", 66 * 3600),  # Saturday 04:00 until Monday 22:00
        ("2026-07-20T20:00:00+00:00", 0),  # summer time: 22:00 in Berlin
    ],
)
def test_a_window_opens_by_its_own_clock(moment, open_in):
    assert NIGHT.opens_in(at(moment)) == open_in


@pytest.mark.parametrize(
    ("start", "end", "opens", "closes"),
    [
        ("02:30", "03:15", "01:30", "02:15"),
        ("02:10", "02:50", "01:10", "01:50"),
        ("02:30", "03:00", "01:30", "02:00"),
        ("02:00", "04:00", "01:00", "03:00"),
        ("01:30", "02:30", "00:30", "01:30"),
        ("03:00", "03:30", "01:00", "01:30"),
    ],
)
def test_a_window_in_the_hour_that_summer_time_skips_is_open_all_the_same(
    start, end, opens, closes
):
    """In Berlin, on 29 March 2026: 03:00 there is 01:00 UTC. A window of a Sunday comes weekly."""
    window = Window("*", "install", "Europe/Berlin", (6,), start, end)
    first, last = (at(f"2026-03-29T{clock}:00+00:00") for clock in (opens, closes))
    midnight = at("2026-03-28T23:00:00+00:00")
    assert window.opens_in(midnight) == first - midnight
    assert (window.opens_in(first), window.opens_in(last - 1)) == (0, 0)
    assert window.opens_in(last) > 86400


def test_a_window_of_its_label_stands_above_the_one_for_all():
    every = Window("*", "install", "UTC", tuple(range(7)), "00:00", "00:00")
    noon = at("2026-11-18T12:00:00+00:00")
    assert windows.opens_in([every, NIGHT], "install", {}, noon) == 0
    assert windows.opens_in([every, NIGHT], "install", {"site": "berlin"}, noon) == 9 * 3600
    assert windows.opens_in([every, NIGHT], "download", {"site": "berlin"}, noon) == 0


@given(st.integers(0, 2 * 366 * 86400), st.sampled_from(["22:00", "00:00", "02:30", "09:15"]))
def test_a_window_is_open_when_it_said_it_would_be(offset, start):
    window = Window("*", "download", "Europe/Berlin", (1, 6), start, "05:45")
    now = at("2026-01-01T00:00:00+00:00") + offset
    wait = window.opens_in(now)
    assert 0 <= wait <= 8 * 86400
    assert window.opens_in(now + wait) == 0


@pytest.mark.parametrize(
    "change",
    [{"kind": "x"}, {"label": "x"}, {"zone": "Mars/Base"}, {"days": ()}, {"start": "24:00"}],
)
def test_a_window_that_can_not_be_is_refused(change):
    members = {"label": "*", "kind": "install", "zone": "UTC", "days": (1,)}
    members |= {"start": "01:00", "end": "02:00"}
    with pytest.raises(WindowError):
        Window(**{**members, **change})


# ---- on the wire


@pytest.fixture
def fleet(tmp_path):
    """A fleet on 1.0.0, its channel at 1.0.0, and 1.1.0 uploaded for a pilot."""
    with running(tmp_path) as found:
        found.publish("1.0.0")
        answer = found.upload(tmp_path, "1.1.0")
        assert answer.status_code == 201, answer.text
        number = answer.json()["id"]
        found.api("PATCH", f"firmware/{number}", {"pilot_ready": True})
        found.number = number
        yield found


QUICK = {"bake_s": 0, "min_sample": 3, "max_concurrent": 100}


def boards(fleet, count, **facts):
    made = [Board(fleet, f"board-{n:03}", **facts) for n in range(count)]
    for board in made:
        board.poll()
    return made


def rollout(fleet, plan, start=True, **policy):
    body = {
        "firmware_id": fleet.number,
        "stages": plan,
        "policy": {**QUICK, **policy},
        "seed": "s",
        "start": start,
    }
    made = fleet.api("POST", "rollouts", body)
    assert "id" in made, made
    return made["id"]


def tick(fleet, number, times=1, ahead=0):
    for _ in range(times):
        now = int(time.time()) + ahead
        found = fleet.store.write(lambda c, now=now: course.tick(c, number, now))
    return found


def state(fleet, number):
    return fleet.api("GET", f"rollouts/{number}")


def test_a_rollout_goes_stage_by_stage_to_its_end(fleet):
    all_boards = boards(fleet, 20)
    number = rollout(fleet, [{"count": 2}, {"percent": 50}, {"percent": 100}], promote=False)
    reached = []
    for _ in range(3):
        took = [b for b in all_boards if b.update()]
        assert all(b.version == "1.1.0" for b in took)
        reached.append(sum(b.version == "1.1.0" for b in all_boards))
        tick(fleet, number, 2)
    assert reached[0] == 2 and reached[0] < reached[1] < reached[2] == 20
    done = state(fleet, number)
    assert (done["state"], done["counts"]["confirmed"]) == ("complete", 20)
    assert fleet.release("1.1.0")["stable"]


def ticks(fleet, times=2):
    """What the server's clock does to all rollouts; each look moves one step."""
    clock = Background(fleet.parts, fleet.data)
    for _ in range(times):
        clock.tick()
    clock._leader.release()


def asleep(fleet, device_id):
    table = schema.devices
    change = table.update().where(table.c.device_id == device_id).values(last_seen=5)
    fleet.store.write(lambda c: c.execute(change))


def test_a_rollout_for_nobody_is_not_started(fleet):
    all_boards = boards(fleet, 3)
    plan = {"firmware_id": fleet.number, "target": {"label": ["site=hmoe"]}}
    draft = fleet.api("POST", "rollouts", plan)
    assert set(draft["preview"]) == {0}
    for path, body in (
        (f"rollouts/{draft['id']}/start", {}),
        ("rollouts", {**plan, "start": True}),
    ):
        refused = fleet.api("POST", path, body)
        assert (refused["status"], refused["code"]) == (409, "nobody")
    assert state(fleet, draft["id"])["state"] == "draft"
    assert not any(board.poll()["update_available"] for board in all_boards)


@pytest.mark.parametrize("sleeper", [None, "board-000"], ids=["no such label", "all asleep"])
def test_a_pilot_that_nobody_has_run_lets_nobody_else_have_it(fleet, sleeper):
    """None of its boards has the label, or the only one that has it sleeps."""
    all_boards = boards(fleet, 10)
    if sleeper:
        fleet.api("PATCH", f"devices/{sleeper}", {"labels": {"ring": "pilot"}})
        asleep(fleet, sleeper)
    number = rollout(fleet, [{"label": "ring=pilot"}, {"percent": 100}])
    ticks(fleet, 4)
    found = state(fleet, number)
    assert (found["state"], found["stage"]) == ("pilot", 0)
    assert found["why"] == "no board has run it yet"
    assert not any(b.poll()["update_available"] for b in all_boards if b.device_id != sleeper)
    if sleeper:  # it wakes, and all goes on
        assert all_boards[0].update() == "1.1.0"
        ticks(fleet)
        assert all(board.update() == "1.1.0" for board in all_boards[1:])


def test_a_share_too_small_for_one_board_gives_way_to_the_next(fleet):
    all_boards = boards(fleet, 5)
    plan = [{"percent": percent} for percent in (0.01, 0.02, 100)]
    number = rollout(fleet, plan)
    assert not any(board.poll()["update_available"] for board in all_boards)
    ticks(fleet, 3)
    assert state(fleet, number)["stage"] == 2, "and no further: nobody has run it"
    assert all(board.update() == "1.1.0" for board in all_boards)
    ticks(fleet)
    assert state(fleet, number)["state"] == "complete"


@pytest.mark.parametrize(
    ("plan", "labels"),
    [([{"percent": 100}], ["site=lab"]), ([{"percent": 50}], []), ([{"count": 1}], [])],
    ids=["a label", "half", "one board"],
)
def test_a_rollout_to_some_boards_brings_it_to_no_other(fleet, plan, labels):
    """Complete, it would point its channel to the release: for all boards, at once."""
    meant, other = Board(fleet, "board-000", labels=["site=lab"]), Board(fleet, "board-001")
    for board in (meant, other):
        board.poll()
    body = {"firmware_id": fleet.number, "stages": plan, "policy": QUICK, "seed": "s"}
    draft = fleet.api("POST", "rollouts", {**body, "target": {"label": labels}})
    assert (draft["preview"], draft["promotes"]) == ([1], None)
    fleet.api("POST", f"rollouts/{draft['id']}/start", {})
    took = [board for board in (meant, other) if board.update() == "1.1.0"]
    ticks(fleet)
    assert (len(took), state(fleet, draft["id"])["state"]) == (1, "complete")
    for board in (meant, other):
        assert board.poll()["reason"] == ("version" if board in took else "up_to_date")


@pytest.mark.parametrize("blocked", [False, True], ids=["newer", "newer and blocked"])
def test_a_complete_rollout_moves_no_channel_back(fleet, tmp_path, blocked):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    assert state(fleet, number)["promotes"] == "stable"
    newer = fleet.upload(tmp_path, "1.2.0").json()["id"]
    fleet.api("PATCH", f"firmware/{newer}", {"stable": True})
    fleet.api("POST", f"firmware/{newer}/promote", {"channel": "stable"})
    assert board.update() == "1.1.0"
    if blocked:
        fleet.api("PATCH", f"firmware/{newer}", {"blocked": "burns the coffee"})
    ticks(fleet)
    assert state(fleet, number)["state"] == "complete"
    pointer = json.loads((fleet.site_folder / servers.PRODUCT / "stable.json").read_bytes())
    assert pointer["release"] == ("r/1.1.0.jws" if blocked else "r/1.2.0.jws")


def test_many_rollouts_are_listed_in_pages(fleet):
    made = [fleet.api("POST", "rollouts", {"firmware_id": fleet.number})["id"] for _ in range(5)]
    found = fleet.api("GET", "rollouts?limit=2")["rollouts"]
    assert [row["id"] for row in found] == made[:-3:-1]
    rest = fleet.api("GET", f"rollouts?before={found[-1]['id']}")["rollouts"]
    assert [row["id"] for row in rest] == made[2::-1]


def test_I20_F121_a_bad_build_stops_itself_within_the_pilot(fleet):
    """F121, I20: what is bad reaches no more than the pilot, and offers stop at once."""
    all_boards = boards(fleet, 40)
    number = rollout(fleet, [{"count": 5}, {"percent": 100}], failure_percent=10)
    met = [b for b in all_boards if b.update(good=False)]
    assert len(met) == 3  # the third failure paused it before the fourth asked
    line = fleet.api("GET", "audit")["audit"][0]
    assert (line["who"], line["action"], line["after"]["state"]) == (
        "scheduler",
        "rollout.pause",
        "paused",
    )
    paused = state(fleet, number)
    assert paused["state"] == "paused"
    assert "3 of 3" in paused["why"]
    assert not any(b.poll()["update_available"] for b in all_boards)
    tick(fleet, number, 3)
    assert state(fleet, number)["state"] == "paused"


def test_what_would_pause_again_is_not_resumed_until_its_policy_allows_it(fleet):
    all_boards = boards(fleet, 10)
    number = rollout(fleet, [{"percent": 100}])
    for board in all_boards:
        board.update(good=False)
    assert state(fleet, number)["state"] == "paused"
    refused = fleet.api("POST", f"rollouts/{number}/resume", {})
    assert refused["code"] == "policy" and "3 of 3" in refused["detail"]
    for wrong in ({"failure_percent": 101}, {"bake_s": 0.5}, {"gate": 1}, {"speed": 5}):
        answer = fleet.api("PATCH", f"rollouts/{number}", {"policy": wrong})
        assert answer["code"] == "malformed", wrong
    looser = {"failure_percent": 40, "success_percent": 60}
    fleet.api("PATCH", f"rollouts/{number}", {"policy": {**looser, "min_sample": 10}})
    line = fleet.api("GET", "audit")["audit"][0]
    assert line["before"] == {"failure_percent": 5, "success_percent": 95, "min_sample": 3}
    assert fleet.api("POST", f"rollouts/{number}/resume", {})["state"] == "pilot"
    assert sum(board.update() == "1.1.0" for board in all_boards) == 7
    tick(fleet, number, 2)
    assert state(fleet, number)["state"] == "complete"
    assert fleet.api("PATCH", f"rollouts/{number}", {"policy": looser})["code"] == "state"


def test_F122_one_board_that_forges_failures_stops_nobody(fleet):
    """What counts is how many boards failed that had an offer, not how often it was said."""
    liar, *honest = boards(fleet, 20)
    number = rollout(fleet, [{"percent": 100}], failure_percent=10, promote=False)
    liar.update(good=False)
    for lie in range(40):
        liar.attempt = f"lie-{lie}"
        liar.report("failed", "1.1.0", {"code": "checksum", "message": "a lie"})
        stranger = Board(fleet, f"nobody-{lie}")  # reports, and was never offered anything
        stranger.attempt = f"lie-{lie}"
        stranger.report("rolledback", "1.1.0")
    for board in honest:
        assert board.update() == "1.1.0"
    tick(fleet, number, 2)
    found = state(fleet, number)
    assert found["state"] != "paused", found["why"]
    assert (
        found["counts"]["failed"] + found["counts"]["rolledback"],
        found["counts"]["confirmed"],
    ) == (1, 19)


def test_offers_made_but_not_begun_are_withdrawn_by_a_pause(fleet):
    one, two = boards(fleet, 2)
    number = rollout(fleet, [{"percent": 100}])
    assert one.poll()["update_available"]
    two.fetch()
    fleet.api("POST", f"rollouts/{number}/pause", {"why": "lunch"})
    assert not one.poll()["update_available"]
    assert one.attempts()[0]["reason"] == "withdrawn"
    assert two.attempts()[0]["state"] == "staged"  # in flight: it finishes
    two.version = "1.1.0"
    two.poll()
    two.report("confirmed", "1.1.0")
    fleet.api("POST", f"rollouts/{number}/resume", {})
    assert one.update() == "1.1.0"
    assert state(fleet, number)["counts"]["confirmed"] == 2


def test_no_more_boards_begin_than_may_at_once(fleet):
    all_boards = boards(fleet, 6)
    rollout(fleet, [{"percent": 100}], max_concurrent=2)
    offered = [b for b in all_boards if b.poll()["update_available"]]
    assert len(offered) == 2
    waiting = next(b for b in all_boards if b not in offered)
    assert waiting.poll()["reason"] == "busy"
    assert offered[0].update()
    assert waiting.poll()["update_available"]


def test_a_gate_waits_for_a_person_and_a_bake_for_time(fleet):
    all_boards = boards(fleet, 4)
    number = rollout(fleet, [{"count": 1}, {"percent": 100}], gate=True, bake_s=600)
    assert [b.update() for b in all_boards].count("1.1.0") == 1
    assert tick(fleet, number)[0] == "passed"
    assert "baking" in tick(fleet, number)[1]
    assert "person" in tick(fleet, number, ahead=700)[1]
    fleet.api("POST", f"rollouts/{number}/expand", {"why": "looks good"})
    assert tick(fleet, number, ahead=700)[0] == "advance"
    assert state(fleet, number)["state"] == "expand"


def test_sleeping_boards_hold_nobody_up(fleet):
    awake, sleeper = boards(fleet, 2)
    asleep(fleet, sleeper.device_id)
    number = rollout(fleet, [{"percent": 100}])
    assert awake.update()
    assert tick(fleet, number, 2)[0] == "complete"


def test_boards_that_are_pinned_or_newer_hold_nobody_up(fleet):
    """They never take it, and nobody said that they should."""
    plain, pinned, newer = boards(fleet, 3)
    newer.version = "2.0.0"
    newer.poll()
    fleet.api("PATCH", "devices/board-001", {"pin": "1.0.0"})
    assert fleet.api("GET", f"firmware/{fleet.number}/reach") == {"devices": 2}
    number = rollout(fleet, [{"percent": 100}])
    assert plain.update() == "1.1.0"
    assert pinned.poll()["reason"] == "up_to_date"
    assert "would refuse" in fleet.api("GET", "devices/board-002/explain")["sentence"]
    assert newer.poll()["reason"] == "version"
    assert tick(fleet, number, 2)[0] == "complete"
    counts = state(fleet, number)["counts"]
    assert (counts["members"], counts["confirmed"]) == (1, 1)


def test_a_board_that_is_unpinned_joins_the_rollout_it_is_in(fleet):
    one, two = boards(fleet, 2)
    fleet.api("PATCH", "devices/board-001", {"pin": "1.0.0"})
    number = rollout(fleet, [{"percent": 100}])
    assert (one.update(), two.update()) == ("1.1.0", None)
    fleet.api("PATCH", "devices/board-001", {"pin": None})
    assert two.update() == "1.1.0"
    assert state(fleet, number)["counts"]["confirmed"] == 2


def test_a_lost_board_is_a_failure_after_its_time(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    board.fetch()
    hook = {"url": "https://example.org/", "events": ["attempt.*", "rollout.*"]}
    fleet.api("POST", "webhooks", hook)
    tick(fleet, number, ahead=4000)
    assert board.attempts()[0]["reason"] == "timed_out"
    assert state(fleet, number)["state"] == "paused"
    assert fleet.api("GET", f"devices/{board.device_id}")["status"] == "failed"
    (event, about), (then, _) = fleet.told()
    assert (event, then) == ("attempt.failed", "rollout.paused")
    assert (about["device_id"], about["reason"]) == (board.device_id, "timed_out")
    board.version = "1.1.0"
    board.poll()
    board.report("confirmed", "1.1.0")  # it was only slow: its word counts
    assert board.attempts()[0]["state"] == "confirmed"


def test_an_offer_that_no_board_takes_up_is_withdrawn(fleet):
    """An application may put it off for a day, and says nothing of it."""
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}], max_concurrent=1)
    assert board.poll()["update_available"]
    tick(fleet, number, ahead=4000)
    assert board.attempts()[0]["reason"] == "withdrawn"
    found = state(fleet, number)
    assert (found["state"], found["counts"]["in_flight"]) == ("pilot", 0)
    assert board.update() == "1.1.0"


def set_all(fleet, table, **values):
    fleet.store.write(lambda c: c.execute(table.update().values(**values)))


def test_a_board_that_goes_on_asking_is_not_lost_until_the_day_is_over(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    board.poll()
    board.attempt = "slow"
    board.report("staging", "1.1.0")
    for ahead, became in ((4000, "downloading"), (attempts.LONGEST_S + 5, "failed")):
        set_all(fleet, schema.devices, last_seen=int(time.time()) + ahead)
        tick(fleet, number, ahead=ahead)
        assert board.attempts()[0]["state"] == became
    assert board.attempts()[0]["reason"] == "timed_out"


@pytest.mark.parametrize("by", ["pin", "job"])
def test_a_board_that_is_given_another_release_is_no_failure(fleet, tmp_path, by):
    all_boards = boards(fleet, 4)
    number = rollout(fleet, [{"percent": 100}])
    assert all(board.poll()["update_available"] for board in all_boards)
    other = fleet.upload(tmp_path, "1.2.0").json()["id"]
    nodes = [board.device_id for board in all_boards[:3]]
    if by == "job":
        fleet.api("POST", "ota/updates", {"firmware_id": other, "target": {"nodes": nodes}})
    else:
        for node in nodes:
            fleet.api("PATCH", f"devices/{node}", {"pin": "1.2.0"})
    assert all(board.poll()["release"].endswith("/1.2.0.jws") for board in all_boards[:3])
    tick(fleet, number)
    found = state(fleet, number)
    assert (found["state"], found["counts"]["failed"]) == ("pilot", 0)
    assert all(board.update() == "1.2.0" for board in all_boards[:3])
    for board in all_boards[:3]:
        board.poll()
    assert all_boards[3].update() == "1.1.0"
    assert tick(fleet, number, 2)[0] == "complete"


def test_a_board_that_may_choose_again_takes_the_rollout_it_was_called_away_from(fleet, tmp_path):
    (board,) = boards(fleet, 1)
    rollout(fleet, [{"percent": 100}])
    fleet.upload(tmp_path, "1.2.0")
    for pin, version in ((None, "1.1.0"), ("1.2.0", "1.2.0"), (None, "1.1.0")):
        fleet.api("PATCH", "devices/board-000", {"pin": pin})
        assert board.poll()["release"].endswith(f"/{version}.jws")
    assert board.update() == "1.1.0"


def staged_by_an_aborted_rollout(fleet, count):
    """Boards that have fetched the release and wait, and what offered it is no more."""
    made = boards(fleet, count, staged="")
    number = rollout(fleet, [{"percent": 100}])
    for board in made:
        assert board.fetch() == "1.1.0"
        board.facts["staged"] = build_of("1.1.0")
    fleet.api("POST", f"rollouts/{number}/abort", {})
    return made


def test_a_second_rollout_counts_the_failures_of_what_the_first_began(fleet):
    all_boards = staged_by_an_aborted_rollout(fleet, 6)
    number = rollout(fleet, [{"percent": 100}])
    for board in all_boards:
        if board.poll()["update_available"]:
            board.facts["staged"] = ""
            for board.version in ("1.1.0", "1.0.0"):
                board.poll()
    found = state(fleet, number)
    assert (found["state"], found["counts"]["rolledback"]) == ("paused", QUICK["min_sample"])
    assert not any(board.poll()["update_available"] for board in all_boards)


def test_a_second_rollout_gives_no_more_places_than_it_has(fleet):
    all_boards = staged_by_an_aborted_rollout(fleet, 4)
    rollout(fleet, [{"percent": 100}], max_concurrent=2)
    assert [b.poll()["update_available"] for b in all_boards] == [True, True, False, False]


@pytest.mark.parametrize("leaves", ["decommissioned", "pending"])
def test_a_board_that_may_update_no_longer_keeps_no_place(fleet, leaves):
    one, other = boards(fleet, 2, staged="")
    number = rollout(fleet, [{"percent": 100}], max_concurrent=1)
    assert one.fetch() == "1.1.0"
    one.facts["staged"] = build_of("1.1.0")
    assert other.poll()["reason"] == "busy"
    if leaves == "decommissioned":
        fleet.api("DELETE", "devices/board-000")
    else:
        fleet.api("PATCH", "devices/board-000", {"enrolment": "pending"})
    assert one.attempts()[0]["reason"] == "withdrawn"
    one.report("trial", "1.1.0")  # whatever it goes on to do
    assert one.poll()["reason"] == leaves
    assert state(fleet, number)["counts"]["members"] == 1
    assert other.update() == "1.1.0"


@pytest.mark.parametrize("ended", ["channel", "pin", "board", "pause", "abort"])
def test_no_attempt_is_open_for_ever(fleet, ended):
    (board,) = boards(fleet, 1)
    fleet.api("PATCH", f"firmware/{fleet.number}", {"stable": True})
    if ended == "channel":
        fleet.api("POST", f"firmware/{fleet.number}/promote", {"channel": "stable"})
    elif ended == "pin":
        fleet.api("PATCH", "devices/board-000", {"pin": "1.1.0"})
    elif ended != "board":
        number = rollout(fleet, [{"percent": 100}])
    board.poll()
    board.attempt = "a"
    board.report("staged", "1.1.0")
    if ended in ("pause", "abort"):
        fleet.api("POST", f"rollouts/{number}/{ended}", {})
    ticks(fleet)
    (attempt,) = board.attempts()
    assert attempt["state"] == "staged"
    set_all(fleet, schema.attempts, updated=int(time.time()) - attempts.LONGEST_S - 5)
    ticks(fleet)
    (attempt,) = board.attempts()
    assert (attempt["state"], attempt["reason"]) == ("failed", "timed_out")


def test_a_straggler_of_a_complete_rollout_is_given_up_too(fleet):
    *most, last = boards(fleet, 20)
    number = rollout(fleet, [{"percent": 100}])
    last.fetch()
    for board in most:
        board.update()
    ticks(fleet, 3)
    assert state(fleet, number)["state"] == "complete"
    assert last.attempts()[0]["state"] == "staged"
    asleep(fleet, last.device_id)
    set_all(fleet, schema.attempts, updated=int(time.time()) - Policy().timeout_s - 5)
    ticks(fleet)
    assert last.attempts()[0]["reason"] == "timed_out"
    assert state(fleet, number)["counts"]["in_flight"] == 0


def test_what_no_longer_passes_bakes_anew(fleet):
    """A newcomer confirms just before the bake time is over."""
    first, late = Board(fleet, "a", labels=["ring=pilot"]), Board(fleet, "b")
    for board in (first, late):
        board.poll()
    plan = [{"label": "ring=pilot"}, {"percent": 100}]
    number = rollout(fleet, plan, include_new=True, bake_s=600)
    assert first.update() == "1.1.0"
    assert tick(fleet, number)[0] == "passed"
    late.facts["labels"] = ["ring=pilot"]
    assert late.poll()["update_available"]
    assert "1 of 2" in tick(fleet, number, ahead=550)[1]
    assert late.update() == "1.1.0"
    assert tick(fleet, number, ahead=590)[0] == "passed"
    assert "baking" in tick(fleet, number, ahead=700)[1]
    assert tick(fleet, number, ahead=1200)[0] == "advance"


def test_a_pause_is_no_time_of_baking(fleet):
    all_boards = boards(fleet, 4)
    number = rollout(fleet, [{"count": 1}, {"percent": 100}], bake_s=600)
    assert [b.update() for b in all_boards].count("1.1.0") == 1
    assert tick(fleet, number)[0] == "passed"
    for action in ("pause", "resume"):
        fleet.api("POST", f"rollouts/{number}/{action}", {})
    assert tick(fleet, number, ahead=700)[0] == "passed"
    assert "baking" in tick(fleet, number, ahead=710)[1]


def test_a_changed_label_moves_nobody_and_newcomers_join_where_asked(fleet):
    """Golioth's lesson, and hawkbit#1548."""
    boards(fleet, 2)
    number = rollout(fleet, [{"label": "ring=pilot"}, {"percent": 100}])
    fleet.api("PATCH", "devices/board-000", {"labels": {"ring": "pilot"}})
    assert not Board(fleet, "board-000").poll()["update_available"]
    fleet.api("POST", f"rollouts/{number}/abort", {})
    rollout(fleet, [{"label": "ring=pilot"}], include_new=True)
    fleet.api("PATCH", "devices/board-001", {"labels": {"ring": "pilot"}})
    assert Board(fleet, "board-001").poll()["update_available"]
    assert Board(fleet, "new", labels=["ring=pilot"]).poll()["update_available"]
    assert not Board(fleet, "other").poll()["update_available"]


def test_another_target_label_promotes_a_running_rollout(fleet):
    pilot, other = Board(fleet, "a", labels=["ring=pilot"]), Board(fleet, "b")
    for board in (pilot, other):
        board.poll()
    number = rollout(fleet, [{"percent": 100}], start=False, bake_s=3600)
    draft = fleet.api("PATCH", f"rollouts/{number}", {"target": {"label": ["ring=pilot"]}})
    assert draft["preview"] == [1]
    fleet.api("POST", f"rollouts/{number}/start", {})
    assert pilot.update() == "1.1.0"
    assert not other.poll()["update_available"]
    refused = fleet.api("PATCH", f"rollouts/{number}", {"target": {"label": ["pilot"]}})
    assert refused["code"] == "malformed"
    shown = fleet.api("PATCH", f"rollouts/{number}", {"target": {"label": []}})
    assert shown["counts"]["members"] == 2
    assert other.update() == "1.1.0"
    fleet.api("POST", f"rollouts/{number}/abort", {})
    assert fleet.api("PATCH", f"rollouts/{number}", {"target": {}})["code"] == "state"


def older(fleet, tmp_path):
    made = fleet.upload(tmp_path, "0.9.0", downgrade=True).json()
    fleet.api("PATCH", f"firmware/{made['id']}", {"pilot_ready": True})


def test_everyone_is_sent_back_by_a_new_rollout_and_nobody_else(fleet, tmp_path):
    """Those that took it: no older board, none of another channel, no newcomer."""
    took, waits, pilot = boards(fleet, 3)
    number = rollout(fleet, [{"percent": 100}], include_new=True, max_concurrent=2)
    assert (took.update(), pilot.update()) == ("1.1.0", "1.1.0")
    assert waits.poll()["update_available"]
    beta = Board(fleet, "beta", version="2.0.0", channel="beta")
    others = [beta, Board(fleet, "old", version="0.5.0"), Board(fleet, "plain", version="0.9.5")]
    fleet.api("POST", f"rollouts/{number}/pause", {})
    for board in others:
        board.poll()
    refused = fleet.api("POST", f"rollouts/{number}/back", {"version": "1.0.0"})
    assert refused["code"] == "no_downgrade"
    older(fleet, tmp_path)
    back = fleet.api("POST", f"rollouts/{number}/back", {"version": "0.9.0"})
    assert (back["state"], back["counts"]["members"], back["promotes"]) == ("pilot", 2, None)
    assert fleet.release("1.1.0")["blocked"] is None, "no channel has offered it"
    assert state(fleet, number)["state"] == "aborted"
    others += [waits, Board(fleet, "new")]
    offered = [board.poll().get("release", "") for board in others]
    assert not any(release.endswith("0.9.0.jws") for release in offered), offered
    assert (took.update(), pilot.update()) == ("0.9.0", "0.9.0")
    ticks(fleet)
    assert state(fleet, back["id"])["state"] == "complete"


@pytest.mark.parametrize("good", [True, False], ids=["it boots it", "it comes back by itself"])
def test_a_board_in_the_middle_is_sent_back_only_if_it_boots_the_release(fleet, tmp_path, good):
    took, between = boards(fleet, 2)
    number = rollout(fleet, [{"percent": 100}], success_percent=1)
    assert (took.update(), between.fetch()) == ("1.1.0", "1.1.0")
    older(fleet, tmp_path)
    back = fleet.api("POST", f"rollouts/{number}/back", {"version": "0.9.0"})
    assert back["counts"]["members"] == 2
    if good:
        between.version = "1.1.0"
        assert between.poll()["release"].endswith("/0.9.0.jws")
        assert between.update() == "0.9.0"
    else:
        assert between.poll()["reason"] == "up_to_date"
        assert between.attempts()[0]["reason"] == "came_back_old"
    assert took.update() == "0.9.0"
    ticks(fleet)
    done = state(fleet, back["id"])
    assert (done["state"], done["counts"]["members"]) == ("complete", 1 + good)


def test_one_that_took_the_offer_as_it_was_withdrawn_is_sent_back_when_it_asks(fleet, tmp_path):
    took, late = boards(fleet, 2)
    number = rollout(fleet, [{"percent": 100}])
    assert took.update() == "1.1.0"
    assert late.poll()["update_available"]
    older(fleet, tmp_path)
    back = fleet.api("POST", f"rollouts/{number}/back", {"version": "0.9.0"})
    assert back["counts"]["members"] == 1
    late.version = "1.1.0"  # it had begun, and has not said so
    assert late.poll()["release"].endswith("/0.9.0.jws")
    assert state(fleet, back["id"])["counts"]["members"] == 2


def test_what_everyone_was_sent_back_from_is_offered_by_no_channel_again(fleet, tmp_path):
    """It was complete, and so the channel points to it."""
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    assert board.update() == "1.1.0"
    ticks(fleet)
    assert Board(fleet, "new").poll()["release"].endswith("/1.1.0.jws")
    older(fleet, tmp_path)
    back = fleet.api("POST", f"rollouts/{number}/back", {"version": "0.9.0"})["id"]
    assert f"rollout {back}" in fleet.release("1.1.0")["blocked"]
    assert fleet.api("GET", "audit")["audit"][0]["after"]["blocked"]
    assert Board(fleet, "new").poll()["reason"] == "blocked"
    assert board.update() == "0.9.0"
    ticks(fleet)
    assert state(fleet, back)["state"] == "complete"
    assert board.update() == "1.0.0", "the last good one of its channel"
    assert not board.poll()["update_available"]


def test_where_nobody_took_it_nobody_is_sent_back(fleet, tmp_path):
    boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    older(fleet, tmp_path)
    refused = fleet.api("POST", f"rollouts/{number}/back", {"version": "0.9.0"})
    assert refused["code"] == "nobody"
    assert state(fleet, number)["state"] == "pilot"


def test_a_start_time_and_what_a_release_must_be(fleet):
    boards(fleet, 1)
    body = {"firmware_id": fleet.number, "starts_at": "2000-01-01T00:00:00Z"}
    number = fleet.api("POST", "rollouts", body)["id"]
    assert state(fleet, number)["state"] == "draft"
    assert state(fleet, number)["preview"][-1] == 1
    assert tick(fleet, number)[0] == "advance"
    fleet.api("PATCH", f"firmware/{fleet.number}", {"pilot_ready": False})
    other = fleet.api("POST", "rollouts", {"firmware_id": fleet.number})["id"]
    assert fleet.api("POST", f"rollouts/{other}/start", {})["code"] == "not_ready"
    assert fleet.api("POST", f"rollouts/{other}/resume", {})["code"] == "state"


def test_a_start_that_is_refused_at_its_time_is_said_once(fleet):
    boards(fleet, 1)
    fleet.api("POST", "webhooks", {"url": "https://example.org/", "events": ["rollout.*"]})
    fleet.api("PATCH", f"firmware/{fleet.number}", {"pilot_ready": False})
    body = {"firmware_id": fleet.number, "starts_at": "2000-01-01T00:00:00Z"}
    number = fleet.api("POST", "rollouts", body)["id"]
    ticks(fleet, 3)
    found = state(fleet, number)
    assert (found["state"], found["starts_at"]) == ("draft", None)
    assert found["why"].endswith("is not pilot_ready")
    told = fleet.store.read(lambda c: c.execute(schema.deliveries.select()).all())
    assert [json.loads(row.body)["event"] for row in told] == ["rollout.refused"]
    lines = fleet.api("GET", "audit")["audit"]
    assert [line["action"] for line in lines if line["who"] == "scheduler"] == ["rollout.refused"]
    fleet.api("PATCH", f"firmware/{fleet.number}", {"pilot_ready": True})
    assert fleet.api("POST", f"rollouts/{number}/start", {})["state"] == "pilot"


def test_blocking_a_release_pauses_its_rollouts(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    fleet.api("POST", "webhooks", {"url": "https://example.org/", "events": ["rollout.*"]})
    fleet.api("PATCH", f"firmware/{fleet.number}", {"blocked": "burns the coffee"})
    told = fleet.store.read(lambda c: c.execute(schema.deliveries.select()).one())
    assert json.loads(told.body)["event"] == "rollout.paused"
    assert not board.poll()["update_available"]
    assert "burns the coffee" in state(fleet, number)["why"]
    assert fleet.api("POST", f"rollouts/{number}/resume", {})["code"] == "blocked"


def test_complete_points_the_channel_at_the_release(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}])
    board.update()
    ticks(fleet)
    assert state(fleet, number)["state"] == "complete"
    assert Board(fleet, "later").poll()["release"].endswith("/1.1.0.jws")
    last = fleet.api("GET", "audit")["audit"][0]
    assert (last["who"], last["action"]) == ("scheduler", "rollout.complete")


def test_outside_its_window_a_board_waits_and_asks_in_time(fleet):
    (board,) = boards(fleet, 1)
    rollout(fleet, [{"percent": 100}])
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=2)
    window = {
        "start": soon.strftime("%H:%M"),
        "end": (soon + dt.timedelta(minutes=5)).strftime("%H:%M"),
    }
    made = fleet.api("POST", "windows", window)
    answer = board.poll()
    assert answer["reason"] == "window"
    assert answer["poll"] <= 120
    fleet.api("DELETE", f"windows/{made['id']}")
    assert board.poll()["update_available"]


def test_a_board_that_nothing_waits_for_asks_no_sooner_for_a_window(fleet):
    """Its answer is remembered: it would ask as soon again when the window has long been open."""
    (board,) = boards(fleet, 1)
    fleet.api("POST", "windows", opens_in(2))
    remembered = fleet.desk.remembered
    for _ in range(2):
        assert board.poll()["poll"] == offers.DEFAULT_POLL_S
    assert fleet.desk.remembered == remembered + 1
    rollout(fleet, [{"percent": 100}])
    assert board.poll()["poll"] <= 120, "but for this it is to come in time"


def opens_in(minutes, kind="install", length=5):
    """A window for all that opens so many minutes from now."""
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=minutes)
    end = soon + dt.timedelta(minutes=length)
    return {"kind": kind, "start": soon.strftime("%H:%M"), "end": end.strftime("%H:%M")}


def test_a_board_fetches_by_day_and_installs_in_its_window(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}], timeout_s=1)
    window = fleet.api("POST", "windows", opens_in(120))["id"]
    assert board.poll()["reason"] == "window", "an agent that can't wait is offered nothing"

    board.facts["staged"] = ""
    answer = board.poll()
    assert answer["update_available"] and 7000 < answer["install"] <= 7200
    assert "to be installed in 1" in fleet.api("GET", "devices/board-000/explain")["sentence"]
    assert board.fetch() == "1.1.0"
    board.facts["staged"] = build_of("1.1.0")
    fleet.api("POST", "windows", opens_in(60, "download"))  # what is here needs no window
    assert board.poll()["install"] > 7000
    tick(fleet, number, ahead=600)
    (attempt,) = board.attempts()
    assert attempt["state"] == "staged" and attempt["waits_until"], "it waits and is not lost"
    assert fleet.api("GET", "devices/board-000")["staged"] == build_of("1.1.0")

    fleet.api("DELETE", f"windows/{window}")
    answer = board.poll()
    assert answer["update_available"] and "install" not in answer
    board.version, board.facts["staged"] = "1.1.0", ""
    board.poll()
    board.report("confirmed", "1.1.0")
    (attempt,) = board.attempts()
    assert attempt["state"] == "confirmed"


def test_a_paused_rollout_installs_nothing_that_waits(fleet):
    (board,) = boards(fleet, 1, staged="")
    number = rollout(fleet, [{"percent": 100}])
    fleet.api("POST", "windows", opens_in(120))
    board.fetch()
    board.facts["staged"] = build_of("1.1.0")
    fleet.api("POST", f"rollouts/{number}/pause", {})
    assert not board.poll()["update_available"]
    assert board.attempts()[0]["state"] == "staged"
    fleet.api("POST", f"rollouts/{number}/resume", {})
    assert board.poll()["install"]


def test_past_its_deadline_a_stage_waits_for_no_window(fleet):
    (board,) = boards(fleet, 1)
    number = rollout(fleet, [{"percent": 100}], deadline_s=3600)
    fleet.api("POST", "windows", opens_in(120))
    assert board.poll()["reason"] == "window"
    earlier = int(time.time()) - 3601
    table = schema.rollouts
    fleet.store.write(
        lambda c: c.execute(
            table.update().where(table.c.id == number).values(stage_started=earlier)
        )
    )
    assert "install" not in board.poll()
    assert board.update() == "1.1.0"


# ---- explain agrees with the poll, whatever the fleet


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["pin", "unpin", "pause", "resume", "block", "unblock", "pending", "accept", "label",
             "window", "no window", "job", "fail", "update", "promote"]
        ),
        st.integers(0, 2),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_explain_says_what_the_poll_answers(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("explain")
    with running(folder) as fleet:
        fleet.publish("1.0.0")
        fleet.number = fleet.upload(folder, "1.1.0").json()["id"]
        fleet.api("PATCH", f"firmware/{fleet.number}", {"pilot_ready": True, "stable": True})
        three = boards(fleet, 3)
        three[0].facts["staged"] = ""  # this one can wait for an install window
        number = rollout(fleet, [{"count": 2}, {"percent": 100}], max_concurrent=1)
        opened = []
        for word, index in steps:
            board = three[index]
            path = f"devices/{board.device_id}"
            if word in ("pin", "unpin"):
                fleet.api("PATCH", path, {"pin": "1.1.0" if word == "pin" else None})
            elif word in ("pause", "resume"):
                fleet.api("POST", f"rollouts/{number}/{word}", {})
            elif word in ("block", "unblock"):
                why = "bad" if word == "block" else None
                fleet.api("PATCH", f"firmware/{fleet.number}", {"blocked": why})
            elif word in ("pending", "accept"):
                wanted = "pending" if word == "pending" else "accepted"
                fleet.api("PATCH", path, {"enrolment": wanted})
            elif word == "label":
                fleet.api("PATCH", path, {"labels": {"site": "here"}})
            elif word == "window":
                kind = "download" if index else "install"
                hours = {"start": "00:00", "end": "00:01", "days": [0]}
                body = {"label": "site=here", "kind": kind, **hours}
                opened.append(fleet.api("POST", "windows", body)["id"])
            elif word == "no window" and opened:
                fleet.api("DELETE", f"windows/{opened.pop()}")
            elif word == "job":
                body = {"firmware_id": fleet.number, "target": {"nodes": [board.device_id]}}
                fleet.api("POST", "ota/updates", body)
            elif word in ("fail", "update"):
                board.update(good=word == "update")
            elif word == "promote":
                fleet.api("POST", f"firmware/{fleet.number}/promote", {"channel": "stable"})
            for other in three:
                told = fleet.api("GET", f"devices/{other.device_id}/explain")
                answer = other.poll()
                assert told["update_available"] == answer["update_available"], told
                assert told["release"] == answer.get("release"), told
                assert bool(told["install_in_s"]) == ("install" in answer), told
                assert told["reason"] == answer.get("reason", "offered"), told
                assert told["sentence"].endswith(".")


def test_precedence_is_pin_then_job_then_rollout_then_channel(fleet, tmp_path):
    (board,) = boards(fleet, 1)
    numbers = {"1.1.0": fleet.number}
    for version in ("1.2.0", "1.3.0", "1.4.0"):
        numbers[version] = fleet.upload(tmp_path, version).json()["id"]
        flags = {"pilot_ready": True, "stable": True}
        fleet.api("PATCH", f"firmware/{numbers[version]}", flags)
    fleet.api("PATCH", f"firmware/{fleet.number}", {"stable": True})
    said = []

    def ask():
        said.append(board.poll()["release"].rpartition("/")[2])

    fleet.api("POST", f"firmware/{fleet.number}/promote", {"channel": "stable"})
    ask()
    fleet.number = numbers["1.2.0"]
    rollout(fleet, [{"percent": 100}])
    ask()
    fleet.api(
        "POST",
        "ota/updates",
        {"firmware_id": numbers["1.3.0"], "target": {"nodes": ["board-000"]}},
    )
    ask()
    fleet.api("PATCH", "devices/board-000", {"pin": "1.4.0"})
    ask()
    assert said == ["1.1.0.jws", "1.2.0.jws", "1.3.0.jws", "1.4.0.jws"]


def test_a_decision_needs_no_database():
    board = offers.Board("b", "p", "h", "1.0.0")
    empty = offers.decide(offers.Situation(board, []), 0)
    assert (empty.reason, empty.offer) == ("no_channel", None)
