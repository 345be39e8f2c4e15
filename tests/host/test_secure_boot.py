"""Images signed by espsecure for Secure Boot v2: recognised, and passed through untouched."""

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import bench
import pytest
from onhost import OnHost, pieces, run
from servers import HARDWARE, PRODUCT
from trust import key

from twinslot import release
from twinslot.errors import ImageError
from twinslot_tools import images, inspection, publish, secure_boot

ESPSECURE = Path(sys.executable).with_name("espsecure")
UNSIGNED = bench.firmware("1.2.0", size=60_000)


@cache
def signed(tmp: Path, scheme: str = "rsa3072", times: int = 1) -> bytes:
    """The image as espsecure signs it, with ``times`` keys."""
    source = tmp / "plain.bin"
    source.write_bytes(UNSIGNED)
    for number in range(1, times + 1):
        pem, target = (
            tmp / f"{scheme}-{number}-of-{times}.pem",
            tmp / f"{scheme}-{number}-of-{times}.bin",
        )
        espsecure("generate-signing-key", "--version", "2", "--scheme", scheme, pem)
        more = ["--append-signatures"] if number > 1 else []
        espsecure("sign-data", "--version", "2", "-k", pem, *more, "--output", target, source)
        source = target
    return source.read_bytes()


def espsecure(*arguments):
    done = subprocess.run([ESPSECURE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("espsecure")


def test_the_signature_sector_of_espsecure_is_read_and_verified(folder):
    image = signed(folder)
    [signature] = secure_boot.read(image, len(UNSIGNED))
    assert (signature.scheme, signature.holds) == ("RSA-3072 PSS", True)
    told = espsecure("signature-info-v2", folder / "rsa3072-1-of-1.bin")
    assert signature.key_digest in told.replace(" ", "").replace("\n", "")


def test_several_signatures_and_ecdsa_are_recognised(folder):
    several = secure_boot.read(signed(folder, times=3), len(UNSIGNED))
    assert [s.holds for s in several] == [True] * 3
    assert len({s.key_digest for s in several}) == 3
    [ecdsa] = secure_boot.read(signed(folder, "ecdsa256"), len(UNSIGNED))
    assert (ecdsa.scheme, ecdsa.holds) == ("ECDSA", None)


def test_an_image_without_a_signature_sector_has_none():
    assert secure_boot.read(UNSIGNED, len(UNSIGNED)) is None


@pytest.mark.parametrize("where", [2000, 65536 - 4096 + 1, 65536 - 4096 + 10, 65536 - 3600, 62000])
def test_a_damaged_or_foreign_signature_is_refused_before_it_is_published(folder, tmp_path, where):
    image = bytearray(signed(folder))
    image[where] ^= 1
    with pytest.raises(ImageError):
        secure_boot.read(bytes(image), len(UNSIGNED))
    path = tmp_path / "damaged.bin"
    path.write_bytes(image)
    with pytest.raises(ImageError):
        images.load(path)


def test_a_forged_signature_is_told_by_inspect_and_refused_by_publish(folder, tmp_path):
    import binascii

    image = bytearray(signed(folder))
    at = len(image) - 4096
    image[at + 900] ^= 1  # in the signature; the CRC is made to fit
    image[at + 1196 : at + 1200] = binascii.crc32(image[at : at + 1196]).to_bytes(4, "little")
    path = tmp_path / "forged.bin"
    path.write_bytes(image)
    found = inspection.inspect(path)
    assert not found["ok"] and "signature" in found["why"]
    with pytest.raises(ImageError, match="does not hold"):
        images.load(path)


def test_inspect_tells_the_signatures(folder):
    signed(folder)
    found = inspection.inspect(folder / "rsa3072-1-of-1.bin")
    assert found["ok"] and found["secure_boot"][0]["holds"] is True
    assert json.dumps(found)


def test_a_signed_image_goes_from_publish_to_the_slot_untouched(folder, tmp_path):
    image = signed(folder)
    spec = publish.Spec(product=PRODUCT, version="1.2.0", hardware=(HARDWARE,))
    site = tmp_path / "site"
    published = publish.publish(folder / "rsa3072-1-of-1.bin", spec, key("release"), site)
    described = published.manifest["images"][0]
    blob = site / PRODUCT / described["payloads"][0]["url"]
    assert blob.read_bytes() == image
    assert described["sha256"] == hashlib.sha256(image).hexdigest()
    assert described["build"] == UNSIGNED[-32:].hex()

    board = OnHost(bench.firmware("1.0.0"))
    slot = board.slot()
    manifest = release.parse(json.dumps(published.manifest).encode())

    async def install():
        await slot.begin(manifest.firmware)
        for at in range(0, len(image), 4096):
            slot.write(pieces(image[at : at + 4096]))
        await slot.finish()
        slot.activate()

    run(install())
    assert board.slot_bytes("ota_1")[: len(image)] == image
    assert board.boot() == "ota_1"
