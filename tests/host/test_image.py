"""The image check: what set_boot refuses, what only the bootloader refuses, and why."""

import hashlib
import struct
from pathlib import Path

import pytest
from bench import firmware, run_on_cpython, run_on_micropython
from hypothesis import given
from hypothesis import strategies as st

from twinslot_tools.virtual_esp32.chip import image
from twinslot_tools.virtual_esp32.chip.image import CHIPS, ImageError
from twinslot_tools.virtual_esp32.firmware import make_firmware

CASES = Path(__file__).with_name("chip_cases.py")
SLOT = 0x180000


def reader(data):
    """Read an image that lies in an erased slot."""

    def read(at, buf):
        piece = data[at : at + len(buf)]
        buf[:] = piece + b"\xff" * (len(buf) - len(piece))

    return read


def verify(content, limit=SLOT, chip="esp32", offset=0x10000, **options):
    return image.verify(reader(content), limit, chip, offset, **options)


def make_image(segments, header=b"", count=None, digest=True):
    """An image from (load address, data) pairs, right in all that isn't given.

    `header` replaces the beginning of a header for the ESP32.
    """
    good = bytearray.fromhex("e9010220 28150840 ee000000 0000 00 0000 8f01 00000000 01")
    good[: len(header)] = header
    good[1] = len(segments) if count is None else count
    good[23] = digest
    body, checksum = bytes(good), 0xEF
    for load, data in segments:
        body += struct.pack("<II", load, len(data)) + data
        for byte in data:
            checksum ^= byte
    body += bytes(15 - len(body) % 16) + bytes([checksum])
    return body + hashlib.sha256(body).digest() if digest else body


# Long enough that a segment put behind it can be checked on its own.
DROM = (0x3F400020, bytes(range(256)))


def minimal_image():
    """The smallest image of the reference: made with esptool, digests known."""
    desc = struct.pack(
        "<II8x32s32s16s16s32s32sHHB75x",
        0xABCD5432, 0, b"1.0", b"sim", b"00:00:00", b"Jan  1 2024", b"v5.5.2", b"", 0, 0, 16,
    )  # fmt: skip
    return make_image([(0x3F400020, desc)], bytes.fromhex("e901022000000840"))


def test_the_minimal_image_of_the_reference_is_accepted():
    data = minimal_image()
    assert len(data) == 336
    assert (
        hashlib.sha256(data).hexdigest()
        == "82538702de72678e92436853fa9fa80aee86d5a92a08236972944fbb994c13f4"
    )
    info = verify(data, in_bootloader=True)
    assert info.segments == [image.Segment(0x3F400020, 0x20, 0x100)]
    assert (info.length, info.entry, info.chip_id, info.desc) == (336, 0x40080000, 0, 0x20)
    assert info.digest.hex() == "2da802261ddbfa86e5a64809a17888312eb893515808afe3e98dc1d1db71c364"
    desc = image.read_desc(reader(data), info)
    assert desc[:6] == (0, "1.0", "sim", "00:00:00", "Jan  1 2024", "v5.5.2")
    assert image.find_tree(reader(data), info) is None


def head(**fields):
    values = {"chip": 0, "min": 0, "max": 399} | fields
    packed = struct.pack("<HBHH", values["chip"], 0, values["min"], values["max"])
    return bytes.fromhex("e9010220 28150840 ee000000") + packed


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"invalid magic byte 0xff, expected 0xe9 \(nothing flashed here\?\)"),
        (make_image([DROM], b"\xea"), "invalid magic byte 0xea, expected 0xe9$"),
        (make_image([DROM], head(chip=9)), "mismatch chip ID, expected 0, found 9"),
        (make_image([DROM], head(min=400)), "chip revision 301 is below the image's minimum 400"),
        (make_image([DROM], head(max=300)), "chip revision 301 is above the image's maximum 300"),
        (make_image([DROM] * 17), "segment count 17 exceeds max 16"),
        (make_image([DROM], count=3), "segment 2: invalid length"),
        (make_image([(0x3F400020, bytes(255))]), "segment 0: invalid length 0xff"),
        (make_image([(0x3F400024, bytes(256))]), r"segment 0: .*doesn't match data at 0x00010020"),
        (make_image([DROM, (0x400D0000, b"code")]), "segment 1: load address 0x400d0000 doesn't"),
        (make_image([DROM])[:-33] + b"\0" + make_image([DROM])[-32:], "checksum failed"),
        (make_image([DROM])[:-1] + b"\0", "image hash failed"),
    ],
)
def test_bad_images_are_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        verify(data)


@pytest.mark.parametrize("limits", [{"max": 0}, {"max": 65535}, {"min": 301}, {"max": 301}])
def test_revision_limits_that_hold_are_accepted(limits):
    verify(make_image([DROM], head(**limits)))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("other", CHIPS)
def test_firmware_boots_on_its_own_chip_only(chip, other):
    """F80: an image for another chip."""
    data = firmware("1.0.0", chip)
    if chip == other:
        assert verify(data, chip=chip, in_bootloader=True).chip_id == CHIPS[chip].chip_id
    else:
        with pytest.raises(ImageError, match="mismatch chip ID"):
            verify(data, chip=other)


def test_reasons_come_in_the_order_of_the_idf():
    """Everything is wrong with it; mending one thing shows the next."""
    data = bytearray(make_image([(0x3F400020, bytes(256)), (0x3F410000, bytes(16))], b"\x00"))
    data[12], data[1], data[-1] = 5, 17, data[-1] ^ 1
    data[28:32] = struct.pack("<I", 0x102)
    mends = [
        ("invalid magic", 0, b"\xe9"),
        ("chip ID", 12, b"\x00"),
        ("segment count", 1, b"\x02"),
        ("invalid length", 28, struct.pack("<I", 256)),
        ("segment 1: load address", 0x120, struct.pack("<I", 0x3F410128)),
    ]
    for reason, at, mended in mends:
        with pytest.raises(ImageError, match=reason):
            verify(bytes(data))
        data[at : at + len(mended)] = mended
    data[0x130] ^= 1
    with pytest.raises(ImageError, match="checksum failed"):
        verify(bytes(data))
    data[0x130] ^= 1
    with pytest.raises(ImageError, match="hash failed"):
        verify(bytes(data))


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (0x3FFBDB60, None),
        (0x40080000, None),
        (0x50000000, None),
        (0x00000000, None),  # padding is never loaded
        (0x0FFFFFFC, None),
        (0x20000000, "bad load address range"),
        (0x3FFFFFF0, "bad load address range"),  # runs out of DRAM
        (0x3FFF0000, "overlaps bootloader"),
        (0x3FFEFFF0, "overlaps bootloader"),
        (0x3FFE3F00, "overlaps bootloader"),  # its stack
    ],
)
def test_ram_range_is_checked_in_the_bootloader_only(load, reason):
    """Such an image passes set_boot and is refused at boot."""
    data = make_image([DROM, (load, bytes(32))])
    verify(data)
    if reason is None:
        verify(data, in_bootloader=True)
    else:
        with pytest.raises(ImageError, match=reason):
            verify(data, in_bootloader=True)


def test_a_partition_over_16_mib_is_refused_where_the_cache_cannot_reach():
    with pytest.raises(ImageError, match="larger than 16MB"):
        verify(firmware(), limit=0x1000001)
    verify(firmware(chip="esp32s3"), limit=0x2000000, chip="esp32s3")


def test_the_image_must_fit_its_partition():
    data = firmware()
    verify(data, limit=len(data))
    with pytest.raises(ImageError, match="doesn't fit in partition length"):
        verify(data, limit=len(data) - 1)


def test_bytes_behind_the_image_are_ignored():
    """A signed image is accepted by firmware that knows no signatures."""
    data = firmware()
    assert verify(data + b"\xe7" * 4096).length == len(data)


def test_without_the_hash_flag_only_the_checksum_is_left():
    """The header is not in the checksum: clearing byte 23 disarms the digest."""
    data = bytearray(firmware())
    data[23] = 0
    assert verify(bytes(data)).digest is None
    data[0x30] ^= 1
    with pytest.raises(ImageError, match="checksum failed"):
        verify(bytes(data))
    data[0x31] ^= 1  # a second flip in the same bit position escapes the checksum
    verify(bytes(data))


def test_a_wake_from_deep_sleep_looks_at_the_structure_only():
    data = bytearray(firmware())
    data[0x200] ^= 1
    with pytest.raises(ImageError):
        verify(bytes(data))
    verify(bytes(data), data=False)
    with pytest.raises(ImageError, match="invalid magic"):
        verify(b"", data=False)


def test_efuse_block_revision_is_checked_except_on_the_esp32():
    for chip in CHIPS:
        data = bytearray(firmware(chip=chip))
        data[0x20 + 176] = 200  # minimum v2.0
        data[23] = 0
        data[-33] ^= 200  # mend the checksum
        if chip == "esp32":
            verify(bytes(data))
            continue
        with pytest.raises(
            ImageError, match=f"eFuse block revision {CHIPS[chip].blk_rev}, image expects 200"
        ):
            verify(bytes(data), chip=chip)


IMAGE = firmware()


@given(st.integers(0, len(IMAGE) * 8 - 1))
def test_no_single_flipped_bit_is_accepted_with_the_digest_on(bit):
    """F70 for images. Only a flip of the hash flag escapes, and it leaves no digest."""
    data = bytearray(IMAGE)
    data[bit // 8] ^= 1 << bit % 8
    try:
        info = verify(bytes(data), in_bootloader=True)
    except ImageError:
        return
    assert bit // 8 == 23
    assert info.digest is not None or data[23] == 0


@given(st.integers(0, len(IMAGE) - 1))
def test_no_truncated_image_is_accepted(length):
    """F71 for images."""
    with pytest.raises(ImageError):
        verify(IMAGE[:length])


@given(st.binary(max_size=200))
def test_noise_never_raises_anything_else(noise):
    try:
        verify(b"\xe9" + noise)
    except ImageError:
        pass


# --- the Python tree ---


def test_tree_is_found_in_its_own_data_segment(tmp_path):
    (tmp_path / "main.py").write_text("print('hello')\n")
    data = make_firmware(tmp_path, chip="esp32", version="1", project="p", mpy=False)
    at, length = image.find_tree(reader(data), verify(data))
    assert data[at : at + 3] == b"\xd2\xcd\x31"
    assert b"print('hello')" in data[at : at + length]


@pytest.mark.parametrize(
    ("load", "content"),
    [
        (0x3F410128, b"\xd2\xcd\x32" + bytes(61)),  # another magic
        (0x3F410128, b"\xd2\xcd\x31\x7f" + bytes(60)),  # longer than its segment
        (0x3F410128, b"\xd2\xcd\x31" + b"\xff" * 61),  # no length at all
        (0x400D0128, b"\xd2\xcd\x31\x04" + bytes(60)),  # code, not data
        (0x3FFBDB60, b"\xd2\xcd\x31\x04" + bytes(60)),  # RAM
    ],
)
def test_what_only_looks_like_a_tree_is_none(load, content):
    data = make_image([DROM, (load, content)])
    assert image.find_tree(reader(data), verify(data)) is None


def test_tree_length_is_that_of_the_romfs():
    data = make_image([DROM, (0x3F410128, b"\xd2\xcd\x31\x81\x00" + bytes(203))])
    assert image.find_tree(reader(data), verify(data)) == (0x128, 5 + 128)


def test_foreign_bytes_in_a_descriptor_are_shown_harmless():
    data = b"\x32\x54\xcd\xab" + bytes(12) + b"1.0\x1b[31m\xff".ljust(32, b"\0") + bytes(208)
    assert image.parse_desc(data).version == "1.0?[31m?"
    assert image.parse_desc(data[:200]) is None
    assert image.parse_desc(bytes(256)) is None


def test_micropython_verifies_as_cpython_does(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "main.py").write_text("x = 1\n")
    data = make_firmware(tmp_path / "tree", chip="esp32", version="1", project="p", size=100_001)
    (tmp_path / "image.bin").write_bytes(data)
    output = run_on_cpython(CASES, "image", str(tmp_path))
    assert run_on_micropython(CASES, "image", str(tmp_path)) == output
    assert "accepted" not in output
