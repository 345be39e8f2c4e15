"""F42 to F65 of the catalogue, told to the whole agent: the network fails, the update gets there.

A proxy process between board and server breaks what it is told to (`proxy.py`); the cases are
tables with offsets rolled by a seed (`network_cases.py`). After every poll: the board would boot
the old image or the new one, every byte of it. When the fault is over the next poll installs,
what was fetched twice is bounded, nobody else got a request or a token, and nothing but an
OtaError ever left the agent. The proxy sees that each fault of a case has really happened.

    make faults-long        # many more offsets, and a cut at every byte
    make faults-long SEED=7
    make faults-long PIECE=3/20         # every 20th of the bytes, from the third on
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from network_cases import BLOB, CHECKPOINT, SEED, SIZE, SLACK, THEN, Case, cases
from scenes import renewed
from servers import signing_key
from station import LEISURE, SHORT_S, TIMEOUT_S, Station

LONG = os.environ.get("FAULTS") == "long"
ROLLED = int(os.environ.get("SEED") or SEED)
PIECE, PIECES = (int(n) for n in (os.environ.get("PIECE") or "1/1").split("/"))
CASES = cases(ROLLED, 12 if LONG else 4)
TRIES = 3  # of the agent, then a release rests
SIX_HOURS_LATER = "agent._tried[2] -= 6 * 3600"
STATIONS = 2
PATIENCE = f"c = agent._client; c.read_timeout_ms = c._connect_timeout_ms = {TIMEOUT_S * 1000}"


class Crew:
    """Stations, each with one thread at a time."""

    def __init__(self, folder: Path, **options):
        self._options = options
        self._folder = folder
        self._own = threading.local()
        self._made: list[Station] = []
        self._pool = ThreadPoolExecutor(STATIONS)
        signing_key()  # one for all threads

    def station(self) -> Station:
        if not hasattr(self._own, "station"):
            self._own.station = Station(
                self._folder / f"{threading.get_ident()}", **self._options
            ).__enter__()
            self._own.station.ask("evaluate", code=LEISURE)
            self._made.append(self._own.station)
        return self._own.station

    def all(self, function, items) -> list:
        """Results of ``function(station, item)``, in order; an exception is a result."""

        def one(item):
            try:
                return function(self.station(), item)
            except Exception as exc:
                return exc

        return list(self._pool.map(one, items))

    def stop(self) -> None:
        self._pool.shutdown()
        for station in self._made:
            station.__exit__()


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    made = Crew(tmp_path_factory.mktemp("network"), size=SIZE)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def station(crew):
    """One station for tests that come one after the other."""
    return crew._pool.submit(crew.station).result()


def fill(plan: dict, station: Station) -> dict:
    """Put real addresses into a plan."""
    text = json.dumps(plan)
    for door, port in station.proxy.ports.items():
        scheme = "https" if door in ("tls", "elsewhere_tls") else "http"
        text = text.replace(f"<{door}>", f"{scheme}://localhost:{port}/elsewhere")
    text = text.replace("<loop>", "/sensor-node/stable.json").replace("<file>", "file:///etc")
    return json.loads(text)


def follow(station: Station, case: Case) -> list[str]:
    """Let one case happen; return the codes of its polls."""
    patient = station.settings(case.door)
    settings = station.settings(case.door, timeout=SHORT_S) if case.waits else patient
    station.proxy.plan(fill(case.plan, station))
    station.fresh(settings, dns=case.dns)
    dice = random.Random(f"{ROLLED} {case.id}")
    codes: list[str] = []
    while "installed" not in codes:
        said = station.update()
        codes.append(said["code"])
        assert said["code"] != "LEAKED", said["message"]
        station.check(complete=said["code"] == "installed")
        if case.wish is not None and len(codes) == 1:
            assert said["delay_ms"] >= case.wish * 1000, (said["delay_ms"], case.wish)
            assert said["delay_ms"] <= (case.wish + 61) * 1000, (said["delay_ms"], case.wish)
        if said["code"] == "idle":
            faults = len(codes) - codes.count("idle")
            assert codes.count("idle") <= faults // TRIES, f"the release is ignored: {codes}"
            station.ask("evaluate", code=SIX_HOURS_LATER)
        elif dice.random() < 0.3 and said["code"] != "installed":
            station.reboot(settings)
        spoiled = [c for c in codes if c not in ("idle", "installed")]
        # This machine may be busy, and the board's time is quick: then it gives up for no fault.
        # So once the faults can be over it is given more time, and what they may cost is counted
        # by polls that were spoiled.
        spare = min(4, spoiled.count("timeout"))
        assert len(spoiled) <= case.faults + spare, f"{said.get('message')}: {codes}"
        if len(spoiled) >= case.faults and settings is not patient:
            settings = patient
            station.ask("evaluate", code=PATIENCE)
    report = station.proxy.report()
    assert report["missed"] == [], f"this did not happen: {report['missed']}: {codes}"
    left = station.ask("evaluate", code="import __main__; result = __main__.names.script")
    assert left == [], f"never looked up: {left}"
    bound = case.bound(max(case.faults, len(spoiled)))
    assert report["down"] <= bound, f"{report['down']} bytes: {codes}"
    assert report["elsewhere"] == [], report["elsewhere"]
    for request in report["requests"]:
        assert (case.door != "http") == ("Authorization: Bearer " in request), request
    return codes


def judge(results: list, items: list, name) -> None:
    broken = [
        f"  {name(item)}: {type(result).__name__}: {str(result)[:400]}"
        for item, result in zip(items, results, strict=True)
        if isinstance(result, Exception)
    ]
    assert not broken, f"{len(broken)} of {len(items)}, seed {ROLLED}:\n" + "\n".join(broken)


def test_there_are_300_cases_and_each_has_its_own_name():
    assert len(CASES) >= 300
    assert len({c.id for c in CASES}) == len(CASES)
    assert {c.row for c in CASES} == set(THEN)


ROWS = list(dict.fromkeys(c.row for c in CASES))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.replace(" ", "-"))
def test_F44_F51_F57_F65_network_fault(crew, row, record_property):
    mine = [c for c in CASES if c.row == row]
    results = crew.all(follow, mine)
    judge(results, mine, lambda case: case.id)
    harmless = [c for c, codes in zip(mine, results, strict=True) if codes == ["installed"]]
    assert all(c.may_pass for c in harmless), [c.id for c in harmless if not c.may_pass]
    met = Counter(code for codes in results for code in codes)
    record_property("ended", dict(met))
    print(f"{row}: {len(mine)} cases, seed {ROLLED}, polls ended {dict(met)}")
    # A row in which nothing went wrong would prove nothing.
    assert len(harmless) <= len(mine) // 2, met


# ---- every byte


SMALL = 17_000  # an exchange of about 20 kB


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    made = Crew(tmp_path_factory.mktemp("small"), size=SMALL)
    yield made
    made.stop()


def cut_once(station: Station, at: int, do: str, door: str) -> str:
    """Cut the first connection there; the next poll must bring the whole image."""
    station.proxy.plan({"connections": [{"edits": [{"at": at, "do": do}]}]})
    station.fresh(station.settings(door))
    said = station.update()
    report = station.proxy.report()
    if report["missed"]:
        if said["code"] == "timeout":
            return cut_once(station, at, do, door)  # this machine is busy
        assert said["code"] == "installed", said
        return "not met"  # the exchange was shorter
    if said["code"] == "installed":  # before an answer: it was asked once more
        assert report["connections"] > 1, "how did the rest come?"
        station.check(complete=True)
        return "installed"
    assert said["code"] != "LEAKED", said["message"]
    station.check()
    for _ in range(3):
        again = station.update()
        if again["code"] != "timeout":
            break
    assert again["code"] == "installed", again.get("message")
    station.check(complete=True)
    return said["code"]


def exchange(station: Station, door: str) -> int:
    """Bytes towards the device of a whole update."""
    station.proxy.plan({})
    station.fresh(station.settings(door))
    assert station.update()["code"] == "installed"
    return station.proxy.report()["down"]


def chosen(points: range, n: int) -> list[int]:
    """All points, or this piece of them; ``n`` of them in the short form."""
    if LONG:
        return list(points[PIECE - 1 :: PIECES])
    return sorted(random.Random(ROLLED).sample(points, n))


def sweep(crew: Crew, door: str, do: str, points: list[int]) -> Counter:
    results = crew.all(lambda station, at: cut_once(station, at, do, door), points)
    judge(results, points, lambda at: f"{do} at byte {at} ({door})")
    met = Counter(results)
    print(f"{do} at {len(points)} bytes of an exchange ({door}), seed {ROLLED}: {dict(met)}")
    return met


@pytest.mark.parametrize("do", ["reset", "fin"])
def test_F51_connection_ends_at_any_byte_of_an_update_of_20_kB(small, do, record_property):
    whole = small._pool.submit(lambda: exchange(small.station(), "http")).result()
    assert whole > 18_000
    points = chosen(range(whole), 60)
    met = sweep(small, "http", do, points)
    record_property("ended", dict(met))
    assert met["network"] > len(points) * 0.9
    assert not met["not met"], met


def test_F43_connection_is_reset_at_any_byte_of_a_tls_handshake(small, record_property):
    # Hello, certificate, key and Finished of the server's, and the first answer's record.
    points = chosen(range(1300), 25)
    met = sweep(small, "through", "reset", points)
    record_property("ended", dict(met))
    assert met["tls"] + met["network"] > len(points) * 0.8  # some hellos are shorter


# ---- the server itself


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_server_restarted_in_mid_body(station, how):
    """The server goes away while it sends the payload, and comes back."""
    station.proxy.plan(
        {"connections": [{"edits": [{"on": BLOB, "at": CHECKPOINT + 3000, "do": "hold"}]}]}
    )
    station.fresh(station.settings("tls", timeout=600))
    restarted = threading.Thread(target=station.restart_server, args=(how,))
    restarted.start()
    said = station.update()
    restarted.join()
    assert said["code"] in ("network", "timeout"), said  # the board's time is quick
    station.check()
    before = station.proxy.report()["payload"]
    assert station.update()["code"] == "installed"
    station.check(complete=True)
    assert station.proxy.report()["payload"] - before < SIZE - CHECKPOINT + 1000


@pytest.mark.parametrize("do", ["fin", "flip"])
def test_a_keyring_that_is_lost_or_damaged_on_the_way_comes_with_the_next_poll(station, do):
    """The release is signed by a key that it brings: that is refused until then."""
    renewed(station)
    cuts = [{"edits": [{"on": "/keyring.jws", "at": 600, "do": do}]}]
    station.proxy.plan({"connections": cuts})
    said = station.update()
    assert said["code"] == "signature" and said["events"].count("failed") == 2, said
    assert station.proxy.report()["missed"] == []
    station.check()
    assert station.update()["code"] == "installed"
    station.check(complete=True)


def test_a_download_that_came_on_is_not_one_of_the_tries(station):
    cuts = [{"edits": [{"on": BLOB, "at": at, "do": "reset"}]} for at in (CHECKPOINT + 3000, 500)]
    station.proxy.plan({"connections": [*cuts, cuts[1]]})
    station.fresh(station.settings("http"))
    codes = [station.update()["code"] for _ in range(TRIES + 1)]
    assert codes == ["network"] * TRIES + ["installed"]
    assert station.proxy.report()["missed"] == []
    station.check(complete=True)


def test_F59_payload_replaced_by_another_file_in_mid_download(station):
    station.proxy.plan(
        {"connections": [{"edits": [{"on": BLOB, "at": CHECKPOINT + 3000, "do": "reset"}]}]}
    )
    station.fresh(station.settings("http"))
    blob = station.blob()
    kept = blob.read_bytes()
    assert station.update()["code"] == "network"
    blob.write_bytes(bytes(len(kept)))
    try:
        codes = [station.update()["code"] for _ in range(2)]
        station.reboot(station.settings("http"))  # which forgets that it was no image
        codes.append(station.update()["code"])
        assert set(codes) <= {"checksum", "image"}, codes
        station.check()
    finally:
        blob.write_bytes(kept)
    # Three times it was not what was signed: it rests, and a reboot does not change that.
    station.reboot(station.settings("http"))
    assert station.update()["code"] == "idle"
    station.ask("evaluate", code=SIX_HOURS_LATER)
    assert station.update()["code"] == "installed"
    station.check(complete=True)


# ---- mirrors and the budget


def mirrored(station: Station, *bases: str) -> dict:
    return station.settings("tls", mirrors=list(bases))


def test_mirrors_are_asked_in_turn_and_never_get_the_token(station):
    """The server and the first mirror take no connections; the second has the tree."""
    # The same door by another name is another origin.
    copy = f"https://127.0.0.1:{station.proxy.ports['tls']}"
    station.proxy.plan({"connections": [{"accept": "reset"}, {"accept": "fin"}]})
    station.fresh(mirrored(station, copy, copy))
    said = station.update()
    assert said["code"] == "installed", said
    station.check(complete=True)
    report = station.proxy.report()
    assert report["connections"] == 3
    assert not any("Authorization" in r for r in report["requests"])


def test_a_download_goes_on_at_a_mirror_where_the_server_broke_off(station):
    cut = {"on": BLOB, "at": CHECKPOINT + 3000, "do": "reset"}
    station.proxy.plan({"connections": [{"edits": [cut]}]})
    copy = f"https://127.0.0.1:{station.proxy.ports['tls']}/"
    station.fresh(mirrored(station, copy))
    assert station.update()["code"] == "installed"
    station.check(complete=True)
    assert station.proxy.report()["payload"] < SIZE + 10_000


def test_F51_a_mirror_with_etags_of_its_own_goes_on_where_the_server_broke_off(station):
    """nginx makes them from times of files, which a copy need not keep."""
    cut = {"on": BLOB, "at": CHECKPOINT + 3000, "do": "reset"}
    theirs = {"on": BLOB, "find": r"^etag: .*$", "by": 'ETag: "of the server"\r'}
    station.proxy.plan({"connections": [{"edits": [cut], "replace": [theirs]}]})
    copy = f"http://127.0.0.1:{station.proxy.ports['http']}/"
    station.fresh(station.settings("http", mirrors=[copy]))
    assert station.update()["code"] == "installed"
    station.check(complete=True)
    report = station.proxy.report()
    assert report["missed"] == [] and report["payload"] < SIZE + 10_000


def test_the_next_poll_asks_the_server_first_again(station):
    copy = f"https://127.0.0.1:{station.proxy.ports['tls']}/"
    station.proxy.plan({"connections": [{"accept": "reset"}]})
    station.fresh(mirrored(station, copy))
    assert station.update()["code"] == "installed"
    station.proxy.plan({})
    station.fresh(mirrored(station, copy))
    assert station.update()["code"] == "installed"
    assert all("Authorization" in r for r in station.proxy.report()["requests"])


def test_a_budget_per_day_is_kept_and_the_download_goes_on_the_next_day(station):
    station.proxy.plan({})
    settings = station.settings("http", budget=50_000)
    station.fresh(settings)
    assert [station.update()["code"] for _ in range(3)] == ["busy"] * 3
    spent = station.proxy.report()["payload"]
    assert CHECKPOINT <= spent < CHECKPOINT + SLACK
    station.reboot(settings)  # nor does a reboot help
    assert station.update()["code"] == "busy"
    assert station.proxy.report()["payload"] == spent
    station.ask("evaluate", code="import __main__; __main__.jumped(86400)")
    assert station.update()["code"] == "installed"
    station.check(complete=True)
    assert station.proxy.report()["payload"] < SIZE + SLACK


def test_nothing_but_what_was_foreseen_is_on_the_console_and_no_token(crew, station):
    """Last: reads all that the boards of this file have printed."""
    for one in crew._made:
        token = one.token
        text = one.console()
        assert "twinslot: staged" in text
        assert "Traceback" not in text
        assert token not in text
