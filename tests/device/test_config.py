"""ota.json: what is taken, what is refused and in which words, and the copy that worked."""

import binascii
import json
import os

import signer
from harness import raises

from twinslot import config, keyring, lastgood
from twinslot.errors import ConfigError

HEAP = "256K"
GOOD = {"product": "lamp", "url": "https://updates.example/", "keys": "/k.json", "ca": "/ca.pem"}


def refused(**change):
    """Check a configuration that differs from a good one; return the words of the refusal."""
    settings = dict(GOOD)
    for name, value in change.items():
        if value is None:
            del settings[name]
        else:
            settings[name] = value
    return str(raises(ConfigError, config.check, settings))


def write(path, content):
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def remove(*paths):
    for path in paths:
        try:
            os.remove(path)
        except OSError:
            pass


def test_a_short_configuration_is_completed():
    full = config.check(GOOD)
    assert full["product"] == "lamp" and full["channel"] == "stable"
    assert full["hardware"] == "ESP32_GENERIC", "the name of the MicroPython build"
    assert full["poll"] > 0 and full["stable"] > 0 and full["hang"] > 0
    assert "source" in full and "source" not in GOOD


def test_a_url_gets_its_slash():
    assert config.check(dict(GOOD, url="https://a.example/tree"))["url"].endswith("/tree/")


def test_each_required_member_is_missed_by_name():
    for name in ("product", "url", "keys"):
        assert name in refused(**{name: None})
        assert name in refused(**{name: ""})


def test_an_unknown_member_is_refused_and_the_known_ones_are_named():
    text = refused(chanel="beta")
    assert "chanel" in text and "channel" in text


def test_each_member_has_one_type():
    for name, value in (
        ("product", 5),
        ("poll", "60"),
        ("poll", True),
        ("poll", 1.5),
        ("stable", None or []),
        ("labels", "a"),
        ("allow_http", 1),
        ("keys", {}),
        ("wifi", "home"),
    ):
        assert name in refused(**{name: value})


def test_a_time_is_never_negative():
    for name in ("poll", "timeout", "stable", "deadline", "hang", "wdt"):
        assert name in refused(**{name: -1})


def test_what_is_no_object_is_no_configuration():
    for value in (None, [], "x", 5):
        raises(ConfigError, config.check, value)


def test_the_source_is_one_of_two():
    assert "static or server" in refused(source="ftp")


def test_transport_is_verified_or_refused():
    assert "ca" in refused(ca=None)
    config.check(dict(GOOD, ca="", fingerprint="ab" * 32))
    assert "allow_http" in refused(url="http://a.example/")
    config.check(dict(GOOD, url="http://a.example/", allow_http=True))
    assert "token" in refused(url="http://a.example/", allow_http=True, token="secret")
    for url in ("ftp://a.example/", "a.example", "//a.example/", "file:///etc/"):
        refused(url=url, allow_http=True)
    assert "client_key" in refused(client_cert="/c.pem")


def test_F104_a_refusal_does_not_tell_the_token():
    assert "s3cret" not in refused(url="http://a.example/", allow_http=True, token="s3cret")
    assert "s3cret" not in refused(wifi={"ssid": "home", "ap_password": "s3cret"})
    assert "token: saw list, expected str" in refused(token=["s3cret"])
    assert "s3cret" not in refused(token=["s3cret"]) + refused(wifi="s3cret")


def test_hosts_are_names_with_or_without_a_port():
    config.check(dict(GOOD, allow_hosts=["cdn.example", "10.0.0.1:8443"]))
    for host in ("https://cdn.example", "cdn.example/", "CDN.example", "", 5):
        assert "allow_hosts" in refused(allow_hosts=[host])


def test_wifi_is_checked_too():
    config.check(dict(GOOD, wifi={"ssid": "home", "password": "secret"}))
    assert "ssid" in refused(wifi={"password": "secret"})
    assert "pass" in refused(wifi={"ssid": "home", "pass": "secret"})
    assert "8" in refused(wifi={"ssid": "home", "ap_password": "short"})


def test_a_file_that_is_not_there_or_not_json():
    remove("/c.json", "/c.json.good")
    assert "/c.json" in str(raises(ConfigError, config.load, "/c.json"))
    for content in (b"", b"{", b"\xff\xfe", b"[1"):
        write("/c.json", content)
        assert "/c.json" in str(raises(ConfigError, config.load, "/c.json"))
    write("/c.json", GOOD)
    assert config.load("/c.json")["product"] == "lamp"


def test_the_last_one_that_worked_takes_the_place_of_a_damaged_one():
    write("/c.json", GOOD)
    lastgood.keep("/c.json")
    for content in (b"", b'{"product": "la', json.dumps(dict(GOOD, nosuch=1)).encode()):
        write("/c.json", content)
        assert config.load("/c.json")["product"] == "lamp"
    remove("/c.json")
    assert config.load("/c.json")["product"] == "lamp"


def test_a_damaged_one_never_becomes_the_copy():
    write("/c.json", GOOD)
    lastgood.keep("/c.json")
    write("/c.json", b"{")
    lastgood.keep("/c.json")
    assert config.load("/c.json")["product"] == "lamp"
    write("/c.json", dict(GOOD, product="radio"))
    lastgood.keep("/c.json")
    write("/c.json", b"{")
    assert config.load("/c.json")["product"] == "radio"


def certificates():
    """Certificates as far as a board looks at them: DER of short, longer and long lengths."""
    for head, n in ((b"\x30\x7f", 127), (b"\x30\x81\x80", 128), (b"\x30\x82\x02\x05", 517)):
        yield head + b"x" * n


def test_a_certificate_is_whole_if_it_is_as_long_as_it_says():
    for der in certificates():
        for content in (der, pem(der), pem(der) + pem(der)):
            write("/c.pem", content)
            assert lastgood.is_whole("ca", "/c.pem")
        for content in (der[:-1], der + b"x", der[:1], pem(der[:-1]), pem(der) + pem(der[:-1])):
            write("/c.pem", content)
            assert not lastgood.is_whole("ca", "/c.pem"), content
    remove("/c.pem")
    assert not lastgood.is_whole("ca", "/c.pem")


def test_a_block_of_another_kind_is_no_certificate_and_no_key():
    der = next(certificates())
    for kind, whole in (
        ("CERTIFICATE", {"ca", "client_cert"}),
        ("EC PRIVATE KEY", {"client_key"}),
        ("CERTIFIC@TE", set()),
    ):
        write("/c.pem", pem(der, kind))
        names = ("ca", "client_cert", "client_key")
        assert {name for name in names if lastgood.is_whole(name, "/c.pem")} == whole


def pem(der, kind="CERTIFICATE"):
    text = binascii.b2a_base64(der).decode()
    return ("-----BEGIN %s-----\n%s-----END %s-----\n" % (kind, text, kind)).encode()


def test_keys_are_whole_if_they_can_be_used():
    content = json.dumps({"keys": [signer.jwk("release")]}).encode()
    write("/k.json", content)
    assert lastgood.is_whole("keys", "/k.json")
    for damaged in (content[:-1], content.replace(b"RSA", b"RSB"), b"", b"{}"):
        write("/k.json", damaged)
        assert not lastgood.is_whole("keys", "/k.json"), damaged


def test_only_whole_files_are_kept_and_stand_in_for_damaged_ones():
    keys = json.dumps({"keys": [signer.jwk("release")]}).encode()
    der = next(certificates())
    write("/c.json", GOOD)
    write("/k.json", keys)
    write("/ca.pem", der)
    lastgood.keep("/c.json")
    write("/ca.pem", der[:-1])
    lastgood.keep("/c.json")
    assert keyring.read("/ca.pem.good") == der and keyring.read("/k.json.good") == keys
    found = config.load("/c.json")
    assert (found["ca"], found["keys"]) == ("/ca.pem.good", "/k.json")
    write("/k.json", keys[:-9])
    assert config.load("/c.json")["keys"] == "/k.json.good"


def test_what_has_not_changed_is_not_written_again():
    write("/c.json", GOOD)
    remove("/k.json", "/ca.pem")
    lastgood.keep("/c.json")
    renamed, real = [], lastgood.os

    class Spy:
        @staticmethod
        def rename(old, new):
            renamed.append(new)
            real.rename(old, new)

    lastgood.os = Spy
    try:
        lastgood.keep("/c.json")
        assert renamed == []
        write("/c.json", dict(GOOD, product="radio"))
        lastgood.keep("/c.json")
        assert renamed == ["/c.json.good"]
    finally:
        lastgood.os = real


def test_a_key_file_that_is_not_there_is_named():
    assert "/nosuch.pem" in str(raises(ConfigError, keyring.read, "/nosuch.pem"))
