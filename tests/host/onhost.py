"""The device's slot, health and journal under CPython, over a flash in memory.

The same `esp32.Partition` as on the virtual board (chip/esp32.py) and the same bootloader, without
a process per boot: for tests that need thousands of boots. Not for memory, time or the event loop.

    board = OnHost(tmp_firmware)
    slot = board.slot()              # a FirmwareSlot of what runs now
    board.boot()                     # reset: the bootloader decides; returns the label
"""

import asyncio
import sys
import types
from pathlib import Path

import bench
from trust import Nvs

from twinslot.journal import Journal
from twinslot.slot import PIECE
from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.chip import image

if not hasattr(asyncio, "sleep_ms"):  # MicroPython's; nothing here waits for real

    async def sleep_ms(_ms):
        return None

    asyncio.sleep_ms = sleep_ms

_CHIP = Path(image.__file__).parent


def _load_esp32():
    """Import chip/esp32.py and what it imports as top-level modules, as on the chip."""
    soc = types.ModuleType("soc")
    micropython = types.ModuleType("micropython")
    micropython.heap_lock = micropython.heap_unlock = lambda: 0
    names = ("esp32", "image", "micropython", "nvs", "otadata", "soc", "table")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)
    sys.modules["soc"], sys.modules["micropython"] = soc, micropython
    sys.path.insert(0, str(_CHIP))
    try:
        import esp32

        return esp32, soc, sys.modules["image"], sys.modules["table"]
    finally:
        sys.path.remove(str(_CHIP))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


_ESP32, _SOC, _IMAGE, _TABLE = _load_esp32()


def pieces(block):
    """Return a block as ``FirmwareSlot.write`` takes it."""
    return [block[at : at + PIECE] for at in range(0, len(block), PIECE)]


class OnHost:
    """A board of 4 MiB with an image in ota_0.

    Args:
        first: bytes of that image.
        confirmed: otadata says it was; False: both entries are blank.
    """

    def __init__(self, first: bytes, confirmed: bool = True):
        self.board = bench.Board(slots=())
        self.board.put(self.board.part("ota_0").offset, first)
        if confirmed:
            self.board.set_boot("ota_0")
            self.board.confirm()
        self.nvs = Nvs()
        self.running = "ota_0"
        self.boot()

    @property
    def flash(self):
        return self.board.flash()

    def boot(self, cause: int = bootloader.HARD_RESET) -> str | None:
        """Reset; return the label of what runs."""
        label = self.board.boot(cause)
        self.cause = cause
        if label:
            self.running = label
        return label

    def partition(self):
        """The class `esp32.Partition` as software on the running slot sees it."""
        flash = self.flash
        partitions = [_TABLE.Partition(*part) for part in self.board.partitions]
        _SOC.flash = flash
        _SOC.partitions = partitions
        _SOC.running = next(part for part in partitions if part.label == self.running)
        _SOC.config = {"idf6": False, "chip": self.board.chip}
        _SOC.find = self._find
        _SOC.check_write = self._check_write

        def verify(part):
            def read(offset, buf):
                flash.read(part.offset + offset, buf)

            _IMAGE.verify(read, part.size, self.board.chip, part.offset)

        _SOC.verify = verify
        return _ESP32.Partition

    def slot(self):
        from twinslot.slot import FirmwareSlot

        return FirmwareSlot(self.partition())

    def journal(self) -> Journal:
        return Journal(self.nvs)

    def slot_bytes(self, label: str) -> bytes:
        part = self.board.part(label)
        return self.board.data[part.offset : part.offset + part.size]

    @staticmethod
    def _find(kind, subtype=0xFF, label=None):
        return [
            p
            for p in _SOC.partitions
            if kind in (0xFF, p.type)
            and subtype in (0xFF, p.subtype)
            and (label is None or label == p.label)
        ]

    @staticmethod
    def _check_write(offset, size):
        running = _SOC.running
        assert offset >= 0x8C00, "a write to the bootloader or the partition table"
        clear = offset >= running.offset + running.size or offset + size <= running.offset
        assert clear, "a write to the running slot"


def run(coroutine):
    """Run what the device awaits; nothing in it waits for anything here."""
    return asyncio.run(coroutine)
