"""Whom a board trusts over TLS: handshakes with mbedTLS at both ends, over a pipe in memory.

The certificates were made for these tests and are trusted by nobody. ``server`` and ``client`` are
signed by ``ca``, the others by themselves; ``own``, ``old``, ``early`` and ``server`` are for
tree.example. ``old`` was valid until 1999, ``early`` is from 2048 on, the rest from 1990 to 2049.
"""

import hashlib
import io
import sys
from binascii import a2b_base64, b2a_base64, hexlify

import tls
from harness import raises

from twinslot import certs, handshake
from twinslot.certs import Tls
from twinslot.errors import ConfigError, TlsError, UnreachableError
from twinslot.http import Client

# mbedTLS itself. The virtual board's module goes by the board's clock, and names dates alone.
tls = sys.modules["tls"] = getattr(tls, "_tls", tls)

HEAP = "1M"
NAME = "tree.example"

# {name: (certificate, key)}, DER in base64
_FILES = {
    "ca": (
        "MIIBQjCB6aADAgECAgEHMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmNhLmV4YW1wbGUwHhcNOTAwMTAxMDAwMDAw"
        "WhcNNDkxMjMxMDAwMDAwWjAVMRMwEQYDVQQDDApjYS5leGFtcGxlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE"
        "juJTXPUNuVb/lYwGVKELRx/6i1HhNhe9UZEQt8U3UI4DZEfPtqIVr0Q8oWxlBnOE3JVyoEDBaZsK5QT4102YfaMq"
        "MCgwFQYDVR0RBA4wDIIKY2EuZXhhbXBsZTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIQCI59Sk"
        "P4ZiPmlNcUbVs1mpuxv0sE10BCEPA6CmzAbz7QIgGLP2vWvYOyF2xSXcWevUdQd2qvP7gGr0Eiae+HFAMCQ=",
        "",
    ),
    "server": (
        "MIIBQzCB6qADAgECAgEHMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmNhLmV4YW1wbGUwHhcNOTAwMTAxMDAwMDAw"
        "WhcNNDkxMjMxMDAwMDAwWjAXMRUwEwYDVQQDDAx0cmVlLmV4YW1wbGUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC"
        "AARmg5AVuBzf0KJF7VKAX/1vBfVj4BnHXb+wxm6WqYJwdeLSeZTruPx2NKvKiSPIY62uLxb5dTttNkX3ktc3wX6X"
        "oykwJzAXBgNVHREEEDAOggx0cmVlLmV4YW1wbGUwDAYDVR0TAQH/BAIwADAKBggqhkjOPQQDAgNIADBFAiEA4QkB"
        "WBmh1lHyWvItiDLHZk4pO/RYFzQm372P6xEk7qICIEo+g6EWSdH/REXxK9Szfmlq7yDkx3EnzcltHmD2qtwJ",
        "MHcCAQEEIAsKFwHufLbmmS6T2MgRQQGhFUPLHUioZ7NaX4uELXefoAoGCCqGSM49AwEHoUQDQgAEZoOQFbgc39Ci"
        "Re1SgF/9bwX1Y+AZx12/sMZulqmCcHXi0nmU67j8djSryokjyGOtri8W+XU7bTZF95LXN8F+lw==",
    ),
    "own": (
        "MIIBSDCB76ADAgECAgEHMAoGCCqGSM49BAMCMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTAeFw05MDAxMDEwMDAw"
        "MDBaFw00OTEyMzEwMDAwMDBaMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH"
        "A0IABBUoTod9tT9d9MZJHip/U5K6uESp6FzZ8OWaQNIrPxGbCteYJXTBpiWwy/rYyFF3F6azSJ8oLcmxnGMJ3ZXv"
        "SPijLDAqMBcGA1UdEQQQMA6CDHRyZWUuZXhhbXBsZTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUC"
        "IQDviOghqNpAe69M6JrYnM8FP8oaDPxZr1JFkiOyIiTY6AIgPxAHlk1XJ3PXTbJL2BU4330GXD07vVV2aetyUwxK"
        "U+M=",
        "MHcCAQEEIMlBJMTFHIRW8y71pGFLyVKlKq1DzVM+XOgOfuHJcjgRoAoGCCqGSM49AwEHoUQDQgAEFShOh321P130"
        "xkkeKn9Tkrq4RKnoXNnw5ZpA0is/EZsK15gldMGmJbDL+tjIUXcXprNInygtybGcYwndle9I+A==",
    ),
    "old": (
        "MIIBSDCB76ADAgECAgEHMAoGCCqGSM49BAMCMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTAeFw05MDAxMDEwMDAw"
        "MDBaFw05OTAxMDEwMDAwMDBaMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH"
        "A0IABLbKU1X4g/oddxR5yVYq9XmlmsfA5r+xvTO6RJQABEQD3fukplxXTcIt42kblAiCVYPctEbhtmu7fp15C8Y2"
        "NjajLDAqMBcGA1UdEQQQMA6CDHRyZWUuZXhhbXBsZTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUC"
        "ICwHAiF/4xEENrkMTPeSn9Q72GXl7jJw9QPlXOhZm+XmAiEAzP0nSJ+l6PCjv9CXGoLT1XDWJKyG1FrRtQI7qIqO"
        "y2o=",
        "MHcCAQEEIPmMbmBICxnmPMUkkmU3tB7MsmbjsBmSnSNgQ1oAGVZYoAoGCCqGSM49AwEHoUQDQgAEtspTVfiD+h13"
        "FHnJVir1eaWax8Dmv7G9M7pElAAERAPd+6SmXFdNwi3jaRuUCIJVg9y0RuG2a7t+nXkLxjY2Ng==",
    ),
    "early": (
        "MIIBSDCB76ADAgECAgEHMAoGCCqGSM49BAMCMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTAeFw00ODAxMDEwMDAw"
        "MDBaFw00OTEyMzEwMDAwMDBaMBcxFTATBgNVBAMMDHRyZWUuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH"
        "A0IABKxQVy5NksL5NCmoxL+mkmlrG3fg/ZlWoOSyevVts+oL/NmdE6IRCsI/ZAVMpoaMbCho0yZyDYkfugnSke5w"
        "YEKjLDAqMBcGA1UdEQQQMA6CDHRyZWUuZXhhbXBsZTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUC"
        "IQCZ+ipEVXZc5ZIKrm0dTsKhaPyKijnsxnQGMp7XKy54GgIgfDx+EMpqxlWndAUxsgHqL8vLh7Dn5XEVUl8iJwIP"
        "Rpo=",
        "MHcCAQEEICvO86mNkTffIsnp0etxGueAaneLldiIIlCFeX1UlleBoAoGCCqGSM49AwEHoUQDQgAErFBXLk2Swvk0"
        "KajEv6aSaWsbd+D9mVag5LJ69W2z6gv82Z0TohEKwj9kBUymhoxsKGjTJnINiR+6CdKR7nBgQg==",
    ),
    "client": (
        "MIIBRjCB7KADAgECAgEHMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmNhLmV4YW1wbGUwHhcNOTAwMTAxMDAwMDAw"
        "WhcNNDkxMjMxMDAwMDAwWjAYMRYwFAYDVQQDDA1ib2FyZC5leGFtcGxlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD"
        "QgAE8KQFOOAByrKmEcAusF3+6tfqvP5N/UFU/EiiWgzQ8Ukw4BvF423sQdW7gSS6Iwkl+A98zRRR1O7L7iwtdeme"
        "UKMqMCgwGAYDVR0RBBEwD4INYm9hcmQuZXhhbXBsZTAMBgNVHRMBAf8EAjAAMAoGCCqGSM49BAMCA0kAMEYCIQCu"
        "8f+p1ERU6sSbpVEZ+LyCmO4nSgogR0iQxrmvRJ9i8wIhAP2S2XyZ76Vjqyu1mKq2k1OQw1V/zy/ETdgP0Yw0IoLc",
        "MHcCAQEEIDN2i965SqJUfutCVosdiXVR6tI16ZVo9QZg8QDOgH2roAoGCCqGSM49AwEHoUQDQgAE8KQFOOAByrKm"
        "EcAusF3+6tfqvP5N/UFU/EiiWgzQ8Ukw4BvF423sQdW7gSS6Iwkl+A98zRRR1O7L7iwtdemeUA==",
    ),
}


def cert(name):
    return a2b_base64(_FILES[name][0])


def key(name):
    return a2b_base64(_FILES[name][1])


def pem(der, label="CERTIFICATE"):
    text = b2a_base64(der).decode()
    return "-----BEGIN %s-----\n%s-----END %s-----\n" % (label, text, label)


def pin(name):
    return hexlify(hashlib.sha256(cert(name)).digest()).decode()


class End(io.IOBase):
    """One end of a pipe that never blocks."""

    def __init__(self):
        self.arrived = bytearray()
        self.other = None

    def readinto(self, buf):
        n = min(len(buf), len(self.arrived))
        buf[:n] = self.arrived[:n]
        self.arrived = self.arrived[n:]
        return n or None

    def write(self, buf):
        self.other.arrived += bytes(buf)
        return len(buf)

    def ioctl(self, request, argument):
        return 0


def reach(board, name="server", host=NAME, client_ca=None):
    """Send a server what a board would send first; return what the server has read of it.

    Raises the TlsError that the board makes of a handshake that fails; it has `heard` then.
    """
    near, far = End(), End()
    near.other, far.other = far, near
    context = tls.SSLContext(tls.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert(name), key(name))
    if client_ca:
        context.verify_mode = tls.CERT_REQUIRED
        context.load_verify_locations(cert(client_ca))
    server = context.wrap_socket(far, server_side=True, do_handshake_on_connect=False)
    client = board.wrap(near, host)
    sent, heard = None, b""
    for _ in range(20):
        try:
            sent = sent or client.write(b"hello")
        except (OSError, ValueError) as exc:
            error = handshake.tls_error(exc, host, board)
            error.heard = heard
            raise error
        try:
            heard = heard or server.read(5) or b""
        except OSError:
            pass  # it refuses the board: that hears of it
        if heard:
            break
    return heard


def fails(words, board, **how):
    error = raises(TlsError, reach, board, **how)
    assert error.heard == b"", "nothing leaves the board before the server is known"
    assert words in error.message, error.message
    return error


# -- a CA, or the server's own certificate


def test_a_server_by_the_pinned_ca_is_reached():
    for ca in (
        cert("ca"),
        bytearray(cert("ca")),
        pem(cert("ca")),
        pem(cert("ca")).encode(),
        "a comment\n" + pem(cert("own")) + pem(cert("ca")),
        pem(key("own"), "EC PRIVATE KEY") + pem(cert("ca")),
        "---- OUR CERTIFICATE----- for the lamps\n" + pem(cert("ca")),
    ):
        board = Tls(ca=ca)
        for _ in range(2):
            assert reach(board) == b"hello"
            assert board.pinned, "there is nothing to wait for"
    assert reach(Tls(ca=cert("own")), name="own") == b"hello"


def test_a_server_that_is_another_is_not():
    fails("the right ca?", Tls(ca=cert("own")))
    fails("the right ca?", Tls(ca=cert("ca")), name="own")
    error = fails("another name than b.example:", Tls(ca=cert("ca")), host="b.example")
    assert not error.dates


def test_F38_a_date_that_is_wrong_is_told_from_all_else():
    for name, words in (("old", "correct the clock"), ("early", "is the clock set?")):
        error = fails(words, Tls(ca=cert(name)), name=name)
        assert error.dates
        error = fails("the right ca?", Tls(ca=cert("ca")), name=name)
        assert not error.dates
        error = fails("another name", Tls(ca=cert(name)), name=name, host="b.example")
        assert not error.dates


# -- a fingerprint


def test_the_server_of_the_pinned_fingerprint_is_reached_whatever_its_name_and_dates():
    for name in ("server", "own", "old", "early"):
        digits = pin(name)
        spelt = ":".join(digits[i : i + 2] for i in range(0, 64, 2)).upper()
        for fingerprint in (digits, spelt, " %s\n" % digits):
            board = Tls(fingerprint=fingerprint)
            assert not board.pinned, "before any handshake"
            assert reach(board, name=name, host="b.example") == b"hello"
            assert board.pinned


def test_a_server_of_another_fingerprint_is_told_by_its_own():
    board = Tls(fingerprint=pin("own"))
    for _ in range(2):
        fails("fingerprint: saw %s, expected" % pin("server"), board)
        assert not board.pinned
        assert reach(board, name="own") == b"hello"
        assert board.pinned
    for at in (0, 31, 63):  # a single digit off
        digit = "%x" % (int(pin("own")[at], 16) ^ 1)
        off = pin("own")[:at] + digit + pin("own")[at + 1 :]
        fails("fingerprint", Tls(fingerprint=off), name="own")


def test_what_was_wrong_with_the_last_connection_is_not_said_of_the_next():
    board = Tls(fingerprint=pin("own"))
    fails("fingerprint", board)
    board.wrap(End(), NAME)
    assert "closed" in handshake.tls_error(OSError(104), NAME, board).message


def test_what_signed_a_certificate_is_not_compared_with_the_fingerprint():
    board = Tls(fingerprint=pin("server"))
    board.pinned = board._seen = None
    assert board._check(cert("ca"), 1) == 0
    assert board.pinned is None and board._seen is None
    assert board._check(cert("server"), 0) == 0
    assert board.pinned is True and board._seen is None


def test_with_both_both_must_hold():
    assert reach(Tls(ca=cert("ca"), fingerprint=pin("server"))) == b"hello"
    fails("fingerprint", Tls(ca=cert("ca"), fingerprint=pin("own")))
    fails("the right ca?", Tls(ca=cert("own"), fingerprint=pin("server")))
    fails("correct the clock", Tls(ca=cert("old"), fingerprint=pin("old")), name="old")


def test_a_port_that_can_not_compare_fingerprints_is_no_way_around_them():
    class Context:
        __slots__ = ()

        def __init__(self, protocol):
            pass

        def __setattr__(self, name, value):
            if name == "verify_callback":
                raise AttributeError(name)

        def load_verify_locations(self, der):
            pass

        def wrap_socket(self, *args, **kw):
            raise AssertionError("a connection")

    class Fake:
        SSLContext = Context
        PROTOCOL_TLS_CLIENT = CERT_REQUIRED = CERT_OPTIONAL = 1

    sys.modules["tls"] = Fake
    try:
        for more in ({}, {"ca": cert("ca")}):
            board = Tls(fingerprint=pin("server"), **more)
            for _ in range(2):
                error = raises(TlsError, board.wrap, None, NAME)
                assert "pin the certificate itself" in error.message
    finally:
        sys.modules["tls"] = tls


# -- a certificate of the board's own


def test_F42_a_server_that_asks_is_shown_the_boards_certificate():
    for kind in (bytes, pem):
        board = Tls(
            ca=cert("ca"),
            client_cert=kind(cert("client")),
            client_key=key("client") if kind is bytes else pem(key("client"), "EC PRIVATE KEY"),
        )
        for _ in range(2):
            assert reach(board, client_ca="ca") == b"hello"
    both = pem(key("client"), "EC PRIVATE KEY") + pem(cert("client")) + pem(cert("ca"))
    board = Tls(fingerprint=pin("server"), client_cert=both, client_key=both)
    assert reach(board, client_ca="ca") == b"hello"
    error = fails("does it ask for a client certificate", Tls(ca=cert("ca")), client_ca="ca")
    assert not error.dates


# -- what can't be used


def test_F67_without_anything_to_verify_by_there_is_no_tls():
    for nothing in ({}, {"ca": ""}, {"ca": b"", "fingerprint": ""}):
        assert "needs a certificate" in raises(ConfigError, Tls, **nothing).message
    for half in ({"client_cert": b"x"}, {"client_key": b"x"}):
        error = raises(ConfigError, Tls, ca=cert("ca"), **half)
        assert "needs its key" in error.message


def test_a_fingerprint_is_64_hex_digits():
    for digits in (pin("own")[:62], pin("own") + "00", "", "0" * 63):
        if digits:
            error = raises(ConfigError, Tls, fingerprint=digits)
            assert "fingerprint: saw %d characters" % len(digits) in error.message
    raises(ConfigError, Tls, fingerprint="g" * 64)
    raises(ConfigError, Tls, ca=cert("ca"), fingerprint="sha256")


def test_a_file_that_is_no_certificate_is_named():
    def said(**files):
        board = Tls(**files)  # an agent is made all the same: it keeps the network, too
        told = [raises(ConfigError, board.wrap, End(), NAME) for _ in range(2)]
        assert told[0] is not told[1], "its traceback would grow with each connection"
        assert told[0].message == told[1].message
        return told[0].message

    client = {"client_cert": cert("client"), "client_key": key("client")}
    assert said(ca=b"x").startswith("ca: mbedTLS can't read it")
    assert said(ca=cert("ca")[:-9]).startswith("ca: mbedTLS can't read it")
    assert said(ca=pem(cert("ca")) + pem(b"x")).startswith("ca: mbedTLS can't read it")
    assert said(ca=pem(cert("ca"), "PUBLIC KEY")).startswith("ca: no PEM block")
    assert "expected CERTIFICATE" in said(ca=pem(cert("ca"), "PUBLIC KEY"))
    broken = pem(cert("ca"))[:-50] + "=\n-----END CERTIFICATE-----\n"
    assert said(ca=broken) == "ca: not base64 between the PEM lines"
    for change, words in (
        ({"client_cert": b"x"}, "client certificate: mbedTLS can't read it"),
        ({"client_key": b"x"}, "client certificate: mbedTLS can't read it"),
        ({"client_cert": pem(b"x", "NOTHING")}, "client certificate: no PEM block"),
        ({"client_cert": pem(b"")}, "client certificate: mbedTLS can't read it"),
        ({"client_key": pem(key("client"), "CERTIFICATE")}, "client key: no PEM block"),
    ):
        files = dict(client)
        files.update(change)
        assert said(ca=cert("ca"), **files).startswith(words)


def test_the_files_are_let_go_once_they_are_read():
    board = Tls(ca=cert("ca"), client_cert=cert("client"), client_key=key("client"))
    reach(board)
    assert board._sources is None


async def test_F107_no_context_draws_random_numbers_before_a_connection_stands():
    # The radio may be off until then, and the ESP32's generator with it.
    board = Tls(ca=cert("ca"))
    try:
        await Client(board).get("https://127.0.0.1:1/")
    except UnreachableError:
        assert board._context is None and board._room is not None
    else:
        raise AssertionError("somebody listens there")
    assert reach(board) == b"hello"
    assert board._context is not None and board._room is None


class Context:
    """One of mbedTLS that runs into an error where it is told to."""

    where = error = None

    def __init__(self, protocol):
        pass

    def load_verify_locations(self, der):
        self._fail("load")

    def wrap_socket(self, *args, **kw):
        self._fail("wrap")
        return kw

    def _fail(self, where):
        if where == self.where:
            raise self.error


def test_F42_want_of_memory_is_no_fault_of_a_file():
    class Fake:
        SSLContext = Context
        PROTOCOL_TLS_CLIENT = CERT_REQUIRED = CERT_OPTIONAL = 1

    sys.modules["tls"] = Fake
    Context.error = OSError(12)
    try:
        for Context.where in ("load", "wrap"):
            board = Tls(ca=cert("ca"))
            assert "out of memory" in raises(TlsError, board.wrap, End(), NAME).message
        Context.where = None
        assert board.wrap(End(), NAME) == {
            "server_hostname": NAME,
            "do_handshake_on_connect": False,
        }
        Context.where, Context.error = "wrap", ValueError("not this name")
        assert "not this name" in raises(TlsError, board.wrap, End(), NAME).message
    finally:
        Context.where = None
        sys.modules["tls"] = tls


def Scarce(n):
    """The builtin ``bytearray`` where the heap has no hole for it."""
    raise MemoryError("no hole of %d" % n)


def test_the_room_for_the_context_is_taken_again_where_it_was_not_enough():
    class Fake:
        SSLContext = Context
        PROTOCOL_TLS_CLIENT = CERT_REQUIRED = CERT_OPTIONAL = 1

    sys.modules["tls"] = Fake
    try:
        board = Tls(ca=cert("ca"))
        room = len(board._room)
        Context.where = "load"
        for Context.error, kind in (
            (MemoryError("no room"), MemoryError),
            (OSError(12), TlsError),
            (ValueError("malformed"), ConfigError),
        ):
            raises(kind, board.wrap, End(), NAME)
            assert len(board._room) == room and board._context is None
        Context.error = OSError(12)
        certs.bytearray = Scarce
        try:
            assert "out of memory for TLS" in raises(TlsError, board.wrap, End(), NAME).message
        finally:
            del certs.bytearray
        assert board._room is None
        Context.where = None
        board.wrap(End(), NAME)
        assert board._room is None
    finally:
        Context.where = None
        sys.modules["tls"] = tls


# -- words for what went wrong


def test_each_way_to_fail_has_its_remedy():
    class Board:
        _seen = None

    def said(exc):
        error = handshake.tls_error(exc, NAME, Board)
        assert type(error) is TlsError
        return error

    # errno.h, mbedtls/ssl.h, x509.h, pk.h
    for code, words in (
        (12, "out of memory"),
        (-0x7F00, "out of memory"),
        (-0x2880, "out of memory"),
        (-0x3F80, "out of memory"),
        (-0x7280, "closed during the TLS handshake"),
        (104, "closed during the TLS handshake (104)"),
        (1, "closed during the TLS handshake"),
        (-0x7A00, "not fit for a server"),
        (-0x7780, "client certificate"),
        (-0x2700, "TLS handshake failed"),
        (0, "TLS handshake failed (0)"),
        ("text", "TLS handshake failed (text)"),
    ):
        error = said(OSError(code))
        assert words in error.message and not error.dates, error.message
    assert "(why)" in said(OSError(-0x2700, "why")).message
    expired = "The certificate validity has expired"
    future = "The certificate validity starts in the future"
    revoked = "The certificate has been revoked (is on a CRL)"
    for text, dates, words in (
        (expired, True, "correct the clock"),
        ("\n %s \n" % expired, True, "(%s)" % expired),
        (future, True, "is the clock set"),
        (expired + "\n" + future, True, "(%s %s)" % (expired, future)),
        (expired + "\n" + revoked, False, "correct the clock"),
        (revoked, False, "is refused ("),
        ("", False, "is refused ()"),
    ):
        error = said(ValueError(text))
        assert error.dates is dates and words in error.message, error.message
    assert "is refused (" in said(ValueError()).message
    Board._seen = b"\xab" * 32
    assert "saw " + "ab" * 32 in said(ValueError(expired)).message
