"""esp32.Partition: arguments, block device calls, bounds and error codes, otadata functions.

The board here runs ota_0 (seeded entry 0: seq 1, VALID) and has a stock image in ota_1 too.
"""

import errno

import micropython
from esp32 import Partition
from harness import raises

_ERASED = b"\xff" * 4096


def _passive():
    return Partition("ota_1")


def _entries():
    otadata = Partition.find(Partition.TYPE_DATA, 0)[0]
    found = []
    for i in range(2):
        buf = bytearray(32)
        otadata.readblocks(i, buf)
        found.append(bytes(buf))
    return found


def test_constants():
    assert (Partition.BOOT, Partition.RUNNING) == (0, 1)
    assert (Partition.TYPE_APP, Partition.TYPE_DATA) == (0, 1)


def test_boot_and_running_name_the_slot_that_runs():
    assert Partition(Partition.RUNNING).info() == (0, 0x10, 0x10000, 0x1C0000, "ota_0", False)
    assert Partition(Partition.BOOT).info() == Partition(Partition.RUNNING).info()


def test_other_ids():
    raises(ValueError, Partition, 2)
    raises(ValueError, Partition, -1)
    assert raises(OSError, Partition, "nosuch").errno == errno.ENOENT
    assert Partition("nvs").info()[:2] == (1, 2)
    raises(TypeError, Partition, None)
    raises(TypeError, Partition)


def test_find_positional_and_keyword_in_table_order():
    assert [p.info()[4] for p in Partition.find()] == ["ota_0", "ota_1"]
    data = [p.info()[4] for p in Partition.find(Partition.TYPE_DATA)]
    assert data == ["nvs", "otadata", "phy_init", "vfs"]
    assert Partition.find(type=1, subtype=0)[0].info()[4] == "otadata"
    assert Partition.find(1, label="vfs", block_size=512)[0].ioctl(5, 0) == 512
    assert Partition.find(0, 0x12) == []
    assert Partition.find(0xFF, 0x10) == []
    assert len(Partition.find(0xFF)) == 6


def test_two_objects_of_one_partition_are_not_equal_but_their_info_is():
    assert Partition("ota_1") != Partition("ota_1")
    assert Partition("ota_1").info() == Partition("ota_1").info()


def test_repr():
    expected = (
        "<Partition type=0, subtype=17, address=1900544, size=1835008, label=ota_1, encrypted=0>"
    )
    assert repr(_passive()) == expected


def test_write_with_two_arguments_erases_first():
    part = _passive()
    assert part.writeblocks(3, b"\x00" * 4096) is None
    part.writeblocks(3, b"\xa5" * 4096)
    buf = bytearray(4096)
    assert part.readblocks(3, buf) is None
    assert buf == b"\xa5" * 4096


def test_write_with_three_arguments_programs_only():
    part = _passive()
    assert part.ioctl(6, 4) == 0
    part.writeblocks(4, b"\xf0", 0)
    part.writeblocks(4, b"twinslot", 100)
    buf = bytearray(4096)
    part.readblocks(4, buf)
    assert buf[0] == 0xF0 and buf[100:108] == b"twinslot" and buf[108:] == _ERASED[108:]


def test_write_with_three_arguments_crosses_pages_and_blocks():
    part = _passive()
    part.ioctl(6, 5)
    part.ioctl(6, 6)
    data = bytes([i % 251 for i in range(1000)])
    part.writeblocks(5, data, 4096 - 300)
    buf = bytearray(1000)
    part.readblocks(5, buf, 4096 - 300)
    assert buf == data


def test_big_aligned_write_erases_whole_blocks():
    part = _passive()
    piece = bytes(range(256)) * 16
    part.writeblocks(16, piece * 16)
    buf = bytearray(4096)
    for i in range(16):
        part.readblocks(16 + i, buf)
        assert buf == piece


def test_two_argument_write_takes_whole_sectors_only():
    assert raises(OSError, _passive().writeblocks, 3, b"x" * 100).args == (
        -260,
        "ESP_ERR_INVALID_SIZE",
    )


def test_blocks_are_read_and_written_with_the_heap_locked():
    part = _passive()
    buf = bytearray(4096)
    micropython.heap_lock()
    try:
        part.writeblocks(10, buf)
        part.readblocks(10, buf)
        still_locked = False
        try:
            bytearray(100)
        except MemoryError:
            still_locked = True
    finally:
        micropython.heap_unlock()
    assert still_locked


def test_ioctl():
    part = _passive()
    assert part.ioctl(1, 0) == part.ioctl(2, 0) == part.ioctl(3, 0) == 0
    assert part.ioctl(4, 0) == 0x1C0000 // 4096
    assert part.ioctl(5, 0) == 4096
    assert part.ioctl(7, 0) is None


def test_block_erase_with_another_block_size_answers_einval_and_erases_nothing():
    part = _passive()
    part.writeblocks(7, b"\x11" * 4096)
    assert Partition("ota_1", 512).ioctl(6, 7) == -22
    buf = bytearray(4096)
    part.readblocks(7, buf)
    assert buf == b"\x11" * 4096


def test_small_blocks_keep_their_neighbours():
    whole = Partition("ota_1")
    whole.writeblocks(8, bytes([i % 256 for i in range(4096)]))
    whole.writeblocks(9, bytes([i % 256 for i in range(4096)]))
    small = Partition("ota_1", 512)
    small.writeblocks(8 * 8 + 6, b"\xee" * 1536)  # the last two of sector 8, the first of 9
    buf = bytearray(8192)
    whole.readblocks(8, buf)
    for i in range(8192):
        inside = 6 * 512 <= i < 9 * 512
        assert buf[i] == (0xEE if inside else i % 256), i


def test_block_size_is_a_uint16():
    assert Partition("ota_1", 0x11000).ioctl(5, 0) == 0x1000


def test_bounds():
    part = _passive()
    blocks = part.ioctl(4, 0)
    buf = bytearray(4096)
    part.readblocks(blocks, bytearray(0))
    assert raises(OSError, part.readblocks, blocks, buf).args[0] == -260
    assert raises(OSError, part.readblocks, blocks + 1, buf).args == (
        -258,
        "ESP_ERR_INVALID_ARG",
    )
    assert raises(OSError, part.readblocks, -1, buf).args[0] == -258
    assert raises(OSError, part.writeblocks, blocks, buf).args[0] == -260
    assert raises(OSError, part.writeblocks, blocks - 1, buf, 1).args[0] == -260
    assert raises(OSError, part.ioctl, 6, blocks).args[0] == -260
    assert raises(OSError, part.ioctl, 6, blocks + 1).args[0] == -258


def test_get_next_update_goes_round():
    running = Partition(Partition.RUNNING)
    assert running.get_next_update().info()[4] == "ota_1"
    assert _passive().get_next_update().info()[4] == "ota_0"
    assert Partition("nvs").get_next_update().info()[4] == "ota_0"


def test_confirming_a_confirmed_slot_writes_nothing():
    before = _entries()
    assert Partition.mark_app_valid_cancel_rollback() is None
    assert _entries() == before


def test_set_boot_of_a_blank_or_damaged_slot_fails_and_changes_nothing():
    before = _entries()
    part = Partition("ota_1")
    part.ioctl(6, 0)
    wrong = (-5379, "ESP_ERR_OTA_VALIDATE_FAILED")
    assert raises(OSError, part.set_boot).args == wrong
    assert raises(OSError, Partition("vfs").set_boot).args == wrong
    assert _entries() == before


def test_set_boot_of_a_good_image_arms_a_trial():
    _copy_running()
    _passive().set_boot()
    first, second = _entries()
    assert first == b"\x01\0\0\0" + b"\xff" * 20 + b"\x02\0\0\0\x9a\x98\x43\x47"
    assert second == b"\x02\0\0\0" + b"\xff" * 20 + b"\0\0\0\0\x74\x37\xf6\x55"
    assert Partition(Partition.BOOT).info()[4] == "ota_1"
    assert Partition(Partition.RUNNING).info()[4] == "ota_0"


def test_set_boot_of_the_active_slot_takes_the_other_record():
    """The quirk of IDF 5: the same seq again, and the record of the other slot is lost."""
    _passive().set_boot()
    first, second = _entries()
    assert first == b"\x02\0\0\0" + b"\xff" * 20 + b"\0\0\0\0\x74\x37\xf6\x55"
    assert second == first


def _copy_running():
    source = Partition(Partition.RUNNING)
    target = _passive()
    buf = bytearray(4096)
    block = 0
    source.readblocks(block, buf)
    while buf != _ERASED:
        target.writeblocks(block, buf)
        block += 1
        source.readblocks(block, buf)
