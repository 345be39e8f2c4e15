"""URLs of offers, manifests and redirects: what they resolve to, and what is refused."""

import harness

from twinslot.errors import FormatError
from twinslot.http import http_date
from twinslot.url import parse, resolve

BASE = "https://updates.example:8443/fleet/sensor/stable.json?x=/../y"
HERE = "https://updates.example:8443"

RESOLVED = (
    ("r/1.4.0.jws", HERE + "/fleet/sensor/r/1.4.0.jws"),
    ("r/1.4.0.jws?sig=a%2Fb", HERE + "/fleet/sensor/r/1.4.0.jws?sig=a%2Fb"),
    ("/blobs/ab/ab12.bin", HERE + "/blobs/ab/ab12.bin"),
    ("/", HERE + "/"),
    ("?page=2", HERE + "/fleet/sensor/stable.json?page=2"),
    ("a..b/c...d", HERE + "/fleet/sensor/a..b/c...d"),
    ("?up=../..", HERE + "/fleet/sensor/stable.json?up=../.."),
    (HERE + "/elsewhere", HERE + "/elsewhere"),
    ("HTTPS://UPDATES.example:8443/Case", HERE + "/Case"),
    ("//updates.example:8443/x", HERE + "/x"),
)

REFUSED = (
    "",
    None,
    7,
    "..",
    ".",
    "../x",
    "r/../../x",
    "/../x",
    "r/%2e%2e/x",
    "r/.%2E/x",
    "r%2f..%2fx",
    "r/..%5cx",
    "a\\b",
    "a b",
    " a",
    "a\tb",
    "a\r\nHost: evil",
    "a\0",
    "a#b",
    "ä",
    "<a>",
    "http://updates.example:8443/x",
    "https://updates.example/x",
    "https://updates.example:8444/x",
    "https://evil.example:8443/x",
    "//evil.example/x",
    "https://updates.example:8443@evil.example/x",
    "https://user:pass@updates.example:8443/x",
    "ftp://updates.example/x",
    "file:///etc/passwd",
    "data:,x",
    "javascript:x",
    "https:",
    "https://",
    "https:/x",
    "https:x",
    "https://[::1/x",
    "https://[::1]x/x",
    "https://updates.example:/x",
    "https://updates.example:99999/x",
    "https://updates.example:-1/x",
    "a:b",
    "x" * 513,
    "x" * 480,  # too long once the base is in front of it
)


def test_references_resolve_against_the_document_that_names_them():
    for reference, expected in RESOLVED:
        assert resolve(BASE, reference) == expected, reference
        assert resolve(parse(BASE), reference) == expected, reference


def test_unusual_references_are_refused():
    for reference in REFUSED:
        error = harness.raises(FormatError, resolve, BASE, reference)
        assert "pass" not in str(error).replace("password", ""), error


def test_foreign_hosts_only_when_named():
    cdn = "https://cdn.example/x"
    harness.raises(FormatError, resolve, BASE, cdn)
    harness.raises(FormatError, resolve, BASE, cdn, ("cdn.example:8443", "other"))
    harness.raises(FormatError, resolve, BASE, "http://cdn.example/x", ("cdn.example",))
    assert resolve(BASE, cdn, ("cdn.example",)) == cdn
    assert resolve(BASE, cdn, ("cdn.example:443",)) == cdn


def test_ports_and_addresses():
    assert parse("http://h") == ("http", "h", 80, "/")
    assert parse("https://h?a") == ("https", "h", 443, "/?a")
    assert parse("https://[FE80::1]:444/x") == ("https", "fe80::1", 444, "/x")
    assert resolve("https://[fe80::1]:444/x", "y") == "https://[fe80::1]:444/y"


def test_http_dates():
    assert http_date(b"Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert http_date(b"Tue, 19 Jan 2038 03:14:08 GMT") == 1 << 31
    assert http_date(b"Thu, 29 Feb 2024 23:59:59 GMT") == 1709251199
    for text in (
        b"",
        b"Thu, 29 Feb 2023 00:00:00 GMT",
        b"Fri, 01 Jan 1970 00:00:00 GMT",
        b"Thu, 01 jan 1970 00:00:00 GMT",
        b"Thu, 1 Jan 1970 00:00:00 GMT ",
        b"Wed, 31 Dec 1969 23:59:59 GMT",
        b"Thu, 01 Jan 1970 00-00-00 GMT",
        b"Thu, 01 anF 1970 00:00:00 GMT",
        b"Thu, 00 Jan 1970 00:00:00 GMT",
        b"Thu, 01 Jan 1970 -1:00:00 GMT",
    ):
        assert http_date(text) is None, text
