"""From an offer to a release whose signature holds: whom it is asked of, whose keys count, and
what is done where only the calendar stands in the way.

Keys and signatures are real, the network is not.
"""

import json
import os
import sys

import signer
import workbench as bench
from harness import raises

from twinslot import config, jws, release, trust
from twinslot.anybody import Anybody
from twinslot.errors import (
    ConfigError,
    HttpError,
    KeyringError,
    NetworkError,
    OtaError,
    ReleaseError,
    SignatureError,
    SpaceError,
    TlsError,
)
from twinslot.sources import DEADLINE_MS

HEAP = "1M"
BASE = "https://tree.example/"
RELEASE_URL = BASE + "lamp/r/2.0.0.jws"
KEYRING_URL = BASE + "lamp/keyring.jws"
NOW = 1795165200
MONTH_S = 30 * 86400
PIN = "5a" * 32
MANIFEST = {
    "schema": 1,
    "product": "lamp",
    "version": "2.0.0",
    "hardware": ["H"],
    "issued": "2026-11-20T09:00:00Z",
    "images": [
        {
            "slot": "firmware",
            "chip_id": 0,
            "size": 4096,
            "sha256": "ab" * 32,
            "build": "cd" * 32,
            "payloads": [{"url": "blobs/a", "encoding": "identity", "size": 4096}],
        }
    ],
}
_signed = {}


def signed(name, obj=MANIFEST, typ=release.TYPE):
    """A document signed once for all tests: signing takes its time."""
    key = (name, typ, json.dumps(obj))
    if key not in _signed:
        _signed[key] = signer.sign(obj, typ, name)
    return _signed[key]


def keyring(version, *names, by="root", **members):
    keys = [signer.jwk(name) for name in names]
    obj = dict({"schema": 1, "version": version, "keys": keys}, **members)
    return signed(by, obj, "twinslot-keyring+jws")


class Answer:
    retry_after = 33

    def __init__(self, content, status=200):
        self.content = content
        self.status = status
        self.closed = 0
        self.limit = None

    async def read(self, limit):
        self.limit = limit
        return self.content

    async def close(self):
        self.closed += 1


class Site:
    """{URL: bytes, Answer or exception}, and what was asked of it."""

    def __init__(self, **files):
        self.files = {RELEASE_URL: files.get("release"), KEYRING_URL: files.get("keyring")}
        self.asked = []
        self.answers = []

    async def get(self, url, deadline_ms=None):
        assert deadline_ms == DEADLINE_MS
        self.asked.append(url)
        found = self.files[url]
        if isinstance(found, Exception):
            raise found
        self.answers.append(found if isinstance(found, Answer) else Answer(found))
        return self.answers[-1]


class Clock:
    def __init__(self, now=NOW, trusted=True):
        self.trusted = trusted
        self._now = now
        self.heard = []
        self.floor = 0

    @property
    def earliest(self):
        return self._now if self.trusted else self.floor

    def now(self):
        return self._now

    def at_least(self, unix):
        self.heard.append(unix)

    def observe(self, unix):
        pass


def make(clock=None, roots=("root",), keys=(), **settings):
    """A Trust of a board with this key file, without a keyring yet."""
    try:
        os.remove("/keyring.jws")
    except OSError:
        pass
    with open("/keys.json", "w") as f:
        held = {}
        if roots:
            held["root"] = [signer.jwk(name) for name in roots]
        if keys:
            held["keys"] = [signer.jwk(name) for name in keys]
        json.dump(held, f)
    full = {"product": "lamp", "url": BASE, "keys": "/keys.json", "hardware": "H"}
    full["fingerprint"] = PIN
    full.update(settings)
    journal = bench.new_journal()
    return trust.Trust(config.check(full), journal, clock or Clock())


async def fails(kind, coroutine):
    try:
        await coroutine
    except OtaError as exc:
        assert type(exc) is kind, repr(exc)
        return exc
    raise AssertionError("nothing raised, expected %s" % kind.__name__)


# -- a release


async def test_a_release_by_a_key_of_the_board_is_taken_and_dates_the_clock():
    clock = Clock()
    board = make(clock, keys=("release",), roots=())
    site = Site(release=signed("release"))
    manifest = await board.release(site, RELEASE_URL)
    assert (manifest.version, manifest.firmware.build) == ("2.0.0", "cd" * 32)
    assert clock.heard == [manifest.issued]
    assert site.asked == [RELEASE_URL]
    assert site.answers[0].closed == 1 and site.answers[0].limit == jws.TOKEN_LIMIT


async def test_nothing_but_a_release_by_a_key_that_signs_releases_is_one():
    clock = Clock()
    board = make(clock, keys=("release",))
    for token, kind in (
        (signed("second"), SignatureError),
        (signed("root"), SignatureError),
        (signed("release", typ="twinslot-keyring+jws"), SignatureError),
        (signed("release")[:-8] + b"AAAAAAAA", SignatureError),
        (b"<html>Please log in</html>", SignatureError),
        (signed("release", dict(MANIFEST, schema=2)), ReleaseError),
    ):
        site = Site(release=token)
        await fails(kind, board.release(site, RELEASE_URL))
        assert clock.heard == [], "nothing was learnt from it"
        assert site.answers[0].closed == 1


async def test_a_document_that_does_not_come_is_no_release():
    board = make(keys=("release",))
    for status in (199, 201, 404, 503):
        site = Site(release=Answer(signed("release"), status))
        exc = await fails(HttpError, board.release(site, RELEASE_URL))
        assert (exc.status, exc.retry_after) == (status, 33)
        assert site.answers[0].closed == 1 and site.answers[0].limit is None
    await fails(NetworkError, board.release(Site(release=NetworkError("reset")), RELEASE_URL))


async def test_F36_an_expired_keyring_trusts_nobody_where_the_time_is_known():
    clock = Clock(now=NOW)
    board = make(clock)
    expired = keyring(1, "release", expires="2026-11-20T08:00:00Z")
    assert await board.renew(Site(keyring=expired), 1, BASE) == 1
    site = Site(release=signed("release"))
    await fails(KeyringError, board.release(site, RELEASE_URL))
    clock.trusted = False
    assert (await board.release(site, RELEASE_URL)).version == "2.0.0"
    clock.floor = NOW - 3599  # something newer was signed, and is installed
    await fails(KeyringError, board.release(site, RELEASE_URL))


async def test_F41_a_frozen_tree_is_good_until_its_keyring_expires_and_no_longer():
    """Month after month a server shows what once was true."""
    clock = Clock()
    board = make(clock)
    frozen = Site(keyring=keyring(1, "release", expires="2027-02-20T09:00:00Z"))
    frozen.files[RELEASE_URL] = signed("release")
    await board.renew(frozen, 1, BASE)
    for months in range(3):
        clock._now = NOW + months * MONTH_S
        assert (await board.release(frozen, RELEASE_URL)).version == "2.0.0"
    for months in range(4, 7):
        clock._now = NOW + months * MONTH_S
        for said in (1, 0, 1):
            assert await board.renew(frozen, said, BASE) is None, "that one is known"
            await fails(KeyringError, board.release(frozen, RELEASE_URL))
    # A number made up makes no date of it; it costs one fetch.
    await fails(KeyringError, board.renew(frozen, 9, BASE))
    await fails(KeyringError, board.release(frozen, RELEASE_URL))
    # Where somebody shows its successor, it goes on.
    elsewhere = Site(keyring=keyring(2, "second"), release=signed("second"))
    assert await board.renew(elsewhere, 2, BASE) == 2
    assert (await board.release(elsewhere, RELEASE_URL)).version == "2.0.0"
    await fails(SignatureError, board.release(frozen, RELEASE_URL))


# -- the keyring


async def test_a_keyring_is_fetched_where_a_newer_one_is_said_to_be_there():
    board = make()
    site = Site(keyring=keyring(3, "release"), release=signed("release"))
    assert await board.renew(site, 0, BASE) is None
    assert site.asked == []
    assert await board.renew(site, 3, BASE) == 3
    assert site.asked == [KEYRING_URL]
    assert await board.renew(site, 3, BASE) is None
    assert len(site.asked) == 1, "that one is known"
    assert (await board.release(site, RELEASE_URL)).version == "2.0.0"


async def test_a_board_without_a_root_asks_for_no_keyring():
    board = make(roots=(), keys=("release",))
    site = Site(keyring=keyring(3, "release"))
    assert await board.renew(site, 3, BASE) is None
    assert site.asked == []


async def test_a_key_that_the_newer_keyring_leaves_out_is_revoked():
    board = make()
    await board.renew(Site(keyring=keyring(1, "release")), 1, BASE)
    await board.renew(Site(keyring=keyring(2, "second")), 2, BASE)
    await fails(SignatureError, board.release(Site(release=signed("release")), RELEASE_URL))
    await board.release(Site(release=signed("second")), RELEASE_URL)


async def test_a_keyring_that_does_not_hold_is_asked_for_again():
    """It was damaged on the way, or is an old one out of a cache, and comes right later: a board
    that never resets must not stay with the keys before."""
    for wrong in (
        keyring(2, "second", by="release"),
        b"nothing",
        keyring(2, "second", product="x"),
    ):
        board = make()
        await board.renew(Site(keyring=keyring(1, "release")), 1, BASE)
        site = Site(keyring=wrong)
        await fails(KeyringError, board.renew(site, 2, BASE))
        await fails(KeyringError, board.renew(site, 2, BASE))
        site.files[KEYRING_URL] = keyring(2, "second")
        assert await board.renew(site, 2, BASE) == 2
        assert len(site.asked) == 3


async def test_F28_a_keyring_that_could_not_be_written_down_is_asked_for_again():
    board = make()
    site = Site(keyring=keyring(1, "release"), release=signed("release"))
    store = board._journal._store

    def full(key, body):
        raise SpaceError("full")

    board._journal._store = full
    await fails(SpaceError, board.renew(site, 1, BASE))
    board._journal._store = store
    assert await board.renew(site, 1, BASE) == 1
    assert (await board.release(site, RELEASE_URL)).version == "2.0.0"


async def test_a_keyring_that_did_not_come_is_asked_for_again():
    board = make()
    site = Site(keyring=NetworkError("reset"))
    await fails(NetworkError, board.renew(site, 1, BASE))
    site.files[KEYRING_URL] = keyring(1, "release")
    assert await board.renew(site, 1, BASE) == 1


# -- connections


def test_the_token_belongs_to_the_server_and_goes_over_https():
    clock = Clock()
    client = make(clock, token="secret", timeout=7, allow_hosts=["cdn.example"]).client
    assert client._token == "secret" and client._token_for[:2] == ("https", "tree.example")
    assert client.read_timeout_ms == client._connect_timeout_ms == 7000
    assert client._allow_hosts == ["cdn.example"] and not client._allow_http
    assert client._on_date == clock.observe
    assert make(token="").client._token is None


def test_what_a_connection_is_verified_by_comes_from_the_files_that_are_named():
    for name in ("ca", "cert", "key"):
        with open("/%s.pem" % name, "w") as f:
            f.write(name)
    tls = make(fingerprint="", ca="/ca.pem").client._tls
    assert tls._sources == ([b"ca"], None, None) and tls._pin is None
    tls = make(client_cert="/cert.pem", client_key="/key.pem").client._tls
    assert tls._sources == ((), b"cert", b"key") and tls._pin == b"\x5a" * 32
    for change in ({"ca": "/no.pem"}, {"client_cert": "/no.pem", "client_key": "/key.pem"}):
        raises(ConfigError, make, **change)
    assert make(url="http://tree.example/", allow_http=True).client._tls is None
    assert make(url="http://tree.example/", allow_http=True).client._allow_http


def dates():
    error = TlsError("expired")
    error.dates = True
    return error


def test_F38_three_polls_that_fail_on_dates_alone_open_a_way_without_token():
    board = make(token="secret")
    for n in (1, 2):
        assert raises(TlsError, board.regardless, dates()).dates
        assert board._journal.get("dates", int) == n
    client = board.regardless(dates())
    assert client._token is None and client._on_date is None
    assert client is not board.client and board.regardless(dates()) is client
    assert board._journal.get("dates", int) == 3, "counted no further: flash wears"
    board.verified()
    assert board._journal.get("dates", int) == 0
    raises(TlsError, board.regardless, dates())


def test_F38_a_poll_counts_once_however_many_mirrors_have_old_certificates():
    board = make()
    for n in (1, 2):
        raises(TlsError, board.regardless, dates())
        for _ in range(3):
            raises(TlsError, board.regardless, dates(), False)
        assert board._journal.get("dates", int) == n
    client = board.regardless(dates())
    assert board.regardless(dates(), False) is client


def test_F38_any_other_failure_of_tls_opens_no_way():
    board = make()
    for _ in range(5):
        raises(TlsError, board.regardless, TlsError("not signed by the pinned CA"))
    assert board._journal.get("dates", int) == 0


def test_a_poll_that_works_as_ever_writes_nothing():
    board = make()
    stored = []
    board._journal._store = lambda key, body: stored.append(key)
    board.verified()
    assert stored == []


def test_the_connection_that_proves_nothing_is_open_to_anybody():
    made = []

    class Context:
        def __init__(self, kind):
            self.kind = kind
            self.verify_mode = "required"
            made.append(self)

        def wrap_socket(self, sock, server_hostname=None, do_handshake_on_connect=True):
            self.wrapped = (sock, server_hostname, do_handshake_on_connect, self.verify_mode)
            if isinstance(sock, Exception):
                raise sock
            return "wrapped"

    class Fake:
        SSLContext = Context
        PROTOCOL_TLS_CLIENT = "client"
        CERT_NONE = "none"

    real = sys.modules["tls"]
    sys.modules["tls"] = Fake
    try:
        anybody = Anybody()
        assert anybody.wrap("sock", "host") == "wrapped"
        assert made[0].kind == "client" and made[0].wrapped == ("sock", "host", False, "none")
        for error in (OSError(12), ValueError("no")):
            raises(TlsError, anybody.wrap, error, "host")
    finally:
        sys.modules["tls"] = real
    assert anybody.pinned is True, "no handshake is held up for a fingerprint"


def test_F42_a_handshake_without_memory_is_told_apart():
    """By errno.h, and mbedTLS's ssl.h, x509.h and pk.h: MBEDTLS_ERR_..._ALLOC_FAILED."""
    from twinslot.handshake import tls_error

    class Tls:
        _seen = None

    for code in (12, -0x7F00, -0x2880, -0x3F80):
        error = tls_error(OSError(code, "alloc"), "tree.example", Tls)
        assert type(error) is TlsError and not error.dates
        assert "out of memory" in error.message and "40 KB" in error.message
    for code in (104, -0x7780, -0x7280, -0x2700):
        error = tls_error(OSError(code, "else"), "tree.example", Tls)
        assert "memory" not in error.message


def test_without_its_key_file_there_is_no_trust():
    make()
    os.remove("/keys.json")
    full = config.check(
        {"product": "l", "url": BASE, "keys": "/keys.json", "hardware": "H", "fingerprint": PIN}
    )
    raises(ConfigError, trust.Trust, full, bench.new_journal(), Clock())
