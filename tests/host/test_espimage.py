"""The device's reader of ESP images, against images made and read by other code."""

import contextlib
import functools
import hashlib
import operator
import random
import struct

import pytest

from twinslot import espimage
from twinslot.errors import ImageError
from twinslot.walk import Walk
from twinslot_tools import images
from twinslot_tools.virtual_esp32.firmware import make_bootloader, make_firmware

CHIPS = {"esp32": 0, "esp32s3": 9, "esp32c3": 5, "esp32c5": 23}
IMAGE = make_firmware(None, chip="esp32", version="1.2.3", project="node", size=70_001)


def reader(data):
    def read(offset, buf):
        part = data[offset : offset + len(buf)]
        buf[: len(part)] = part

    return read


def identify(data, limit=None):
    return espimage.identify(reader(data), len(data) if limit is None else limit)


@pytest.mark.parametrize("chip", CHIPS)
def test_head_and_identity_are_what_the_builder_put_in(chip):
    image = make_firmware(
        None, chip=chip, version="3.2.1", project="pump", size=50_000, secure_version=7
    )
    head = espimage.parse(image[: espimage.HEAD_LEN])
    assert head["chip_id"] == CHIPS[chip]
    assert espimage.chip_name(head["chip_id"]) == chip
    assert (head["version"], head["project"]) == ("3.2.1", "pump")
    assert head["secure_version"] == 7
    assert head["hash_appended"]
    length, build = identify(image)
    assert length == len(image)
    assert build == image[-32:].hex() == hashlib.sha256(image[:-32]).hexdigest()


def test_the_vector_of_a_genuine_build_is_walked_to_its_end():
    # 336 bytes, accepted by esptool 5: one DROM segment that is only an app descriptor.
    desc = struct.pack("<I28x", 0xABCD5432)[:16] + b"1.0".ljust(32, b"\0") + bytes(208)
    image = bytearray(struct.pack("<BBBBIB3xHBHH4xB", 0xE9, 1, 2, 0x20, 0, 0xEE, 0, 0, 0, 399, 1))
    image += struct.pack("<II", 0x3F400020, len(desc)) + desc
    checksum = 0xEF
    for byte in desc:
        checksum ^= byte
    image += bytes(15 - len(image) % 16) + bytes([checksum])
    image += hashlib.sha256(image).digest()
    assert len(image) == 336
    assert identify(bytes(image)) == (336, image[-32:].hex())


def test_every_wrong_first_byte_is_refused():
    for byte in range(256):
        if byte != 0xE9:
            with pytest.raises(ImageError, match="magic"):
                espimage.parse(bytes([byte]) + IMAGE[1:])
            with pytest.raises(ImageError, match="magic"):
                identify(bytes([byte]) + IMAGE[1:])


@pytest.mark.parametrize("length", [0, 1, 23, 24, 32, 287])
def test_a_head_cut_short_is_refused(length):
    with pytest.raises(ImageError, match="at least 288"):
        espimage.parse(IMAGE[:length])


@pytest.mark.parametrize("segments", [0, 17, 255])
def test_a_number_of_segments_no_bootloader_takes_is_refused(segments):
    image = IMAGE[:1] + bytes([segments]) + IMAGE[2:]
    with pytest.raises(ImageError, match="segments"):
        espimage.parse(image)
    with pytest.raises(ImageError, match="segments"):
        identify(image)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1 << 24, 0xFFFFFFFC])
def test_a_segment_length_no_bootloader_takes_is_refused(length):
    image = IMAGE[:28] + struct.pack("<I", length) + IMAGE[32:]
    with pytest.raises(ImageError, match="segment length"):
        identify(image)


@pytest.mark.parametrize("length", [5, 6, 7])
def test_the_last_segment_too_is_of_whole_words(length):
    image = bytearray(built(8))
    image[28] = length
    with pytest.raises(ImageError, match="segment length"):
        identify(bytes(image))


def test_an_image_that_ends_beyond_its_slot_is_refused():
    for limit in (0, 24, 31, 300, len(IMAGE) // 2, len(IMAGE) - 33, len(IMAGE) - 1):
        with pytest.raises(ImageError):
            identify(IMAGE, limit)


def test_a_bootloader_is_no_application():
    with pytest.raises(ImageError, match="bootloader"):
        espimage.parse(make_bootloader("esp32", 4 << 20)[: espimage.HEAD_LEN])


def test_an_image_without_digest_has_no_identity():
    image = IMAGE[:23] + b"\0" + IMAGE[24:]
    assert identify(image) == (len(IMAGE) - 32, "")
    assert not espimage.parse(image[: espimage.HEAD_LEN])["hash_appended"]


def test_random_damage_to_headers_gives_an_answer_or_an_image_error():
    rng = random.Random(11)
    for _ in range(3000):
        image = bytearray(IMAGE[:400])
        for _ in range(rng.randrange(1, 6)):
            image[rng.randrange(320)] = rng.randrange(256)
        with contextlib.suppress(ImageError):
            espimage.parse(image[:288])
        with contextlib.suppress(ImageError):
            length, build = identify(bytes(image), 70_001)
            assert length <= 70_001
            assert len(build) in (0, 64)


def built(*lengths, segments=None):
    """An image with segments of these lengths; `segments` is the number it claims."""
    image = struct.pack("<BBBBI", 0xE9, segments or len(lengths), 2, 0x2F, 0x40081528)
    image += bytes(15) + b"\1"
    data = b""
    for number, length in enumerate(lengths):
        image += struct.pack("<II", 0x3F400020, length) + bytes([number + 1]) * length
        data += bytes([number + 1]) * length
    checksum = functools.reduce(operator.xor, data, 0xEF)
    image += bytes(15 - len(image) % 16) + bytes([checksum])
    return image + hashlib.sha256(image).digest()


@pytest.mark.parametrize("count", range(1, 18))
def test_an_image_has_one_to_sixteen_segments(count):
    image = built(*[4 * n + 4 for n in range(count)])
    if count <= 16:
        assert walked(image) == image[-32:].hex()
        assert identify(image) == (len(image), image[-32:].hex())
        assert espimage.parse(image[:32] + IMAGE[32:288])["segments"] == count
    else:
        for reads in (walked, identify):
            with pytest.raises(ImageError):
                reads(image)


def test_a_segment_may_be_empty_or_just_below_16_MiB():
    image = built(0, 8, 0)
    assert walked(image) == identify(image)[1] == image[-32:].hex()
    head = built(4)[:24] + struct.pack("<II", 0, (1 << 24) - 4)
    with pytest.raises(ImageError, match="early"):
        walked(head)
    with pytest.raises(ImageError, match="image length"):
        identify(head)


@pytest.mark.parametrize("lengths", [(4,), (8, 12), (0, 0, 4), (16, 4)])
def test_nothing_beyond_the_limit_is_read_whatever_it_cuts(lengths):
    image = built(*lengths)

    def read(offset, buf):
        assert offset + len(buf) <= limit
        buf[:] = image[offset : offset + len(buf)]

    for limit in range(24, len(image)):
        with pytest.raises(ImageError, match="image length"):
            espimage.identify(read, limit)
    limit = len(image)
    assert espimage.identify(read, limit)[0] == len(image)


def test_texts_and_numbers_of_a_head_are_read_to_their_last_byte():
    head = bytearray(IMAGE[:288])
    head[12:14] = b"\x34\x12"
    head[36:40] = b"\x01\x02\x03\x04"
    head[48:80] = b"v" * 32
    head[80:113] = b"p" * 32 + b"q"
    said = espimage.parse(head)
    assert espimage.chip_name(said["chip_id"]) == "chip 0x1234"
    assert said["secure_version"] == 0x04030201
    assert (said["version"], said["project"]) == ("v" * 32, "p" * 32)
    head[48:112] = bytes(32) + b"\xff" * 32
    said = espimage.parse(memoryview(head))
    assert (said["version"], said["project"]) == ("", "")


# ---- the walk that verifies


def walked(data, piece=4096):
    walk = Walk()
    for at in range(0, len(data), piece):
        walk.feed(data[at : at + piece])
    return walk.finish()


@pytest.mark.parametrize("piece", [1, 7, 32, 255, 256, 257, 4095, 4096, 65536])
def test_the_walk_gives_the_build_whatever_the_pieces(piece):
    assert walked(IMAGE, piece) == IMAGE[-32:].hex()


@pytest.mark.parametrize("chip", CHIPS)
def test_the_walk_agrees_with_esptool_and_the_bootloader_model(chip, tmp_path):
    for size in (30_000, 30_001, 30_015, 30_016, 50_000):
        data = make_firmware(None, chip=chip, version="1.0.0", project="p", size=size)
        images.check_with_esptool("image", chip, data)
        images.check_as_bootloader(data, chip)
        assert walked(data) == data[-32:].hex()


def test_bytes_behind_the_image_are_not_the_walks_business():
    assert walked(IMAGE + b"\xe7" + bytes(4095)) == IMAGE[-32:].hex()


def test_every_truncation_of_an_image_is_refused():
    small = make_firmware(None, chip="esp32", version="1.0.0", project="p", size=12_000)
    assert walked(small)
    for end in [*range(400), *range(400, len(small), 97), *range(len(small) - 60, len(small))]:
        with pytest.raises(ImageError):
            walked(small[:end])


def test_every_changed_byte_of_an_image_is_refused():
    """Each byte of the headers and the end, and a sample of the data, by one bit."""
    small = bytearray(make_firmware(None, chip="esp32", version="1.0.0", project="p", size=12_000))
    end = len(small)
    for at in [*range(320), *range(320, end - 64, 53), *range(end - 64, end)]:
        for bit in (1, 0x80):
            small[at] ^= bit
            with pytest.raises(ImageError):
                walked(small)
            small[at] ^= bit
    assert walked(small)


def resealed(image):
    """The same image with the digest that belongs to it."""
    body = bytes(image[:-32])
    return body + hashlib.sha256(body).digest()


def test_a_wrong_checksum_under_a_right_digest_is_refused():
    image = bytearray(IMAGE)
    image[-33] ^= 0x10
    with pytest.raises(ImageError, match="checksum"):
        walked(resealed(image))
    # And a byte of data changed twice: the checksum holds, the digest does not.
    image = bytearray(IMAGE)
    image[4000] ^= 1
    image[5000] ^= 1
    with pytest.raises(ImageError, match="SHA-256"):
        walked(image)
    assert walked(resealed(image))


@pytest.mark.parametrize("first", [b"\xe8\x02", b"\xe9\x00", b"\xe9\x11"])
def test_a_first_byte_or_a_number_of_segments_that_no_bootloader_takes_ends_the_walk(first):
    with pytest.raises(ImageError, match="first bytes"):
        walked(resealed(first + IMAGE[2:]))


def test_the_walk_needs_an_appended_digest():
    image = bytearray(IMAGE)
    image[23] = 0
    with pytest.raises(ImageError, match="no SHA-256"):
        walked(resealed(image))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1 << 24, 0xFFFFFFFC, 0xFFFFFFFF])
def test_a_segment_no_bootloader_takes_ends_the_walk(length):
    image = bytearray(IMAGE)
    image[28:32] = struct.pack("<I", length)
    with pytest.raises(ImageError, match=f"segment of {length} "):
        walked(resealed(image))


def test_nothing_is_raised_before_the_end():
    walk = Walk()
    walk.feed(b"no image at all" * 100)
    walk.feed(b"")
    with pytest.raises(ImageError, match="first bytes"):
        walk.finish()
