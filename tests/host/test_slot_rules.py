"""What the device's slot refuses of an image, before the first erase and after the last byte."""

import hashlib

import pytest
from onhost import OnHost, pieces, run

from twinslot import release
from twinslot.errors import (
    ChecksumError,
    HardwareError,
    ImageError,
    PartitionError,
    SecurityVersionError,
    SpaceError,
)
from twinslot_tools.virtual_esp32.bootloader import PWRON_RESET
from twinslot_tools.virtual_esp32.chip.flash import Fault, PowerCut
from twinslot_tools.virtual_esp32.firmware import make_bootloader, make_firmware

BLOCK = 4096
BOUNDARY = 65536  # a checkpoint's distance


def firmware(version="1.1.0", **options):
    options = {"chip": "esp32", "size": 30_000, "project": "p", **options}
    return make_firmware(None, version=version, **options)


def described(image, **members):
    """What a release says of these bytes; ``members`` lie."""
    truth = {
        "slot": "firmware",
        "chip_id": 0,
        "size": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
        "build": image[-32:].hex(),
        "payloads": [],
    }
    return release.Image(**{**truth, **members})


async def fill(slot, image, what=None):
    await slot.begin(what or described(image))
    for at in range(0, len(image), BLOCK):
        slot.write(pieces(image[at : at + BLOCK]))
    await slot.finish()


@pytest.fixture
def board():
    return OnHost(firmware("1.0.0", secure_version=4))


def resealed(body):
    """The same with a digest that belongs to it: whoever signs can do that by mistake."""
    return bytes(body) + hashlib.sha256(body).digest()


def with_checksum(image, change):
    body = bytearray(image[:-32])
    body[-1] ^= change
    return resealed(body)


def test_a_good_image_is_taken_and_boots(board):
    slot = board.slot()
    image = firmware(secure_version=4)
    run(fill(slot, image))
    slot.activate()
    assert board.boot() == "ota_1"
    assert board.slot_bytes("ota_1")[: len(image)] == image


# ---- before the first erase

EARLY = [
    (firmware(secure_version=3), SecurityVersionError, "4 or higher"),
    (firmware(secure_version=0), SecurityVersionError, "4 or higher"),
    (firmware(chip="esp32s3", secure_version=4), HardwareError, "esp32s3"),
    (make_bootloader("esp32", 4 << 20).ljust(9000, b"\xff"), ImageError, "bootloader"),
    (b"\x00" * 9000, ImageError, "magic"),
    (b"<!doctype html><title>Please log in</title>".ljust(9000), ImageError, "magic"),
]


@pytest.mark.parametrize(("image", "error", "text"), EARLY, ids=lambda v: str(v)[:20])
def test_a_wrong_file_is_refused_before_the_first_erase(board, image, error, text):
    before = board.board.data
    with pytest.raises(error, match=text):
        run(fill(board.slot(), image))
    assert board.board.data == before


def test_a_higher_secure_version_is_taken_and_then_is_the_least(board):
    slot = board.slot()
    run(fill(slot, firmware(secure_version=9)))
    slot.activate()
    board.boot()
    board.slot().confirm()
    with pytest.raises(SecurityVersionError, match="9 or higher"):
        run(fill(board.slot(), firmware("1.2.0", secure_version=8)))


def test_F23_an_image_larger_than_the_slot_is_refused_at_once(board):
    slot = board.slot()
    with pytest.raises(SpaceError):
        run(slot.begin(described(firmware(), size=slot.size + 1)))
    run(slot.begin(described(firmware(), size=slot.size)))


# ---- after the last byte

BROKEN = [
    (with_checksum(firmware(secure_version=4), 0x40), "checksum"),
    (resealed(b"\xe9\x00" + firmware(secure_version=4)[2:-32]), "segments|first bytes"),
    (firmware(secure_version=4)[:-32] + bytes(32), "belongs to another"),
    (firmware(secure_version=4)[:-33], "early"),
    (firmware(secure_version=4)[:20_000], "early"),
]


@pytest.mark.parametrize(("image", "why"), BROKEN, ids=lambda v: str(v)[:20])
def test_an_image_that_can_not_boot_is_refused_although_it_is_signed(board, image, why):
    slot = board.slot()
    with pytest.raises(ImageError, match=why):
        run(fill(slot, image))
    written = board.slot_bytes("ota_1")
    assert written[:32] == b"\xff" * 32, "its header was never programmed"
    with pytest.raises(PartitionError):
        slot.activate()
    assert board.boot() == "ota_0"


def test_I1_F86_the_digest_of_the_release_decides(board):
    image = firmware(secure_version=4)
    lies = ("", " ", "0" * 64, image[-32:].hex(), hashlib.sha256(image).hexdigest().upper())
    for lie in lies:
        with pytest.raises(ChecksumError):
            run(fill(board.slot(), image, described(image, sha256=lie)))
        assert board.slot_bytes("ota_1")[:32] == b"\xff" * 32


def test_F79_another_build_than_the_signed_one_is_refused(board):
    image = firmware(secure_version=4)
    other = firmware("3.0.0", secure_version=4)
    for build in ("", other[-32:].hex(), image[-32:].hex().upper()):
        with pytest.raises(ImageError, match="build"):
            run(fill(board.slot(), image, described(image, build=build)))
        assert board.slot_bytes("ota_1")[:32] == b"\xff" * 32


def test_F19_a_bit_that_rots_between_write_and_verify_is_found(board):
    image = firmware(secure_version=4)
    for at in (40, 4096, 20_000, len(image) - 40, len(image) - 1):
        slot = board.slot()

        async def rot(slot=slot, at=at):
            await slot.begin(described(image))
            for start in range(0, len(image), BLOCK):
                slot.write(pieces(image[start : start + BLOCK]))
            where = board.board.part("ota_1").offset + at
            board.board.put(where, bytes([board.board.data[where] ^ 4]))
            await slot.finish()

        with pytest.raises(ChecksumError, match="SHA-256"):
            run(rot())
        assert board.slot_bytes("ota_1")[:32] == b"\xff" * 32


def test_F95_flash_that_changes_between_finish_and_activate_does_not_boot(board):
    image = firmware(secure_version=4)
    for at in (40, 5000, len(image) - 34, len(image) - 1):
        slot = board.slot()
        run(fill(slot, image))
        where = board.board.part("ota_1").offset + at
        board.board.put(where, bytes([board.board.data[where] ^ 1]))
        with pytest.raises((ChecksumError, ImageError)):
            slot.activate()
        assert board.boot() == "ota_0"


def test_I3_F95_a_slot_that_was_verified_once_is_verified_again(board):
    """A finished image, then other bytes under the same description: nothing is remembered."""
    image = firmware(secure_version=4)
    slot = board.slot()
    run(fill(slot, image))
    where = board.board.part("ota_1").offset + 10_000
    board.board.put(where, bytes([board.board.data[where] ^ 1]))
    assert run(slot.begin(described(image))) == 0
    with pytest.raises(PartitionError):
        slot.activate()


def test_F52_more_bytes_than_the_release_says_are_refused(board):
    image = firmware(secure_version=4)
    slot = board.slot()

    async def flood():
        await slot.begin(described(image))
        for start in range(0, len(image), BLOCK):
            slot.write(pieces(image[start : start + BLOCK].ljust(BLOCK, b"\0")))

    with pytest.raises(ImageError):
        run(flood())


def test_F71_fewer_bytes_than_the_release_says_are_refused(board):
    image = firmware(secure_version=4)
    for end in (0, BLOCK, len(image) // BLOCK * BLOCK):
        slot = board.slot()

        async def stop(slot=slot, end=end):
            await slot.begin(described(image))
            for start in range(0, end, BLOCK):
                slot.write(pieces(image[start : start + BLOCK]))
            await slot.finish()

        with pytest.raises(ImageError):
            run(stop())
        with pytest.raises(PartitionError):
            slot.activate()


# ---- power cuts, again and again


async def go_on(board, image):
    """What a boot does for an update: begin, write with checkpoints, verify, activate."""
    slot, journal = board.slot(), board.journal()
    if board.running == "ota_1":
        slot.confirm()
        return
    start = await slot.begin(described(image), journal.checkpoint() or None)
    for at in range(start, len(image), BLOCK):
        slot.write(pieces(image[at : at + BLOCK]))
        if (at + BLOCK) % BOUNDARY == 0:
            kept = slot.checkpoint()
            journal.save_checkpoint({**kept, "at": kept["offset"], "position": 0})
    await slot.finish()
    slot.activate()


def storm(board, image, every, boots):
    """Cut the power at every so many flash operations; True once the image is confirmed."""
    old = board.slot_bytes("ota_0")
    for n in range(boots):
        board.board.fault = Fault(board.board.stats.ops + every, "torn", None, n)
        try:
            run(go_on(board, image))
        except PowerCut:
            pass
        else:
            if board.running == "ota_1":
                return True
        board.board.fault = None
        assert board.boot(PWRON_RESET), "the board does not boot any more"
        assert board.slot_bytes("ota_0") == old
        if board.running == "ota_1":
            assert board.slot_bytes("ota_1")[: len(image)] == image, "not verified, and it boots"
    return False


def test_F33_a_storm_of_power_cuts_harms_nothing_and_lets_an_update_through_in_the_end():
    """From where a checkpoint fits between two cuts, each boot gets one checkpoint further."""
    image = firmware(size=150_000, secure_version=4)
    between = 17 * BOUNDARY // BLOCK  # an erase and 16 pages for each block
    for every in (1, 2, 3, 16, 17, 18, 33, 100, 200, between):
        storm(OnHost(firmware("1.0.0", secure_version=4)), image, every, 6)
    for every in (between + 1, between + 7, 2 * between, 1000):
        board = OnHost(firmware("1.0.0", secure_version=4))
        assert storm(board, image, every, 8), every
