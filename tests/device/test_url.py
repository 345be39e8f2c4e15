"""URLs of offers, manifests and redirects: what they resolve to, and what is refused."""

import harness

from twinslot.digits import decimal, hexadecimal
from twinslot.errors import FormatError
from twinslot.head import http_date
from twinslot.url import parse, resolve, shown, text_of

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
    assert parse("https://[::1]") == ("https", "::1", 443, "/")
    assert parse("https://[FE80::1]:444/x") == ("https", "fe80::1", 444, "/x")
    assert resolve("https://[fe80::1]:444/x", "y") == "https://[fe80::1]:444/y"


def test_a_port_that_is_not_the_usual_one_is_kept():
    for address in ("http://h:79/", "http://h:81/", "http://h:443/", "https://h:80/"):
        assert text_of(parse(address)) == resolve(address, "/") == address
    for address in ("http://h:80/", "https://h:443/"):
        assert text_of(parse(address)) == address[: address.rindex(":")] + "/"
    for port in (1, 65535):
        assert parse("https://h:%d" % port).port == port


MALFORMED = (
    "h/x",
    "h",
    "https:/h",
    "https//h",
    "ftp://h/x",
    "://h/x",
    "https://",
    "https:///x",
    "https://?x",
    "https://:443/",
    "https://[::1/x",
    "https://[::1",
    "https://[::1]x/x",
    "https://[::1]443/x",
    "https://[]/x",
    "https://[::1]:/x",
    "https://[::g]/x",
    "https://h:/x",
    "https://h:0/x",
    "https://h:65536/x",
    "https://h:1:2/x",
    "https://h:+1/x",
    "https://h%41/x",
    "https://a,b/x",
    "https://h/../x",
    "https://u@h/x",
)


def test_what_is_no_address_is_refused_by_itself_too():
    for address in MALFORMED:
        harness.raises(FormatError, parse, address)
    error = harness.raises(FormatError, parse, "user:secret@h/x")
    assert "secret" not in error.message


def test_an_address_is_long_or_short_but_not_longer():
    base = "https://h/"
    assert parse(base + "x" * (512 - len(base))).host == "h"
    harness.raises(FormatError, parse, base + "x" * (513 - len(base)))
    assert len(parse("https://" + "h" * 253).host) == 253
    harness.raises(FormatError, parse, "https://" + "h" * 254)
    assert parse("https://h/!~").path == "/!~"


def test_what_is_shown_of_an_address_holds_no_query_and_is_short():
    assert shown(parse("https://h:444/a/b?signature=secret?x")) == "https://h:444/a/b"
    long = "https://h/" + "x" * 200
    assert shown(parse(long)) == long[:120]


def test_numbers_are_digits_and_nothing_else():
    for text, limit, value in (
        (b"0", 0, 0),
        (b"0123456789", 1 << 30, 123456789),
        (b"9", 9, 9),
        (b"10", 9, None),
        (b"00000000001", 9, None),  # eleven digits
        (b"", 9, None),
        (b"1_0", 99, None),
        (b"+1", 9, None),
        (b" 1", 9, None),
        (b"1/", 9, None),
        (b"1:", 9, None),
        (b"a", 9, None),
    ):
        assert decimal(text, limit) == value, text
    for text, limit, value in (
        (b"0", 0, 0),
        (b"1234567", 1 << 32, 0x1234567),
        (b"89abcdef", 1 << 32, 0x89ABCDEF),
        (b"ABCDEF", 0xABCDEF, 0xABCDEF),
        (b"ABCDEF", 0xABCDEE, None),
        (b"000000001", 9, None),  # nine digits
        (b"", 9, None),
        (b"0x1", 99, None),
        (b"1_0", 99, None),
        (b"-1", 9, None),
        (b"/", 99, None),
        (b":", 99, None),
        (b"@", 99, None),
        (b"G", 99, None),
        (b"`", 99, None),
        (b"g", 99, None),
    ):
        assert hexadecimal(text, limit) == value, text


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
