"""esp32.NVS: types, limits and error numbers."""

from esp32 import NVS
from harness import raises


def _code(function, *args):
    return raises(OSError, function, *args).args


def test_integers():
    nvs = NVS("ints")
    for value in (0, 1, -1, 2**31 - 1, -(2**31)):
        nvs.set_i32("n", value)
        assert nvs.get_i32("n") == value
    nvs.commit()
    raises(OverflowError, nvs.set_i32, "n", 2**31)
    assert nvs.get_i32("n") == -(2**31)


def test_blobs():
    nvs = NVS("blobs")
    buf = bytearray(5000)
    pattern = bytes(range(256)) * 20
    for size in (0, 1, 31, 32, 33, 4000, 4001, 5000):
        data = pattern[size % 100 : size % 100 + size]
        nvs.set_blob("b", data)
        assert nvs.get_blob("b", buf) == size
        assert buf[:size] == data
    nvs.set_blob("b", "text")
    assert nvs.get_blob("b", buf) == 4 and buf[:4] == b"text"
    nvs.set_blob("b", memoryview(b"view")[1:])
    assert nvs.get_blob("b", buf) == 3 and buf[:3] == b"iew"


def test_a_blob_larger_than_the_buffer_leaves_the_buffer_alone():
    nvs = NVS("blobs")
    nvs.set_blob("c", b"12345678")
    buf = bytearray(7)
    assert _code(nvs.get_blob, "c", buf) == (-4364, "ESP_ERR_NVS_INVALID_LENGTH")
    assert buf == bytes(7)


def test_absent_keys_and_other_types():
    nvs = NVS("types")
    assert _code(nvs.get_i32, "none") == (-4354, "ESP_ERR_NVS_NOT_FOUND")
    assert _code(nvs.get_blob, "none", bytearray(4))[0] == -4354
    assert _code(nvs.erase_key, "none")[0] == -4354
    nvs.set_i32("k", 5)
    assert _code(nvs.get_blob, "k", bytearray(4))[0] == -4354


def test_another_type_replaces_the_value():
    nvs = NVS("types")
    nvs.set_i32("k", 5)
    nvs.set_blob("k", b"five")
    assert _code(nvs.get_i32, "k")[0] == -4354
    nvs.set_i32("k", 6)
    assert nvs.get_i32("k") == 6
    assert _code(nvs.get_blob, "k", bytearray(4))[0] == -4354
    nvs.erase_key("k")
    assert _code(nvs.get_i32, "k")[0] == -4354


def test_keys_have_15_characters_at_most():
    nvs = NVS("keys")
    nvs.set_i32("k" * 15, 1)
    assert nvs.get_i32("k" * 15) == 1
    assert _code(nvs.set_i32, "k" * 16, 1) == (-4361, "ESP_ERR_NVS_KEY_TOO_LONG")
    assert _code(nvs.get_i32, "k" * 16)[0] == -4361


def test_namespaces_are_apart_and_compared_on_15_characters():
    NVS("one").set_i32("k", 1)
    NVS("two").set_i32("k", 2)
    assert NVS("one").get_i32("k") == 1
    assert _code(NVS, "n" * 16)[0] == -4361
    NVS("n" * 15).set_i32("k", 3)
    assert NVS("n" * 16).get_i32("k") == 3


def test_a_full_partition_says_so_and_keeps_what_it_has():
    nvs = NVS("full")
    nvs.set_blob("keep", b"precious")
    assert _code(nvs.set_blob, "huge", bytes(12001)) == (-4366, "ESP_ERR_NVS_VALUE_TOO_LONG")
    assert _code(nvs.set_blob, "big", bytes(11990)) == (-4357, "ESP_ERR_NVS_NOT_ENOUGH_SPACE")
    assert _code(nvs.get_blob, "big", bytearray(12000))[0] == -4354
    buf = bytearray(8)
    assert nvs.get_blob("keep", buf) == 8 and buf == b"precious"


def test_hundreds_of_updates_go_through_page_after_page():
    nvs = NVS("wear")
    nvs.set_blob("keep", b"precious")
    for i in range(1000):
        nvs.set_i32("counter", i)
    assert nvs.get_i32("counter") == 999
    buf = bytearray(8)
    assert nvs.get_blob("keep", buf) == 8 and buf == b"precious"
