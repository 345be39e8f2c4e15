"""The device's clock: real NTP exchanges on loopback, a fake RTC, scripts in MicroPython.

F numbers are those of the fault catalogue.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("clock_driver.py")
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))

FLOOR = 1767225600  # 2026-01-01
UNSET = 946684800  # 2000-01-01: an ESP32 after power-on
NOW = 1795000000  # 2026-11-18
YEAR = 366 * 86400
WINDOW = 20 * YEAR
NTP_UNIX = 2208988800


# ---- An NTP server ---------------------------------------------------------------------------


def reply(request: bytes, unix: float = NOW, **other) -> bytes:
    """Return a good reply to a request, with fields changed as told."""
    fields = {"leap": 0, "version": 4, "mode": 4, "stratum": 2, "ref": b"GPS\0", "nonce": None}
    fields.update(other)
    first = fields["leap"] << 6 | fields["version"] << 3 | fields["mode"]
    seconds = int(unix + NTP_UNIX) & 0xFFFFFFFF
    stamp = struct.pack(">II", fields.get("seconds", seconds), 0)
    return (
        struct.pack(">BBbb", first, fields["stratum"], 6, -20)
        + bytes(8)
        + fields["ref"]
        + stamp
        + (fields["nonce"] if fields["nonce"] is not None else request[40:48])
        + stamp
        + stamp
    )


class NtpServer:
    """Answers each request with what ``answer(request)`` returns: a list of datagrams."""

    def __init__(self, answer: Callable[[bytes], list[bytes]]) -> None:
        self.requests: list[bytes] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._answer = answer
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._socket.settimeout(0.1)
        while not self._stopping:
            try:
                request, peer = self._socket.recvfrom(512)
            except TimeoutError:
                continue
            self.requests.append(request)
            for datagram in self._answer(request):
                self._socket.sendto(datagram, peer)
        self._socket.close()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()


@pytest.fixture
def ntp():
    """Return a function that starts an NTP server."""
    started = []

    def start(answer: Callable[[bytes], list[bytes]] | None = None) -> NtpServer:
        started.append(NtpServer(answer or (lambda request: [reply(request)])))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def run(tmp_path: Path, *steps, rtc: int = UNSET, settable: bool = True, **clock) -> list[dict]:
    """Lead one clock through steps; return what was so after each, the beginning first."""
    clock = {"ntp": "", "floor": FLOOR, **clock}
    script = {"id": "x", "rtc": rtc, "settable": settable, "clock": clock, "steps": list(steps)}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"lib": str(ROOT / "lib"), "scripts": [script]}))
    done = subprocess.run(
        [MICROPYTHON, str(DRIVER), str(plan)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {r["id"]: r["trail"] for r in map(json.loads, done.stdout.splitlines())}
    assert found["gap"][0] < 300, "the event loop was held"
    return found["x"]


# ---- No clock --------------------------------------------------------------------------------


def test_F36_unset_clock_is_unknown_then_at_least_the_floor(tmp_path):
    before, after = run(tmp_path, ["ensure"])
    assert (before["state"], before["now"], before["trusted"]) == ("unknown", None, False)
    assert (after["state"], after["now"], after["rtc"]) == ("at_least", FLOOR, FLOOR)
    assert not after["trusted"] and after["lasting"] is None


def test_F36_the_time_stored_by_the_last_boot_raises_the_bound(tmp_path):
    after = run(tmp_path, ["ensure"], last=FLOOR + 1000)[-1]
    assert (after["state"], after["rtc"], after["trusted"]) == ("at_least", FLOOR + 1000, False)


def test_F36_a_signed_date_raises_the_bound_and_the_rtc(tmp_path):
    _, ensured, raised = run(tmp_path, ["ensure"], ["at_least", NOW])
    assert ensured["rtc"] == FLOOR
    assert (raised["rtc"], raised["state"], raised["trusted"]) == (NOW, "at_least", False)


def test_a_lower_bound_never_sets_a_running_clock_back(tmp_path):
    last = run(tmp_path, ["ensure"], ["at_least", FLOOR + 5], rtc=NOW)[-1]
    assert last["rtc"] == NOW and last["state"] == "at_least"


def test_rtc_found_at_boot_is_a_lower_bound_only(tmp_path):
    after = run(tmp_path, ["ensure"], rtc=NOW)[-1]
    assert (after["now"], after["trusted"], after["lasting"]) == (NOW, False, None)


def test_rtc_is_trusted_where_the_application_says_so(tmp_path):
    first = run(tmp_path, rtc=NOW, trust_rtc=True)[0]
    assert (first["source"], first["trusted"], first["now"]) == ("rtc", True, NOW)
    unset = run(tmp_path, rtc=UNSET, trust_rtc=True)[0]
    assert not unset["trusted"] and unset["now"] is None


# ---- NTP -------------------------------------------------------------------------------------


def test_ntp_sets_the_clock_and_is_asked_once(tmp_path, ntp):
    server = ntp()
    trail = run(tmp_path, ["ensure"], ["tick", 100], ["ensure"], ntp=server.address)
    assert (trail[1]["source"], trail[1]["rtc"], trail[1]["trusted"]) == ("ntp", NOW, True)
    assert trail[3]["now"] == NOW + 100
    assert len(server.requests) == 1
    assert server.requests[0][0] == 0x23 and len(server.requests[0]) == 48
    assert server.requests[0][:40] == b"\x23" + bytes(39), "the request tells nothing of the board"


def test_ntp_requests_never_repeat_their_nonce(tmp_path, ntp):
    server = ntp(lambda request: [])
    run(tmp_path, ["ensure", 50], ["ensure", 50], ntp=server.address)
    nonces = [r[40:] for r in server.requests]
    assert len(nonces) == len(set(nonces)) == 4


def test_ntp_in_era_1_after_2036(tmp_path, ntp):
    then = 2085978496 + 1000  # 2036-02-07 06:28:16 and 1000 s
    server = ntp(lambda request: [reply(request, then)])
    assert run(tmp_path, ["ensure"], ntp=server.address)[-1]["now"] == then


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"mode": 3}, "mode"),
        ({"mode": 5}, "mode"),
        ({"version": 1}, "version"),
        ({"version": 7}, "version"),
        ({"leap": 3}, "not synchronised"),
        ({"stratum": 16}, "not synchronised"),
        ({"stratum": 255}, "not synchronised"),
        ({"nonce": bytes(8)}, "no answer"),
        ({"nonce": os.urandom(8)}, "no answer"),
        ({"seconds": 0}, "no answer"),
    ],
)
def test_F37_ntp_reply_of_nobody_we_asked_is_passed_over(tmp_path, ntp, other, problem):
    server = ntp(lambda request: [reply(request, **other)])
    after = run(tmp_path, ["ensure", 100], ntp=server.address)[-1]
    assert (after["state"], after["trusted"], after["rtc"]) == ("at_least", False, FLOOR)
    assert after["problem"]


@pytest.mark.parametrize("size", [0, 1, 47, 20])
def test_ntp_short_datagram_is_passed_over(tmp_path, ntp, size):
    server = ntp(lambda request: [reply(request)[:size]])
    assert run(tmp_path, ["ensure", 100], ntp=server.address)[-1]["trusted"] is False


def test_ntp_good_reply_behind_bad_ones_is_found(tmp_path, ntp):
    server = ntp(
        lambda request: [
            b"noise",
            reply(request, NOW + 10**6, nonce=bytes(8)),
            reply(request, NOW + 10**6, mode=2),
            reply(request, NOW),
        ]
    )
    assert run(tmp_path, ["ensure"], ntp=server.address)[-1]["now"] == NOW


@pytest.mark.parametrize(
    "unix", [0, UNSET, FLOOR - 1, FLOOR + WINDOW + 1, 4102444800 + 86400 * 3000]
)
def test_F37_ntp_time_out_of_the_plausible_is_not_believed(tmp_path, ntp, unix):
    server = ntp(lambda request: [reply(request, unix)])
    after = run(tmp_path, ["ensure"], ntp=server.address)[-1]
    assert (after["trusted"], after["rtc"]) == (False, FLOOR)
    assert "expected" in after["problem"]


def test_ntp_time_before_a_signed_date_is_not_believed(tmp_path, ntp):
    server = ntp(lambda request: [reply(request, NOW - 1)])
    after = run(tmp_path, ["at_least", NOW], ["ensure"], ntp=server.address)[-1]
    assert (after["trusted"], after["rtc"]) == (False, NOW)


def test_ntp_kiss_of_death_ends_the_asking_for_an_hour(tmp_path, ntp):
    server = ntp(lambda request: [reply(request, stratum=0, ref=b"RATE")])
    steps = (["ensure", 100], ["ensure", 100], ["tick", 3000], ["ensure", 100])
    trail = run(tmp_path, *steps, ["tick", 700], ["ensure", 100], rtc=NOW, ntp=server.address)
    assert "RATE" in trail[1]["problem"]
    assert len(server.requests) == 2


def test_a_kiss_of_death_from_a_stranger_is_passed_over(tmp_path, ntp):
    def answer(request: bytes) -> list[bytes]:
        return [reply(request, stratum=0, ref=b"DENY", nonce=bytes(8)), reply(request)]

    assert run(tmp_path, ["ensure"], ntp=ntp(answer).address)[-1]["now"] == NOW


def test_F63_ntp_server_silent_closed_or_unknown_costs_bounded_time(tmp_path, ntp):
    silent = run(tmp_path, ["ensure", 300], ntp=ntp(lambda request: []).address)[-1]
    assert 600 <= silent["ms"] < 3000 and silent["state"] == "at_least"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    closed = run(tmp_path, ["ensure", 300], ntp=address)[-1]
    assert closed["state"] == "at_least" and "no answer" in closed["problem"]


@pytest.mark.parametrize("text", ["host:", "host:0", "host:65536", "host:ntp", ":123", "host:1:2"])
def test_ntp_malformed_configuration_is_refused(tmp_path, text):
    (outcome,) = run(tmp_path, ntp=text)
    assert outcome["error"] == "config" and text in outcome["message"]


# ---- Date of a verified server, and the user --------------------------------------------------


def test_date_of_a_verified_server_sets_the_clock_when_ntp_did_not(tmp_path):
    _, _, dated = run(tmp_path, ["ensure"], ["observe", NOW])
    assert dated["returned"] is True
    assert (dated["source"], dated["rtc"], dated["lasting"]) == ("date", NOW, NOW)


def test_date_within_five_minutes_of_ntp_leaves_the_clock_alone(tmp_path, ntp):
    last = run(tmp_path, ["ensure"], ["observe", NOW - 200], ntp=ntp().address)[-1]
    assert (last["rtc"], last["source"]) == (NOW, "date")


def test_F37_date_overrules_a_spoofed_ntp(tmp_path, ntp):
    spoofed = 2145916800  # 2038-01-01
    server = ntp(lambda request: [reply(request, spoofed)])
    _, lied_to, mended = run(tmp_path, ["ensure"], ["observe", NOW], ntp=server.address)
    assert lied_to["now"] == spoofed and lied_to["lasting"] is None, "nothing of it is stored"
    assert (mended["now"], mended["source"]) == (NOW, "date")


def test_F37_ntp_is_asked_again_after_a_day_and_may_set_the_clock_back(tmp_path, ntp):
    times = [NOW + 10 * YEAR, NOW]
    server = ntp(lambda request: [reply(request, times.pop(0))])
    trail = run(tmp_path, ["ensure"], ["ensure"], ["tick", 86401], ["ensure"], ntp=server.address)
    assert [t["now"] for t in trail[1:3]] == [NOW + 10 * YEAR] * 2
    assert trail[4]["now"] == NOW and trail[4]["trusted"]


def test_F37_doubt_asks_again_at_once(tmp_path, ntp):
    times = [NOW + 10 * YEAR, NOW]
    server = ntp(lambda request: [reply(request, times.pop(0))])
    trail = run(tmp_path, ["ensure"], ["doubt"], ["ensure"], ntp=server.address)
    assert trail[2]["trusted"] is False
    assert (trail[3]["now"], trail[3]["trusted"]) == (NOW, True)


@pytest.mark.parametrize("unix", [0, FLOOR - 1, FLOOR + WINDOW + 1])
def test_F37_implausible_date_is_not_believed(tmp_path, unix):
    last = run(tmp_path, ["ensure"], ["observe", unix])[-1]
    assert (last["returned"], last["trusted"], last["rtc"]) == (False, False, FLOOR)


def test_F37_F123_what_a_lying_server_makes_the_board_store_ends_after_a_year(tmp_path):
    """A verified server shows 2045 once: the next boot still begins within a year of the floor."""
    far = FLOOR + 19 * YEAR
    lied_to = run(tmp_path, ["observe", far])[-1]
    assert lied_to["now"] == far and lied_to["lasting"] == FLOOR + YEAR
    stored = run(tmp_path, ["ensure"], ["observe", FLOOR + YEAR + 5], last=far)
    assert stored[1]["rtc"] == FLOOR + YEAR
    assert stored[2]["now"] == FLOOR + YEAR + 5


def test_time_set_by_the_user_outranks_every_other(tmp_path, ntp):
    trail = run(
        tmp_path,
        ["observe", NOW, "user"],
        ["observe", NOW + 5000],
        ["ensure"],
        ntp=ntp(lambda request: [reply(request, NOW + 9000)]).address,
    )
    assert [t["now"] for t in trail[1:]] == [NOW] * 3
    assert trail[2]["returned"] is False and trail[-1]["source"] == "user"


def test_signed_date_later_than_a_trusted_clock_is_the_signers_mistake(tmp_path):
    steps = (["observe", NOW], ["at_least", NOW + YEAR], ["doubt"], ["ensure"])
    assert run(tmp_path, *steps)[-1]["rtc"] == NOW


def test_F36_rtc_far_ahead_of_all_that_is_known_counts_as_unset(tmp_path):
    before, after = run(tmp_path, ["ensure"], rtc=FLOOR + WINDOW + 86400)
    assert before["state"] == "unknown"
    assert after["rtc"] == FLOOR


def test_clock_that_cannot_be_set_is_kept_right_by_an_offset(tmp_path):
    trail = run(tmp_path, ["observe", NOW], ["tick", 60], rtc=FLOOR, settable=False)
    assert trail[-1]["rtc"] == FLOOR + 60 and trail[-1]["now"] == NOW + 60


# ---- The real RTC and the epochs -------------------------------------------------------------

ESP32 = """
import sys
sys.path.insert(0, sys.argv[1])
import asyncio
import time as real
class Time:
    epoch = 946684800
    offset = 0
    def gmtime(self, s):
        return real.gmtime(s + self.epoch)[:8]
    def time(self):
        return Machine.now
    ticks_ms = real.ticks_ms
    ticks_diff = real.ticks_diff
class Machine:
    now = 5                      # seconds since 2000
    class RTC:
        def datetime(self, t):
            print(t)
            assert len(t) == 8
            Machine.now = real.mktime((t[0], t[1], t[2], t[4], t[5], t[6], 0, 0, 0)) - 946684800
sys.modules["time"] = Time()
sys.modules["machine"] = Machine
from twinslot.clock import Clock
clock = Clock(ntp="")
print(clock.state)
clock.observe(1795000000)
print(clock.state, clock.now(), Machine.now)
clock.observe(2300000000)
print(clock.now())
"""


def test_esp32_rtc_is_set_with_its_weekday_and_its_epoch(tmp_path):
    script = tmp_path / "esp32.py"
    script.write_text(ESP32)
    environment = {**os.environ, "TZ": "UTC"}
    done = subprocess.run(
        [MICROPYTHON, str(script), str(ROOT / "lib")],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=environment,
    )
    wanted = time.gmtime(NOW)
    lines = done.stdout.splitlines()
    assert lines[0] == "unknown", done.stdout + done.stderr
    expected = (*wanted[:3], wanted.tm_wday, *wanted[3:6], 0)
    assert lines[1] == str(expected)
    assert lines[2] == f"known {NOW} {NOW - 946684800}"
    assert lines[-1] == "2300000000", "beyond 2038"


HTTP_DATES = """
import sys
sys.path.insert(0, sys.argv[1])
from twinslot.head import http_date
for line in open(sys.argv[2]):
    print(http_date(line.strip().encode()))
"""


def test_F40_http_dates_from_1970_to_2110_leap_days_included(tmp_path):
    """Every 17th hour and odd second of 140 years, against the C library."""
    seconds = [*range(0, 4417977600, 17 * 3600 * 13 + 7), 951782400, 4107542400 - 1, 2147483648]
    dates = tmp_path / "dates"
    lines = [time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(s)) for s in seconds]
    dates.write_text("\n".join(lines))
    script = tmp_path / "dates.py"
    script.write_text(HTTP_DATES)
    done = subprocess.run(
        [MICROPYTHON, str(script), str(ROOT / "lib"), str(dates)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [int(line) for line in done.stdout.split()] == seconds
