"""Whose signature a release needs: the key file, keyrings, revocation, expiry, power cuts."""

import json
import os
import shutil
from pathlib import Path

import boards
import pytest
from trust import DATE, PRODUCT, Nvs, jwk, key, keyring, kid, sign

import twinslot
from twinslot import base64url, release
from twinslot import keyring as rings
from twinslot.errors import ConfigError, KeyringError, SpaceError
from twinslot.journal import Journal
from twinslot_tools.virtual_esp32 import vfs
from twinslot_tools.virtual_esp32.chip.flash import Fault

EXPIRES = release.parse_time(DATE)
BEFORE = EXPIRES - 1


class Device:
    """A board's key file, volume and journal; ``boot`` starts anew from what they hold."""

    def __init__(self, folder: Path, key_file: dict | None = None):
        self.folder = folder
        self.nvs = Nvs()
        if key_file is None:
            key_file = {"root": [jwk("root")], "keys": [jwk("first")]}
        (folder / "keys.json").write_text(json.dumps(key_file, indent=1))

    def boot(self, product=PRODUCT, demo=False) -> rings.Keyring:
        self.journal = Journal(self.nvs)
        path = (self.folder / "keys.json").as_posix()
        return rings.Keyring(path, self.journal, product, demo)

    def trusts(self, now=BEFORE) -> set[str]:
        return set(self.boot().keys(now))


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path)


def test_keys_of_a_plain_key_file_sign_for_good(tmp_path):
    device = Device(tmp_path, {"keys": [jwk("first"), jwk("second")]})
    ring = device.boot()
    assert set(ring.keys(2**31)) == {kid("first"), kid("second")}
    assert not ring.wants(7), "without a root there is nobody to sign a keyring"


def test_a_keyring_of_the_root_takes_the_place_of_the_key_file(device):
    ring = device.boot()
    assert set(ring.keys()) == {kid("first")}
    assert ring.wants(1)
    ring.take(keyring(1, "second", "third"))
    assert set(ring.keys(BEFORE)) == {kid("second"), kid("third")}
    assert not ring.wants(1)
    assert device.trusts() == {kid("second"), kid("third")}


def test_a_key_is_revoked_by_leaving_it_out(device):
    ring = device.boot()
    ring.take(keyring(1, "first", "second"))
    ring.take(keyring(2, "second"))
    assert device.trusts() == {kid("second")}


def test_F96_only_a_higher_version_is_taken_and_any_may_be_skipped(device):
    ring = device.boot()
    ring.take(keyring(5, "second"))
    for version in (1, 4, 5):
        with pytest.raises(KeyringError, match="higher than 5"):
            ring.take(keyring(version, "first"))
        with pytest.raises(KeyringError, match="higher than 5"):
            device.boot().take(keyring(version, "first"))
    assert device.trusts() == {kid("second")}
    device.boot().take(keyring(300, "third"))
    assert device.trusts() == {kid("third")}


@pytest.mark.parametrize("signer", ["first", "second", "stranger"])
def test_F72_a_keyring_signed_by_anybody_but_the_root_is_refused(device, signer):
    ring = device.boot()
    ring.take(keyring(1, "first", "second"))
    with pytest.raises(KeyringError, match="signing key"):
        ring.take(keyring(2, "first", signer=signer))


def test_F72_a_root_signs_keyrings_and_nothing_else(device):
    ring = device.boot()
    for claims in (["root"], ["second", "root"]):
        with pytest.raises(KeyringError, match="is a root"):
            ring.take(keyring(1, *claims))
    with pytest.raises(KeyringError, match="JWS type"):
        ring.take(sign(json.loads(payload_of(keyring(1, "second"))), "root", typ=None))
    with pytest.raises(KeyringError, match="JWS type"):
        ring.take(
            sign(json.loads(payload_of(keyring(1, "second"))), "root", typ="twinslot-release+jws")
        )
    assert device.trusts() == {kid("first")}


def payload_of(token: bytes) -> bytes:

    return base64url.b64url_decode(token.split(b".")[1])


def test_F98_a_spare_root_is_as_good_as_the_first(tmp_path):
    device = Device(tmp_path, {"root": [jwk("root"), jwk("spare root")]})
    device.boot().take(keyring(1, "first"))
    device.boot().take(keyring(2, "second", signer="spare root"))
    assert device.trusts() == {kid("second")}


def test_a_key_file_with_a_root_alone_waits_for_its_first_keyring(tmp_path):
    device = Device(tmp_path, {"root": [jwk("root")]})
    ring = device.boot()
    with pytest.raises(KeyringError, match="version 1"):
        ring.keys()
    assert ring.wants(1)
    ring.take(keyring(1, "first"))
    assert device.trusts() == {kid("first")}


def test_F78_the_root_may_set_the_security_floor_once_and_by_a_new_keyring_only(device):
    device.boot()
    device.journal.update(floor=2**30 - 1, issued=4_000_000_000)
    device.boot().take(keyring(1, "second"))
    assert device.journal.get("floor", int) == 2**30 - 1, "without a word on it, it stays"
    token = keyring(2, "third", security_floor=4)
    device.boot().take(token)
    assert device.journal.get("floor", int) == 4
    assert device.journal.get("issued", int) == 0
    device.journal.update(floor=6)  # by a release that was confirmed
    with pytest.raises(KeyringError, match="higher than 2"):
        device.boot().take(token)
    assert device.trusts() == {kid("third")}
    assert device.journal.get("floor", int) == 6


def test_F78_a_floor_is_set_as_well_where_the_power_failed_before_the_journal(device):
    device.boot().take(keyring(1, "first"))
    device.journal.update(floor=9)
    (device.folder / "keyring.jws").write_bytes(keyring(2, "second", security_floor=0))
    assert device.trusts() == {kid("second")}
    assert device.journal.get("floor", int) == 0


def test_F78_a_floor_may_be_as_high_as_any(device):
    device.boot().take(keyring(1, "first", security_floor=2**30 - 1))
    assert device.journal.get("floor", int) == 2**30 - 1


@pytest.mark.parametrize("floor", [-1, 2**30, True, "1", [1], {}], ids=str)
def test_F78_a_floor_of_a_keyring_has_one_type_and_range(device, floor):
    with pytest.raises(KeyringError, match="security_floor"):
        device.boot().take(keyring(1, "second", security_floor=floor))
    assert device.trusts() == {kid("first")}


# ---- time


def test_F84_an_expired_keyring_trusts_nobody_until_its_successor(device):
    device.boot().take(keyring(1, "second"))
    ring = device.boot()
    assert set(ring.keys(BEFORE)) == {kid("second")}
    for now in (EXPIRES, EXPIRES + 10**6):
        with pytest.raises(KeyringError, match="expired"):
            ring.keys(now)
    ring.take(keyring(2, "second", expires="2028-11-20T09:00:00Z"))
    assert set(ring.keys(EXPIRES + 10**6)) == {kid("second")}


def test_F84_without_a_trusted_clock_expiry_is_not_judged(device):
    device.boot().take(keyring(1, "second"))
    assert set(device.boot().keys(None)) == {kid("second")}


def test_F37_one_bad_clock_does_not_expire_a_keyring_for_good(device):
    ring = device.boot()
    ring.take(keyring(1, "second"))
    with pytest.raises(KeyringError):
        ring.keys(release.parse_time("2106-01-01T00:00:00Z"))
    assert set(ring.keys(BEFORE)) == {kid("second")}


def test_an_expired_keyring_is_taken_for_what_it_revokes(device):
    ring = device.boot()
    ring.take(keyring(1, "first", "second"))
    ring.take(keyring(2, "second", expires="2001-01-01T00:00:00Z"))
    with pytest.raises(KeyringError, match="keyring 2 expired"):
        ring.keys(BEFORE)


def test_a_keyring_without_an_end_never_expires(device):
    device.boot().take(keyring(1, "second", expires=None))
    assert device.trusts(2**33) == {kid("second")}


# ---- what it says


TWICE = (["first", "first"], ["second", "first", "second"])


@pytest.mark.parametrize("names", TWICE, ids=str)
def test_F75_I8_a_key_that_stands_there_twice_is_refused(device, names):
    with pytest.raises(KeyringError, match="twice"):
        device.boot().take(keyring(1, *names))
    device.folder.joinpath("keys.json").write_text(
        json.dumps({"root": [jwk("root")], "keys": [jwk(name) for name in names]})
    )
    with pytest.raises(ConfigError, match="twice"):
        device.boot()


def test_F75_two_names_for_one_key_are_refused(device):
    with pytest.raises(KeyringError, match="thumbprint"):
        device.boot().take(keyring(1, keys=[jwk("first"), jwk("first", kid="another")]))


BAD = [
    *({"version": v} for v in (None, 0, -1, 2**30, 10**14, "1", True, [1], {})),
    *({"schema": s} for s in (None, 0, 2, "1", True, 10**14)),
    *({"product": p} for p in ("other", "", 1, ["sensor-node"], "SENSOR-NODE", "sensor-node ")),
    *({"expires": e} for e in (0, "", "2027", "2027-11-20T09:00:00", 1900000000, True, [])),
    *({"keys": k} for k in (None, [], {}, "AQAB", 1, [1], [None], [[]], [{}], {"keys": []})),
    {"keys": [jwk("first", d="AQAB")]},
    {"keys": [jwk("first", alg="RS256")]},
    {"keys": [jwk("first", e="Aw")]},
    {"keys": [jwk("first", kty="oct")]},
    {"keys": [jwk("first"), {}]},
]


@pytest.mark.parametrize("members", BAD, ids="-".join)
def test_a_member_of_the_wrong_type_or_range_is_refused(device, members):
    token = keyring(1, "first", **members)
    with pytest.raises(KeyringError):
        device.boot().take(token)
    assert not os.path.exists(device.folder / "keyring.jws")
    assert device.trusts() == {kid("first")}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b'{"schema":1,"version":1,"version":2,"keys":[]}',
        b'{"schema":1,"version":1.0,"keys":[]}',
        b'{"schema":1 "version":1}',
        b"[" * 4000,
        b'{"schema":' + b"9" * 6000 + b"}",
    ],
    ids=lambda p: repr(p[:16]),
)
def test_F89_what_is_no_keyring_is_refused(device, payload):
    with pytest.raises(KeyringError):
        device.boot().take(sign(payload, "root", typ="twinslot-keyring+jws"))


def test_more_keys_than_a_board_has_room_for_are_refused(device):
    names = [f"k{i}" for i in range(9)]
    with pytest.raises(KeyringError):
        device.boot().take(keyring(1, *names))
    device.boot().take(keyring(1, *names[:8]))


def test_I9_sample_keys_are_refused_by_all_but_a_demo_board(tmp_path):
    sample = {"root": [jwk("root", demo=True)], "keys": [jwk("first", demo=True)]}
    device = Device(tmp_path, sample)
    with pytest.raises(ConfigError, match="sample"):
        device.boot()
    assert set(device.boot(demo=True).keys()) == {kid("first")}
    device = Device(tmp_path)
    for mark in (True, 1, "yes", None):
        with pytest.raises(KeyringError, match="sample"):
            device.boot().take(keyring(1, keys=[jwk("first"), jwk("second", demo=mark)]))
    device.boot(demo=True).take(keyring(1, keys=[jwk("second", demo=True)]))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b'{"root":[]}',
        b'{"root":[],"keys":[]}',
        b'{"root":1}',
        b'{"keys":[],"keys":[]}',
        b" " * 20000,
        b"\xff",
        b"1",
        b"null",
        b'"keys"',
    ],
)
def test_a_key_file_that_trusts_nobody_is_a_clear_error(device, text):
    (device.folder / "keys.json").write_bytes(text)
    with pytest.raises(ConfigError):
        device.boot()


def test_a_root_among_the_keys_of_the_key_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a root"):
        Device(tmp_path, {"root": [jwk("root")], "keys": [jwk("root")]}).boot()


def test_a_key_file_has_a_largest_size_and_a_largest_number_of_roots(tmp_path):
    text = json.dumps({"keys": [jwk("first")]})
    assert rings.load(text.ljust(16384).encode())[1]
    with pytest.raises(ConfigError, match="16385 bytes"):
        rings.load(text.ljust(16385).encode())
    roots = [jwk(f"k{i}") for i in range(5)]
    assert len(rings.load(json.dumps({"root": roots[:4]}).encode())[0]) == 4
    with pytest.raises(ConfigError, match="roots"):
        rings.load(json.dumps({"root": roots}).encode())


def test_the_highest_version_is_taken_and_none_beyond(device):
    roots = rings.load(json.dumps({"keys": [jwk("root")]}).encode())[1]
    for version in (0, 2**30):
        with pytest.raises(KeyringError, match="version"):
            rings.parse(keyring(version, "first"), roots, PRODUCT)
    assert rings.parse(keyring(1, "first"), roots, PRODUCT)[0] == 1
    device.boot().take(keyring(2**30 - 1, "second"))
    assert device.trusts() == {kid("second")}


def test_a_board_that_is_given_plain_keys_by_cable_goes_by_them(device):
    device.boot().take(keyring(3, "second"))
    (device.folder / "keys.json").write_text(json.dumps({"keys": [jwk("third")]}))
    assert device.trusts() == {kid("third")}


# ---- what flash does


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "lost":
        path.unlink()
        return
    if how == "truncated":
        content = content[:-1]
    elif how == "bit":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(keyring(1, "first"))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["lost", "truncated", "bit", "replaced by an older one"])
def test_a_keyring_that_is_gone_does_not_bring_revoked_keys_back(device, how):
    device.boot().take(keyring(3, "second"))
    damage(device.folder / "keyring.jws", how)
    ring = device.boot()
    assert not ring.wants(3), "not yet known to be lost"
    with pytest.raises(KeyringError, match="version 3"):
        ring.keys(BEFORE)
    assert ring.wants(3), "asked for again"
    with pytest.raises(KeyringError, match="higher than 3"):
        ring.take(keyring(2, "first"))
    ring.take(keyring(3, "second"))
    assert device.trusts() == {kid("second")}


def test_a_board_without_its_journal_goes_by_the_stored_keyring(device):
    device.boot().take(keyring(3, "second"))
    device.nvs.blobs.clear()
    assert device.trusts() == {kid("second")}
    with pytest.raises(KeyringError, match="higher than 3"):
        device.boot().take(keyring(2, "first"))


@pytest.mark.parametrize("older", [1, 6])
def test_F28_F96_an_older_keyring_is_refused_though_the_journal_is_lost(device, older):
    """Offered before any key was asked for, as the agent does at its first poll."""
    device.boot().take(keyring(7, "second"))
    device.nvs.blobs.clear()
    ring = device.boot()
    with pytest.raises(KeyringError, match="higher than 7"):
        ring.take(keyring(older, "first"))
    assert device.trusts() == {kid("second")}
    device.nvs.blobs.clear()
    device.boot().take(keyring(7, "second"))
    device.boot().take(keyring(8, "first"))
    assert device.trusts() == {kid("first")}


def test_a_cut_between_file_and_journal_leaves_the_new_keyring(device):
    ring = device.boot()
    ring.take(keyring(1, "first"))
    device.nvs.fail = True
    with pytest.raises(SpaceError):
        ring.take(keyring(2, "second"))
    device.nvs.fail = False
    again = device.boot()
    assert again.wants(2)
    assert set(again.keys(BEFORE)) == {kid("second")}
    assert not again.wants(2), "it is there, and the journal knows by now"
    assert again.version == 2
    assert device.boot().version == 2
    with pytest.raises(KeyringError, match="higher than 2"):
        device.boot().take(keyring(2, "first"))


def test_a_rename_that_was_cut_half_way_as_on_FAT_loses_nothing(device):
    device.boot().take(keyring(1, "first"))
    device.boot().take(keyring(2, "second"))
    os.rename(device.folder / "keyring.jws", device.folder / "keyring.jws.new")
    assert device.trusts() == {kid("second")}


def test_rubbish_under_the_temporary_name_is_ignored(device):
    device.boot().take(keyring(1, "second"))
    for rubbish in (b"", keyring(2, "first")[:-1], keyring(2, "first", signer="first")):
        (device.folder / "keyring.jws.new").write_bytes(rubbish)
        assert device.trusts() == {kid("second")}


def test_F24_a_volume_that_is_full_keeps_the_keyring_before(device, monkeypatch):
    ring = device.boot()
    ring.take(keyring(1, "second"))

    def full(*_):
        raise OSError(28)

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(SpaceError):
        ring.take(keyring(2, "third"))
    monkeypatch.undo()
    os.unlink(device.folder / "keyring.jws.new")
    assert device.trusts() == {kid("second")}


def test_what_is_known_of_keyrings_may_outlive_the_object(device):
    path = (device.folder / "keys.json").as_posix()
    device.boot().take(keyring(1, "first"))
    known = [1]
    again = rings.Keyring(path, device.journal, PRODUCT, known=known)
    assert again.wants(2) and not again.wants(1)
    again.take(keyring(2, "second"))
    assert rings.Keyring(path, device.journal, PRODUCT, known=known).version == 2


def test_F27_a_keyring_that_is_lost_is_wanted_again_by_all_who_share_what_is_known(device):
    device.boot().take(keyring(3, "second"))
    path = (device.folder / "keys.json").as_posix()
    known = [3]
    os.remove(device.folder / "keyring.jws")
    with pytest.raises(KeyringError, match="none on the board"):
        rings.Keyring(path, device.journal, PRODUCT, known=known).keys()
    assert known == [0]
    assert rings.Keyring(path, device.journal, PRODUCT, known=known).wants(3)


TAKE = """
import json
from twinslot.journal import Journal
from twinslot.keyring import Keyring

def trusted():
    return json.dumps(sorted(Keyring("/keys.json", Journal.shared(), "sensor-node").keys()))

ring = Keyring("/keys.json", Journal.shared(), "sensor-node")
print("before", trusted())
with open("/next.jws", "rb") as f:
    token = f.read()
if ring.wants(2):
    ring.take(token)
print("after", trusted())
"""


@pytest.mark.parametrize(
    ("mode", "shape"), [("after", None), ("torn", "prefix"), ("torn", "bits")]
)
def test_F96_a_power_cut_at_any_operation_leaves_the_old_keyring_or_the_new(tmp_path, mode, shape):
    tree = tmp_path / "tree"
    source = Path(twinslot.__path__[0])
    shutil.copytree(source, tree / "twinslot", ignore=shutil.ignore_patterns("__pycache__"))
    image = boards.firmware(tree, {}, seed=1)
    files = {
        "main.py": TAKE.replace("wants(2)", "wants(1)"),
        "keys.json": json.dumps({"root": [jwk("root")], "keys": [jwk("zeroth")]}),
        "next.jws": keyring(1, "first").decode(),
    }
    board = boards.new_board(tmp_path, files=files, slots={"ota_0": image})
    assert f'after ["{kid("first")}"]' in board.run(max_boots=1).console
    vfs.write_files(board.path, {"/next.jws": keyring(2, "second"), "/main.py": TAKE.encode()})
    flash = board.path.read_bytes()
    whole = board.run(max_boots=1)
    old, new = (json.dumps([kid(name)]) for name in ("first", "second"))
    assert whole.console.splitlines() == [f"before {old}", f"after {new}"]
    seen = set()
    for op in range(1, whole.flash["ops"] + 1):
        board.path.write_bytes(flash)
        result = board.run(max_boots=2, fault=Fault(op, mode, shape, op * 5 + 1))
        lines = result.boots[1].console.splitlines()
        assert result.boots[0].outcome == "power-cut"
        assert lines[-1] == f"after {new}", (op, lines, result.boots[1].error)
        assert lines[0] in (f"before {old}", f"before {new}"), (op, lines)
        seen.add(lines[0])
    assert len(seen) == 2, "some cuts came before the keyring was in force, some after"
    assert whole.flash["ops"] >= 5


def test_a_key_of_any_size_a_device_takes_may_be_a_root(tmp_path):
    big = key("big root", 4096)
    device = Device(tmp_path, {"root": [big.as_dict(private=False)]})
    obj = {"schema": 1, "version": 1, "keys": [jwk("first")]}
    from joserfc import jws as jose

    header = {"alg": "PS256", "kid": big.kid, "typ": "twinslot-keyring+jws"}
    token = jose.serialize_compact(header, json.dumps(obj).encode(), big, algorithms=["PS256"])
    device.boot().take(token.encode())
    assert device.trusts() == {kid("first")}
