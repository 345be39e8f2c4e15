"""The agent's decisions, with the network replaced (`world.py`)."""

import asyncio
import binascii
import builtins

import machine
import workbench as bench
from esp32 import NVS
from harness import raises
from workbench import BLOCK, NEW, PENDING, VALID
from world import (
    HOME,
    IMAGE,
    OTHER,
    OWN,
    SETTINGS,
    Body,
    World,
    installs,
    make_release,
    names,
    refuses,
    start,
)

import twinslot.agent
from twinslot import health, release, startup
from twinslot.errors import (
    BusyError,
    ChecksumError,
    HttpError,
    KnownBadError,
    NetworkError,
    ProductError,
    RefusedError,
    UnreachableError,
    VersionError,
)
from twinslot.sources.server import Server

HEAP = "2M"
TIMEOUT = 90


# -- one update


async def test_an_offer_becomes_a_finished_slot_a_record_and_a_reset():
    world = World()
    agent, events = start(world)
    await installs(agent)
    assert bench.read(len(IMAGE)) == IMAGE
    assert bench.states() == {0: VALID, 1: NEW}
    trial = agent._journal.get("trial")
    assert (trial["build"], trial["version"], trial["back"]) == (OTHER, "2.0.0", OWN)
    assert agent._journal.get("confirmed", str) == OWN
    assert agent._journal.get("floor", int) == 0, "not before it is confirmed"
    assert names(events)[:2] == ["checking", "staging"] and "staged" in names(events)
    assert [r["status"] for r in world.reports] == ["staging", "staged"]
    assert world.fetched == [HOME + "lamp/blobs/a.bin"]


async def test_the_record_is_written_before_the_slot_is_activated():
    world = World()
    agent, _ = start(world)
    activate = agent._slot.activate
    seen = []

    def noted():
        seen.append(twinslot.agent.Journal(NVS("twinslot")).get("trial").get("build"))
        seen.append(bench.states())
        activate()

    agent._slot.activate = noted
    await installs(agent)
    assert seen == [OTHER, {0: VALID}]


async def test_F4_a_complete_slot_is_not_fetched_again():
    world = World()
    agent, _ = start(world)
    bench.put(IMAGE)
    await installs(agent)
    assert world.fetched == []
    assert bench.states()[1] == NEW


async def test_no_offer_is_idle():
    world = World()
    world.offer = {}
    agent, events = start(world)
    assert await agent.update_now() is False
    assert events[-1] == ("idle", {"version": "1.0.0"})
    assert world.released == []


async def test_F110_the_build_that_runs_is_not_installed_again():
    running = make_release().firmware
    running = release.Image("firmware", 0, 5000, running.sha256, OWN, running.payloads)
    for version, known_as in (("1.3.0", "1.3.0"), ("1.3.0+b", "1.3.0"), ("0.9.0", "1.3.0")):
        world = World(firmware=running, version=version)
        agent, _ = start(world, versions={OWN: "1.3.0"})
        assert await agent.update_now() is False
        assert agent.version() == known_as, "a name may rise, or an old release could come in"
        assert world.fetched == []
        assert agent._journal.get("floor", int) == 4, "of what runs"
        await agent.update_now()
        assert len(world.released) == 1, "looked at once"


async def test_I10_the_floor_stays_while_the_image_that_runs_may_still_go_back():
    """The guard had a fault of its own at the start, so that nothing proves the trial."""
    running = make_release().firmware
    running = release.Image("firmware", 0, 5000, running.sha256, OWN, running.payloads)
    trial = {"build": OWN, "version": "2.0.0"}
    for entries, journal in (
        (((3, PENDING), (2, VALID)), {}),
        (((3, VALID), (2, VALID)), {"trial": trial}),  # where the bootloader does not watch
    ):
        world = World(firmware=running, version="2.0.0")
        agent, events = start(world, *entries, **journal)
        agent._verdict = "idle"
        assert await agent.update_now() is False
        assert agent._journal.get("floor", int) == 0
        assert OWN not in agent._journal.get("versions")
        assert events[-1][0] == "idle"
        agent._journal.update(trial=None)
        bench.otadata((3, VALID), (2, VALID))
        await agent.update_now()
        assert agent._journal.get("floor", int) == 4, "once it has been confirmed"


async def test_F110_one_version_of_two_contents_is_refused_for_good():
    world = World(version="1.0.0")
    agent, events = start(world)
    await refuses(VersionError, agent)
    assert await agent.update_now() is False
    assert names(events).count("failed") == 1


async def test_the_running_build_under_another_products_name_is_refused():
    firmware = make_release().firmware
    firmware = release.Image("firmware", 0, 5000, firmware.sha256, OWN, firmware.payloads)
    world = World(firmware=firmware, product="radio", security_version=99)
    agent, _ = start(world)
    await refuses(ProductError, agent)
    assert agent._journal.get("floor", int) == 0


async def test_a_refusal_is_reported_once_and_the_slot_is_untouched():
    world = World(product="radio")
    agent, _ = start(world)
    bench.put(b"\x5a" * BLOCK)
    await refuses(ProductError, agent)
    await agent.update_now()
    assert [r["status"] for r in world.reports] == ["failed"]
    assert world.reports[0]["error"]["code"] == "product"
    assert bench.read(BLOCK) == b"\x5a" * BLOCK
    assert agent._failures == 0, "no back-off: it would not help"


async def test_a_known_bad_build_is_left_alone_unless_forced():
    failed = [[OTHER, "2.0.0", "it crashed", health.TRIES]]
    world = World()
    agent, _ = start(world, failed=failed)
    await refuses(KnownBadError, agent)
    assert world.reports == [], "that was told when it was rolled back"
    assert await agent.update_now() is False
    await installs(agent, force=True)
    world = World()
    agent, _ = start(world, failed=[[OTHER, "2.0.0", "power failed", health.TRIES - 1]])
    await installs(agent)


async def test_bytes_that_do_not_match_are_refused_and_may_come_right_later():
    world = World()
    world.content = bytearray(IMAGE)
    world.content[2 * BLOCK] ^= 1
    agent, _ = start(world)
    await refuses(ChecksumError, agent)
    assert bench.read(32) == b"\xff" * 32
    assert bench.states() == {0: VALID}
    world.content = IMAGE
    await installs(agent)


async def test_a_release_that_does_not_come_three_times_rests():
    world = World()
    world.content = UnreachableError("nobody there")
    agent, _ = start(world)
    for _ in range(3):
        await refuses(UnreachableError, agent)
    assert await agent.update_now() is False
    assert len(world.fetched) == 3
    agent._tried[2] -= 6 * 3600
    await refuses(UnreachableError, agent)
    agent._tried[1] = 3
    assert await agent.update_now() is False
    world.offer = {"release": HOME + "lamp/r/2.0.1.jws"}
    world.manifest = make_release(version="2.0.1")
    world.content = IMAGE
    await installs(agent)


async def test_F31_I17_a_release_rests_by_whatever_name_a_server_calls_it():
    world = World()
    world.content = UnreachableError("nobody there")
    agent, events = start(world)
    for n in range(3):
        world.offer = {"release": HOME + "lamp/r/2.0.0.jws?%d" % n}
        await refuses(UnreachableError, agent)
    world.offer = {"release": HOME + "lamp/r/2.0.0.jws?again"}
    assert await agent.update_now() is False
    assert len(world.fetched) == 3
    assert events[-1] == ("idle", {"version": "1.0.0"})
    world.content = IMAGE
    await installs(agent, force=True)


async def test_a_download_that_a_reset_has_ended_counts_as_one_that_did_not_come():
    world = World()
    mark = binascii.crc32(("2.0.0" + OTHER).encode()) & 0x7FFFFFFF
    agent, _ = start(world)
    agent._journal.set_fetching(mark)  # as it was when the power failed
    await installs(agent)
    assert agent._tried[1] == 1
    assert agent._journal.fetching() == 0
    tried = [agent._tried[0], 2, agent._tried[2], 2]
    agent, _ = start(world, tried=tried)
    agent._journal.set_fetching(mark)
    assert await agent.update_now() is False
    assert agent._tried[1] == 3 and agent._journal.fetching() == 0
    agent, _ = start(world)
    agent._journal.set_fetching(mark ^ 1)  # of another release
    await installs(agent)
    assert agent._tried == []


async def test_a_download_is_marked_while_it_is_under_way_and_no_longer():
    world = World()
    marks = []
    agent, _ = start(world)
    agent.on_event(lambda name, data: marks.append((name, agent._journal.fetching())))

    async def look(url, **kw):
        marks.append(("get", agent._journal.fetching()))
        raise UnreachableError("nobody there")

    world.get = look
    await refuses(UnreachableError, agent)
    mark = binascii.crc32(("2.0.0" + OTHER).encode()) & 0x7FFFFFFF
    assert ("get", mark) in marks and marks[-1] == ("failed", 0)
    assert agent._tried[1] == 1, "once for this poll, not twice"


async def test_an_offer_makes_no_board_retry_faster_than_it_would_itself():
    agent, _ = start(World(), settings={"poll": 3600})
    agent._poll_s = 1
    agent._failures = 5
    assert max(agent._delay_ms() for _ in range(40)) > 60_000


async def test_a_board_that_sleeps_between_polls_lets_a_release_rest_too():
    """Each wake is a boot: what is counted must not end with it."""
    world = World()
    world.content = damaged = bytearray(IMAGE)
    damaged[-40] ^= 1
    agent, _ = start(world)
    for _ in range(3):
        await refuses(ChecksumError, agent)
        agent, _ = start(world, tried=agent._journal.get("tried", list))
    fetched = len(world.fetched)
    assert await agent.update_now() is False
    assert len(world.fetched) == fetched


async def test_before_its_time_a_release_is_fetched_and_not_installed():
    """The board may sleep, or lose power, while it waits: what is staged stays so."""
    world = World()
    world.offer["install"] = 7200
    agent, events = start(world)
    assert await agent.update_now() is False
    assert bench.read(len(IMAGE)) == IMAGE and bench.states() == {0: VALID}
    assert names(events)[-2:] == ["staged", "waiting"] and events[-1][1]["seconds"] == 7200
    assert agent.facts()["staged"] == OTHER
    waiting = agent._journal.get("waiting", list)

    agent, events = start(world, (1, VALID), waiting=waiting)
    world.offer["install"] = 60
    assert await agent.update_now() is False
    assert names(events) == ["checking", "waiting"]
    assert (len(world.released), len(world.fetched)) == (1, 1), "nothing is fetched again"

    world.offer["install"] = 0
    await installs(agent)
    assert bench.states() == {0: VALID, 1: NEW}
    assert len(world.fetched) == 1
    assert len({r["attempt"] for r in world.reports}) == 1
    assert agent._journal.get("trial")["attempt"] == world.reports[0]["attempt"]
    assert agent.facts()["staged"] == ""


async def test_what_waited_in_vain_makes_room_for_another_release():
    world = World()
    world.offer["install"] = 7200
    agent, _ = start(world)
    await agent.update_now()
    world.offer = {"release": HOME + "lamp/r/2.0.1.jws", "install": 7200}
    world.manifest = ProductError("not for this board")
    await refuses(ProductError, agent)
    assert agent.facts()["staged"] == ""
    first = {r["attempt"] for r in world.reports}
    world.manifest = make_release(version="2.0.1")
    await agent.update_now()
    assert agent.facts()["staged"] == OTHER
    assert world.reports[-1]["attempt"] not in first


def test_the_board_says_what_it_has_and_how_it_started():
    agent, _ = start(World(), cause=machine.WDT_RESET)
    facts = agent.facts()
    assert facts["flash"] == 4 << 20
    assert 0 < facts["free"] < facts["flash"]
    assert facts["reset_cause"] == machine.WDT_RESET


async def test_while_otadata_names_another_slot_nothing_is_installed():
    world = World()
    agent, _ = start(world)
    bench.otadata((1, VALID), (2, VALID))
    await refuses(BusyError, agent)
    assert world.fetched == []
    bench.otadata((1, VALID))


async def test_a_trial_record_does_not_outlive_an_activation_that_failed():
    world = World()
    agent, _ = start(world)
    activate = agent._slot.activate

    def rotten():
        bench.flip(BLOCK + 1)
        activate()

    agent._slot.activate = rotten
    await refuses(ChecksumError, agent)
    assert agent._journal.get("trial") == {}
    assert bench.states() == {0: VALID}


# -- boots that owe something


async def test_update_now_proves_a_trial_first():
    world = World()
    world.offer = {}
    agent, events = start(
        world, (3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"}, confirmed=OTHER
    )
    await agent.update_now()
    assert names(events)[:2] == ["trial", "confirmed"]
    assert bench.states()[0] == VALID
    assert [r["status"] for r in world.reports] == ["confirmed"]


async def test_F13_a_trial_without_network_is_not_confirmed():
    world = World()
    world.offer = NetworkError("no route")
    bench.put(IMAGE)
    agent, events = start(
        world, (3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"}, confirmed=OTHER
    )
    await installs(agent)
    assert names(events)[-1] == "rolledback"
    assert bench.states()[0] == PENDING
    assert health.failed_builds(agent._journal) == [], "it may be the network's fault"


async def test_a_check_that_is_added_while_the_image_proves_itself_counts():
    bench.put(IMAGE)
    world = World()
    world.offer = {}
    agent, events = start(
        world, (3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"}, confirmed=OTHER
    )

    async def sleep(seconds):  # until it has been stable for so long
        if len(agent._checks) == 1:
            agent.check("late", lambda: False)

    before, asyncio.sleep = asyncio.sleep, sleep
    try:
        await installs(agent)
    finally:
        asyncio.sleep = before
    assert names(events) == ["trial", "rolledback"]
    assert events[1][1]["message"] == "check 'late' failed"


async def test_F14_a_server_in_trouble_is_a_server_that_answers():
    world = World()
    world.offer = HttpError("down", 503, "200", status=503)
    agent, events = start(
        world, (3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"}, confirmed=OTHER
    )
    await refuses(HttpError, agent)
    assert names(events)[:2] == ["trial", "confirmed"]


async def test_own_checks_come_before_the_network():
    asked = []
    world = World()
    world.offer = NetworkError("no route")
    bench.put(IMAGE)
    agent, events = start(
        world, (3, PENDING), (2, VALID), trial={"build": OWN, "version": "2.0.0"}, confirmed=OTHER
    )
    agent.check("lamp", lambda: asked.append(world.polls) or False)
    await installs(agent)
    assert asked == [0]
    assert "lamp" in events[-1][1]["message"]


async def test_an_activated_slot_gets_its_reset():
    world = World()
    bench.put(IMAGE)
    agent, _ = start(
        world,
        (1, VALID),
        (2, NEW),
        cause=machine.SOFT_RESET,
        trial={"build": OTHER},
        confirmed=OWN,
    )
    await installs(agent)
    assert world.polls == 0


# -- the application's word


async def test_the_application_may_refuse():
    world = World()
    agent, _ = start(world)
    agent.on_install(lambda step, manifest: False)
    exc = await refuses(RefusedError, agent)
    assert "2.0.0" in str(exc)
    assert world.fetched == []
    assert await agent.update_now() is False, "the same release is not asked about again"


async def test_the_application_is_asked_for_each_step_and_may_postpone():
    asked = []

    def ask(step, manifest):
        asked.append((step, manifest.version))
        return len(asked) % 2 == 0 or 0.01

    world = World()
    agent, events = start(world)
    agent.on_install(ask)
    await installs(agent)
    assert asked == [("download", "2.0.0")] * 2 + [("activate", "2.0.0")] * 2
    assert names(events).count("postponed") == 2


async def test_F101_a_hook_that_hangs_or_raises_means_not_now():
    waited, limits = [], []
    sleep, limit = asyncio.sleep, asyncio.wait_for
    rare, twinslot._RARE = twinslot._RARE, ""  # the module stays as it is made here
    from twinslot import plan

    assert plan._POSTPONE_MAX_S == 86400
    plan._POSTPONE_MAX_S = 300

    async def hang(step, manifest):
        await sleep(3600)

    def boom(step, manifest):
        return 1 // 0

    async def no_sleep(seconds):
        waited.append(seconds)

    def wait_for(coroutine, seconds):
        limits.append(seconds)
        return limit(coroutine, seconds / 10000)

    answers = [lambda step, manifest, answer=answer: answer for answer in (None, 0, -5, "5")]
    try:
        for hook in [hang, boom] + answers:
            waited.clear()
            world = World()
            agent, _ = start(world)
            agent.on_install(hook)
            asyncio.wait_for = wait_for
            asyncio.sleep = no_sleep
            try:
                await installs(agent)
            finally:
                asyncio.wait_for, asyncio.sleep = limit, sleep
            assert waited == [60] * (2 * 5), "for each step; then the update comes all the same"
    finally:
        twinslot._RARE = rare
    assert limits == [60] * (2 * 6), "only one of these has to be waited for"


async def test_F101_no_answer_puts_an_update_off_for_more_than_a_day():
    waited = []
    sleep = asyncio.sleep

    async def no_sleep(seconds):
        waited.append(seconds)

    world = World()
    agent, _ = start(world)
    agent.on_install(lambda step, manifest: 10**12)
    asyncio.sleep = no_sleep
    try:
        await installs(agent)
    finally:
        asyncio.sleep = sleep
    assert waited == [86400, 86400]


# -- two at once, listeners, memory


async def test_F100_a_second_update_is_refused_and_the_first_goes_on():
    world = World()
    agent, _ = start(world)
    gate = asyncio.Event()

    async def wait(step, manifest):
        await gate.wait()
        return True

    agent.on_install(wait)
    first = asyncio.create_task(installs(agent))
    await asyncio.sleep_ms(5)
    await refuses(BusyError, agent)
    await refuses(BusyError, agent, force=True)
    gate.set()
    await first
    assert bench.states()[1] == NEW


async def test_F100_a_cancelled_update_leaves_the_agent_usable():
    world = World()
    agent, _ = start(world)

    async def never(step, manifest):
        await asyncio.sleep(3600)

    agent.on_install(never)
    first = asyncio.create_task(agent.update_now())
    await asyncio.sleep_ms(5)
    first.cancel()
    try:
        await first
    except asyncio.CancelledError:
        pass
    agent.on_install(lambda step, manifest: True)
    await installs(agent)


async def test_a_listeners_fault_is_not_the_updates():
    world = World()
    agent, _ = start(world)
    agent.on_event(lambda name, data: 1 // 0)
    await installs(agent)


async def test_F35_running_out_of_memory_is_an_error_like_others():
    world = World()
    world.content = MemoryError("memory allocation failed")
    agent, events = start(world)
    await refuses(BusyError, agent)
    assert events[-1][0] == "failed" and events[-1][1]["code"] == "busy"
    world.content = IMAGE
    await installs(agent)


async def test_a_heap_too_small_is_said_before_anything_is_asked():
    import esp32

    world = World()
    agent, _ = start(world)
    kept = esp32.idf_heap_info
    esp32.idf_heap_info = lambda what: [(100_000, 30_000, 9_000, 9_000)]
    try:
        exc = await refuses(BusyError, agent)
    finally:
        esp32.idf_heap_info = kept
    assert "9000" in str(exc) and world.polls == 0


# -- reports


def waiting(n):
    return [
        {"attempt": "a%d" % i, "version": "1.%d.0" % i, "build": OTHER, "status": "failed"}
        for i in range(n)
    ]


async def test_F105_reports_wait_for_a_connection_and_are_told_once():
    world = World()
    world.offer = NetworkError("no route")
    agent, _ = start(world, reports=waiting(2))
    await refuses(NetworkError, agent)
    assert len(agent._journal.get("reports", list)) == 2
    world.offer = {}
    await agent.update_now()
    await agent.update_now()
    assert [r["attempt"] for r in world.reports] == ["a0", "a1"]
    assert agent._journal.get("reports", list) == []


async def test_F105_a_report_nobody_takes_is_dropped():
    for status in (400, 404, 410, 422):
        world = World()
        world.offer = {}
        agent, _ = start(world, reports=waiting(2))
        world.refuse = [HttpError("report", status, "200", status=status)]
        await agent.update_now()
        assert [r["attempt"] for r in world.reports] == ["a1"]
        assert agent._journal.get("reports", list) == []


async def test_F105_a_report_refused_for_now_is_kept_and_no_update_waits_for_it():
    for error in (
        HttpError("report", 500, "200", status=500),
        HttpError("report", 429, "200", status=429),
        HttpError("report", 408, "200", status=408),
        NetworkError("reset by peer"),
    ):
        world = World()
        agent, _ = start(world, reports=waiting(2))
        world.refuse = [error] * 9
        await installs(agent)
        assert len(agent._journal.get("reports", list)) == 2
        assert bench.states()[1] == NEW


async def test_F105_a_failure_that_could_not_be_told_is_told_later():
    world = World()
    world.content = UnreachableError("nobody there")
    agent, _ = start(world)
    world.refuse = [NetworkError("no route")] * 2  # staging, failed
    await refuses(UnreachableError, agent)
    assert world.reports == []
    world.offer = {}
    await agent.update_now()
    assert [r["status"] for r in world.reports] == ["failed"]
    assert world.reports[0]["error"]["code"] == "unreachable"


class Post:
    """A client to which a server answers that all is well."""

    async def post_json(self, url, obj, deadline_ms):
        self.body = obj
        return Body(b"{}")


async def test_a_server_is_told_of_a_failure_with_what_the_board_has_noted():
    agent, _ = start(World())
    noted = agent._journal
    noted.add_to_log("", "failed", "heap: 9 bytes free")  # of this no report ever spoke
    noted.add_to_log("2.0.0", "failed", "no route")
    client, server = Post(), Server(SETTINGS)
    report = {"attempt": "a", "status": "staging", "error": None}
    await server.report(client, agent.facts(), report)
    assert "log" not in client.body
    report = {"attempt": "a", "status": "failed", "error": {"code": "unreachable"}}
    await server.report(client, agent.facts(), report)
    lines = client.body["log"].split("\n")
    assert [line.split(" ", 1)[1] for line in lines] == [
        " failed heap: 9 bytes free",
        "2.0.0 failed no route",
    ]
    assert "log" not in report, "what may wait in the journal stays small"


# -- pace


def test_errors_back_off_with_full_jitter_and_a_ceiling():
    agent, _ = start(World(), settings={"poll": 21600})
    for failures, ceiling in ((1, 60), (2, 120), (4, 480), (7, 3600), (1000, 3600)):
        agent._failures = failures
        waits = [agent._delay_ms() for _ in range(40)]
        assert 0 <= min(waits) and max(waits) <= ceiling * 1000
        assert max(waits) > ceiling * 500, "spread over all of it"
    agent._failures = 0
    waits = [agent._delay_ms() for _ in range(40)]
    assert 0.85 * 21600e3 < min(waits) < max(waits) < 1.15 * 21600e3


def test_retry_after_is_obeyed_within_reason():
    agent, _ = start(World())
    agent._failures = 1
    agent._retry_after = 600
    assert 600_000 <= agent._delay_ms() <= 660_000
    agent._retry_after = 10**9
    agent._settings["poll"] = 0
    assert 6 * 3600_000 <= agent._delay_ms() < 6 * 3600_000 + 1000


async def test_retry_after_of_one_answer_does_not_outlive_the_next():
    world = World()
    world.offer = HttpError("busy", 503, "200", status=503, retry_after=600)
    agent, _ = start(world)
    await refuses(HttpError, agent)
    assert agent._delay_ms() >= 600_000
    world.offer = NetworkError("no route")
    await refuses(NetworkError, agent)
    assert agent._delay_ms() < 600_000


def test_the_longest_wait_fits_the_ticks_of_a_32_bit_port():
    agent, _ = start(World(), settings={"poll": 7 * 86400})  # the longest an offer may ask for
    for _ in range(20):
        assert 5 * 86400_000 < agent._delay_ms() < 1 << 29


def test_the_first_poll_has_a_constant_place_of_its_own():
    agent, _ = start(World(), settings={"poll": 21600})
    first = startup.first_delay_ms(agent)
    assert first == startup.first_delay_ms(agent) and 0 <= first <= 300_000
    places = set()
    for n in range(50):
        agent.device_id = "24:0a:c4:00:00:%02x" % n
        places.add(startup.first_delay_ms(agent) // 30_000)
    assert len(places) >= 8, places


async def test_an_offer_may_set_the_pace():
    world = World()
    world.offer = {"poll": 50}
    agent, _ = start(world, settings={"poll": 21600})
    await agent.update_now()
    assert 40_000 <= agent._delay_ms() <= 60_000


async def test_no_offer_makes_a_board_ask_all_the_time_unless_it_was_set_to():
    world = World()
    world.offer = {"poll": 1}
    for own, least in ((21600, 27_000), (30, 27_000), (7, 6_300), (1, 900)):
        agent, _ = start(world, settings={"poll": own})
        await agent.update_now()
        assert least <= agent._delay_ms() <= least * 13 // 10, own


# -- what is printed


def printed(name, data):
    """Return what the console listener prints."""
    lines = []
    kept = builtins.print
    builtins.print = lambda *args: lines.append(" ".join(str(a) for a in args))
    try:
        twinslot.agent._console(name, data)
    finally:
        builtins.print = kept
    return lines


def test_F103_text_of_a_server_can_not_pose_as_another_line():
    evil = "\x1b[2J\r\ntwinslot: confirmed version=9\n%s%n\u2028\x00" + "x" * 10_000
    lines = printed("failed", {"message": evil, "code": "http"})
    assert len(lines) == 1 and len(lines[0]) < 300
    assert lines[0].startswith("twinslot: failed ")
    for c in lines[0]:
        assert " " <= c <= "~", repr(c)


def test_a_value_is_printed_up_to_160_characters():
    assert printed("failed", {"a": "x" * 161}) == ["twinslot: failed a=" + "x" * 160]


def test_an_agent_without_its_files_says_which():
    from twinslot.errors import ConfigError

    start(World())
    settings = dict(SETTINGS, keys="/nosuch.json")
    assert "nosuch" in str(raises(ConfigError, twinslot.agent.Agent, settings))
