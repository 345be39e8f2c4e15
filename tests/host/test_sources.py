"""Where offers come from: what a pointer or an answer may say, and what is asked of whom."""

import asyncio
import json

import pytest
from trust import Nvs

from twinslot import journal, sources, url
from twinslot.errors import FormatError, HttpError, NetworkError
from twinslot.sources import server, static

HOME = "https://updates.example/"
CHANNEL = HOME + "lamp/stable.json"
RELEASE = HOME + "lamp/r/2.0.0.jws"
SETTINGS = {"url": HOME, "product": "lamp", "channel": "stable"}
FACTS = {"device_id": "d1", "current_version": "1.0.0", "product": "lamp"}
DAYS_7 = 7 * 24 * 3600


def offer(**members):
    return sources.parse_offer(members, CHANNEL, url.resolve)


# -- an offer


def test_an_offer_of_nothing_is_nothing():
    assert offer() == (None, None, 100, "", 0, 0)
    assert offer(release=None, poll=None, rollout=None) == offer()
    assert offer(unknown=1) == offer(), "a later server may say more"


def test_what_an_offer_says():
    found = offer(
        release="r/2.0.0.jws",
        poll=60,
        rollout={"percent": 12.5, "seed": "s"},
        keyring=3,
        install=7,
    )
    assert found._asdict() == {
        "release": RELEASE,
        "poll": 60,
        "percent": 12.5,
        "seed": "s",
        "keyring": 3,
        "install": 7,
    }


@pytest.mark.parametrize(
    ("said", "meant"),
    [(-5, 1), (0, 1), (1, 1), (2, 2), (DAYS_7, DAYS_7), (DAYS_7 + 1, DAYS_7), (1 << 40, DAYS_7)],
)
def test_no_server_makes_a_board_poll_without_a_pause_or_never_again(said, meant):
    assert offer(poll=said).poll == meant


@pytest.mark.parametrize(("said", "meant"), [(0, 0), (1, 1), (DAYS_7, DAYS_7), (1 << 40, DAYS_7)])
def test_no_server_puts_an_installation_off_for_more_than_a_week(said, meant):
    assert offer(install=said).install == meant


@pytest.mark.parametrize("percent", [0, 1, 99.9, 100])
def test_a_rollout_is_a_share_of_the_fleet(percent):
    assert offer(rollout={"percent": percent, "seed": ""}).percent == percent


@pytest.mark.parametrize("keyring", [0, 1, (1 << 30) - 1])
def test_versions_of_keyrings_are_what_a_board_can_count(keyring):
    assert offer(keyring=keyring).keyring == keyring


WRONG = [
    {"release": ""},
    {"release": 7},
    {"release": []},
    {"release": False},
    {"release": "https://evil.example/r.jws"},
    {"poll": "60"},
    {"poll": 1.5},
    {"poll": True},
    {"poll": False},
    {"rollout": []},
    {"rollout": 100},
    {"rollout": ""},
    {"rollout": {}},
    {"rollout": {"seed": "s"}},
    {"rollout": {"percent": 50}},
    {"rollout": {"percent": 50, "seed": 7}},
    {"rollout": {"percent": -1, "seed": "s"}},
    {"rollout": {"percent": -0.1, "seed": "s"}},
    {"rollout": {"percent": 100.1, "seed": "s"}},
    {"rollout": {"percent": 101, "seed": "s"}},
    {"rollout": {"percent": float("nan"), "seed": "s"}},
    {"rollout": {"percent": "50", "seed": "s"}},
    {"rollout": {"percent": True, "seed": "s"}},
    {"keyring": -1},
    {"keyring": 1 << 30},
    {"keyring": True},
    {"keyring": "1"},
    {"keyring": None},
    {"install": -1},
    {"install": True},
    {"install": 1.0},
    {"install": None},
]


@pytest.mark.parametrize("members", WRONG, ids=json.dumps)
def test_a_member_of_another_kind_is_refused_by_its_name(members):
    with pytest.raises(
        FormatError, match=f"{next(iter(members))}( of the offer|$|:)|foreign host"
    ):
        offer(**members)


@pytest.mark.parametrize("obj", [None, [], "offer", 1, True])
def test_an_offer_is_an_object(obj):
    with pytest.raises(FormatError, match="offer"):
        sources.parse_offer(obj, CHANNEL, url.resolve)


def test_what_an_error_quotes_of_a_server_is_short():
    for member in ("keyring", "install"):
        with pytest.raises(FormatError) as error:
            offer(**{member: "x" * 5000})
        assert 32 <= error.value.message.count("x") <= 40


# -- who is asked, and what


class Answer:
    retry_after = 33

    def __init__(self, content=b"{}", status=200, etag=None):
        self.status = status
        self.etag = etag
        self.closed = 0
        self.limit = None
        self._content = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def read(self, limit):
        self.limit = limit
        return self._content

    async def close(self):
        self.closed += 1


class Client:
    """Answers one by one what it was told to; ``asked`` is what of it was asked for."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def get(self, address, etag=None, deadline_ms=None):
        assert deadline_ms == sources.DEADLINE_MS
        self.asked.append((address, etag))
        return self._next()

    async def post_json(self, address, obj, deadline_ms):
        assert deadline_ms == sources.DEADLINE_MS
        self.asked.append((address, obj))
        return self._next()

    def _next(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def polls(source, client):
    return asyncio.run(source.poll(client, dict(FACTS)))


@pytest.mark.parametrize("source", ["static", "server"])
@pytest.mark.parametrize("status", [199, 201, 204, 301, 304, 404, 429, 503])
def test_an_answer_of_another_status_is_an_error_that_says_when_to_come_again(source, status):
    made = static.Static(SETTINGS) if source == "static" else server.Server(SETTINGS)
    answer = Answer({"release": "r/2.0.0.jws", "update_available": True}, status)
    with pytest.raises(HttpError) as error:
        polls(made, Client(answer))
    assert (error.value.status, error.value.retry_after) == (status, 33)
    assert answer.closed == 1 and answer.limit is None


def test_a_tree_is_asked_for_its_channel():
    answer = Answer({"release": "r/2.0.0.jws", "poll": 60}, etag='"a"')
    client = Client(answer)
    found = polls(static.Static(SETTINGS), client)
    assert (found.release, found.poll) == (RELEASE, 60)
    assert client.asked == [(CHANNEL, None)]
    assert answer.limit == sources.DOCUMENT_LIMIT and answer.closed == 1


def test_a_channel_that_has_not_changed_costs_a_304():
    client = Client(Answer({"release": "r/2.0.0.jws"}, etag='"a"'), Answer(b"", 304))
    source = static.Static(SETTINGS)
    first = polls(source, client)
    assert polls(source, client) is first
    assert [etag for _, etag in client.asked] == [None, '"a"']
    client.answers = [Answer({"poll": 9}), Answer({"poll": 10})]
    assert polls(source, client).poll == 9
    assert polls(source, client).poll == 10
    assert [etag for _, etag in client.asked][2:] == ['"a"', None], "the new one named none"


def test_a_304_to_nothing_is_no_answer():
    with pytest.raises(HttpError):
        polls(static.Static(SETTINGS), Client(Answer(b"", 304)))


def test_what_led_nowhere_is_fetched_whole_the_next_time():
    client = Client(Answer({"poll": 9}, etag='"a"'), Answer({"poll": 9}, etag='"a"'))
    source = static.Static(SETTINGS)
    polls(source, client)
    source.forget()
    polls(source, client)
    assert [etag for _, etag in client.asked] == [None, None]


@pytest.mark.parametrize("content", [b"", b"<html>", b"{", b'{"release": "r/2.0.0.jws"'])
def test_F44_a_portals_page_is_no_channel(content):
    client = Client(Answer(content, etag='"a"'), Answer({"poll": 9}))
    source = static.Static(SETTINGS)
    with pytest.raises(FormatError, match="is not JSON"):
        polls(source, client)
    assert polls(source, client).poll == 9
    assert [etag for _, etag in client.asked] == [None, None], "and what it calls itself is void"


def test_F44_a_portals_JSON_is_no_channel_either():
    for content in ({}, {"login": "https://portal.example/"}):
        client = Client(Answer(content, etag='"a"'), Answer({"poll": 9}))
        source = static.Static(SETTINGS)
        with pytest.raises(FormatError, match="holds no offer"):
            polls(source, client)
        polls(source, client)
        assert [etag for _, etag in client.asked] == [None, None]
    for name, value in (("release", None), ("poll", 9), ("rollout", None), ("keyring", 0)):
        assert polls(static.Static(SETTINGS), Client(Answer({name: value})))


def test_nobody_listens_to_reports_at_a_tree():
    client = Client()
    asyncio.run(static.Static(SETTINGS).report(client, FACTS, {"status": "confirmed"}))
    assert client.asked == []


def test_a_server_is_told_the_facts_and_asked_for_an_offer():
    answer = Answer({"update_available": True, "release": "/lamp/r/2.0.0.jws", "keyring": 2})
    client = Client(answer)
    found = polls(server.Server(SETTINGS), client)
    assert (found.release, found.keyring) == (RELEASE, 2)
    assert client.asked == [(HOME + "api/v1/check-update", FACTS)]
    assert answer.limit == sources.DOCUMENT_LIMIT and answer.closed == 1


def test_a_server_that_has_nothing_offers_nothing_whatever_else_it_says():
    content = {"update_available": False, "release": "/lamp/r/2.0.0.jws", "poll": 5}
    found = polls(server.Server(SETTINGS), Client(Answer(content)))
    assert (found.release, found.poll) == (None, 5)
    assert polls(server.Server(SETTINGS), Client(Answer({"update_available": False})))


@pytest.mark.parametrize(
    "content", [{}, [], "yes", None, {"update_available": 1}, {"update_available": None}]
)
def test_an_answer_that_does_not_say_whether_is_none(content):
    with pytest.raises(FormatError, match="update_available"):
        polls(server.Server(SETTINGS), Client(Answer(content)))


def test_an_answer_that_is_no_JSON_is_none():
    answer = Answer(b"<html>")
    with pytest.raises(FormatError, match="api/v1/check-update is not JSON"):
        polls(server.Server(SETTINGS), Client(answer))
    assert answer.closed == 1


def test_a_report_says_whose_it_is_and_must_be_taken():
    report = {"attempt": "a", "status": "confirmed", "current_version": "told otherwise"}
    client = Client(Answer(), Answer(status=503), NetworkError("reset"))
    source = server.Server(SETTINGS)
    asyncio.run(source.report(client, FACTS, report))
    body = {"attempt": "a", "status": "confirmed", "device_id": "d1", "current_version": "1.0.0"}
    assert client.asked == [(HOME + "api/v1/report-status", body)]
    assert "device_id" not in report, "the caller's own is as it was"
    for kind in (HttpError, NetworkError):
        with pytest.raises(kind):
            asyncio.run(source.report(client, FACTS, report))


def test_a_report_of_a_failure_brings_what_the_board_has_noted(monkeypatch):
    board = journal.Journal(Nvs())
    monkeypatch.setattr(journal, "_shared", board)
    board.add_to_log("1.0.0", "failed", "dark")
    board.add_to_log("2.0.0", "rolledback", "the lamp is off")
    client = Client(Answer(), Answer())
    source = server.Server(SETTINGS)
    for error in ({"code": "health"}, None):
        asyncio.run(source.report(client, FACTS, {"attempt": "a", "error": error}))
    failed, well = [body for _, body in client.asked]
    notes = [note.split(" ", 1)[1] for note in failed["log"].split("\n")]
    assert notes == ["1.0.0 failed dark", "2.0.0 rolledback the lamp is off"]
    assert "log" not in well
