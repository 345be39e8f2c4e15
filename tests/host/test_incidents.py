"""The incident museum: what went wrong for others, as a test by its number in the catalogue.

Those not here have their tests where the subject is: I1, I3, I19 test_slot_rules; I7 test_server;
I8, I9 test_keyring; I10, I15 test_policy; I11 test_http, test_attacks; I13 test_attacks; I14
test_transport. `make faults` lists them all.
"""

import ast
import datetime as dt
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from onhost import OnHost, run
from servers import PRODUCT, public_keys, publish_version, signing_key
from test_exhaustive import MANIFEST
from test_slot_rules import described, fill, firmware
from trust import jwk, key

import twinslot
from twinslot import keyring, release, semver, url
from twinslot.errors import FormatError, OtaError, ReleaseError
from twinslot.sources import parse_offer
from twinslot_server.site import ChannelError, Site
from twinslot_tools import keyrings, publish, signing

LIB = Path(twinslot.__path__[0])
BASE = "https://updates.example/sensor-node/stable.json"


def manifest(**changes):
    return json.dumps({**MANIFEST, **changes}).encode()


def image_member(**changes):
    image = {**MANIFEST["images"][0], **changes}
    return manifest(images=[{k: v for k, v in image.items() if v is not ...}])


def payload_member(**changes):
    payload = {**MANIFEST["images"][0]["payloads"][0], **changes}
    return image_member(payloads=[{k: v for k, v in payload.items() if v is not ...}])


# ---- I1, I2: a digest that is not there is no digest that holds

NO_DIGEST = [..., None, "", " ", "\n", "0", "sha256:", False, 0, [], {}]


@pytest.mark.parametrize("digest", NO_DIGEST, ids=repr)
@pytest.mark.parametrize("member", ["sha256", "build"])
def test_I1_I2_F86_a_blank_or_missing_digest_never_means_do_not_check(member, digest):
    with pytest.raises(ReleaseError, match=member):
        release.parse(image_member(**{member: digest}))


def test_I2_F87_an_image_that_is_not_listed_can_not_come_in():
    firmware_image = MANIFEST["images"][0]
    for images in (
        [],
        [firmware_image] * 2,
        [firmware_image] * 3,
        [{**firmware_image, "slot": "x"}],
    ):
        with pytest.raises(ReleaseError):
            release.parse(manifest(images=images))
    with pytest.raises(ReleaseError):
        release.parse(image_member(payloads=[]))


def test_I2_a_patch_must_name_its_base():
    for base in NO_DIGEST:
        with pytest.raises(ReleaseError, match="base"):
            release.parse(payload_member(patch="detools", base=base))


# ---- I4: sizes at the edges of integers

EDGES = [0, -1, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**32 + 1629968, 2**63, 2**64, 10**400]


@pytest.mark.parametrize("size", [*EDGES, 1629968.0, "1629968", True, None, [1629968]], ids=str)
def test_I4_F85_no_size_wraps_or_overflows(size):
    text = re.sub(rb'"size": 1629968', b'"size": ' + json.dumps(size).encode(), manifest())
    with pytest.raises(ReleaseError):
        release.parse(text)


@pytest.mark.parametrize("number", [-1, 2**30, 2**31, 2**32, 2**63, "3", 3.0, True, [3]], ids=str)
def test_F78_no_number_is_so_high_that_nothing_can_follow(number):
    with pytest.raises(ReleaseError):
        release.parse(manifest(security_version=number))
    # The highest that is taken leaves nothing above it: a root can set it back (test_keyring.py).
    with pytest.raises(ReleaseError):
        semver.parse(f"{10**10}.0.0")


# ---- I5: names that a server makes up

HOSTILE = [
    "../x",
    "r/../../x",
    "/../x",
    "%2e%2e/x",
    "%2E./x",
    "..%2fx",
    "..\\x",
    "..%5cx",
    "./x",
    "x/.",
    "a\0b",
    "a b",
    "a\nb",
    "a\r\nHost: evil",
    "//evil.example/x",
    "https://evil.example/x",
    "http://updates.example/x",
    "https://user@updates.example/x",
    "https://updates.example:444/x",
    "file:///etc/passwd",
    "javascript:1",
    "é",
    "x" * 600,
    "",
    "x#y",
    "x|y",
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: repr(n)[:24])
def test_I5_F88_F108_a_name_made_up_by_the_server_leads_nowhere(name):
    with pytest.raises(FormatError):
        parse_offer({"release": name}, BASE, url.resolve)


@pytest.mark.parametrize("name", [*HOSTILE, ".", "..", ".a", "-a", "a/b", "C:", "a" * 65])
def test_I5_no_name_of_a_release_can_be_a_path(name):
    for changes in ({"product": name}, {"hardware": [name]}):
        with pytest.raises(ReleaseError):
            release.parse(manifest(**changes))


def test_I5_no_string_of_a_server_names_a_file_on_the_board():
    """Every path that the device package opens comes from ota.json or is spelt out in it."""
    opened = {}
    for path in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "os.rename"):
                opened.setdefault(path.name, []).append(ast.unparse(node.args[0]))
    allowed = {"path", "path + '.new'", "self._path", "self._path + '.new'"}
    assert set(opened) <= {"config.py", "keyring.py", "lastgood.py", "doctor.py"}
    assert {name for names in opened.values() for name in names} <= allowed, opened


# ---- I12: what `requests` on MicroPython does


def test_I12_verification_of_connections_has_no_off_switch():
    tree = ast.parse((LIB / "certs.py").read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Tls")
    init = next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = {argument.arg for argument in init.args.args}
    assert names == {"self", "ca", "fingerprint", "client_cert", "client_key"}
    modes = re.findall(r"verify_mode = (.*?)  #", (LIB / "context.py").read_text())
    assert modes == ["tls.CERT_REQUIRED if ca else tls.CERT_OPTIONAL"]
    users = [p.name for p in LIB.rglob("*.py") if "CERT_NONE" in p.read_text()]
    assert users == ["anybody.py"], "signed files only, without a token; see test_transport"
    for path in LIB.rglob("*.py"):
        assert "import requests" not in path.read_text()


# ---- I16: the wrong build, pushed to everybody


def test_I16_F120_a_release_boards_would_refuse_is_not_published(tmp_path):
    site = tmp_path / "site"
    publish_version(site, "1.0.0")
    pointer = (site / PRODUCT / "stable.json").read_bytes()
    image = tmp_path / "bad.bin"
    content = bytearray((tmp_path / "1.0.0.bin").read_bytes())
    for at in (0, 12, 40, 5000, len(content) - 40, len(content) - 1):
        content[at] ^= 0x5A
        image.write_bytes(content)
        content[at] ^= 0x5A
        spec = publish.Spec(product=PRODUCT, version="1.1.0", hardware=("ESP32_GENERIC",))
        with pytest.raises(OtaError):
            publish.publish(image, spec, signing_key(), site)
    assert (site / PRODUCT / "stable.json").read_bytes() == pointer


def test_I16_F120_a_server_that_knows_the_keys_offers_only_what_boards_take(tmp_path):
    site = tmp_path / "site"
    publish_version(site, "1.0.0")
    roots, trusted = keyring.load(public_keys(tmp_path).read_bytes())
    assert Site(site, trusted, roots).channel(PRODUCT, "stable").release.version == "1.0.0"
    stranger = keyring.load(public_keys(tmp_path, 1).read_bytes())[1]
    with pytest.raises(ChannelError, match="signing key"):
        Site(site, stranger, {}).channel(PRODUCT, "stable")


def test_F97_a_server_goes_by_the_keyring_at_once(tmp_path):
    """A release that it offered a moment ago is offered no more when its key is revoked."""
    site_folder = tmp_path / "site"
    publish_version(site_folder, "1.0.0")
    root = signing.signer_of(key("root"))
    first = signing_key().as_dict(private=False)
    keyrings.update(site_folder, PRODUCT, root, add=[first, jwk("second")])
    site = Site(site_folder, {}, root.trusted)
    assert site.channel(PRODUCT, "stable").release.version == "1.0.0"
    assert site.keyring(PRODUCT) == 1
    keyrings.update(site_folder, PRODUCT, root, revoke=[signing_key().kid])
    with pytest.raises(ChannelError, match="signing key"):
        site.channel(PRODUCT, "stable")
    assert site.keyring(PRODUCT) == 2, "boards are told, although nothing is offered"
    (site_folder / PRODUCT / "keyring.jws").write_bytes(b"rubbish")
    assert site.keyring(PRODUCT) == 0


def test_F97_a_server_offers_and_takes_nothing_under_an_expired_keyring(tmp_path, monkeypatch):
    """Boards with a clock would refuse it; of the successor all of them are told."""
    site_folder = tmp_path / "site"
    name = publish_version(site_folder, "1.0.0").release
    root = signing.signer_of(key("root"))
    day = dt.timedelta(days=1)
    first = signing_key().as_dict(private=False)
    keyrings.update(site_folder, PRODUCT, root, add=[first], expires=day)
    site = Site(site_folder, {}, root.trusted)
    asked = {
        "offered": lambda: site.channel(PRODUCT, "stable").release.version,
        "by its number": lambda: site.release(name).version,
        "uploaded": lambda: len(site.trusted(PRODUCT) or {}),
    }
    before = [ask() for ask in asked.values()]
    stamp = site.stamp(PRODUCT, "stable")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + day.total_seconds())
    for ask in asked.values():
        with pytest.raises(ChannelError, match="keyring 1 has expired"):
            ask()
    assert site.stamp(PRODUCT, "stable") != stamp, "what a board was told holds no longer"
    assert site.keyring(PRODUCT) == 1
    keyrings.update(site_folder, PRODUCT, root, expires=2 * day)
    assert [ask() for ask in asked.values()] == before
    assert site.keyring(PRODUCT) == 2


# ---- I17: flash worn out by writing


def test_I17_F31_a_decade_of_weekly_updates_wears_no_sector_out():
    """Erases per sector of 40 updates, stretched to 520."""
    board = OnHost(firmware("1.0.0"))
    stats = board.board.stats
    before = stats.erases()
    for n in range(40):
        slot = board.slot()
        run(fill(slot, firmware(f"1.{n}.0", seed=n)))
        slot.activate()
        board.boot()
        board.slot().confirm()
    worn = Counter({i: count - before[i] for i, count in enumerate(stats.erases())})
    sector, erases = worn.most_common(1)[0]
    assert 20 <= erases, "something was written"
    assert erases * 520 / 40 < 10_000, (sector, erases)


# ---- I19: sizes and alignments nobody had tried


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 15, 16, 17, 2048, 4080, 4095])
def test_I19_F23_an_image_of_any_length_is_written_and_verified(extra):
    image = firmware(size=24_000 + extra)
    board = OnHost(firmware("1.0.0"))
    slot = board.slot()
    tail = image + b"\xe7" * extra  # as a signature sector, of any length
    run(fill(slot, tail, described(tail, build=image[-32:].hex())))
    slot.activate()
    assert board.boot() == "ota_1"
    assert board.slot_bytes("ota_1")[: len(tail)] == tail
    assert set(board.slot_bytes("ota_1")[len(tail) : (len(tail) + 4095) // 4096 * 4096]) <= {0xFF}


def test_F81_a_keyring_of_another_product_is_nothing_to_this_board():
    from trust import keyring as make

    roots = {key("root").kid: keyring.load(json.dumps({"keys": [jwk("root")]}).encode())[1]}
    trusted = next(iter(roots.values()))
    with pytest.raises(OtaError, match="of product"):
        keyring.parse(make(1, "first", product="door-lock"), trusted, PRODUCT)
