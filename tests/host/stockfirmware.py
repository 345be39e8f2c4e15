"""Firmware files as micropython.org offers them, made of what a virtual board can boot."""

import hashlib
from functools import cache

from twinslot_tools.virtual_esp32.chip import table
from twinslot_tools.virtual_esp32.chip.image import CHIPS
from twinslot_tools.virtual_esp32.firmware import make_bootloader, make_firmware
from twinslot_tools.virtual_esp32.layout import parse_csv

# What MicroPython's own build puts into every file: partitions-4MiBplus.csv.
STOCK_TABLE = """
nvs,      data, nvs,     0x9000,  0x6000,
phy_init, data, phy,     0xf000,  0x1000,
factory,  app,  factory, 0x10000, 0x1F0000,
"""
_TEXT_AT = 0x20 + 256 + 16  # in the first segment, behind the app descriptor


@cache
def application(chip="esp32", micropython="1.28.0", size=None, seed=0):
    """A treeless image, so only files of the volume run, with MicroPython's banner in it."""
    image = bytearray(make_firmware(None, chip=chip, version="", project="", size=size, seed=seed))
    if micropython:
        text = f"MicroPython v{micropython} on 2026-04-01".encode()
        for i, byte in enumerate(text, _TEXT_AT):
            image[-33] ^= image[i] ^ byte  # the checksum is the XOR of all data
            image[i] = byte
        image[-32:] = hashlib.sha256(image[:-32]).digest()
    return bytes(image)


def combined(app, chip="esp32", csv=STOCK_TABLE):
    """Bootloader, table and application in one file that begins at the bootloader's offset."""
    start = CHIPS[chip].bootloader
    data = make_bootloader(chip, 4 << 20).ljust(table.TABLE_OFFSET - start, b"\xff")
    data += table.build(parse_csv(csv))
    return data.ljust(0x10000 - start, b"\xff") + app
