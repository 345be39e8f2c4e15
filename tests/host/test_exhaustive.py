"""Every single-bit flip and every truncation: of a release, a keyring, an otadata entry.

Not samples: each of the tens of thousands of cases is tried, and every one has to be refused by
an OtaError. Nothing else may come out.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import pytest
from onhost import OnHost
from test_slot_rules import described, firmware
from trust import PRODUCT, jwk, keyring, kid, sign

import twinslot
from twinslot import base64url, health, jws, keyset, release
from twinslot import keyring as rings
from twinslot.errors import OtaError
from twinslot_tools.virtual_esp32.chip import otadata

MANIFEST = {
    "schema": 1,
    "product": PRODUCT,
    "version": "1.4.0",
    "hardware": ["ESP32_GENERIC"],
    "security_version": 3,
    "downgrade": False,
    "issued": "2026-11-20T09:00:00Z",
    "expires": "2027-11-20T09:00:00Z",
    "images": [
        {
            "slot": "firmware",
            "chip_id": 0,
            "size": 1629968,
            "sha256": hashlib.sha256(b"image").hexdigest(),
            "build": hashlib.sha256(b"build").hexdigest(),
            "payloads": [{"url": "blobs/ab/ab.bin", "encoding": "identity", "size": 1629968}],
        }
    ],
}
RELEASE = sign(MANIFEST, "release", typ=release.TYPE)
KEYRING = keyring(7, "release")
TRUSTED = keyset.load({"keys": [jwk("release"), jwk("other")]})
ROOTS = keyset.load({"keys": [jwk("root")]})


def take_release(token):
    return release.parse(jws.verify(token, TRUSTED, release.TYPE))


def take_keyring(token):
    return rings.parse(token, ROOTS, PRODUCT)


DOCUMENTS = {"release": (RELEASE, take_release), "keyring": (KEYRING, take_keyring)}


def outcomes(take, cases):
    """Run every case; return how many, and those that were not refused as they should."""
    count, wrong = 0, []
    for name, token in cases:
        count += 1
        try:
            take(token)
            wrong.append((name, "accepted"))
        except OtaError:
            pass
        except Exception as exc:
            wrong.append((name, repr(exc)))
    return count, wrong


def text_flips(token):
    for at in range(len(token)):
        for bit in range(8):
            yield (at, bit), token[:at] + bytes([token[at] ^ 1 << bit]) + token[at + 1 :]


def decoded_flips(token):
    """Flips of the bytes that the three parts stand for, spelt anew as they should be."""
    parts = [base64url.b64url_decode(part) for part in token.split(b".")]
    for number, part in enumerate(parts):
        for at in range(len(part)):
            for bit in range(8):
                changed = part[:at] + bytes([part[at] ^ 1 << bit]) + part[at + 1 :]
                spelt = [*parts[:number], changed, *parts[number + 1 :]]
                yield (number, at, bit), b".".join(map(base64url.b64url_encode, spelt))


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_F70_every_flipped_bit_of_the_text_is_refused(kind):
    token, take = DOCUMENTS[kind]
    take(token)
    count, wrong = outcomes(take, text_flips(token))
    assert wrong == []
    assert count == len(token) * 8 > 8000


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_F70_every_flipped_bit_of_the_content_and_the_signature_is_refused(kind):
    token, take = DOCUMENTS[kind]
    count, wrong = outcomes(take, decoded_flips(token))
    assert wrong == []
    assert count > 6000


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_F71_every_truncation_and_every_appended_byte_is_refused(kind):
    token, take = DOCUMENTS[kind]
    cuts = [(end, token[:end]) for end in range(len(token))]
    cuts += [(-start, token[start:]) for start in range(1, len(token))]
    cuts += [("append", token + bytes([byte])) for byte in range(256)]
    cuts += [("prepend", bytes([byte]) + token) for byte in range(256)]
    count, wrong = outcomes(take, cuts)
    assert wrong == []
    assert count > 2000


def test_F71_every_truncation_of_the_content_is_refused_though_it_is_signed():
    """What a signer's slip could sign: the manifest cut short. The parser refuses alone."""
    payload = json.dumps(MANIFEST, separators=(",", ":")).encode()
    assert release.parse(payload)
    for end in range(len(payload)):
        with pytest.raises(OtaError):
            release.parse(payload[:end])


MICRO = """
import sys
sys.path.insert(0, sys.argv[1])
from twinslot import jws, keyset, release, keyring, strict
from twinslot.errors import OtaError
with open(sys.argv[2], "rb") as f:
    spec = strict.loads(f.read())
wrong = count = 0
for kind in ("release", "keyring"):
    token = bytearray(spec[kind].encode())
    keys = keyset.load({"keys": spec[kind + "_keys"]})
    for step in range(0, len(token) * 8, spec["step"]):
        token[step >> 3] ^= 1 << (step & 7)
        try:
            if kind == "release":
                release.parse(jws.verify(token, keys, release.TYPE))
            else:
                keyring.parse(token, keys, "sensor-node")
            wrong += 1
        except OtaError:
            count += 1
        token[step >> 3] ^= 1 << (step & 7)
    if kind == "release":
        release.parse(jws.verify(token, keys, release.TYPE))
    else:
        keyring.parse(token, keys, "sensor-node")
print(count, wrong)
"""


def test_F70_F90_micropython_refuses_the_flips_too(tmp_path):
    """The same code as above, so one bit of three will do: each bit of a byte is among them."""
    step = 1 if os.environ.get("FAULTS") == "long" else 3
    (tmp_path / "run.py").write_text(MICRO)
    spec = {
        "release": RELEASE.decode(),
        "keyring": KEYRING.decode(),
        "release_keys": [jwk("release"), jwk("other")],
        "keyring_keys": [jwk("root")],
        "step": step,
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    lib = Path(twinslot.__path__[0]).parent
    command = [Path(sys.executable).with_name("micropython"), tmp_path / "run.py", lib]
    done = subprocess.run(
        [*command, tmp_path / "spec.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    count, wrong = map(int, done.stdout.split())
    bits = [range(0, 8 * len(token), step) for token in (RELEASE, KEYRING)]
    assert wrong == 0 and count == sum(map(len, bits))


# ---- otadata: seq 4, label 20, state 4, crc 4

OLD, NEW = firmware("1.0.0"), firmware("1.1.0")
SEQ_AND_CRC = [*range(32), *range(28 * 8, 32 * 8)]
LABEL = range(4 * 8, 24 * 8)
STATE = range(24 * 8, 28 * 8)


@pytest.fixture(scope="module")
def on_trial():
    """A board that has activated a new image and not yet reset; its agent's record is written."""
    board = OnHost(OLD)
    slot = board.slot()
    board.board.put(board.board.part("ota_1").offset, NEW)
    board.journal().update(
        confirmed=OLD[-32:].hex(),
        trial={"build": NEW[-32:].hex(), "version": "1.1.0", "security": 5, "back": ""},
    )
    board.board.set_boot("ota_1")
    assert slot.status()["boot"] == "ota_1"
    flash = board.board.data
    where = board.board.part("otadata").offset
    newest = max((0, 4096), key=lambda at: flash[where + at : where + at + 4])
    return board, flash, where + newest, dict(board.nvs.blobs)


def flipped(on_trial, bit):
    board, flash, where, blobs = on_trial
    board.board.put(0, flash)
    board.nvs.blobs = dict(blobs)
    at = where + bit // 8
    board.board.put(at, bytes([flash[at] ^ 1 << bit % 8]))
    return board


@pytest.mark.parametrize("bit", SEQ_AND_CRC)
def test_F5_every_flipped_bit_of_sequence_and_crc_makes_the_entry_count_for_nothing(on_trial, bit):
    board = flipped(on_trial, bit)
    board.running = "ota_0"
    assert [slot for _, _, slot in board.slot()._entries()] == [0]
    assert board.boot() == "ota_0"


def test_no_flipped_bit_of_the_label_matters(on_trial):
    for bit in LABEL:
        assert flipped(on_trial, bit).boot() == "ota_1"


@pytest.mark.parametrize("bit", STATE)
def test_F8_F83_no_flipped_bit_of_the_state_confirms_anything(on_trial, bit):
    """The CRC does not cover the state. Whatever it reads as, the image is on trial or out."""
    board = flipped(on_trial, bit)
    for _ in range(4):
        label = board.boot()
        journal = board.journal()
        verdict = health.reconcile(board.slot(), journal, board.cause)
        assert journal.get("confirmed", str) == OLD[-32:].hex()
        assert journal.get("floor", int) == 0
        if label == "ota_0":
            assert verdict != "trial"
            return
        # It dies on trial, each time: it gets one boot, at most two where nobody watched it.
        assert verdict in ("trial", "rejected")
    raise AssertionError("an image that never was confirmed runs for ever")


@pytest.fixture(scope="module")
def confirmed(on_trial):
    """The same board once it has booted the new image and kept it for good."""
    board, flash, where, blobs = on_trial
    board.board.put(0, flash)
    board.nvs.blobs = dict(blobs)
    assert board.boot() == "ota_1"
    assert health.reconcile(board.slot(), board.journal(), board.cause) == "trial"
    health.confirm(board.slot(), board.journal())
    return board, board.board.data, where, dict(board.nvs.blobs)


@pytest.mark.parametrize("bit", STATE)
def test_F8_F83_no_flipped_bit_of_a_confirmed_state_loses_the_confirmed_image(confirmed, bit):
    """Where the bootloader falls back to the older image, that is on trial, and nothing is
    forgotten: it dies there, and the confirmed one returns."""
    board = flipped(confirmed, bit)
    labels = []
    for _ in range(5):
        labels.append(board.boot())
        journal = board.journal()
        verdict = health.reconcile(board.slot(), journal, board.cause)
        assert journal.get("confirmed", str) == NEW[-32:].hex()
        assert journal.get("floor", int) == 5
        assert verdict in (("idle",) if labels[-1] == "ota_1" else ("trial", "rejected"))
    assert labels[-2:] == ["ota_1", "ota_1"]
    assert labels.count("ota_0") <= 2


def test_F83_an_older_image_that_a_flipped_bit_brings_back_lowers_no_floor(confirmed):
    board = flipped(confirmed, STATE[0])  # valid becomes invalid
    assert board.boot() == "ota_0"
    assert health.reconcile(board.slot(), board.journal(), board.cause) == "trial"
    health.confirm(board.slot(), board.journal())
    assert board.journal().get("floor", int) == 5
    assert health.failed_builds(board.journal()) == [], "the newer one may come again"
    assert board.boot() == "ota_0"
    assert health.reconcile(board.slot(), board.journal(), board.cause) == "idle"


def test_every_truncation_of_an_entry_counts_for_nothing(on_trial):
    board, flash, where, _ = on_trial
    entry = flash[where : where + 32]
    for end in range(32):
        board.board.put(0, flash)
        board.board.put(where, entry[:end] + b"\xff" * (32 - end))
        board.running = "ota_0"
        # A state that is blank yet is UNDEFINED: but then the CRC behind it is blank as well.
        assert [slot for _, _, slot in board.slot()._entries()] == [0]
        assert board.boot() == "ota_0"


def test_both_readers_of_otadata_agree_on_every_flip(on_trial):
    """The device's reader and the bootloader's, on all 256 flips of both entries."""
    board, flash, _, _ = on_trial
    where = board.board.part("otadata").offset
    for entry in (0, 4096):
        for bit in range(256):
            at = where + entry + bit // 8
            board.board.put(0, flash)
            board.board.put(at, bytes([flash[at] ^ 1 << bit % 8]))
            board.running = "ota_0"
            ours = {(seq, state) for seq, state, _ in board.slot()._entries()}
            theirs = {
                (e.seq, e.state) for e in board.board.entries() if otadata.crc_ok(e) and e.seq
            }
            assert ours == theirs


def test_the_documents_are_what_they_should_be():
    assert take_release(RELEASE).version == "1.4.0"
    assert set(take_keyring(KEYRING)[2]) == {kid("release")}
    assert described(NEW).build == NEW[-32:].hex()
    assert bench.firmware
