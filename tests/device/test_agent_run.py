"""The agent from power-on to power-on: its configuration, its loop, the watch over both, mirrors,
what a day may cost, the clock, keys, and what it owes to whom.
"""

import asyncio
import json
import os
import sys

import machine
import workbench as bench
from harness import raises
from workbench import BLOCK, NEW, PENDING, VALID
from world import (
    HOME,
    IMAGE,
    OTHER,
    OWN,
    SETTINGS,
    Body,
    Reset,
    World,
    installs,
    make_release,
    names,
    refuses,
    start,
)

import twinslot.agent
import twinslot.wifi
from twinslot import guard, health, release, startup
from twinslot.agent import Agent
from twinslot.errors import (
    BusyError,
    ConfigError,
    ExpiredError,
    FormatError,
    HttpError,
    InternalError,
    KeyringError,
    NetworkError,
    OtaError,
    ProductError,
    RefusedError,
    SecurityVersionError,
    SignatureError,
    SpaceError,
    TlsError,
    UnreachableError,
    VersionError,
)

HEAP = "2M"
TIMEOUT = 240
MIRROR = "http://mirror.example/"
TRIAL = ((3, PENDING), (2, VALID))
ON_TRIAL = {"trial": {"build": OWN, "version": "2.0.0"}, "confirmed": OTHER}


class Instead:
    """``with Instead(module, name=value):`` puts values in the place of others for a while."""

    def __init__(self, where, **values):
        self.where = where
        self.values = values

    def __enter__(self):
        self.kept = {name: getattr(self.where, name) for name in self.values}
        for name, value in self.values.items():
            setattr(self.where, name, value)

    def __exit__(self, *_):
        for name, value in self.kept.items():
            setattr(self.where, name, value)


class InsteadIn(Instead):
    """The same in a module of the package that comes and goes: it stays meanwhile."""

    def __init__(self, name, **values):
        super().__init__(None, **values)
        self.name = name

    def __enter__(self):
        self.rare = twinslot._RARE
        twinslot._RARE = ""
        self.where = getattr(twinslot, self.name)
        super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        twinslot._RARE = self.rare


class Enough(BaseException):
    """Ends what has no end."""


class Naps:
    """asyncio.sleep_ms that does not wait: it notes, and has had enough after so many."""

    def __init__(self, limit=99):
        self.naps = []
        self.limit = limit
        self.real = asyncio.sleep_ms

    async def __call__(self, ms):
        if ms:
            self.naps.append(ms)
        if len(self.naps) >= self.limit:
            raise Enough
        await self.real(0)


class Time:
    """The module ``time``, at a moment to order."""

    def __init__(self, now=0):
        self.now = now

    def time(self):
        return self.now

    def ticks_ms(self):
        return 5000

    def ticks_diff(self, a, b):
        return a - b + 7


class Clock:
    """A clock that says what it was told to, and notes what it is told."""

    trusted = True
    floor = earliest = 0

    def __init__(self, now=1795165300, lasting=None):
        self._now = now
        self._lasting = lasting
        self.heard = []

    async def ensure(self):
        self.heard.append("ensure")

    def now(self):
        return self._now

    def lasting(self):
        return self._lasting

    def doubt(self):
        self.heard.append("doubt")


async def nothing():
    pass


async def until(condition):
    """Let other tasks run until it holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep_ms(0)
    raise AssertionError("waited in vain")


async def running(agent, condition):
    """Run the agent until the condition holds."""
    task = asyncio.create_task(agent.run())
    try:
        await until(condition)
    finally:
        for one in (task, agent._watch):
            if one:
                one.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass


# -- the loop


async def test_it_polls_for_ever_each_time_after_a_pause():
    world = World()
    world.offer = {}
    agent, events = start(world, settings={"poll": 21600, "stable": 9000})
    naps = Naps()
    with Instead(asyncio, sleep_ms=naps):
        await running(agent, lambda: world.polls == 4)
    assert agent._watch is not None, "and somebody feeds the guard between polls"
    long = [ms for ms in naps.naps if ms != 1000]
    assert long[0] == startup.first_delay_ms(agent)
    assert all(19440_000 <= ms <= 23760_000 for ms in long[1:]) and len(long) >= 4
    assert names(events)[-2:] == ["checking", "idle"]


async def test_an_error_ends_a_poll_and_not_the_loop():
    world = World()
    world.offer = NetworkError("no route")
    agent, events = start(world)
    with Instead(asyncio, sleep_ms=Naps()):
        await running(agent, lambda: world.polls == 3)
    assert names(events).count("failed") == 3


async def test_news_of_a_rollback_is_told_at_once_others_wait_for_their_place():
    error = {"code": "health", "number": "OTA_012", "message": "it crashed"}
    back = {"attempt": "a", "version": "2.0.0", "build": OTHER, "status": "rolledback"}
    back["error"] = error
    world = World()
    world.offer = {}
    agent, events = start(
        world,
        settings={"poll": 21600},
        reports=[dict(back, status="failed", version="1.9.0"), back],
    )
    naps = Naps()
    with Instead(asyncio, sleep_ms=naps):
        await running(agent, lambda: world.polls == 1)
    assert events[0] == ("rolledback", dict(error, version="2.0.0"))
    assert names(events).count("rolledback") == 1
    assert startup.first_delay_ms(agent) not in naps.naps


async def test_a_trial_is_proven_at_once_without_waiting_for_a_place():
    world = World()
    world.offer = {}
    agent, events = start(world, *TRIAL, settings={"poll": 21600}, **ON_TRIAL)
    assert agent._verdict == "trial"
    naps = Naps()
    with Instead(asyncio, sleep_ms=naps):
        await running(agent, lambda: "idle" in names(events))
    assert names(events)[:2] == ["trial", "confirmed"]
    assert startup.first_delay_ms(agent) not in naps.naps


async def test_F30_after_a_reset_nobody_waits_for_a_place_the_next_one_may_come_before():
    """An application that crashes each minute, after it has counted as started."""
    for starts in (0, 1, 20):
        world = World()
        world.offer = {}
        agent, events = start(world, settings={"poll": 21600})
        agent._journal.set_starts(starts)
        naps = Naps()
        with Instead(asyncio, sleep_ms=naps):
            await running(agent, lambda events=events: "idle" in names(events))
        assert (startup.first_delay_ms(agent) in naps.naps) is (starts == 0)


async def test_what_the_boot_owes_can_fail_and_the_loop_goes_on():
    world = World()
    world.offer = {}
    agent, _ = start(world, reports=[{"status": "rolledback"}])  # a report without its members
    with Instead(asyncio, sleep_ms=Naps()):
        await running(agent, lambda: world.polls == 2)


async def test_a_step_that_slips_is_done_again_after_a_minute():
    done, slept = [], []

    async def step():
        done.append(len(done))
        if len(done) == 3:
            raise Enough
        raise ValueError("slip")

    async def sleep(seconds):
        slept.append(seconds)

    with Instead(asyncio, sleep=sleep):
        try:
            await twinslot.agent.persist(step)
            raise AssertionError("it ended")
        except Enough:
            pass
    assert done == [0, 1, 2] and slept == [60, 60]


def test_whatever_leaves_a_step_is_an_error_of_the_package():
    for error, kind, text in (
        (NetworkError("no route"), NetworkError, "no route"),
        (MemoryError("17 bytes"), BusyError, "17 bytes"),
        (ValueError("slip"), InternalError, "ValueError: slip"),
    ):
        exc = twinslot.agent.foreseen(error)
        assert text in str(exc) and type(exc) is kind


def test_F66_a_fleet_that_gets_power_back_at_once_asks_in_an_orderly_fashion():
    agent, _ = start(World(), settings={"poll": 21600})
    boards, waits = 3000, [0] * 10
    for n in range(boards):
        agent.device_id = "240ac4%06x" % n
        waits[startup.first_delay_ms(agent) // 30_001] += 1
    mean = boards // len(waits)
    assert 0.7 * mean < min(waits) and max(waits) < 1.3 * mean, waits


# -- wifi


async def test_wifi_is_kept_where_it_is_configured():
    kept = []

    async def keep(settings, name):
        kept.append((settings, name))
        await asyncio.sleep(3600)

    wifi = {"ssid": "home"}
    for settings, said in (({}, []), ({"wifi": wifi}, [wifi])):
        kept.clear()
        world = World()
        world.offer = {}
        agent, _ = start(world, settings=settings)
        with Instead(asyncio, sleep_ms=Naps()), Instead(twinslot.wifi, keep=keep):
            await running(agent, lambda world=world: world.polls == 1)
        assert kept == [(settings, agent.device_id) for settings in said]
        if said:
            agent._network.cancel()


# -- the watch


async def watched(agent, naps):
    """What the guard hears of the watch, until there were so many pauses."""
    heard = []

    async def sleep_ms(ms):
        heard.append(ms)
        if heard.count(1000) == naps:
            raise Enough

    with Instead(guard, feed=heard.append, started=lambda: heard.append("started")):
        with Instead(asyncio, sleep_ms=sleep_ms):
            try:
                await agent._supervise()
                raise AssertionError("it ended")
            except Enough:
                pass
    return heard


async def test_the_watch_feeds_every_second_and_tells_a_good_start_once():
    agent, _ = start(World(), settings={"stable": 2, "hang": 7})
    assert await watched(agent, 5) == [7, 1000] * 2 + [7, "started", 1000] + [7, 1000] * 2


async def test_a_trial_feeds_by_itself():
    agent, _ = start(World(), *TRIAL, settings={"stable": 2, "hang": 7}, **ON_TRIAL)
    assert await watched(agent, 4) == [1000, 1000, "started", 1000, 1000]


async def test_one_update_alone_is_watched_while_it_lasts():
    heard = []
    world = World()
    world.offer = {}
    agent, _ = start(world, settings={"hang": 7, "stable": 9})
    real = world.poll

    async def poll(client, facts):
        await asyncio.sleep_ms(1)
        heard.append("poll")
        return await real(client, facts)

    world.poll = poll
    instead = {
        "feed": heard.append,
        "stop": lambda: heard.append("stop"),
        "started": lambda: heard.append("started"),
    }
    sleep_ms = asyncio.sleep_ms
    with Instead(guard, **instead), Instead(asyncio, sleep_ms=lambda ms: sleep_ms(min(ms, 30))):
        await agent.update_now()
        assert heard == [7, "poll", "stop", "started"]
        await sleep_ms(50)
        assert heard == [7, "poll", "stop", "started"], "nobody feeds any more"
        heard.clear()
        agent._watch = asyncio.create_task(nothing())
        await agent.update_now()
        assert heard == ["poll"], "the loop has a watch of its own"


async def test_garbage_is_collected_oftener_for_a_release_unless_the_application_has_its_own_way():
    import gc

    before = gc.threshold()
    try:
        for found, wanted in ((guard.GC_THRESHOLD, guard.GC_THRESHOLD // 4), (20_000, 20_000)):
            for error in (None, NetworkError("gone")):
                world = World()
                agent, _ = start(world)
                seen = []
                real = world.release

                async def release(*words, real=real, error=error, seen=seen):
                    seen.append(gc.threshold())
                    if error:
                        raise error
                    return await real(*words)

                world.release = release
                gc.threshold(found)
                if error:
                    await refuses(NetworkError, agent)
                else:
                    await installs(agent)
                assert seen == [wanted] and gc.threshold() == found
    finally:
        gc.threshold(before)


async def test_checks_are_asked_in_their_order_and_the_source_last():
    asked = []

    class Asked(World):
        async def poll(self, client, facts):
            asked.append("source")
            return await super().poll(client, facts)

    world = Asked()
    world.offer = {}
    agent, _ = start(world, *TRIAL, **ON_TRIAL)
    for name in ("sensor", "display", "radio"):
        agent.check(name, lambda name=name: asked.append(name) or True)
    await agent.update_now()
    assert asked[:4] == ["sensor", "display", "radio", "source"]


async def test_a_trial_is_fed_by_its_proof_and_then_let_go():
    heard = []
    world = World()
    world.offer = {}
    agent, _ = start(world, *TRIAL, settings={"hang": 7}, **ON_TRIAL)
    agent._watch = asyncio.create_task(nothing())
    with Instead(guard, feed=heard.append, stop=lambda: heard.append("stop")):
        await agent.update_now()
    assert heard[0] == 7 and heard[-1] == "stop" and set(heard[:-1]) == {7}
    assert agent._verdict == "idle"
    await agent.update_now()


async def test_a_trial_that_can_neither_be_proven_nor_left_is_told_and_the_board_goes_on():
    world = World()
    world.offer = {}
    agent, events = start(world, *TRIAL, **ON_TRIAL)

    async def prove(trial):
        raise twinslot.errors.RollbackError("no way back")

    from twinslot import trial  # the agent has unloaded the one of other tests

    with Instead(trial.Trial, prove=prove):
        await agent.update_now()
    assert [n for n in names(events) if n != "checking"] == ["trial", "failed", "idle"]
    assert events[1][1]["message"] == "no way back"


async def test_the_network_is_no_fault_of_an_image_where_only_dates_stand_in_the_way():
    world = World()
    error = TlsError("expired")
    error.dates = True
    for offer, good in (
        (error, True),
        (TlsError("not signed"), False),
        (HttpError("down", 500, "200", status=500), True),
        (HttpError("no answer"), False),
    ):
        world.offer = offer
        agent, _ = start(world)
        agent._clock = clock = Clock()
        try:
            assert await startup.reachable(agent) is True
            assert good, offer
        except NetworkError as exc:
            assert not good and exc is offer
        assert clock.heard == ["ensure"]


# -- the configuration


def configure(path="/ota.json", **change):
    settings = dict(SETTINGS, **change)
    with open("/keys.json", "w") as f:
        n = "v" + "7" * 340 + "Q"
        json.dump({"keys": [{"kty": "RSA", "n": n, "e": "AQAB", "alg": "PS256"}]}, f)
    with open(path, "w") as f:
        json.dump(settings, f)


def remove(*paths):
    for path in paths:
        try:
            os.remove(path)
        except OSError:
            pass


async def test_a_configuration_that_has_worked_is_kept_once():
    world = World()
    world.offer = NetworkError("no route")
    start(world)
    configure()
    remove("/ota.json.good")
    agent = Agent.from_config()
    guard.stop()
    agent._source = agent._trust = world
    agent._ours = False  # as if the application had given it
    await refuses(NetworkError, agent)
    assert "ota.json.good" not in os.listdir("/")
    world.offer = {}
    await agent.update_now()
    assert "ota.json.good" in os.listdir("/")
    remove("/ota.json.good")
    await agent.update_now()
    assert "ota.json.good" not in os.listdir("/"), "it has worked before"
    remove("/ota.json")


def test_the_configuration_says_where_offers_come_from():
    start(World())
    for source in ("static", "server"):
        made = Agent(dict(SETTINGS, source=source))._ask_source()
        assert type(made).__name__.lower() == source
    guard.stop()


def test_without_an_agent_the_application_runs_on_unwatched():
    start(World())
    remove("/ota.json", "/ota.json.good")
    heard = []
    with Instead(guard, stop=lambda: heard.append("stop")):
        raises(ConfigError, Agent.from_config)
    assert heard == ["stop"]


def test_an_image_on_trial_that_makes_no_agent_goes_back():
    remove("/ota.json", "/ota.json.good")
    bench.put(IMAGE)
    agent, _ = start(World(), *TRIAL, **ON_TRIAL)
    raises(Reset, Agent.from_config)
    failed = agent._journal.get("failed", list)
    assert failed[0][0] == OWN and "ota.json" in failed[0][2]
    assert OWN in health.failed_builds(agent._journal), "not tried again"


def test_an_image_on_trial_without_a_way_back_stays():
    remove("/ota.json", "/ota.json.good")
    start(World(), *TRIAL, **ON_TRIAL)
    bench.erase()
    raises(ConfigError, Agent.from_config)


def test_a_version_is_the_installed_one_or_the_images_own_or_the_configured_one():
    agent, _ = start(World(), versions={OWN: "3.0.0"})
    agent._running["version"] = "2.0.0"
    assert agent.version() == "3.0.0"
    agent._journal.update(versions=None)
    assert agent.version() == "2.0.0"
    agent._running["version"] = ""
    assert agent.version() == "1.0.0"
    agent, _ = start(World(), settings={"version": ""})
    assert agent.version() == "0.0.0"


def test_what_a_board_tells_about_itself():
    agent, _ = start(World(), settings={"labels": ["a"], "channel": "beta", "hardware": "H"})
    facts = agent.facts()
    assert (facts["product"], facts["channel"], facts["hardware"]) == ("lamp", "beta", "H")
    assert (facts["current_version"], facts["current_build"]) == ("1.0.0", OWN)
    assert (facts["chip_id"], facts["labels"]) == (0, ["a"])
    assert facts["device_id"] == agent.device_id and len(agent.device_id) == 12
    assert facts["agent"] == twinslot.__version__
    assert facts["micropython"].split(".") == [str(n) for n in sys.implementation.version[:3]]


def test_the_clock_starts_from_what_the_journal_knows():
    agent, _ = start(World(), time=1800000000, issued=1795165200)
    assert agent._clock._bound == 1800000000 and agent._clock._signed == 1795165200
    agent, _ = start(World(), issued=5)
    assert agent._clock._signed == twinslot.agent.BUILD_FLOOR


# -- what is told to whom


async def test_a_report_is_kept_until_the_server_has_taken_it_or_never_will():
    report = {"attempt": "a", "version": "1", "build": OTHER, "status": "failed", "error": None}
    for status, kept in (
        (None, False),
        (0, True),
        (399, True),
        (400, False),
        (408, True),
        (429, True),
        (499, False),
        (500, True),
    ):
        world = World()
        world.offer = {}
        world.refuse = [status if status is None else HttpError("no", status, "", status=status)]
        agent, _ = start(world, reports=[report])
        await agent.update_now()
        assert agent._journal.get("reports", list) == [report] * kept, status


async def test_reports_go_to_the_server_itself_over_a_verified_connection_only():
    class Regardless(World):
        async def poll(self, client, facts):
            self.polls += 1
            error = TlsError("expired")
            error.dates = True
            raise error

        def regardless(self, error, counts):
            assert counts, "the server itself was asked"
            return self.other

    world = Regardless()
    world.other = World()
    world.other.documents = {HOME + "lamp/stable.json": {"release": "r/2.0.0.jws"}}
    waiting = {"attempt": "a", "version": "1", "build": OTHER, "status": "failed", "error": None}
    agent, events = start(world, reports=[waiting])
    agent._clock = clock = Clock()
    world.refuse = [AssertionError("told over a connection that proves nothing")]
    await installs(agent)
    assert names(events)[:3] == ["checking", "failed", "staging"]
    assert world.reports == [] and world.other.reports == []
    assert agent._journal.get("reports", list) == [waiting], "and kept"
    assert "doubt" in clock.heard
    assert world.other.fetched[-1] == HOME + "lamp/blobs/a.bin"


async def test_after_a_poll_that_worked_the_connections_dates_are_in_order():
    world = World()
    world.offer = {}
    said = []
    world.verified = lambda: said.append("verified")
    agent, _ = start(world)
    await agent.update_now()
    assert said == ["verified"]


async def test_mirrors_are_asked_in_turn_where_the_network_fails_and_told_nothing():
    class Away(World):
        async def poll(self, client, facts):
            self.polls += 1
            raise UnreachableError("nobody there")

    world = Away()
    second = "http://second.example/"
    world.documents = {
        MIRROR + "lamp/stable.json": NetworkError("reset"),
        second + "lamp/stable.json": {"release": "r/2.0.0.jws"},
    }
    agent, _ = start(world, settings={"mirrors": [MIRROR, second]})
    await installs(agent)
    at = [HOME, MIRROR, second]
    assert world.polls == 1
    assert world.fetched == [base + "lamp/stable.json" for base in at[1:]] + [
        second + "lamp/blobs/a.bin"
    ]
    assert world.reports == []


async def test_a_server_that_answers_needs_no_mirror_and_every_poll_starts_with_it():
    world = World()
    world.offer = {}
    agent, _ = start(world, settings={"mirrors": [MIRROR]})
    await agent.update_now()
    assert world.polls == 1 and world.fetched == []
    world.offer = NetworkError("no route")
    world.documents = {MIRROR + "lamp/stable.json": {"poll": 60}}
    await agent.update_now()
    await agent.update_now()
    assert world.polls == 3, "the server first"
    world.offer = FormatError("no offer")
    await refuses(FormatError, agent)
    assert len(world.fetched) == 2, "only the network's faults lead to a mirror"


async def test_a_release_that_was_refused_is_known_by_its_name_at_a_mirror_too():
    world = World(product="radio")
    agent, _ = start(world, settings={"mirrors": [MIRROR]})
    await refuses(ProductError, agent)
    world.offer = NetworkError("no route")
    world.documents = {MIRROR + "lamp/stable.json": {"release": "r/2.0.0.jws"}}
    assert await agent.update_now() is False
    assert len(world.released) == 1


async def test_the_source_forgets_what_led_to_an_error():
    world = World()
    said = []
    world.forget = lambda: said.append("forget")
    world.offer = {}
    agent, _ = start(world)
    await agent.update_now()
    assert said == []
    world.offer = NetworkError("no route")
    await refuses(NetworkError, agent)
    assert said == ["forget"]


async def test_the_clock_is_asked_before_and_doubted_after_a_failure_of_tls():
    world = World()

    def again(error, counts):
        raise error

    world.regardless = again
    for error, heard in (
        (NetworkError("no route"), ["ensure"]),
        (TlsError("expired"), ["ensure", "doubt"]),
    ):
        world.offer = error
        agent, _ = start(world)
        agent._clock = clock = Clock()
        await refuses(type(error), agent)
        assert clock.heard == heard


async def test_a_slip_of_our_own_is_noted_once():
    world = World()
    agent, _ = start(world)
    agent._journal.add_to_log("1.1.0", "failed", "of another kind")
    for error in (ValueError("slip"), ValueError("slip"), ValueError("another")):
        world.offer = error
        await refuses(InternalError, agent)
    assert [entry[1:] for entry in agent._journal.log()[1:]] == [
        ["", "failed", "ValueError: slip"],
        ["", "failed", "ValueError: another"],
    ]
    world.offer = NetworkError("no route")
    await refuses(NetworkError, agent)
    assert len(agent._journal.log()) == 3


async def test_want_of_memory_is_noted_once_however_many_bytes_there_are():
    agent, _ = start(World())
    for free in (9000, 8123):
        heap = Heap(free)
        with Instead(twinslot, gc=heap), InsteadIn("plan", gc=heap):
            await refuses(BusyError, agent)
    entry = agent._journal.log()[-1]
    assert len(agent._journal.log()) == 1 and entry[2] == "failed"
    assert "heap" in entry[3] and "9000" in entry[3]


async def test_a_long_slip_is_told_once_too():
    world = World()
    world.offer = ValueError("x" * 200)
    agent, _ = start(world)
    for _ in range(2):
        await refuses(InternalError, agent)
    assert len(agent._journal.log()) == 1


async def test_failures_are_counted_while_trying_again_may_help():
    world = World()
    agent, _ = start(world)
    for error, count in (
        (NetworkError("no route"), 1),
        (NetworkError("no route"), 2),
        (RefusedError("no"), 0),
        (NetworkError("no route"), 1),
    ):
        world.offer = error
        await refuses(type(error), agent)
        assert agent._failures == count
    world.offer = {}
    await agent.update_now()
    assert agent._failures == 0


def test_a_board_that_polls_often_backs_off_no_further():
    agent, _ = start(World(), settings={"poll": 5})
    agent._failures = 9
    assert max(agent._delay_ms() for _ in range(40)) < 5000
    agent._settings["poll"] = 0
    assert max(agent._delay_ms() for _ in range(40)) < 1000


def test_each_failure_doubles_the_pause():
    agent, _ = start(World(), settings={"poll": 21600})
    for failures in range(1, 7):
        agent._failures = failures
        longest = max(agent._delay_ms() for _ in range(200))
        assert 45000 << (failures - 1) < longest < 60000 << (failures - 1)


class Dice:
    """The module ``random``, with an order what to draw."""

    def __init__(self, drawn):
        self.drawn = drawn
        self.asked = []

    def getrandbits(self, n):
        self.asked.append(n)
        return self.drawn


def test_pauses_are_drawn_from_all_of_their_range_and_no_more():
    agent, _ = start(World(), settings={"poll": 21600})
    for failures, bits, drawn, ms in (
        (0, 8, 0, 21600 * 900),
        (0, 8, 199, 21600 * 1099),
        (0, 8, 200, 21600 * 900),
        (1, 24, 0, 0),
        (1, 24, 59_999, 59_999),
        (1, 24, 60_000, 0),
        (9, 24, 3_599_999, 3_599_999),
    ):
        agent._failures = failures
        dice = Dice(drawn)
        with Instead(twinslot.agent, random=dice):
            assert agent._delay_ms() == ms
        assert dice.asked == [bits]


def test_a_boards_place_after_a_power_cut_is_by_its_number():
    # Of sha256sum: the first 24 bits, modulo 300,001 or, where it polls each minute, 60,001.
    for name, poll, place in (
        ("240ac4000001", 21600, 185455),
        ("240ac4000001", 60, 5284),
        ("240ac4fffffe", 21600, 173025),
        ("240ac4fffffe", 60, 52819),
    ):
        agent, _ = start(World(), settings={"poll": poll})
        agent.device_id = name
        assert startup.first_delay_ms(agent) == place


# -- offers


async def test_a_rollout_that_has_not_come_to_this_board_is_no_offer():
    world = World()
    agent, events = start(world)
    for force in (False, True):
        world.offer["rollout"] = {"percent": 0, "seed": "s"}
        assert await agent.update_now(force) is False
        assert world.released == [] and names(events)[-1] == "idle"
    world.offer["rollout"] = {"percent": 100, "seed": "s"}
    await installs(agent)


async def test_force_makes_no_offer_out_of_nothing():
    world = World()
    world.offer = {}
    agent, _ = start(world)
    assert await agent.update_now(force=True) is False
    assert world.released == []


async def test_a_newer_keyring_is_taken_first_and_opens_what_was_refused():
    world = World(product="radio")
    asked = []

    async def renew(client, version, base):
        asked.append((version, base))
        return version if version > 1 else None

    world.renew = renew
    agent, events = start(world, tried=[1, 2, 3, 4])
    await refuses(ProductError, agent)
    world.offer["keyring"] = 1
    assert await agent.update_now() is False, "nothing new"
    assert agent._tried == [1, 2, 3, 4]
    world.offer["keyring"] = 2
    world.manifest = make_release()
    await installs(agent)
    assert asked == [(0, HOME), (1, HOME), (2, HOME)]
    assert ("keyring", {"version": 2}) in events
    assert agent._tried == []


async def test_a_keyring_that_can_not_be_taken_keeps_no_release_away():
    world = World()

    async def renew(client, version, base):
        raise KeyringError("not by a root")

    world.renew = renew
    agent, events = start(world)
    await installs(agent)
    assert names(events)[:3] == ["checking", "failed", "staging"]
    assert events[1][1]["code"] == "keyring"


async def test_the_time_is_kept_for_the_next_boot_once_a_day():
    world = World()
    world.offer = {}
    for known, lasting, kept in (
        (1000, None, 1000),
        (1000, 1000 + 86400, 1000),
        (1000, 1000 + 86401, 1000 + 86401),
    ):
        agent, _ = start(world, time=known)
        agent._clock = clock = Clock(lasting=lasting)
        await agent.update_now()
        assert agent._journal.get("time", int) == kept
        assert clock.heard == ["ensure"]


async def test_the_memory_that_an_update_needs_is_asked_for_to_the_byte():
    import esp32

    world = World()
    world.offer = {}
    need = twinslot.plan._TLS_NEED
    for largest, good in ((need, True), (need - 1, False)):
        agent, _ = start(world)
        regions = lambda what, n=largest: [(9, 9, 9, 9), (100_000, 50_000, n, n - 1)]  # noqa: E731
        with Instead(esp32, idf_heap_info=regions):
            if good:
                await agent.update_now()
            else:
                await refuses(BusyError, agent)
    need, polls = twinslot.plan._HEAP_NEED, world.polls
    agent, _ = start(world)
    heap = Heap(need - 1)
    with Instead(twinslot, gc=heap), InsteadIn("plan", gc=heap):
        assert "heap" in str(await refuses(BusyError, agent))
    assert world.polls == polls
    heap = Heap(need)
    with Instead(twinslot, gc=heap), InsteadIn("plan", gc=heap):
        await agent.update_now()


class Heap:
    """The module ``gc``, of a heap that has so many bytes once it is collected."""

    def __init__(self, free):
        self.free = free
        self.collected = False

    def collect(self):
        self.collected = True

    def mem_free(self):
        return self.free if self.collected else 0


# -- a release


async def test_only_what_did_not_come_is_tried_less_often():
    world = World(product="radio")
    agent, _ = start(world)
    await refuses(ProductError, agent)
    assert agent._tried == [], "it came, and was refused"
    world = World()
    world.manifest = UnreachableError("nobody there")
    agent, _ = start(world)
    for _ in range(3):
        await refuses(UnreachableError, agent)
    assert await agent.update_now() is False
    assert len(world.released) == 3


async def test_a_rest_ends_after_six_hours_and_tries_start_anew():
    world = World()
    world.manifest = UnreachableError("nobody there")
    agent, _ = start(world)
    clock = Time(1_000_000)
    with InsteadIn("tries", time=clock):
        for _ in range(3):
            await refuses(UnreachableError, agent)
        crc = agent._tried[0]
        agent._counted = False  # the next poll
        for later, rests in ((0, True), (6 * 3600 - 1, True), (6 * 3600, False)):
            clock.now = 1_000_000 + later
            assert twinslot.tries.rests(agent, agent._name(world.offer["release"])) is rests
            assert agent._tried == ([crc, 3, 1_000_000, 3] if rests else [])
            assert agent._journal.get("tried", list) == agent._tried
        await refuses(UnreachableError, agent)
        assert agent._tried[1:] == [1, clock.now, 1]
        assert agent._journal.get("tried", list) == agent._tried


async def test_a_board_without_a_clock_rests_as_long_after_each_start():
    """Its time begins anew with the power: it is earlier than the last try, and must not count as
    the end of the rest."""
    world = World()
    world.manifest = UnreachableError("nobody there")
    agent, _ = start(world)
    clock = Time(1_000)
    name = agent._name(world.offer["release"])
    with InsteadIn("tries", time=clock):
        for _ in range(3):
            await refuses(UnreachableError, agent)
        clock.now = 20
        agent._counted = False  # the next poll
        for uptime_s, rests in ((20, True), (6 * 3600 - 1, True), (6 * 3600, False)):
            clock.ticks_ms = lambda ms=uptime_s * 1000: ms
            assert twinslot.tries.rests(agent, name) is rests


class Outage:
    """A release that does not come, and a board that is switched off and on meanwhile."""

    def __init__(self):
        self.world = World()
        self.world.manifest = UnreachableError("nobody there")
        self.tried = []
        self.writes = 0

    async def tries_in(self, starts, polls=1, known=None, keeps_time=False):
        """Numbers of the starts, from 1 on, in which the release was asked for."""
        found = []
        for n in range(1, starts + 1):
            if not keeps_time:
                machine.RTC().datetime((2000, 1, 1, 5, 0, 0, 5, 0))
            agent, _ = start(self.world, tried=self.tried)
            if known:
                assert agent._clock.observe(known, "user")
            agent._journal._store = self.counted(agent._journal._store)
            before = len(self.world.released)
            for _ in range(polls):
                try:
                    await agent.update_now()
                except UnreachableError:
                    pass
            if len(self.world.released) > before:
                found.append(n)
            self.tried = agent._journal.get("tried", list)
        return found

    def counted(self, store):
        self.writes = 0

        def wrote(key, body):
            self.writes += 1
            store(key, body)

        return wrote


async def test_a_board_without_a_clock_that_is_never_on_for_long_tries_again_less_and_less_often():
    """Nothing tells it how long it was off: it would rest for ever, or never."""
    found = await Outage().tries_in(15)
    assert found[:3] == [1, 2, 3]
    gaps = [found[i + 1] - found[i] for i in range(2, len(found) - 1)]
    assert len(gaps) > 2
    assert all(gaps[i + 1] >= 2 * gaps[i] for i in range(len(gaps) - 1)), found


async def test_a_start_without_a_clock_counts_once_and_wears_flash_by_one_write():
    outage = Outage()
    assert (await outage.tries_in(5))[-1] == 4
    assert await outage.tries_in(1, polls=5) == []
    assert outage.writes == 1
    outage.world.manifest = make_release()
    for _ in range(9):
        try:
            assert await outage.tries_in(1) == []
        except Reset:
            return
    raise AssertionError("it rests for ever")


async def test_starts_do_not_shorten_the_rest_of_a_board_that_knows_the_time():
    """Because it was told, or because its clock goes on over deep sleep and resets."""
    assert await Outage().tries_in(9, known=1_800_000_000) == [1, 2, 3]
    assert await Outage().tries_in(9, keeps_time=True) == [1, 2, 3]


async def test_the_last_try_before_a_rest_asks_the_mirror_too():
    world = World()
    world.manifest = UnreachableError("nobody there")
    world.documents = {MIRROR + "lamp/stable.json": {"release": "r/2.0.0.jws"}}
    agent, _ = start(world, settings={"mirrors": [MIRROR]})
    for n in (2, 4, 6):
        await refuses(UnreachableError, agent)
        assert len(world.released) == n
    assert await agent.update_now() is False
    assert len(world.released) == 6


async def test_F31_releases_that_take_turns_rest_together():
    """Each is genuine, and its payload is not: flash wears, and data costs, for either. What does
    not verify must not make the count of what does begin anew."""
    damaged = bytearray(IMAGE)
    damaged[-40] ^= 1
    genuine = ("2.0.0", "2.0.1"), ("2.0.0",) * 2, ["2.0.%d" % n for n in range(11)]
    for versions in genuine:
        world = World()
        world.content = damaged
        agent, _ = start(world)
        clock = Time(1_000_000)
        with InsteadIn("tries", time=clock):
            for n in range(11):
                version = versions[n % len(versions)]
                world.offer = {"release": HOME + "lamp/r/%s.jws" % version}
                world.manifest = make_release(version=version)
                await fails_or_rests(agent)
                world.offer = {"release": HOME + "lamp/r/no%d.jws" % n}
                world.manifest = SignatureError("garbage")
                await fails_or_rests(agent)
                clock.now += 60
            assert 3 <= len(world.fetched) <= 12
            clock.now += 6 * 3600
            world.content = IMAGE
            world.offer = {"release": HOME + "lamp/r/3.0.0.jws"}
            world.manifest = make_release(version="3.0.0")
            await installs(agent)


async def test_F31_another_release_has_three_tries_of_its_own_and_all_have_twelve():
    world = World()
    world.content = bytearray(IMAGE)
    world.content[-40] ^= 1
    agent, _ = start(world)
    clock = Time(1_000_000)
    with InsteadIn("tries", time=clock):
        for n in range(20):
            version = "2.0.%d" % (0 if n == 0 else 1 if n < 8 else n)
            world.offer = {"release": HOME + "lamp/r/%s.jws" % version}
            world.manifest = make_release(version=version)
            await fails_or_rests(agent)
            clock.now += 60
            if n == 7:
                assert len(world.fetched) == 1 + 3
    assert len(world.fetched) == 12


async def test_F31_what_failed_six_hours_ago_counts_with_nothing_that_fails_now():
    world = World()
    agent, _ = start(world)
    clock = Time(1_000_000)
    with InsteadIn("tries", time=clock):
        for n in range(16):
            world.offer = {"release": HOME + "lamp/r/2.0.%d.jws" % n}
            world.manifest = UnreachableError("nobody there")
            await fails_or_rests(agent)
            clock.now += 6 * 3600 if n == 7 else 60
    assert len(world.released) == 16


async def test_a_release_that_rests_is_not_asked_for_again_in_the_start_of_its_last_try():
    outage = Outage()
    await outage.tries_in(2, polls=2)
    assert len(outage.world.released) == 3


class Breaks(Body):
    """A connection that breaks after so many bytes."""

    def __init__(self, content, after):
        super().__init__(content)
        self._after = after

    def take(self, view, n):
        if self.received >= self._after:
            raise UnreachableError("gone")
        return super().take(view, min(n, self._after - self.received))


async def test_a_download_that_came_to_a_checkpoint_is_no_try_in_vain():
    image = bench.make_image(18 * BLOCK, version="2.0.0")
    payload = release.Payload("blobs/a.bin", "identity", len(image), 0, None, None)
    sha256, build = bench.signed(image).sha256, bench.signed(image).build
    firmware = release.Image("firmware", 0, len(image), sha256, build, [payload])
    for after, tries in ((15 * BLOCK, 1), (17 * BLOCK, 0)):
        world = World()
        world.manifest = make_release(firmware=firmware)
        agent, _ = start(world)

        async def get(url, **kw):
            return Breaks(image, after)  # noqa: B023

        world.get = get
        await refuses(UnreachableError, agent)
        assert agent._journal.get("tried", list)[1:2] == [1] * tries


async def fails_or_rests(agent):
    try:
        await agent.update_now()
    except OtaError:
        pass


async def test_a_name_that_once_led_to_another_release_is_good_again_after_a_day():
    """Names are not signed: who held the server for an hour may have used that of the next."""
    world = World(version="0.9.0")
    agent, _ = start(world)
    clock = Time()
    with InsteadIn("tries", time=clock):
        await refuses(VersionError, agent)
        world.manifest = make_release()
        clock.ticks_ms = lambda: 5000 + 86_399_000
        assert await agent.update_now() is False
        clock.ticks_ms = lambda: 5000 + 86_400_000
        await installs(agent)


async def test_an_expired_release_is_refused_without_a_clock_where_something_newer_was_signed():
    day = 86400
    issued = make_release().issued
    for newest, expired in ((issued + day - 1, False), (issued + day, True), (0, False)):
        agent, _ = start(World(expires=issued + day), issued=newest)
        assert not agent._clock.trusted
        if expired:
            await refuses(ExpiredError, agent)
        else:
            await installs(agent)


async def test_F78_a_root_takes_back_a_floor_and_a_date_that_a_thief_has_signed():
    """The thief of a release key names the image that runs, with numbers of his own."""
    f = make_release().firmware
    running = release.Image(f.slot, f.chip_id, f.size, f.sha256, OWN, f.payloads)
    world = World(version="1.0.5", firmware=running, security_version=(1 << 30) - 1)
    agent, _ = start(world, issued=4_000_000_000)
    assert await agent.update_now() is False
    world.offer = {"release": HOME + "lamp/r/2.0.0.jws", "keyring": 2}
    world.manifest = make_release(expires=1_800_000_000)
    agent._done = None
    await refuses(SecurityVersionError, agent)

    async def renew(client, version, base):  # as Keyring.take does
        agent._journal.update(keyring=version, floor=3, issued=None)
        return version

    world.renew = renew
    await installs(agent)


async def test_a_try_counts_once_however_many_mirrors_failed():
    world = World()
    world.manifest = UnreachableError("nobody there")
    world.documents = {MIRROR + "lamp/stable.json": {"release": "r/2.0.0.jws"}}
    agent, _ = start(world, settings={"mirrors": [MIRROR]})
    await refuses(UnreachableError, agent)
    assert len(world.released) == 2
    assert agent._tried[1] == 1
    await refuses(UnreachableError, agent)
    assert agent._tried[1] == 2


async def test_a_count_that_can_not_be_kept_is_no_error_of_its_own():
    world = World()
    world.manifest = UnreachableError("nobody there")
    agent, _ = start(world)

    def full(key, body):
        raise SpaceError("full")

    agent._journal._store = full
    await refuses(UnreachableError, agent)
    assert agent._tried[1] == 1


async def test_a_failure_that_lasts_is_logged_once_whatever_its_numbers():
    world = World()
    agent, _ = start(world)
    for text, n in (
        ("%d of " + "x" * 70 + " bytes", 1),  # the log cuts it, behind more or fewer digits
        ("%d of " + "y" * 70 + " bytes", 2),
        ("%d bytes", 3),
        ("%d bytes, and more", 4),  # what was kept whole is no beginning of another
    ):
        for number in (9, 1, 10, 123456, 77):
            world.offer = RuntimeError(text % number)
            await refuses(InternalError, agent)
            assert len(agent._journal.log()) == n, (text, number)


async def test_what_is_reported_of_an_attempt():
    world = World()
    agent, events = start(world)
    with Instead(twinslot.agent, time=Time(5)):
        await installs(agent)
    first, last = world.reports
    assert len(first["attempt"]) == 12 and first["attempt"] == last["attempt"]
    assert (first["version"], first["build"], first["bytes"]) == ("2.0.0", OTHER, 0)
    assert (last["status"], last["bytes"], last["error"]) == ("staged", len(IMAGE), None)
    said = dict(events)
    assert said["staging"] == {"version": "2.0.0", "size": len(IMAGE)}
    assert said["staged"] == {"version": "2.0.0", "bytes": len(IMAGE), "ms": 7}


async def test_a_failure_is_logged_and_reported_with_its_version():
    world = World(product="radio")
    agent, _ = start(world)
    await refuses(ProductError, agent)
    report = world.reports[0]
    assert (report["version"], report["build"], report["bytes"]) == ("2.0.0", OTHER, 0)
    assert agent._journal.log()[-1][1:3] == ["2.0.0", "failed"]


async def test_the_running_image_by_a_newer_name_is_idle():
    image = make_release().firmware
    firmware = release.Image("firmware", 0, 5000, image.sha256, OWN, image.payloads)
    world = World(firmware=firmware, version="1.3.0")
    agent, events = start(world, versions={OWN: "1.2.0"})
    await agent.update_now()
    assert events[-1] == ("idle", {"version": "1.3.0"})
    world = World(firmware=firmware, version="1.1.0", security_version=2)
    agent, events = start(world, versions={OWN: "1.2.0"}, floor=3)
    await agent.update_now()
    assert agent._journal.get("versions") == {OWN: "1.2.0"}
    assert agent._journal.get("floor", int) == 3, "never lower"


async def test_what_judges_a_release_is_not_there_while_it_comes_nor_between_polls():
    there = []

    class Watching(World):
        async def get(self, url, **kw):
            there.append("twinslot.semver" in sys.modules)
            return await super().get(url, **kw)

    agent, _ = start(Watching())
    await installs(agent)
    assert there == [False]
    image = make_release().firmware
    firmware = release.Image("firmware", 0, 5000, image.sha256, OWN, image.payloads)
    agent, _ = start(World(firmware=firmware, version="1.3.0"))
    await agent.update_now()
    assert "twinslot.semver" not in sys.modules


async def test_a_download_that_failed_holds_nothing():
    world = World()
    world.content = UnreachableError("nobody there")
    agent, _ = start(world)
    await refuses(UnreachableError, agent)
    assert agent._slot._image is None


def test_a_release_is_called_by_its_place_in_the_tree():
    agent, _ = start(World())
    assert agent._name(HOME + "lamp/r/1.jws") == "lamp/r/1.jws"
    for other in (None, "http://other.example/lamp/r/1.jws"):
        assert agent._name(other) == other


async def test_an_activated_image_gets_its_reset_where_something_kept_it():
    world = World()
    agent, _ = start(world)
    bench.put(IMAGE)
    agent._journal.update(trial={"build": OTHER})
    bench.otadata((1, VALID), (2, NEW))
    await installs(agent)
    assert world.fetched == []
    bench.otadata((1, VALID))


async def test_the_connection_is_closed_before_the_slot_is_activated_and_after_any_poll():
    world = World()
    said = []

    async def close():
        said.append("close")

    world.close = close
    agent, _ = start(world)
    activate = agent._slot.activate

    def noted():
        said.append("activate")
        activate()

    agent._slot.activate = noted
    await installs(agent)
    assert said[:2] == ["close", "activate"]
    world.offer = {}
    said.clear()
    agent, _ = start(world)
    await agent.update_now()
    assert said == ["close"]


async def test_what_activation_writes_down():
    world = World(security_version=6, issued=1795165200)
    agent, _ = start(world, settings={"hang": 33}, issued=1795165100, versions={"x": "0.1.0"})
    await installs(agent)
    trial = agent._journal.get("trial")
    assert (trial["security"], trial["hang"], trial["back"]) == (6, 33, OWN)
    assert trial["attempt"] == world.reports[0]["attempt"]
    assert agent._journal.get("issued", int) == 1795165200
    assert agent._journal.get("versions") == {OWN: "1.0.0"}
    agent, _ = start(world, issued=1795165300)
    await installs(agent)
    assert agent._journal.get("issued", int) == 1795165300, "never older"


# -- fetched now, installed later


async def test_a_release_that_may_only_be_installed_later_is_fetched_and_waits():
    asked = []
    world = World()
    world.offer["install"] = 3600
    agent, events = start(world)
    agent.on_install(lambda step, manifest: asked.append(step) or True)
    assert await agent.update_now() is False
    assert names(events)[-2:] == ["staged", "waiting"] and events[-1][1] == {"seconds": 3600}
    assert bench.read(len(IMAGE)) == IMAGE and bench.states() == {0: VALID}
    assert asked == ["download"]
    waiting = agent._journal.get("waiting", list)
    assert waiting[:2] == [OTHER, world.reports[0]["attempt"]]
    assert agent.facts()["staged"] == OTHER
    fetched, released = len(world.fetched), len(world.released)
    assert await agent.update_now() is False
    assert names(events)[-2:] == ["checking", "waiting"]
    assert (len(world.fetched), len(world.released)) == (fetched, released), "it is here"
    world.offer["install"] = 0
    await installs(agent)
    assert len(world.fetched) == fetched
    assert asked == ["download", "activate"]
    assert {r["attempt"] for r in world.reports} == {waiting[1]}, "one attempt"
    assert agent._journal.get("waiting", list) == []
    assert agent._journal.get("trial")["attempt"] == waiting[1]


async def test_while_one_release_waits_another_is_fetched():
    world = World()
    world.offer["install"] = 3600
    agent, _ = start(world)
    await agent.update_now()
    world.offer = {"release": HOME + "lamp/r/2.0.1.jws", "install": 3600}
    world.manifest = make_release(version="2.0.1")
    await agent.update_now()
    assert len(world.released) == 2


async def test_what_waits_costs_nothing_of_a_budget_that_is_used_up():
    world = World()
    world.offer["install"] = 3600
    agent, _ = start(world, settings={"budget": len(IMAGE)})
    await agent.update_now()
    world.offer["install"] = 0
    await installs(agent)


async def test_a_failure_ends_the_waiting():
    world = World()
    world.offer["install"] = 3600
    agent, _ = start(world)
    await agent.update_now()
    first = world.reports[0]["attempt"]
    world.offer["install"] = 0
    agent.on_install(lambda step, manifest: False)
    await refuses(RefusedError, agent)
    assert agent._journal.get("waiting", list) == []
    agent._done = None
    agent.on_install(lambda step, manifest: True)
    await installs(agent)
    assert world.reports[-1]["attempt"] != first


def test_what_a_board_tells_of_its_memory_and_its_boot():
    import esp

    agent, _ = start(World())
    facts = agent.facts()
    assert facts["flash"] == 4 << 20 and facts["reset_cause"] == twinslot.agent.guard._PWRON + 1
    assert facts["staged"] == ""
    stats = os.statvfs("/")
    assert facts["free"] == stats[0] * stats[3] > 0
    flash_size = esp.flash_size
    try:
        del esp.flash_size
        assert agent.facts()["flash"] is None
    finally:
        esp.flash_size = flash_size


async def test_what_is_free_is_counted_once_in_a_poll():
    counted = []

    def statvfs(path):
        counted.append(path)
        return (512, 0, 0, len(counted))

    agent, _ = start(World())
    with Instead(os, statvfs=statvfs):
        await installs(agent)
        assert counted == ["/"] and agent.facts()["free"] == 512
        await installs(agent)
        assert counted == ["/", "/"] and agent.facts()["free"] == 1024


async def test_a_board_without_a_volume_says_nothing_of_it():
    def statvfs(path):
        raise OSError(19)

    agent, _ = start(World())
    with Instead(os, statvfs=statvfs):
        assert agent.facts()["free"] is None


# -- the budget


async def test_a_day_costs_no_more_than_its_budget():
    day = 20000 * 86400
    agent, _ = start(World(), settings={"budget": 1000})
    clock = Time(day)
    with Instead(twinslot.agent, time=clock):
        agent._spend(400)
        agent._spend(0)
        assert agent._journal.get("spent", list) == [20000, 400]
        agent._spend(599)
        assert agent._journal.get("spent", list) == [20000, 999]
        assert "999" not in str(raises(BusyError, agent._spend, 1))
        raises(BusyError, agent._spend, 0)
        clock.now += 86399
        raises(BusyError, agent._spend, 0)
        clock.now += 1
        agent._spend(0)
        agent._spend(10)
        assert agent._journal.get("spent", list) == [20001, 10]


async def test_without_a_budget_nothing_is_booked():
    agent, _ = start(World())
    agent._spend(1 << 29)
    assert agent._journal.get("spent", list) == []


async def test_a_budget_that_is_used_up_is_said_before_anything_is_staged():
    world = World()
    day = int(twinslot.agent.time.time()) // 86400
    agent, events = start(world, settings={"budget": 1000}, spent=[day, 1000])
    await refuses(BusyError, agent)
    assert "staging" not in names(events) and world.fetched == []
    agent, _ = start(world, settings={"budget": 1000}, spent=[day, 999])
    raises(BusyError, agent._spend, 1)
    assert agent._journal.get("spent", list) == [day, 1000]
    world.content = UnreachableError("nobody there")
    agent, _ = start(world, settings={"budget": 1000}, spent=[day, 998])
    await refuses(UnreachableError, agent)
    assert agent._journal.get("spent", list) == [day, 998], "nothing came"


async def test_bytes_that_can_not_be_booked_are_counted_all_the_same():
    for error in (SpaceError("full"), MemoryError("no room")):
        agent, _ = start(World(), settings={"budget": 1000})

        def fails(key, body, error=error):
            raise error

        agent._journal._store = fails
        agent._spend(999)
        raises(BusyError, agent._spend, 1000)


# -- two at once


async def test_an_agent_is_free_again_after_an_update_and_within_its_own_task():
    world = World()
    world.offer = {}
    agent, _ = start(world)
    await agent.update_now()
    assert agent._updating is None
    done = asyncio.create_task(nothing())
    await done
    agent._updating = done
    await agent.update_now()


def test_progress_is_printed_at_every_tenth():
    import builtins

    lines = []
    with Instead(builtins, print=lambda *args: lines.append(args)):
        for done in range(65536, 20 * 65536 + 1, 65536):
            twinslot.agent._console("progress", {"done": done, "total": 20 * 65536})
    tenths = [2 * n * 65536 for n in range(1, 11)]
    assert [line[1] for line in lines] == ["progress done=%d total=1310720" % n for n in tenths]
    with Instead(builtins, print=lambda *args: lines.append(args)):
        twinslot.agent._console("idle", {"b": 2, "a": 1})
    assert lines[-1] == ("twinslot:", "idle a=1 b=2")


async def test_F41_an_old_release_offered_for_months_ends_with_its_date():
    world = World(expires=1795165300 + 90 * 86400)
    agent, _ = start(world)
    agent._clock = Clock(world.manifest.expires - 1)
    await installs(agent)
    world.fetched.clear()
    world.reports.clear()
    for start_up in range(2):
        agent, events = start(world)
        for months in range(3):
            agent._clock = Clock(world.manifest.expires + months * 30 * 86400)
            if not months:
                await refuses(ExpiredError, agent)
            else:
                assert await agent.update_now() is False, "nothing of it is looked at again"
        assert names(events).count("failed") == 1
        assert len(world.reports) == start_up + 1, "who looks at reports sees it"
    assert world.fetched == [] and bench.states() == {0: VALID}
    assert {report["error"]["code"] for report in world.reports} == {"expired"}
    world.manifest = make_release(version="2.0.1")
    world.offer = {"release": HOME + "lamp/r/2.0.1.jws"}
    await installs(agent)


class NoRandomness:
    """What a module is without its randomness: the same numbers at every start."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def urandom(self, n):
        return bytes(n)

    def getrandbits(self, n):
        return 0


async def test_F107_a_board_without_randomness_at_its_first_boot_is_updated_all_the_same():
    module = twinslot.agent
    with Instead(module, os=NoRandomness(module.os), random=NoRandomness(module.random)):
        attempts = []
        for _ in range(2):
            world = World()
            agent, _ = start(world)
            assert agent._delay_ms() > 0, "and it does not poll without a pause"
            await installs(agent)
            assert bench.states() == {0: VALID, 1: NEW}
            assert {report["attempt"] for report in world.reports} == {"00" * 6}
            attempts.append(agent._journal.get("trial")["attempt"])
        assert attempts == ["00" * 6] * 2, "a name of reports, by which nothing is allowed"
        agent, events = start(World(), *TRIAL, **ON_TRIAL)
        agent._source.offer = {}
        await agent.update_now()
        assert names(events)[:2] == ["trial", "confirmed"]
