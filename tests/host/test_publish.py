"""Publishing: what is written, in which order, what is refused, and what a crash leaves behind."""

import datetime as dt
import hashlib
import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from joserfc import jws as jose
from joserfc.jwk import KeySet
from servers import HARDWARE, PRODUCT, firmware, publish_version, signing_key

from twinslot import keyset, release
from twinslot.errors import (
    ConfigError,
    ImageError,
    OtaError,
    ReleaseError,
    SecurityVersionError,
)
from twinslot_tools import images, keys, publish

TRUSTED = keyset.load(json.loads(keys.public_set(signing_key())))


@pytest.fixture
def site(tmp_path):
    return tmp_path / "site"


def snapshot(site: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(site)): p.read_bytes() for p in sorted(site.rglob("*")) if p.is_file()
    }


def offered(site: Path, channel: str = "stable") -> release.Release | None:
    """What a device of that channel gets: everything it will look at, judged as it judges it."""
    pointer = site / PRODUCT / f"{channel}.json"
    if not pointer.exists():
        return None
    path = site / PRODUCT / json.loads(pointer.read_text())["release"]
    publish.verify_tree(site / PRODUCT, path, TRUSTED)
    return publish.verify(path.read_bytes(), TRUSTED)


# ---- what is written


def test_published_tree_has_the_documented_shape(site):
    done = publish_version(site, "1.4.0", notes="Fixes the sensor.", poll=600)
    image = firmware("1.4.0")
    sha256 = hashlib.sha256(image).hexdigest()
    blob = f"blobs/{sha256[:2]}/{sha256}.bin"
    files = snapshot(site)
    assert set(files) == {
        f"{PRODUCT}/{blob}",
        f"{PRODUCT}/r/1.4.0.jws",
        f"{PRODUCT}/stable.json",
    }
    assert files[f"{PRODUCT}/{blob}"] == image
    assert json.loads(files[f"{PRODUCT}/stable.json"]) == {"release": "r/1.4.0.jws", "poll": 600}
    issued = done.manifest.pop("issued")
    assert abs(release.parse_time(issued) - dt.datetime.now().timestamp()) < 60
    assert done.manifest == {
        "schema": 1,
        "product": PRODUCT,
        "version": "1.4.0",
        "hardware": [HARDWARE],
        "security_version": 0,
        "downgrade": False,
        "notes": "Fixes the sensor.",
        "images": [
            {
                "slot": "firmware",
                "chip_id": 0,
                "size": len(image),
                "sha256": sha256,
                "build": image[-32:].hex(),
                "payloads": [{"url": blob, "encoding": "identity", "size": len(image)}],
            }
        ],
    }


def test_an_independent_jose_library_verifies_the_release(site):
    publish_version(site, "1.0.0")
    public = KeySet.import_key_set(json.loads(keys.public_set(signing_key())))
    token = (site / PRODUCT / "r" / "1.0.0.jws").read_text()
    verified = jose.deserialize_compact(token, public, algorithms=["PS256"])
    assert verified.headers() == {
        "alg": "PS256",
        "kid": signing_key().thumbprint(),
        "typ": "twinslot-release+jws",
    }
    assert json.loads(verified.payload)["version"] == "1.0.0"


def test_esptool_accepts_the_published_image(site):
    publish_version(site, "1.0.0")
    blob = next((site / PRODUCT / "blobs").rglob("*.bin"))
    run = subprocess.run(
        [sys.executable, "-m", "esptool", "image-info", str(blob)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert "Checksum" in run.stdout and "(valid)" in run.stdout


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_web_server_may_read_what_was_published(site):
    previous = os.umask(0o022)
    try:
        publish_version(site, "1.0.0")
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in site.rglob("*") if p.is_file()} == {0o644}


def test_a_lifetime_becomes_a_date(site):
    done = publish_version(site, "1.0.0", expires=dt.timedelta(days=365))
    lifetime = offered(site).expires - release.parse_time(done.manifest["issued"])
    assert lifetime == 365 * 86400


def test_security_version_is_inherited_and_may_rise(site):
    publish_version(site, "1.0.0", security_version=3)
    assert publish_version(site, "1.1.0").manifest["security_version"] == 3
    assert publish_version(site, "1.2.0", security_version=4).manifest["security_version"] == 4
    with pytest.raises(SecurityVersionError, match="4 or higher"):
        publish_version(site, "1.3.0", security_version=3)
    assert offered(site).version == "1.2.0"


# ---- the same release again


def test_publishing_again_only_moves_the_pointer(site):
    publish_version(site, "1.0.0", rollout=10)
    before = snapshot(site)
    again = publish_version(site, "1.0.0", rollout=50)
    after = snapshot(site)
    pointer = f"{PRODUCT}/stable.json"
    narrow, wide = json.loads(before.pop(pointer)), json.loads(after.pop(pointer))
    assert not again.new
    assert before == after
    assert narrow["rollout"]["seed"] == wide["rollout"]["seed"]
    assert (narrow["rollout"]["percent"], wide["rollout"]["percent"]) == (10, 50)


def test_a_wider_rollout_keeps_every_device_and_adds_some(site):
    def share():
        rollout = json.loads((site / PRODUCT / "stable.json").read_text())["rollout"]
        return {
            n
            for n in range(2000)
            if release.in_rollout(
                rollout["percent"], rollout["seed"], f"board-{n}", hashlib.sha256
            )
        }

    publish_version(site, "1.0.0", rollout=0)
    assert share() == set()
    publish_version(site, "1.0.0", rollout=12.5)
    first = share()
    assert 150 < len(first) < 350
    publish_version(site, "1.0.0", rollout=60)
    assert first < share()
    assert "rollout" not in publish_version(site, "1.0.0").offer


def test_another_release_starts_with_other_devices(site):
    first = publish_version(site, "1.0.0", rollout=10).offer["rollout"]["seed"]
    assert publish_version(site, "1.1.0", rollout=10).offer["rollout"]["seed"] != first


def test_a_release_is_promoted_to_another_channel_unchanged(site):
    publish_version(site, "1.0.0", channel="beta", expires=dt.timedelta(days=30), notes="N")
    token = (site / PRODUCT / "r" / "1.0.0.jws").read_bytes()
    done = publish_version(site, "1.0.0", expires=dt.timedelta(days=30))
    assert not done.new
    assert (site / PRODUCT / "r" / "1.0.0.jws").read_bytes() == token
    assert offered(site).version == offered(site, "beta").version == "1.0.0"


def test_the_poll_interval_stays_until_another_is_given(site):
    publish_version(site, "1.0.0", poll=60)
    assert publish_version(site, "1.1.0").offer["poll"] == 60
    assert publish_version(site, "1.2.0", poll=90).offer["poll"] == 90


def test_a_downgrade_replaces_a_newer_version_when_it_says_so(site):
    publish_version(site, "2.0.0")
    publish_version(site, "1.9.0", downgrade=True)
    assert offered(site).version == "1.9.0"
    assert offered(site).downgrade


def test_a_rotten_payload_is_written_anew(site):
    publish_version(site, "1.0.0")
    blob = next((site / PRODUCT / "blobs").rglob("*.bin"))
    blob.write_bytes(firmware("1.0.0")[:-1] + b"!")
    publish_version(site, "1.0.0")
    assert blob.read_bytes() == firmware("1.0.0")


# ---- refusals


def spec(**changes) -> publish.Spec:
    members = {"product": PRODUCT, "version": "1.1.0", "hardware": (HARDWARE,), **changes}
    return publish.Spec(**members)


def refused(site: Path, image: bytes, wanted: publish.Spec) -> str:
    """Publish over a channel at 1.0.0; it must be refused with nothing changed."""
    publish_version(site, "1.0.0", security_version=2)
    before = snapshot(site)
    path = site.parent / "image.bin"
    path.write_bytes(image)
    with pytest.raises(OtaError) as caught:
        publish.publish(path, wanted, signing_key(), site)
    assert snapshot(site) == before
    assert len(str(caught.value).splitlines()) == 1
    return f"{type(caught.value).__name__}: {caught.value}"


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def without_digest(data: bytes) -> bytes:
    return data[:23] + b"\0" + data[24:-32]


IMAGE = firmware("1.1.0")
IMAGES = {
    "empty": (b"", "ImageError: .*0 bytes"),
    "text": (b"print('hello')\n" * 50, "ImageError: .*magic: saw 0x70, expected 0xe9"),
    "html": (b"<!DOCTYPE html>".ljust(400), "ImageError: .*magic"),
    "truncated head": (IMAGE[:200], "ImageError: .*200 bytes"),
    "truncated body": (IMAGE[:-1000], "ImageError: .*image length"),
    "flipped bit in a segment": (flip(IMAGE, 1500), "ImageError: .*checksum"),
    "flipped bit in the digest": (flip(IMAGE, len(IMAGE) - 1), "ImageError: .*SHA-256"),
    "flipped entry address": (flip(IMAGE, 5), "ImageError: .*SHA-256"),
    "no digest": (without_digest(IMAGE), "ImageError: .*dont-append-digest"),
    "unknown chip": (IMAGE[:12] + b"\x77" + IMAGE[13:], "ImageError: .*chip"),
    "bytes behind the end": (IMAGE + b"extra", "ImageError: .*5 bytes behind"),
    "a bootloader": (IMAGE[:32] + bytes(4) + IMAGE[36:], "ImageError: .*bootloader"),
    "larger than any slot": (IMAGE + bytes(16 << 20), "ImageError: .*16777216"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_wrong_image_is_refused_before_anything_is_written(site, name):
    image, message = IMAGES[name]
    assert _matches(message, refused(site, image, spec()))


def _matches(pattern: str, text: str) -> bool:
    assert re.search(pattern, text), text
    return True


@pytest.mark.parametrize(
    ("chip", "start"), [("esp32", 0x1000), ("esp32s3", 0), ("esp32c3", 0), ("esp32c5", 0x2000)]
)
def test_a_combined_file_is_refused_with_a_remedy_that_works(site, chip, start):
    app = firmware("1.1.0", chip)
    table = bytes.fromhex(
        "aa50010200900000004000006e76730000000000000000000000000000000000"
        "aa50010000d00000002000006f74616461746100000000000000000000000000"
        "aa50010100f00000001000007068795f696e6974000000000000000000000000"
        "aa50001000000100000018006f74615f30000000000000000000000000000000"
        "aa50001100001900000018006f74615f31000000000000000000000000000000"
        "ebebffffffffffffffffffffffffffff6f91ac1bb2b49e61a1daefd12de800a2"
    )
    bootloader = b"\xe9\x01\x02\x20".ljust(0x8000 - start, b"\xff")
    combined = (bootloader + table).ljust(0x10000 - start, b"\xff") + app
    message = refused(site, combined, spec())
    remedy = message.split("cut out with:  ")[1].replace("application.bin", "app.bin")
    subprocess.run(remedy, shell=True, check=True, cwd=site.parent)
    assert (site.parent / "app.bin").read_bytes() == app
    done = publish.publish(site.parent / "app.bin", spec(), signing_key(), site)
    assert done.manifest["images"][0]["build"] == app[-32:].hex()


SPECS = {
    **{
        f"{what} {name!r}": (
            {what: (name,) if what == "hardware" else name},
            f"ConfigError: {what}",
        )
        for what in ("product", "channel", "hardware")
        for name in (
            "",
            "..",
            ".x",
            "a/b",
            "a\\b",
            "/etc",
            "a b",
            "ä",
            "a\0b",
            "x" * 65,
            "-x",
            "a\n",
        )
    },
    "reserved product": ({"product": "api"}, "ConfigError: product"),
    "no hardware": ({"hardware": ()}, "ConfigError: hardware"),
    **{
        f"version {v!r}": ({"version": v}, "ReleaseError: version")
        for v in ("", "1", "1.1", "v1.1.0", "1.1.0.0", "01.1.0", "1.1.0-", "../1.1.0", "1.1.0/x")
    },
    "older version": ({"version": "0.9.0"}, "VersionError: .*newer than 1.0.0"),
    "equal in precedence": ({"version": "1.0.0+b"}, "VersionError: .*newer than 1.0.0"),
    "pre-release of what runs": ({"version": "1.0.0-rc.1"}, "VersionError: .*newer"),
    "same version, other image": ({"version": "1.0.0"}, "VersionError: .*published already"),
    "lower security version": ({"security_version": 1}, "SecurityVersionError"),
    "security version too large": ({"security_version": 1 << 30}, "ReleaseError: .*security"),
    "rollout below 0": ({"rollout": -1}, "ConfigError: rollout"),
    "rollout above 100": ({"rollout": 101}, "ConfigError: rollout"),
    "rollout nan": ({"rollout": float("nan")}, "ConfigError: rollout"),
    "poll 0": ({"poll": 0}, "ConfigError: poll"),
    "poll of a month": ({"poll": 31 * 86400}, "ConfigError: poll"),
    "expired": (
        {"expires": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)},
        "ConfigError: expires: saw 2020-01-01T00:00:00Z",
    ),
    "expires before it is issued": ({"expires": dt.timedelta(days=-1)}, "ConfigError: expires"),
    "notes too long": ({"notes": "x" * 3000}, "ReleaseError: notes"),
    "manifest too large": ({"notes": "ä" * 2000}, "ReleaseError: manifest"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_wrong_wish_is_refused_with_nothing_changed(site, name):
    changes, message = SPECS[name]
    assert _matches(message, refused(site, IMAGE, spec(**changes)))


@pytest.mark.parametrize(
    ("changes", "member"),
    [
        ({"hardware": ("OTHER",)}, "hardware"),
        ({"security_version": 3}, "security_version"),
        ({"downgrade": True}, "downgrade"),
        ({"notes": "other"}, "notes"),
        ({"expires": dt.timedelta(days=2)}, "expires"),
    ],
)
def test_a_published_version_never_changes(site, changes, member):
    text = refused(site, firmware("1.0.0"), spec(version="1.0.0", **changes))
    assert _matches(f"VersionError: .*published already with other {member}", text)


@pytest.mark.parametrize(
    "pointer", [b"", b"[]", b"{}", b'{"release":5}', b'{"release":"r/9.9.9.jws"}', b"\xff"]
)
def test_a_broken_pointer_is_not_overwritten_blindly(site, pointer):
    publish_version(site, "1.0.0")
    (site / PRODUCT / "stable.json").write_bytes(pointer)
    with pytest.raises(ReleaseError, match=r"stable\.json"):
        publish_version(site, "1.1.0")
    assert (site / PRODUCT / "stable.json").read_bytes() == pointer


def test_after_a_rotation_the_security_version_is_said_once(site):
    publish_version(site, "2.0.0", security_version=2)
    path = site.parent / "new.bin"
    path.write_bytes(IMAGE)
    with pytest.raises(SecurityVersionError, match=r"2, on nobody's word.*--security-version"):
        publish.publish(path, spec(version="2.1.0"), signing_key(1), site)
    done = publish.publish(path, spec(version="2.1.0", security_version=2), signing_key(1), site)
    assert done.kid == signing_key(1).thumbprint() and "r/2.0.0.jws" in done.ignored
    again = publish.publish(path, spec(version="2.2.0"), signing_key(1), site)
    assert again.manifest["security_version"] == 2 and not again.ignored


def test_an_existing_release_of_another_key_is_not_offered_under_this_one(site):
    publish_version(site, "1.0.0", channel="beta")
    path = site.parent / "1.0.0.bin"
    with pytest.raises(OtaError, match="signing key"):
        publish.publish(path, spec(version="1.0.0"), signing_key(1), site)
    assert offered(site) is None


def test_missing_files_are_named(site):
    with pytest.raises(FileNotFoundError):
        publish.publish(Path("nowhere.bin"), spec(), signing_key(), site)


def test_a_chip_without_a_bootloader_model_is_published_on_esptools_word():
    assert images.check_as_bootloader(b"", "esp32p4") is None


def test_what_a_bootloader_would_not_load_is_refused(site):
    """An image may pass set_boot's checks and still not boot: a RAM segment at a bad address."""
    head = bytearray(IMAGE[:-32])
    count, at = head[1], 24
    for _ in range(count - 1):
        at += 8 + int.from_bytes(head[at + 4 : at + 8], "little")
    head[at : at + 4] = (0x3FFF0000).to_bytes(4, "little")  # the bootloader's own memory
    image = bytes(head) + hashlib.sha256(head).digest()
    assert _matches("ImageError: a bootloader would refuse it", refused(site, image, spec()))


def test_errors_are_of_the_documented_classes():
    assert issubclass(ImageError, OtaError) and issubclass(ConfigError, OtaError)


# ---- order and crashes

WRITES = ("os.rename", "os.link", "os.mkdir", "os.remove")


def _in_child(action, die_at: int | None) -> tuple[int, list[str]]:
    """Run ``action`` in a forked child that is killed at its ``die_at``-th change of the tree.

    Returns the exit code (9: killed) and the changes it made, in order.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            write = event == "open" and isinstance(args[2], int) and args[2] & os.O_WRONLY
            if event not in WRITES and not write:
                return
            target = args[1] if event in ("os.rename", "os.link") else args[0]
            if not isinstance(target, int) and "/site" in os.fsdecode(target):
                if seen == die_at:
                    os._exit(9)
                seen += 1
                os.write(writer, f"{event} {os.fsdecode(target)}\n".encode())

        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as lines:
        changes = lines.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), changes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_payload_then_release_then_pointer_each_by_one_atomic_step(site):
    publish_version(site, "1.0.0")
    _, changes = _in_child(lambda: publish_version(site, "1.1.0"), None)
    appeared = [c.split()[1] for c in changes if c.startswith(("os.rename", "os.link"))]
    assert [Path(name).suffix for name in appeared] == [".bin", ".jws", ".json"]
    opened = [Path(c.split()[1]).name for c in changes if c.startswith("open") and "/site/" in c]
    assert opened and all(name.startswith(".") for name in opened)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_change_the_channel_offers_old_or_new_and_publishing_goes_on(tmp_path):
    """F111: kill at every file operation of publish; no half release is ever visible."""
    (tmp_path / "probe").mkdir()
    _, changes = _in_child(lambda: publish_version(tmp_path / "probe" / "site", "1.1.0"), None)
    assert len(changes) > 5
    for n in range(len(changes) + 2):
        site = tmp_path / str(n) / "site"
        site.mkdir(parents=True)
        publish_version(site, "1.0.0")
        code, _ = _in_child(lambda site=site: publish_version(site, "1.1.0"), n)
        pointed = json.loads((site / PRODUCT / "stable.json").read_text())["release"]
        assert code == (9 if n < len(changes) else 0) or "1.1.0" in pointed
        assert offered(site).version == pointed[2:-4]
        publish_version(site, "1.1.0")
        assert offered(site).version == "1.1.0"
