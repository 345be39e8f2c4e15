"""What else a board's Python has: sys, os, esp, network, flashbdev, esp32's smaller functions."""

import os
import sys

import esp
import esp32
import network
from harness import raises


def test_sys_is_a_boards():
    assert sys.platform == "esp32"
    assert sys.implementation.name == "micropython"
    assert sys.implementation[0] == "micropython"
    assert sys.implementation._build == "ESP32_GENERIC"
    assert sys.implementation._machine == "Generic ESP32 module with ESP32"
    assert sys.implementation._mpy & 0xFF == 6
    assert sys.implementation.version >= (1, 24, 0)
    assert sys.path[0] == "" and sys.path[-1] == "/lib"


def test_os_is_a_boards():
    assert os.uname().sysname == os.uname()[0] == "esp32"
    assert os.uname().machine == sys.implementation._machine
    os.sync()
    for name in ("system", "getenv", "putenv"):
        assert not hasattr(os, name)
    assert "main.py" in os.listdir() and "main.py" in os.listdir("/")


def test_times_of_files_count_from_2000():
    with open("/stamp", "w") as f:
        f.write("x")
    assert 0 <= os.stat("/stamp")[8] < 50 * 366 * 86400
    os.remove("/stamp")


def test_rename_replaces_a_file():
    for name in ("a", "b"):
        with open(name, "w") as f:
            f.write(name)
    os.rename("a", "b")
    with open("b") as f:
        assert f.read() == "a"
    assert "a" not in os.listdir()
    os.remove("b")


def test_esp():
    assert esp.flash_size() == 4 << 20
    buf = bytearray(2)
    esp.flash_read(0x8000, buf)
    assert buf == b"\xaa\x50"
    raises(OSError, esp.flash_read, 4 << 20, buf)
    esp.osdebug(None)


def test_flashbdev_is_the_volume():
    import flashbdev

    assert flashbdev.bdev.info()[4] == "vfs"


def test_heap_info_lists_regions():
    for total, free, largest, lowest in esp32.idf_heap_info(esp32.HEAP_DATA):
        assert total >= free >= largest and lowest <= free
    assert esp32.idf_heap_info(esp32.HEAP_EXEC)


def test_wlan_connects_to_loopback():
    wlan = network.WLAN(network.STA_IF)
    assert wlan is network.WLAN()
    assert network.WLAN.IF_STA == network.STA_IF
    assert not wlan.active() and not wlan.isconnected()
    raises(OSError, wlan.connect, "home", "secret")
    wlan.active(True)
    assert wlan.status() == network.STAT_IDLE
    assert wlan.scan()
    wlan.connect("home", "secret")
    assert wlan.isconnected() and wlan.status() == network.STAT_GOT_IP
    assert wlan.ifconfig()[0] == "127.0.0.1"
    assert wlan.config("ssid") == wlan.config("essid") == "home"
    wlan.config(pm=wlan.PM_NONE)
    assert wlan.config("pm") == wlan.PM_NONE
    raises(ValueError, wlan.config, "nosuch")
    wlan.disconnect()
    assert not wlan.isconnected()
    wlan.active(False)


def test_macs_of_the_interfaces_differ():
    import machine

    sta = network.WLAN(network.STA_IF).config("mac")
    assert sta == machine.unique_id()
    assert network.WLAN(network.AP_IF).config("mac") != sta
    raises(ValueError, network.WLAN, 7)


def test_hostname_has_32_characters_at_most():
    assert network.hostname() == "mpy-esp32"
    network.hostname("h" * 32)
    assert network.hostname() == "h" * 32
    raises(ValueError, network.hostname, "h" * 33)
    network.country("DE")
    assert network.country() == "DE"


def test_the_library_is_on_the_volume():
    import twinslot

    assert twinslot.__version__
