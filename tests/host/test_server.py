"""The server as a process: offers, reports, roles, bad input, restarts, a clean end."""

import datetime as dt
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest
from servers import HARDWARE, PRODUCT, Running, firmware, public_keys, publish_version, serving

from twinslot_server.limits import Limits
from twinslot_tools import keys

DEVICE = "a1b2c3d4e5f6"
ASK = {
    "device_id": DEVICE,
    "mac": "a1:b2:c3:d4:e5:f6",
    "product": PRODUCT,
    "channel": "stable",
    "current_version": "1.0.0",
    "current_build": firmware("1.0.0")[-32:].hex(),
    "hardware": HARDWARE,
    "chip_id": 0,
    "labels": ["attic"],
    "agent": "0.1.0",
    "micropython": "1.29.0",
}
REPORT = {
    "device_id": DEVICE,
    "attempt": "7",
    "version": "1.1.0",
    "build": firmware("1.1.0")[-32:].hex(),
    "status": "confirmed",
    "error": None,
    "bytes": 40_000,
    "current_version": "1.1.0",
}
ROUTES = [
    ("POST", "/api/v1/check-update", "device"),
    ("POST", "/api/v1/report-status", "device"),
    ("GET", "/api/v1/devices", "operator"),
    ("GET", f"/api/v1/devices/{DEVICE}", "operator"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose stable channel is at 1.1.0, and keys to verify with."""
    folder = tmp_path_factory.mktemp("server")
    publish_version(folder / "site", "1.1.0")
    with serving(folder / "site", "--keys", str(public_keys(folder))) as running:
        yield running


def post(server: Running, path: str, body: dict, role: str = "device") -> httpx.Response:
    with server.client(server.token(role)) as client:
        return client.post(f"/api/v1/{path}", json=body)


def ask(server: Running, **changes) -> dict:
    response = post(server, "check-update", {**ASK, **changes})
    assert response.status_code == 200, response.text
    return response.json()


def device(server: Running, device_id: str) -> dict:
    with server.client(server.token("operator")) as client:
        return client.get(f"/api/v1/devices/{device_id}").json()


def problem(response: httpx.Response) -> tuple[int, str]:
    """Check the shape of a refusal; return its status and code."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "code", "detail"}
    assert body["type"] == f"urn:twinslot:problem:{body['code']}"
    assert body["status"] == response.status_code
    return response.status_code, body["code"]


# ---- offers


def test_an_older_board_is_offered_the_release_and_can_fetch_it(server):
    answer = ask(server)
    assert answer == {
        "update_available": True,
        "release": f"/{PRODUCT}/r/1.1.0.jws",
        "poll": 300,
    }
    with server.client() as client:
        assert client.get(answer["release"]).text.startswith("eyJ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"current_version": "1.1.0", "current_build": REPORT["build"]}, "up_to_date"),
        ({"current_version": "1.1.0", "current_build": None}, "up_to_date"),
        ({"current_version": "1.1.0", "current_build": "00" * 32}, "version"),
        ({"current_version": "2.0.0"}, "version"),
        ({"hardware": "OTHER_BOARD"}, "hardware"),
        ({"chip_id": 9}, "hardware"),
        ({"channel": "beta"}, "no_channel"),
        ({"product": "other"}, "no_channel"),
    ],
)
def test_a_board_it_does_not_suit_is_told_why(server, changes, reason):
    answer = ask(server, **changes)
    assert answer == {"update_available": False, "poll": 300, "reason": reason}


@pytest.mark.parametrize("version", ["", "unknown", "v1.23.0", "0.0.0"])
def test_a_board_on_stock_firmware_is_offered_the_release(server, version):
    assert ask(server, current_version=version, current_build="", chip_id=None)["update_available"]


def test_checking_registers_the_board_and_renews_what_is_known(server):
    ask(server, device_id="new-board", labels=["cellar"])
    first = device(server, "new-board")
    assert first["labels"] == ["cellar"]
    assert first["current_version"] == "1.0.0"
    assert first["history"] == []
    ask(server, device_id="new-board", current_version="1.1.0", current_build=None)
    again = device(server, "new-board")
    assert again["current_version"] == "1.1.0"
    assert again["first_seen"] == first["first_seen"]


def test_members_of_a_newer_agent_are_ignored(server):
    assert ask(server, battery_mv=3300)["update_available"]


def test_the_offer_follows_the_pointer_at_once(tmp_path):
    publish_version(tmp_path / "site", "1.1.0")
    with serving(tmp_path / "site") as s:
        assert ask(s)["release"].endswith("1.1.0.jws")
        publish_version(tmp_path / "site", "1.2.0", poll=42, rollout=0)
        assert ask(s) == {"update_available": False, "poll": 42, "reason": "rollout"}
        publish_version(tmp_path / "site", "1.2.0", rollout=100)
        answer = ask(s)
        assert answer["release"].endswith("1.2.0.jws")
        assert answer["rollout"]["percent"] == 100


def test_an_expired_release_is_not_offered(tmp_path):
    site = tmp_path / "site"
    publish_version(site, "1.1.0", expires=dt.timedelta(seconds=1))
    time.sleep(1.1)
    with serving(site) as s:
        assert ask(s)["reason"] == "expired"


# ---- a site that is not what it should be


def _flipped_signature(product):
    path = product / "r" / "1.1.0.jws"
    token = bytearray(path.read_bytes())
    token[-10] = ord("A") if token[-10] != ord("A") else ord("B")
    path.write_bytes(token)


def _blob(product):
    return next((product / "blobs").rglob("*.bin"))


def _release(content):
    return lambda product: (product / "r" / "1.1.0.jws").write_bytes(content)


def _pointer(content):
    return lambda product: (product / "stable.json").write_bytes(content)


def _of_another_product(product):
    publish_version(product.parent, "1.1.0", product="other")
    shutil.copytree(product.parent / "other", product, dirs_exist_ok=True)


def _linked_out(product):
    path = product / "r" / "1.1.0.jws"
    outside = product.parent.parent / "outside.jws"
    path.rename(outside)
    path.symlink_to(outside)


SITES = {
    "one flipped bit in the signature": (_flipped_signature, "bad_release"),
    "release of another product": (_of_another_product, "bad_release"),
    "payload missing": (lambda product: _blob(product).unlink(), "bad_release"),
    "payload of another size": (lambda product: _blob(product).write_bytes(b"x"), "bad_release"),
    "release missing": (lambda product: (product / "r" / "1.1.0.jws").unlink(), "bad_release"),
    "release garbage": (_release(b"\0" * 100), "bad_release"),
    "release empty": (_release(b""), "bad_release"),
    "release huge": (_release(b"e" * 1_000_000), "bad_release"),
    "release outside the site": (_linked_out, "bad_release"),
    "pointer empty": (_pointer(b""), "bad_pointer"),
    "pointer no object": (_pointer(b"[]"), "bad_pointer"),
    "pointer leads out": (_pointer(b'{"release":"../../../etc/passwd"}'), "bad_pointer"),
    "pointer to another site": (_pointer(b'{"release":"https://x/r/1.jws"}'), "bad_pointer"),
    "poll of text": (_pointer(b'{"release":"r/1.1.0.jws","poll":"1"}'), "bad_pointer"),
    "rollout of 200 %": (
        _pointer(b'{"release":"r/1.1.0.jws","rollout":{"percent":200,"seed":""}}'),
        "bad_pointer",
    ),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A server whose site the tests spoil."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "site").mkdir()
    with serving(folder / "site", "--keys", str(public_keys(folder))) as running:
        yield running


@pytest.mark.parametrize("name", SITES)
def test_what_does_not_hold_is_never_offered(spoilt, name):
    change, reason = SITES[name]
    site = spoilt.data.parent / "site"
    shutil.rmtree(site / PRODUCT, ignore_errors=True)
    publish_version(site, "1.1.0")
    assert ask(spoilt)["update_available"]
    change(site / PRODUCT)
    assert ask(spoilt) == {"update_available": False, "poll": 300, "reason": reason}
    assert spoilt.log()[-1]["reason"] == reason


def test_a_release_signed_by_a_stranger_is_not_offered(tmp_path):
    publish_version(tmp_path / "site", "1.1.0")
    with serving(tmp_path / "site", "--keys", str(public_keys(tmp_path, 1))) as s:
        assert ask(s)["reason"] == "bad_release"
        assert "signing key" in s.log()[-1]["why"]


# ---- reports


def test_a_report_is_kept_and_renews_the_board(server):
    body = {**REPORT, "device_id": "reporter"}
    assert post(server, "report-status", body).json() == {"ok": True}
    row = device(server, "reporter")
    assert (row["status"], row["status_version"]) == ("confirmed", "1.1.0")
    assert row["current_version"] == "1.1.0"
    report = row["history"][0]
    assert report.pop("received").endswith("Z")
    expected = {k: v for k, v in body.items() if k not in ("device_id", "current_version")}
    assert report == {**expected, "log": None}


def test_the_same_report_twice_counts_once_and_changes_nothing(server):
    body = {**REPORT, "device_id": "twice", "status": "staged"}
    post(server, "report-status", body)
    post(server, "report-status", {**body, "status": "confirmed"})
    assert post(server, "report-status", body).json() == {"ok": True}
    row = device(server, "twice")
    assert [r["status"] for r in row["history"]] == ["staged", "confirmed"]
    assert row["status"] == "confirmed"
    post(server, "report-status", {**body, "attempt": "8"})
    assert len(device(server, "twice")["history"]) == 3


def test_an_error_is_kept_whole_or_shortened_never_refused(server):
    error = {"code": "http", "number": "OTA_004", "message": "x" * 3000}
    body = {**REPORT, "device_id": "failing", "status": "failed", "error": error}
    assert post(server, "report-status", body).status_code == 200
    kept = device(server, "failing")["history"][0]["error"]
    assert kept == {"code": "http", "number": "OTA_004", "message": "x" * 500}


def test_attempts_may_be_numbers(server):
    post(server, "report-status", {**REPORT, "device_id": "counting", "attempt": 12})
    assert device(server, "counting")["history"][0]["attempt"] == "12"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "'; DROP TABLE devices; --", "\u202e"]
)
def test_F118_F119_strings_of_a_board_are_data(server, text):
    """F118, F119: whatever a board says comes back as it was said, and does nothing."""
    ask(server, device_id="hostile", labels=[text])
    assert device(server, "hostile")["labels"] == [text]
    assert device(server, "hostile")["device_id"] == "hostile"


def test_devices_are_listed_page_by_page(server):
    for number in range(5):
        ask(server, device_id=f"page-{number}")
    with server.client(server.token("operator")) as client:
        first = client.get("/api/v1/devices", params={"limit": 2, "after": "page"}).json()
        assert [d["device_id"] for d in first["devices"]] == ["page-0", "page-1"]
        rest = client.get("/api/v1/devices", params={"after": first["next"]}).json()
    assert [d["device_id"] for d in rest["devices"]][:3] == ["page-2", "page-3", "page-4"]
    assert rest["next"] is None


def test_an_unknown_device_is_a_404(server):
    with server.client(server.token("operator")) as client:
        assert problem(client.get("/api/v1/devices/nobody")) == (404, "no_device")


# ---- roles and tokens


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_I7_F117_every_route_takes_its_own_role_only(server, method, path, role):
    """F117: role x endpoint, and I7: a token that is empty, a prefix, longer, or odd."""
    right = server.token(role)
    wrong = server.token("operator" if role == "device" else "device")
    values = [
        None,
        "Bearer",
        "Bearer x",
        f"Bearer {wrong}",
        f"Bearer {right[:-1]}",
        f"Bearer {right}x",
        f"Bearer {right[:1]}",
        f"Bearer {right.swapcase()}",
        f"Basic {right}",
        right,
        "Bearer \xff\xfe",
    ]
    with server.client() as client:
        for value in values:
            headers = {} if value is None else {b"Authorization": value.encode("latin-1")}
            response = client.request(method, path, headers=headers, content=b"{")
            assert problem(response) == (401, "unauthorized"), value
            assert response.headers["www-authenticate"] == "Bearer"
        with server.client(right) as allowed:
            assert allowed.request(method, path, json=ASK).status_code != 401


def test_no_route_answers_a_stranger_or_a_board(server):
    """F117: whatever is added later is closed until it says otherwise."""
    with server.client() as client:
        paths = client.get("/api/v1/openapi.json").json()["paths"]
    found = [(method, path) for path, item in paths.items() for method in item]
    assert len(found) > 30
    own = {path for _, path, role in ROUTES if role == "device"}
    with server.client() as stranger, server.client(server.token("device")) as board:
        for method, path in found:
            filled = re.sub(r"\{\w+\}", "1", path).replace("export/1", "export/audit")
            filled = filled.replace("rollouts/1/1", "rollouts/1/start")
            response = stranger.request(method, filled, content=b"{")
            assert problem(response) == (401, "unauthorized"), (method, path)
            if path not in own:
                response = board.request(method, filled, content=b"{")
                assert problem(response) == (401, "unauthorized"), (method, path)


def test_a_refusal_is_logged_with_who_and_where(server):
    """F117: an audit line, in which a path can forge nothing."""
    with server.client() as client:
        client.post("/api/v1/check-update", json=ASK)
        line = server.log()[-1]
        assert (line["event"], line["code"]) == ("refused", "unauthorized")
        assert (line["path"], line["client"]) == ("/api/v1/check-update", "127.0.0.1")
        client.get("/%0A%7B%22event%22%3A%22forged%22%7D%1b[31m" + "x" * 900)
    line = server.log()[-1]
    assert line["event"] == "refused"
    assert len(line["path"]) == 200
    assert "\x1b" not in server.errors.read_text()


def test_no_token_is_ever_logged(server):
    ask(server)
    for role in ("device", "operator"):
        assert server.token(role) not in server.errors.read_text()


@pytest.mark.parametrize("content", [b"", b"\n", b"short", b"two words of sixteen characters"])
def test_an_unusable_token_stops_the_start(tmp_path, content):
    (tmp_path / "site").mkdir()
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "device-token").write_bytes(content)
    assert "token" in refused_start(tmp_path)


def test_a_hash_stands_in_for_a_token_and_is_none_itself(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "data").mkdir(mode=0o700)
    token = "kept-in-a-safe-0123456789"
    digest = f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    (tmp_path / "data" / "device-token").write_text(digest + "\n")
    with serving(tmp_path / "site") as s:
        with s.client(token) as client:
            assert client.post("/api/v1/check-update", json=ASK).status_code == 200
        with s.client(digest) as client:
            assert client.post("/api/v1/check-update", json=ASK).status_code == 401


def test_a_token_that_was_handed_over_can_be_taken_away(tmp_path):
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as s:
        handed = {role: s.token(role) for role in ("device", "operator")}
        for role, token in handed.items():
            kept = s.data / f"{role}-token.sha256"
            assert (
                kept.read_text().strip() == f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
            )
            (s.data / f"{role}-token").unlink()
    with serving(tmp_path / "site") as s:
        assert not list(s.data.glob("*-token"))
        for role, token in handed.items():
            with s.client(token) as client:
                path = "/api/v1/check-update" if role == "device" else "/api/v1/settings"
                answer = client.request("POST" if role == "device" else "GET", path, json=ASK)
                assert answer.status_code == 200


def test_another_token_takes_the_place_of_a_leaked_one_however_old_its_file_is(tmp_path):
    """``mv``, ``cp -p`` and mounted secrets keep the time a file was written at."""
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as s:
        handed = {"device": s.token("device")}
    (s.data / "device-token").write_text("another-one-0123456789\n")
    os.utime(s.data / "device-token", (0, 0))
    with serving(tmp_path / "site") as s:
        with s.client("another-one-0123456789") as client:
            assert client.post("/api/v1/check-update", json=ASK).status_code == 200
        with s.client(handed["device"]) as client:
            assert client.post("/api/v1/check-update", json=ASK).status_code == 401


def test_an_empty_token_in_the_environment_stops_the_start(tmp_path):
    (tmp_path / "site").mkdir()
    assert "TWINSLOT_DEVICE_TOKEN" in refused_start(tmp_path, TWINSLOT_DEVICE_TOKEN="")


def test_a_token_of_the_environment_wins_and_is_not_written_down(tmp_path):
    (tmp_path / "site").mkdir()
    token = "from-the-environment-0123456789"
    with serving(tmp_path / "site", TWINSLOT_DEVICE_TOKEN=token) as s:
        assert not list(s.data.glob("device-token*"))
        with s.client(token) as client:
            assert client.post("/api/v1/check-update", json=ASK).status_code == 200
        assert token not in s.errors.read_text()


def test_one_token_for_both_roles_stops_the_start(tmp_path):
    (tmp_path / "site").mkdir()
    same = {f"TWINSLOT_{role}_TOKEN": "the-same-token-twice" for role in ("DEVICE", "OPERATOR")}
    assert "same" in refused_start(tmp_path, **same)


# ---- bad input


def longer(name: str, count: int) -> dict:
    return {name: "x" * count}


BAD_BODIES = {
    "nothing": b"",
    "no json": b"hello",
    "half of it": json.dumps(ASK).encode()[:-1],
    "a list": b"[]",
    "null": b"null",
    "invalid utf-8": b'{"device_id":"\xff"}',
    "nested deep": b"[" * 4000,
    **{
        f"{name} missing": {k: v for k, v in ASK.items() if k != name}
        for name in ("device_id", "product", "hardware", "current_version")
    },
    **{
        f"{key} {value!r}"[:40]: {**ASK, key: value}
        for key, value in [
            ("device_id", ""),
            ("device_id", "a/b"),
            ("device_id", "a\nb"),
            ("device_id", "a\n"),
            ("device_id", "x" * 65),
            ("device_id", 5),
            ("device_id", None),
            ("product", ".."),
            ("channel", "../stable"),
            ("channel", ""),
            ("hardware", ["A"]),
            ("current_version", "x" * 65),
            ("chip_id", "0"),
            ("chip_id", 0.0),
            ("chip_id", True),
            ("chip_id", -1),
            ("chip_id", 65536),
            ("labels", "attic"),
            ("labels", [1]),
            ("labels", ["x"] * 33),
            ("mac", "x" * 65),
        ]
    },
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_malformed_question_is_refused_and_registers_nobody(server, name):
    body = BAD_BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client(server.token("device")) as client:
        response = client.post("/api/v1/check-update", content=content)
    assert problem(response) == (422, "malformed")


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "done"},
        {"status": None},
        {"attempt": ""},
        {"attempt": None},
        {"attempt": True},
        {"bytes": -1},
        {"bytes": "12"},
        {"bytes": 1 << 60},
        {"error": "text"},
        {"error": {}},
        {"error": {"code": "x" * 65}},
        {"version": 1},
    ],
)
def test_a_malformed_report_is_refused_and_not_kept(server, changes):
    body = {**REPORT, "device_id": "malformed", **changes}
    assert problem(post(server, "report-status", body)) == (422, "malformed")
    assert device(server, "malformed").get("code") == "no_device"


def test_F115_a_large_body_is_refused_before_it_is_read(server):
    """F115: with or without an announced length, no more than the limit is taken in."""
    with server.client(server.token("device")) as client:
        response = client.post("/api/v1/check-update", content=b" " * 9000)
        assert problem(response) == (413, "too_large")
        chunks = (b" " * 1000 for _ in range(1000))
        response = client.post("/api/v1/check-update", content=chunks)
        assert problem(response) == (413, "too_large")


def test_a_report_whose_log_is_all_escapes_is_kept(server):
    log = "\x1b" * 4096
    assert post(server, "report-status", {**REPORT, "device_id": "noisy", "log": log}).is_success
    assert device(server, "noisy")["history"][0]["log"] == log


def test_wrong_methods_and_paths_are_problems_too(server):
    with server.client(server.token("device")) as client:
        assert problem(client.get("/api/v1/check-update")) == (405, "method")
        assert problem(client.post("/nothing")) == (405, "method")
        assert problem(client.get("/api/v2/check-update")) == (404, "not_found")
        operator = {"Authorization": f"Bearer {server.token('operator')}"}
        for query in ({"limit": "0"}, {"limit": "x"}, {"limit": "1001"}, {"after": "x" * 65}):
            response = client.get("/api/v1/devices", params=query, headers=operator)
            assert problem(response) == (422, "malformed")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/v1/check-update", {"POST"}),
        ("PUT", "/api/v1/rollouts", {"GET", "POST"}),
        ("DELETE", "/api/v1/labels/site", {"PUT"}),
        ("POST", "/nothing", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(server, method, path, allowed):
    """RFC 9110 section 15.5.6."""
    with server.client(server.token("device")) as client:
        response = client.request(method, path)
    assert problem(response) == (405, "method")
    assert set(response.headers["allow"].split(", ")) == allowed


# ---- slow and many clients, with short limits

SHORT = """
import sys
from twinslot_server.serve import main
from twinslot_server.limits import Limits
sys.exit(main(sys.argv[1:], Limits(**LIMITS)))
"""


def short_limits(**limits) -> list[str]:
    return [sys.executable, "-c", SHORT.replace("LIMITS", repr(limits))]


def raw(server: Running) -> ssl.SSLSocket:
    """A bare TLS connection; socket errors in it are the test's to see."""
    context = ssl.create_default_context(cafile=server.data / "server.crt")
    host, port = server.url.removeprefix("https://").split(":")
    plain = socket.create_connection((host, int(port)), timeout=10)
    return context.wrap_socket(plain, server_hostname=host)


def question_without_body(server: Running) -> bytes:
    """The headers of a question whose body of 10 bytes is still to come."""
    lines = [
        "POST /api/v1/check-update HTTP/1.1",
        "Host: x",
        "Content-Length: 10",
        f"Authorization: Bearer {server.token('device')}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def ended(connection: ssl.SSLSocket) -> bool:
    """Wait until the server drops the connection."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def site(tmp_path):
    publish_version(tmp_path / "site", "1.1.0")
    return tmp_path / "site"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: "])
def test_headers_that_never_end_are_not_waited_for(site, sent):
    """F115 slow-loris: on a new connection, and on one that has served a request."""
    with serving(site, program=short_limits(header_timeout_s=0.5)) as s:
        with raw(s) as connection:
            connection.sendall(sent)
            assert ended(connection)
        with raw(s) as connection:
            connection.sendall(b"HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 404")
            connection.sendall(sent or b"G")
            assert ended(connection)


@pytest.mark.parametrize("pieces", [1, 100])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_longer_headers_than_a_board_ever_sends_are_refused(server, pieces, end):
    """F115: whole or without an end, at once or bit by bit."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\nA: ".ljust(Limits().header_bytes + 100, b"x") + end
    size = -(-len(head) // pieces)
    with raw(server) as connection:
        for first in range(0, len(head), size):
            connection.sendall(head[first : first + size])
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        assert ended(connection)


def test_headers_of_every_request_are_bounded_anew(server):
    """What one connection says in all its requests together is not."""
    request = b"HEAD /x HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 8000 + b"\r\n\r\n"
    with raw(server) as connection:
        for _ in range(6):
            connection.sendall(request)
            assert connection.recv(4096).startswith(b"HTTP/1.1 404")


def test_a_body_that_never_comes_is_not_waited_for(site):
    with serving(site, program=short_limits(body_timeout_s=0.5)) as s, raw(s) as connection:
        connection.sendall(question_without_body(s))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


HALF = b"--b\r\nContent-Disposition: form-data; na"


@pytest.mark.parametrize("role", ["device", "operator"])
@pytest.mark.parametrize(
    "path", ["/api/v1/check-update", "/api/v1/rollouts", "/api/v1/firmware/upload", "/-/login"]
)
def test_a_body_that_is_cut_or_longer_than_announced_is_no_failure_of_the_server(
    server, path, role
):
    """I6: it stands in the log as refused, without a traceback, and the next one is answered."""
    told = len(server.log())
    for length in (len(HALF) + 9, len(HALF) - 9):
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}"]
        lines += ["Content-Type: multipart/form-data; boundary=b"]
        lines += [f"Authorization: Bearer {server.token(role)}", "", ""]
        with raw(server) as connection:
            connection.sendall("\r\n".join(lines).encode() + HALF)
            if length < len(HALF):
                assert connection.recv(4096).startswith(b"HTTP/1.1 4")
    with raw(server) as connection:
        connection.sendall(b"HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404")
    assert "error" not in {line["level"] for line in server.log()[told:]}


def test_a_reader_that_stops_reading_is_dropped(tmp_path):
    site = tmp_path / "site"
    publish_version(site, "1.1.0")
    blob = next((site / PRODUCT / "blobs").rglob("*.bin"))
    blob.write_bytes(bytes(32 << 20))
    with serving(site, program=short_limits(send_timeout_s=0.5)) as s, raw(s) as connection:
        name = blob.relative_to(site).as_posix()
        connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(2)
        received = 0
        try:
            while piece := connection.recv(1 << 16):
                received += len(piece)
        except OSError:
            pass
        assert received < blob.stat().st_size


def test_beyond_the_limit_boards_are_told_when_to_come_back(site):
    """Overload is shed: 503 with Retry-After in whole seconds, and it ends with the load."""
    with serving(site, program=short_limits(requests=1)) as s:
        with raw(s) as occupying, s.client(s.token("device")) as client:
            occupying.sendall(question_without_body(s))
            deadline = time.monotonic() + 5
            while (response := client.get("/nothing")).status_code != 503:
                assert time.monotonic() < deadline
            assert problem(response) == (503, "busy")
            assert 10 <= int(response.headers["retry-after"]) <= 20
            occupying.sendall(b"{}        ")
            assert occupying.recv(4096).startswith(b"HTTP/1.1 422")
            assert client.get("/nothing").status_code == 404


def test_polls_that_the_database_has_no_time_for_are_no_error(site):
    """All but what is remembered; reports are taken, and nobody learns what a token is for."""
    with serving(site, program=short_limits(polls=0)) as s:
        response = post(s, "check-update", ASK)
        assert response.status_code == 200
        answer = response.json()
        assert (answer["update_available"], answer["reason"]) == (False, "overload")
        assert 10 <= answer["poll"] <= 20
        with s.client("another-0123456789") as stranger:
            response = stranger.post("/api/v1/check-update", json=ASK)
        assert problem(response) == (401, "unauthorized")
        with s.client(s.token("operator")) as client:
            assert client.get("/api/v1/devices").json()["devices"] == []
            assert "polls_sent_away_total" in client.get("/metrics").text
        assert post(s, "report-status", REPORT).is_success


def test_downloads_wait_while_polls_are_answered(site):
    blob = next((site / PRODUCT / "blobs").rglob("*.bin"))
    blob.write_bytes(bytes(32 << 20))
    name = "/" + blob.relative_to(site).as_posix()
    with serving(site, program=short_limits(downloads=1)) as s, raw(s) as slow:
        slow.sendall(f"GET {name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        with s.client() as client:
            assert problem(client.get(name)) == (503, "busy")
            assert client.get(f"/{PRODUCT}/stable.json").status_code == 200
            assert client.head(name).status_code == 200
        assert ask(s)["reason"] == "bad_release"


def test_a_full_registry_refuses_newcomers_and_knows_its_own(site):
    with serving(site, program=short_limits(devices=2)) as s:
        for name in ("one", "two"):
            ask(s, device_id=name)
        response = post(s, "check-update", {**ASK, "device_id": "three"})
        assert problem(response) == (503, "storage")
        assert ask(s, device_id="one")["update_available"]


def test_old_reports_make_room_for_new_ones(site):
    with serving(site, program=short_limits(reports_per_device=3)) as s:
        for attempt in range(6):
            post(s, "report-status", {**REPORT, "attempt": attempt})
        assert [r["attempt"] for r in device(s, DEVICE)["history"]] == ["3", "4", "5"]


# ---- life and death of the process


def refused_start(tmp_path, *arguments: str, **env) -> str:
    command = [sys.executable, "-m", "twinslot_server", str(tmp_path / "site"), "--port", "0"]
    run = subprocess.run(
        [*command, "--data", str(tmp_path / "data"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, **env},
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout == ""
    message = run.stderr.splitlines()[-1]
    assert message.startswith("twinslot_server: ")
    assert "Traceback" not in run.stderr
    return message


def test_a_missing_site_stops_the_start(tmp_path):
    assert "not a folder" in refused_start(tmp_path)


@pytest.mark.parametrize("inside", ["site", "site/data", "site/../site/x/y"])
def test_keys_and_tokens_never_lie_in_the_published_tree(tmp_path, inside):
    (tmp_path / "site").mkdir()
    assert "published" in refused_start(tmp_path, "--data", str(tmp_path / inside))
    assert not list((tmp_path / "site").iterdir())


def test_a_port_in_use_stops_the_start(tmp_path):
    (tmp_path / "site").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refused_start(tmp_path, "--port", str(port))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"keys":[]}', b'{"keys":[{"kty":"RSA","d":"x"}]}']
)
def test_a_bad_key_set_stops_the_start(tmp_path, content):
    (tmp_path / "site").mkdir()
    (tmp_path / "k.json").write_bytes(content)
    assert refused_start(tmp_path, "--keys", str(tmp_path / "k.json"))


def test_a_database_of_a_later_server_stops_the_start(site, tmp_path):
    with serving(site) as s:
        ask(s)
        s.stop()
    with sqlite3.connect(tmp_path / "data" / "server.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert "schema 99" in refused_start(tmp_path)


def test_a_file_that_is_no_database_stops_the_start(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "server.sqlite3").write_bytes(b"no database at all" * 100)
    assert "server.sqlite3" in refused_start(tmp_path)


def test_F114_while_the_database_is_held_boards_are_told_when_to_come_back(site, tmp_path):
    """F114: another process holds the lock; nothing is lost, and it ends with the lock."""
    with serving(site, program=short_limits(database_wait_s=0.2)) as s:
        ask(s)
        holder = sqlite3.connect(tmp_path / "data" / "server.sqlite3")
        try:
            holder.execute("BEGIN IMMEDIATE")
            response = post(s, "report-status", REPORT)
            assert problem(response) == (503, "storage")
            assert int(response.headers["retry-after"]) >= 10
        finally:
            holder.close()
        assert post(s, "report-status", REPORT).json() == {"ok": True}
        assert len(device(s, DEVICE)["history"]) == 1


def test_F124_a_private_key_among_the_trusted_stops_the_start(tmp_path):
    """F124: a server that could read a release key would be worth stealing."""
    (tmp_path / "site").mkdir()
    keys.generate(tmp_path / "release.key", 2048)
    assert "key" in refused_start(tmp_path, "--keys", str(tmp_path / "release.key"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_soon_with_connections_open(site, number):
    with serving(site) as s, s.client(s.token("device")) as client, raw(s):
        client.post("/api/v1/check-update", json=ASK)
        started = time.monotonic()
        assert s.stop(number) == 0
        assert time.monotonic() - started < 5
        assert s.log()[-1]["event"] == "stopped"
        assert not any("trace" in line for line in s.log())


def test_rows_and_identity_survive_a_restart(site):
    with serving(site) as first:
        post(first, "report-status", REPORT)
        token, before = first.token("device"), device(first, DEVICE)
        certificate = (first.data / "server.crt").read_bytes()
        first.stop()
    with serving(site) as second:
        assert second.token("device") == token
        assert (second.data / "server.crt").read_bytes() == certificate
        assert device(second, DEVICE) == before


def test_F111_what_was_answered_survives_a_kill_at_any_moment(site):
    """F111: kill -9 while reports pour in; every report that was acknowledged is there."""
    for round_ in range(3):
        acknowledged: list[str] = []
        with serving(site) as s:
            worker = threading.Thread(target=_report_until_death, args=(s, round_, acknowledged))
            worker.start()
            while len(acknowledged) < 10 * (round_ + 1):
                time.sleep(0.002)
            s.stop(signal.SIGKILL)
            worker.join()
        with serving(site) as s:
            kept = {r["attempt"] for r in device(s, DEVICE)["history"]}
        assert kept >= set(acknowledged)


def _report_until_death(server: Running, round_: int, acknowledged: list[str]) -> None:
    with server.client(server.token("device")) as client:
        for number in range(10_000):
            attempt = f"{round_}-{number}"
            try:
                client.post("/api/v1/report-status", json={**REPORT, "attempt": attempt})
            except httpx.TransportError:
                return
            acknowledged.append(attempt)


def test_many_boards_at_once_register_once_each(server):
    def worker(number: int) -> None:
        with server.client(server.token("device")) as client:
            for _ in range(5):
                body = {**ASK, "device_id": f"herd-{number % 4}"}
                codes.append(client.post("/api/v1/check-update", json=body).status_code)

    codes: list[int] = []
    threads = [threading.Thread(target=worker, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 60


def test_an_answer_does_not_wait_for_nagle(server):
    """Headers and body are two writes: with Nagle's algorithm each answer took 40 ms more."""
    took = []
    with server.client(server.token("device")) as client:
        for _ in range(20):
            started = time.perf_counter()
            client.post("/api/v1/check-update", json=ASK)
            took.append(time.perf_counter() - started)
    assert min(took) < 0.035


def test_private_files_are_private(server):
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in server.data.iterdir()}
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
    tokens = ("device-token", "operator-token")
    for name in ("server.key", *tokens, *(token + ".sha256" for token in tokens)):
        assert modes[name] == 0o600
