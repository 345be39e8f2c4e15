"""Connections: whom a board talks to, over what, and what happens when a calendar runs out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faultserver import make_identity, server_context

import twinslot
from twinslot import config
from twinslot.errors import ConfigError
from twinslot_tools.hostile import SiteServer
from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs

MICROPYTHON = Path(sys.executable).with_name("micropython")
LIB = Path(twinslot.__path__[0]).parent
GOOD = {
    "product": "p",
    "url": "https://example.org",
    "keys": "/k.json",
    "hardware": "H",
    "ca": "/ca.pem",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://example.org"}, "allow_http"),
        ({"url": "HTTP://example.org"}, "https"),
        ({"url": "http://example.org", "allow_http": True, "token": "t"}, "never goes over http"),
        ({"url": "ftp://example.org", "allow_http": True}, "https"),
        ({"url": "example.org"}, "https"),
        ({"ca": ""}, "certificate"),
        ({"client_cert": "/c.pem"}, "go together"),
        ({"client_key": "/k.pem"}, "go together"),
        ({"allow_http": 1}, "bool"),
        ({"demo": "yes"}, "bool"),
    ],
    ids=lambda v: json.dumps(v)[:40],
)
def test_F67_a_configuration_that_would_be_unsafe_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config.check({**GOOD, **change})


def test_http_is_possible_when_asked_for_and_then_without_a_token():
    made = config.check({**GOOD, "url": "http://example.org", "allow_http": True, "ca": ""})
    assert made["url"] == "http://example.org/"


KINDS = [
    ("\nThe certificate validity has expired\n", True, "correct the clock"),
    ("The certificate validity starts in the future", True, "is the clock set"),
    (
        "The certificate validity has expired\nThe certificate validity starts in the future",
        True,
        "",
    ),
    ("The certificate is not correctly signed by the trusted CA", False, "the right ca"),
    (
        "The certificate validity has expired\n"
        "The certificate is not correctly signed by the trusted CA",
        False,
        "the right ca",
    ),
    (
        "The certificate Common Name (CN) does not match with the expected CN\n"
        "The certificate validity has expired",
        False,
        "the name in the certificate",
    ),
    ("The certificate has been revoked (is on a CRL)", False, "refused"),
    ("", False, ""),
]


def test_F38_only_dates_count_as_only_dates(tmp_path):
    """Told apart by mbedTLS's own words; each with what to do about it."""
    script = tmp_path / "kinds.py"
    script.write_text(
        "import sys, json\nsys.path.insert(0, sys.argv[1])\n"
        "from twinslot.handshake import tls_error\n"
        "class T: _seen = None\n"
        f"for text, _, _ in {KINDS!r}:\n"
        "    e = tls_error(ValueError(text), 'host', T)\n"
        "    print(json.dumps([e.dates, e.message]))\n"
        "for code in (12, -0x7F00, -0x2880, -0x7280, -0x7780, -0x7A00, 104):\n"
        "    e = tls_error(OSError(code), 'host', T)\n"
        "    print(json.dumps([e.dates, e.message]))\n"
    )
    done = subprocess.run([MICROPYTHON, script, LIB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (text, dates, remedy), (said, message) in zip(KINDS, answers, strict=False):
        assert said is dates, text
        assert remedy in message
    rest = answers[len(KINDS) :]
    assert not any(said for said, _ in rest)
    assert "out of memory" in rest[0][1] and "out of memory" in rest[1][1]
    assert "client certificate" in rest[4][1]


@pytest.fixture
def make_lab(tmp_path):
    made = []

    def make(identity, client_ca=None, files=None, **settings):
        """A lab whose server is a stand-in with this certificate, pinned on the board."""
        lab = Lab(tmp_path / f"lab{len(made)}", settings=settings)
        lab.__enter__()
        lab.stop_server()
        port = int(lab.url.rsplit(":", 1)[1])
        context = server_context(identity, client_ca)
        site = SiteServer(lab.site, context, port)
        site.start()
        made.append((lab, site))
        vfs.write_files(lab.flash, {"/ota/ca.pem": identity.pem, **(files or {})})
        return lab, site

    yield make
    for lab, site in made:
        site.close()
        lab.__exit__()


@pytest.mark.parametrize("source", ["server", "static"])
def test_I14_F38_an_expired_certificate_does_not_lock_a_board_out(make_lab, source):
    settings = {"source": source} if source == "server" else {"source": source, "token": ""}
    lab, site = make_lab(make_identity(begins_days=-30, ends_days=-1), **settings)
    lab.publish(lab.firmware("1.1.0"), "1.1.0")
    lab.power_on()
    lab.wait(lambda e: e.name == "staged")
    failed = [e.data for e in lab.events if e.name == "failed"]
    assert [f["code"] for f in failed] == ["tls"] * 3, "three polls, then regardless, and said so"
    assert all("correct the clock" in f["message"] for f in failed)
    lab.wait(lambda e: e.name == "confirmed")
    lab.power_off()
    assert site.requests, "it was fetched from here"
    heads = b"\n".join(site.requests).lower()
    assert b"authorization" not in heads, "never a token"
    assert b"post " not in heads, "never a report"
    token = (lab.folder / "server" / "device-token").read_bytes().strip()
    assert token.lower() not in heads


def test_F38_what_is_fetched_regardless_is_verified_all_the_same(make_lab):
    lab, site = make_lab(make_identity(begins_days=-30, ends_days=-1), token="", source="static")
    lab.publish(lab.firmware("1.1.0"), "1.1.0", key=lab.new_key("stranger"))
    lab.power_on()
    seen = lab.wait(lambda e: e.name == "failed" and e.data["code"] == "signature")
    assert "signing key" in seen.data["message"]
    lab.power_off()
    assert "staging" not in [e.name for e in lab.events]
    assert not [p for p in site.paths if "blobs" in p]


def test_F38_any_other_failure_of_tls_opens_no_way(make_lab):
    lab, site = make_lab(
        make_identity(begins_days=-30, ends_days=-1),
        token="",
        source="static",
        files={"/ota/ca.pem": make_identity().pem},
    )
    lab.publish(lab.firmware("1.1.0"), "1.1.0")
    lab.power_on()
    for _ in range(6):
        lab.wait(lambda e: e.name == "failed", start=len(lab.events))
    lab.power_off()
    assert {e.data["code"] for e in lab.events if e.name == "failed"} == {"tls"}
    assert site.requests == []


def test_a_certificate_that_is_renewed_is_verified_again(make_lab):
    lab, site = make_lab(make_identity(begins_days=-30, ends_days=-1), token="", source="static")
    lab.publish(lab.firmware("0.9.0"), "0.9.0")
    lab.power_on()
    lab.wait(lambda e: e.name == "failed" and e.data["code"] == "version")
    lab.power_off()
    site.close()
    renewed = make_identity()
    vfs.write_files(lab.flash, {"/ota/ca.pem": renewed.pem})
    again = SiteServer(lab.site, server_context(renewed), site.port)
    again.start()
    marker = len(lab.events)
    lab.power_on()
    lab.wait(lambda e: e.name == "failed", start=marker)
    lab.wait(lambda e: e.name == "idle", start=marker)
    lab.power_off()
    again.close()
    assert {e.data["code"] for e in lab.events[marker:] if e.name == "failed"} == {"version"}


def test_F42_a_board_shows_its_client_certificate_to_a_server_that_asks(make_lab):
    ca = make_identity("fleet", is_ca=True)
    board = make_identity("board", issuer=ca)
    lab, site = make_lab(
        make_identity(),
        client_ca=ca,
        token="",
        source="static",
        client_cert="/ota/board.pem",
        client_key="/ota/board.key",
        files={"/ota/board.pem": board.pem, "/ota/board.key": board.key_pem},
    )
    lab.publish(lab.firmware("1.1.0"), "1.1.0")
    lab.power_on()
    lab.wait(lambda e: e.name == "confirmed")
    lab.power_off()
    assert site.requests


def test_F42_without_its_client_certificate_a_board_is_told_why(make_lab):
    ca = make_identity("fleet", is_ca=True)
    lab, site = make_lab(make_identity(), client_ca=ca, token="", source="static")
    lab.power_on()
    seen = lab.wait(lambda e: e.name == "failed")
    lab.power_off()
    assert seen.data["code"] == "tls"
    assert site.requests == []
