"""Whatever is sent to a page, no answer is a 5xx. (Schemathesis sees what the API's document has.)

The routes are those of the application, the forms those that its own pages show.
"""

import html.parser
import re
import time
from urllib.parse import quote, unquote, urlencode

import fleet as fleets
import pytest
from fleet import Board, Fleet
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from twinslot_server import auth
from twinslot_server.audit import Who

EXAMPLES = 12  # for each route
ODD = (
    *(
        "",
        " ",
        "é",
        "²",
        "٣",
        "\0",
        "\x1b",
        "\r\nX: y",
        "\ufeff",
        "😀",
        "%s",
        "{{7*7}}",
        "../../x",
        "\\",
    ),
    *(
        "0",
        "1",
        "-1",
        "1.5",
        "1e400",
        "-inf",
        "nan",
        "9" * 20,
        "9" * 400,
        "0x1",
        "1_0",
        "true",
        "null",
    ),
    *("a=b", "=", "a=", "*", "5%", "-5%", "nan%", "ring=pilot", "[]", "{}", '{"a":1}', "a,b\nc"),
    *("2026-02-31", "0001-01-01T00:00", "9999-12-31T23:59+23:59", "25:99", "Mars/Base", "/etc/x"),
    *("* * * * *", "0 0 31 2 *", "http://[", "https://é.example/", "yes", "stable", "x" * 5000),
)
CHARSETS = (
    "utf-8",
    "UTF-8",
    "unicode_escape",
    "undefined",
    "punycode",
    "idna",
    "base64",
    "\xff",
    "",
)
ODD_HEADERS = (
    (b"content-type", b"multipart/form-data"),
    (b"content-type", b"multipart/form-data; boundary=" + b"x" * 300),
    (b"content-type", b"\xff;\xff=\xff"),
    (b"authorization", b"Bearer \xff\xfe"),
    (b"authorization", b"Bearer"),
    (b"cookie", b'twinslot_session="\\377\\400"; \xff=\xff'),
    (b"cookie", b"twinslot_session=" + b"x" * 4000),
    (b"host", b"[::"),
    (b"range", b"bytes=0-0,9-"),
    (b"if-none-match", b'W/"\xff'),
    (b"last-event-id", b"-1"),
    (b"x-twinslot-proxy", b"\xff"),
    (b"x-forwarded-user", b"\xff"),
)
values = st.sampled_from(ODD) | st.text(max_size=30) | st.integers().map(str)


class Forms(html.parser.HTMLParser):
    """The forms of a page: where each goes, and what it sends as it stands."""

    def __init__(self, page):
        super().__init__()
        self.page = page
        self.found = []

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        if tag == "form":
            self.found.append((said.get("action", self.page), {}))
        elif "name" in said and self.found:
            self.found[-1][1][said["name"]] = said.get("value") or "1"


class Asking:
    """Asks the application itself, as a server would that checks nothing."""

    def __init__(self, fleet, runner):
        self.fleet = fleet
        self._runner = runner
        self._asked = 0

    def session(self):
        """The cookie of a new session, and its token for forms."""
        now = int(time.time())
        who = Who("operator-token", "admin")
        value = self.fleet.store.write(lambda c: auth.open_session(c, who, now))
        found = self.fleet.store.read(lambda c: auth.session(c, value, now))
        return value, found.csrf

    def __call__(self, method, path, query=b"", headers=(), body=b""):
        """Return the status of the answer, and its text."""
        self._asked += 1
        raw = quote(path.encode("utf-8", "replace"), safe="/:").encode()
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": unquote(raw.decode()),
            "raw_path": raw,
            "query_string": query,
            "headers": list(headers),
            "client": (f"10.{self._asked >> 8}.{self._asked & 255}", 1),  # none is throttled
            "server": ("fleet", 443),
        }
        return self._runner.run(self._ask(scope, body))

    async def _ask(self, scope, body):
        incoming = [{"type": "http.request", "body": body}]
        sent = []

        async def receive():
            return incoming.pop() if incoming else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        try:
            await self.fleet.app(scope, receive, send)
        except Exception:
            assert sent  # what escapes has been answered with a 500
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A fleet that has one of everything."""
    folder = tmp_path_factory.mktemp("strict")
    fleet = Fleet(folder)
    try:
        fleet.publish("1.0.0")
        fleet.publish("0.9.0", downgrade=True)
        Board(fleet, "b1", labels=["site=home"]).poll()
        for path, body in (
            ("rollouts", {"firmware_id": 1}),
            ("ota/updates", {"firmware_id": 1}),
            ("windows", {"start": "00:00", "end": "00:00"}),
            ("schedules", {"name": "x", "cron": "0 0 1 1 *", "action": {"do": "gc"}}),
            ("webhooks", {"url": "https://localhost/"}),
        ):
            assert "id" in fleet.api("POST", path, body), path
        fleet.api("PUT", "users/anna", {"role": "viewer"})
        fleet.api("PUT", "filters/home", {"label": "site=home"})
        yield Asking(fleet, fleet.client.runner)
    finally:
        fleet.close()


def routes(asking):
    """Method and path of each route that is a page's."""
    found = [
        r for r in asking.fleet.app.routes if isinstance(r, Route) and not r.include_in_schema
    ]
    return [(method, route) for route in found for method in sorted(route.methods or ())]


def forms(asking):
    """What the pages' own forms send, by the route that takes it."""
    cookie, _ = asking.session()
    found = {}
    for page in ("/-/login", *fleets.PAGES):
        status, text = asking("GET", page, headers=[session_header(cookie)])
        assert status == 200, (page, text)
        parser = Forms(page)
        parser.feed(text)
        for action, fields in parser.found:
            for _, route in (r for r in routes(asking) if r[0] == "POST"):
                if route.path_regex.match(action):
                    found.setdefault(route.path, {}).update(fields)
                    break
    return found


def session_header(cookie):
    return b"cookie", f"{auth.COOKIE}={cookie}".encode()


def multipart(fields, files, charset):
    body = b""
    for name, value in [*fields.items(), *files.items()]:
        more = f'; filename="{value[:50]}"' if name in files else ""
        head = f'--between\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        body += (head + value + "\r\n").encode("utf-8", "surrogatepass")
    kind = f"multipart/form-data; boundary=between; charset={charset}".encode("latin-1")
    return (b"content-type", kind), body + b"--between--\r\n"


def urlencoded(fields):
    body = urlencode(fields, errors="surrogatepass").encode()
    return (b"content-type", b"application/x-www-form-urlencoded"), body


def attack(asking, method, route, usual):
    """Send a page what nobody would; return what it answered."""
    names = st.sampled_from([*usual, "csrf", "name", "file", "release"])
    places = st.sampled_from(["1", "b1", "anna", "home"]) | values
    answers = set()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def once(data):
        cookie, csrf = asking.session()
        fields = {**usual, "csrf": csrf} | data.draw(st.dictionaries(names, values, max_size=3))
        files = {}
        if data.draw(st.booleans()):
            files = {name: fields.pop(name) for name in ("file", "release") if name in fields}
        kind, body = urlencoded(fields)
        if files or data.draw(st.booleans()):
            kind, body = multipart(fields, files, data.draw(st.sampled_from(CHARSETS)))
        headers = [kind, *data.draw(st.lists(st.sampled_from(ODD_HEADERS), max_size=2))]
        if data.draw(st.integers(0, 5)):
            headers = [session_header(cookie), *headers]
        path = route.path
        for name in route.param_convertors:
            path = re.sub(rf"{{{name}(:\w+)?}}", lambda _: data.draw(places), path)
        query = urlencode(data.draw(st.dictionaries(names, values, max_size=3))).encode()
        status, text = asking(method, path, query, headers, body)
        assert status < 500, (method, path, query, headers, body, text)
        answers.add(status)

    once()
    return answers


def test_no_form_header_or_cookie_makes_a_page_fail(asking):
    shown = forms(asking)
    taken = set()
    for method, route in routes(asking):
        if attack(asking, method, route, shown.get(route.path, {})) & {200, 303}:
            taken.add(route.path)
    assert taken >= set(shown), "each form was also taken as it is"


LONE = b"\\ud800"  # a lone surrogate, by what Python calls unicode_escape


@pytest.mark.parametrize("charset", [c for c in CHARSETS if c not in ("utf-8", "UTF-8", "")])
def test_a_login_in_an_encoding_of_python_s_own_is_refused_not_failed(asking, charset):
    kind, body = multipart({"name": "a", "password": LONE.decode()}, {}, charset)
    status, text = asking("POST", "/-/login", headers=[kind], body=body)
    assert (status, "expected utf-8" in text) == (400, True)


@pytest.mark.parametrize("token", ["é", "\ud800", "", "x" * 5000])
def test_a_form_s_token_that_no_page_can_have_made_is_wrong_not_a_failure(asking, token):
    cookie, _ = asking.session()
    kind, body = urlencoded({"csrf": token})
    status, text = asking("POST", "/-/logout", headers=[kind, session_header(cookie)], body=body)
    assert (status, "not from this page" in text) == (403, True)


def test_a_secret_that_can_not_be_encoded_matches_nothing(asking):
    assert not asking.fleet.parts.operator_token.matches("\ud800")
    assert not asking.fleet.parts.operator_token.matches(fleets.ADMIN + "\udcff")
    assert not auth.password_matches("\ud800", auth.hash_password("x" * 10))
