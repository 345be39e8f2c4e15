"""F15, F24, F28, F33, F35 to F39 of the catalogue: time, memory and storage fail during updates.

Clocks unset and jumping, ticks that wrap as on a 32-bit port, a watchdog that bites, sleep at the
wrong moment, NVS and filesystem full or wiped, heaps too small. What holds each time: the board
would boot the old image or the whole new one, and the update comes when the trouble is over, or
is refused for a reason that names it.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections import Counter

import pytest
from network_cases import answer
from scenes import OnTrial, mirrored, plain, renewed, resumed
from servers import signing_key
from station import Station

from twinslot_tools import log_cli
from twinslot_tools.lab import PRODUCT, Lab
from twinslot_tools.virtual_esp32 import firmware

LONG = os.environ.get("FAULTS") == "long"
SIZE = 70_000
LEAK = 96  # bytes of heap that a poll must not leave in use
YEAR_S = 365 * 86400
PERIOD_MS = 1 << 30


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    signing_key()
    with Station(tmp_path_factory.mktemp("time") / "s", size=SIZE) as made:
        made.proxy.plan({})
        yield made


def install(station, settings, polls=4, **more):
    """Poll until the update is there; return the codes."""
    station.fresh(settings, **more)
    codes = []
    while "installed" not in codes and len(codes) < polls:
        said = station.update()
        codes.append(said["code"])
        assert said["code"] != "LEAKED", said["message"]
        station.check(complete=said["code"] == "installed")
    assert codes[-1] == "installed", codes
    return codes


# ---- time


@pytest.mark.parametrize(
    "jumps",
    [
        [10 * YEAR_S],
        [-10 * YEAR_S],
        [3600, -7200, 3600],
        [80 * YEAR_S, -80 * YEAR_S],
        [-86400] * 4,
    ],
    ids=[
        "ten years ahead",
        "ten years back",
        "hours to and fro",
        "2106 and back",
        "a day at a time",
    ],
)
@pytest.mark.parametrize("door", ["http", "tls"])
def test_F37_F39_clock_that_jumps_during_an_update_delays_it_at_most(station, door, jumps):
    codes = install(station, station.settings(door), polls=5, jump=jumps)
    assert set(codes[:-1]) <= {"tls", "timeout"}, codes
    assert station.proxy.report()["elsewhere"] == []


def test_F36_a_board_without_a_clock_updates_over_tls_and_keeps_its_token(tmp_path):
    """No NTP, power-on clock: certificates "start in the future". After three polls that fail on
    nothing but dates the signed files are fetched, without the token."""
    signing_key()
    with Station(tmp_path / "s", size=SIZE, clock=None) as made:
        made.proxy.plan({})
        codes = install(made, made.settings("tls"), polls=5)
        assert codes[-1] == "installed"
        sent = [r for r in made.proxy.report()["requests"] if "Authorization" in r]
        assert codes.count("tls") >= 2 and not sent, codes
        made.proxy.plan({})


@pytest.mark.parametrize("wrap_in_ms", [2_000, 6_000, 9_000])
def test_F39_ticks_of_a_32_bit_port_wrap_during_an_update(tmp_path, wrap_in_ms):
    """2**30 ms after power-on, which is every 12.4 days; here within the first update or two."""
    signing_key()
    with Station(tmp_path / "s", size=SIZE, wrap_in_ms=wrap_in_ms) as made:
        edit = {"on": "/blobs/", "at": 66_000, "do": "stall"}
        made.proxy.plan({"rest": {"edits": [edit]}})
        settings = made.settings("http", timeout=15)
        before = made.ask("evaluate", code="import time; result = time.ticks_ms()")
        codes = install(made, settings, polls=5)
        after = made.ask("evaluate", code="import time; result = time.ticks_ms()")
        assert codes[0] == "timeout" and codes.count("timeout") <= 4
        assert after < before, "the ticks did not wrap"
        assert before > PERIOD_MS - 10_000


def test_F39_ticks_wrap_during_a_trial_and_it_is_confirmed(tmp_path):
    with Lab(tmp_path / "lab", wrap_in_ms=3_500) as lab:
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.power_on()
        assert lab.wait(lambda e: e.name == "confirmed", timeout=60).data["version"] == "1.1.0"
        names = [e.name for e in lab.events]
        assert "rolledback" not in names and "failed" not in names


SET = "import machine; machine.RTC().datetime(%r)"


def test_a_board_without_a_clock_that_is_never_on_for_long_tries_again_at_rarer_starts(
    station,
):
    """Six hours it can't tell. So it counts its starts: an outage costs few tries, and lasts for
    the board at most twice as long."""
    down = {"on": "/blobs/", "raw": answer("503 Service Unavailable"), "end": "fin", "times": 99}
    station.proxy.plan({"rest": {"answers": [down]}})
    settings = station.settings("http")
    station.fresh(settings)
    codes = []
    try:
        while "installed" not in codes and len(codes) < 31:
            station.ask("evaluate", code=SET % ((2000, 1, 1, 5, 0, 0, 0, 0),))
            station.reboot(settings)
            codes.append(station.update()["code"])
            if len(codes) == 15:
                station.proxy.plan({})
    finally:
        now = time.gmtime()
        date = (*now[:3], now.tm_wday, *now[3:6], 0)
        station.ask("evaluate", code=SET % (date,))
    tries = [n for n, code in enumerate(codes, 1) if code != "idle"]
    assert tries[:3] == [1, 2, 3] and codes[-1] == "installed"
    assert set(codes) == {"http", "idle", "installed"} and codes.count("http") <= 6, codes
    station.check(complete=True)


# ---- resets at the wrong moment


BITES = """\
    import machine
    heard = []
    def bite(name, data):
        if name == "progress":
            heard.append(1)
            if len(heard) == 3:
                machine.WDT(timeout=1)
                while True:
                    pass
    agent.on_event(bite)
"""


def changed_main(lab, lines):
    """Flash a 1.0.0 whose main() has these lines right after it has made its agent."""
    tree = lab.folder / "tree-1.0.0"
    path = tree / "main.py"
    anchor = "    agent.on_event("
    text = path.read_text()
    assert text.count(anchor) == 1
    path.write_text(text.replace(anchor, lines + anchor))
    image = firmware.make_firmware(
        tree, chip="esp32", version="1.0.0", project=PRODUCT, size=400_000, seed=5
    )
    part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_0")
    with lab.flash.open("r+b") as f:
        f.seek(part["offset"])
        f.write(image.ljust(part["size"], b"\xff"))


def test_F33_watchdog_that_bites_again_and_again_does_not_keep_the_update_away(tmp_path):
    """Each download lives for two checkpoints, then the watchdog bites; the next goes on there."""
    with Lab(tmp_path / "lab", image_size=600_000) as lab:
        changed_main(lab, BITES)
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.power_on(timeout=200)
        lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "1.1.0", timeout=180)
        outcomes = [b.outcome for b in lab.power_off().boots]
    # 600 kB have nine boundaries: two are won in each boot.
    assert outcomes[:3] == ["wdt"] * 3 and len(outcomes) <= 8, outcomes


SLEEPS = """\
    import machine
    class Drowsy:
        unique_id = machine.unique_id
        reset_cause = machine.reset_cause
        @staticmethod
        def reset():
            machine.deepsleep(1000)
    if machine.reset_cause() != machine.DEEPSLEEP_RESET:
        agent._machine = Drowsy
"""


def test_C6_deep_sleep_between_activation_and_reset_still_gives_the_image_its_trial(tmp_path):
    """A wake from deep sleep boots the old slot without asking otadata: the guard resets."""
    with Lab(tmp_path / "lab") as lab:
        changed_main(lab, SLEEPS)
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.power_on()
        lab.wait(lambda e: e.name == "confirmed", timeout=60)
        outcomes = [b.outcome for b in lab.power_off().boots]
    assert "deepsleep" in outcomes, outcomes


def _growth(station, poll, polls):
    """Bytes of heap that so many polls of one boot have left in use; the first few fill caches,
    and of three the least counts: a collector that looks at the stack may keep something once."""
    taken = []
    for _ in range(polls + 5):
        said = poll()
        taken.append(said["heap"])
    return min(taken[-3:]) - min(taken[2:5])


def _idle(station, code=""):
    """A board whose application has refused what is offered; it asks again, and again."""
    station.proxy.plan({})
    station.fresh(station.settings("http"))
    refuse = "agent.on_install(lambda step, release: False)\n"
    station.ask("evaluate", code=refuse + code)
    assert station.update()["code"] == "refused"
    return station.update


def _failing(station):
    station.proxy.plan({"connections": [{"accept": "reset"}] * 100})
    station.fresh(station.settings("http"))
    return station.update


def _installing(station):
    station.proxy.plan({})

    def poll():
        station.fresh(station.settings("http"))
        return station.update()

    return poll


@pytest.mark.parametrize(
    ("kind", "polls", "code"),
    [(_idle, 25, "idle"), (_failing, 20, "network"), (_installing, 6, "installed")],
    ids=["idle", "failing", "installing"],
)
def test_heap_in_use_does_not_grow_from_poll_to_poll_of_one_boot(station, kind, polls, code):
    poll = kind(station)
    assert poll()["code"] == code
    assert _growth(station, poll, polls) < LEAK * polls


def test_a_leak_at_each_poll_is_noticed(station):
    leak = "import sys\nsys.kept = []\n"
    leak += f"agent.on_event(lambda name, data: sys.kept.append(bytes({LEAK})))\n"
    poll = _idle(station, leak)
    try:
        assert _growth(station, poll, 10) >= LEAK * 10
    finally:
        station.ask("evaluate", code="import sys\nsys.kept = None\n")


# ---- storage


FILL_NVS = """
from esp32 import NVS
theirs = NVS("theirs")
for size in (1900, 300, 30):
    for i in range(9):
        try:
            theirs.set_blob("b%d-%d" % (size, i), bytes(size))
        except OSError:
            break
result = 1
"""
FREE_NVS = """
from esp32 import NVS
theirs = NVS("theirs")
for size in (1900, 300, 30):
    for i in range(9):
        try:
            theirs.erase_key("b%d-%d" % (size, i))
        except OSError:
            pass
result = 1
"""


def test_F28_nvs_that_others_have_filled_refuses_cleanly_and_the_update_comes_later(station):
    station.proxy.plan({})
    settings = station.settings("http")
    station.fresh(settings)
    station.ask("evaluate", code=FILL_NVS)
    try:
        said = station.update()
        station.check()
        assert said["code"] == "space", said
        assert "journal" in said["message"]
    finally:
        station.ask("evaluate", code=FREE_NVS)
    assert station.update()["code"] == "installed"
    station.check(complete=True)


FILLS = textwrap.indent(FILL_NVS, "    ")  # in an application


@pytest.mark.parametrize("well", [True, False], ids=["well", "ill"])
def test_F28_image_on_trial_that_fills_nvs_keeps_no_later_release_away(tmp_path, well):
    """The journal has kept room for itself: how the trial ended is written down, the next release
    comes. What fills NVS, nobody ever takes away."""
    code = FILLS if well else FILLS + '    raise ValueError("and then it stumbled")\n'
    with Lab(tmp_path / "lab") as lab:
        lab.publish(lab.firmware("1.1.0", fault=code), "1.1.0")
        lab.power_on(timeout=100)
        ends = "confirmed" if well else "rolledback"
        lab.wait(lambda e: e.name == ends and e.data["version"] == "1.1.0", timeout=60)
        lab.publish(lab.firmware("1.2.0"), "1.2.0")
        lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "1.2.0", timeout=60)
        lab.power_off()
        notes = log_cli.read(lab.flash.read_bytes())
    assert [f[1] for f in notes.journal.get("failed", [])] == ([] if well else ["1.1.0"])


def test_F28_nvs_erased_in_mid_download_costs_the_checkpoint_and_nothing_else(station):
    cut = {"on": "/blobs/", "at": 67_000, "do": "reset"}
    station.proxy.plan({"connections": [{"edits": [cut]}]})
    settings = station.settings("http")
    station.fresh(settings)
    assert station.update()["code"] == "network"
    code = "from esp32 import NVS\nn = NVS('twinslot')\n"
    code += "for k in ('journal', 'checkpoint', 'log'):\n  try: n.erase_key(k)\n"
    station.ask("evaluate", code=code + "  except OSError: pass\nresult = 1")
    station.reboot(settings)
    assert station.update()["code"] == "installed"
    station.check(complete=True)


FILL_FILES = """
for size in (4096, 256, 1):
    try:
        with open("/fill%d" % size, "wb") as f:
            while True:
                f.write(bytes(size))
                f.flush()
    except OSError:
        pass
for i in range(9):
    try:
        with open("/fill-%d" % i, "w") as f:
            f.write("x" * 60)
    except OSError:
        pass
result = 1
"""
FREE_FILES = """
import os
for name in os.listdir("/"):
    if name.startswith("fill"):
        os.remove("/" + name)
result = 1
"""


def test_F24_full_filesystem_does_not_keep_a_firmware_update_away(station):
    station.proxy.plan({})
    station.ask("evaluate", code=FILL_FILES)
    try:
        assert install(station, station.settings("http")) == ["installed"]
    finally:
        station.ask("evaluate", code=FREE_FILES)


# ---- memory


FREE = "import gc; gc.collect(); result = gc.mem_free()"
LEAST = 8_000  # bytes that are left at the end of the sweep


def test_F35_heaps_swept_downward_update_or_refuse_for_want_of_memory(tmp_path, record_property):
    """From plenty to hardly any: first all works, then the poll is refused by name; never half."""
    signing_key()
    with Station(tmp_path / "s", size=SIZE, heap="320K") as made:
        made.proxy.plan({})
        settings = made.settings("http")
        ends = []
        made.fresh(settings)
        free = made.ask("evaluate", code=FREE)
        fine = range(free - 60_000, free - LEAST, 2_000)
        for take in [*range(0, free - 60_000, 30_000), *fine]:
            made.fresh(settings)
            said = made.ask("update", hog=take)
            ends.append(said["code"])
            made.check(complete=said["code"] == "installed")
        console = made.console()
    record_property("ended", dict(Counter(ends)))
    assert ends[0] == "installed"
    assert set(ends) == {"installed", "busy"}, ends
    # Once it refuses, it goes on refusing: no heap in between does something else.
    assert "installed" not in ends[ends.index("busy") :], ends
    assert "Traceback" not in console


STEP = 128 if LONG else 1_536
STEP_ON_THE_WAY = 128 if LONG else 9_000
BARE = "import sys; sys.modules['twinslot.agent']._HEAP_NEED = 0"  # the check that stands in front


@pytest.mark.parametrize("scene", [plain, resumed, mirrored, renewed])
def test_F35_an_allocation_that_fails_anywhere_in_an_update_ends_it_cleanly(
    tmp_path, scene, record_property
):
    """With the check in front taken out, each step of the sweep runs out of memory elsewhere; with
    the memory back, the same agent installs."""
    signing_key()
    with Station(tmp_path / "s", size=SIZE, heap="320K") as made:
        scene(made)
        made.ask("evaluate", code=BARE)
        free = made.ask("evaluate", code=FREE)
        ends = Counter()
        for take in range(
            free - 48_000, free - 1_000, STEP if scene is plain else STEP_ON_THE_WAY
        ):
            scene(made)
            said = made.ask("update", hog=take)
            ends[said["code"]] += 1
            made.check(complete=said["code"] == "installed")
            if said["code"] == "signature":  # without the keyring, and that was told before
                assert scene is renewed and said["events"].count("failed") == 2, said
            if said["code"] != "installed":
                again = [made.update()["code"] for _ in range(2)]
                assert "installed" in again, (take, said, again)
                made.check(complete=True)
    print(f"{sum(ends.values())} heaps: {dict(ends)}")
    record_property("ended", dict(ends))
    assert {"installed", "busy"} <= set(ends) <= {"installed", "busy", "signature"}, ends


@pytest.mark.parametrize("well", [True, False], ids=["confirmed", "rolled-back"])
def test_F35_an_allocation_that_fails_anywhere_in_a_trial_ends_it_cleanly(
    tmp_path, well, record_property
):
    """From the guard's start to the end: the image is confirmed, or goes back; if this start can't
    do either, the next one does."""
    signing_key()
    with Station(tmp_path / "s", size=SIZE, heap="320K") as made:
        trial = OnTrial(made, well)
        trial.begin()
        made.ask("evaluate", code=BARE)
        free = made.ask("evaluate", code=FREE)
        ends = Counter()
        starts = Counter()
        for take in range(free - 48_000, free - 500, STEP_ON_THE_WAY):
            trial.begin()
            ends[trial.end_it(hog=take)] += 1
            starts[trial.starts] += 1
    print(f"{sum(ends.values())} heaps: {dict(ends)}; by starts: {dict(starts)}")
    record_property("ended", dict(ends))
    assert starts[1] and len(starts) > 1, "no start was short of memory, or all"


# ---- the reader of flash that no board would leave


def test_what_the_board_notes_of_all_this_can_be_read_from_outside(station):
    from twinslot_tools import log_cli

    cut = {"on": "/blobs/", "at": 67_000, "do": "reset"}
    station.proxy.plan({"connections": [{"edits": [cut]}]})
    station.fresh(station.settings("http"))
    assert station.update()["code"] == "network"
    notes = log_cli.read(station.flash.read_bytes())
    assert notes.attempts[-1][1:3] == ["2.0.1", "failed"]
    assert notes.checkpoint["offset"] == 65536
    assert json.dumps(notes.__dict__)
