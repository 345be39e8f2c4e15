"""What the fakes share: flash, partition table, RTC domain and the wire to the power supply.

Runs on the chip only. The parent process (`board.py`) reads the wire: one JSON object per line,
{"event": name, ...}. Whatever ends a boot is written there, and then the chip stands still until
the parent kills it: user code can neither catch a reset nor run on after it.

RTC domain: a small file that outlives the process, kept by the parent until power is lost:
    0  8  host time (us since 1970) at which the board's clock reads 2000-01-01, i64
    8  2  length of the user memory, u16
    10 2048 user memory
    2058 1  1: Ctrl-C was pressed while code ran, see `heed`
    2059 1  1: no network is in reach
"""

import _thread
import json
import struct
import time

import flash as nor
import image
import table

config = {}
flash = None
partitions = []  # the table's, then the synthesised vfs
running = None  # the table.Partition that this firmware was loaded from
threads = []  # one item for each thread that user code started
timers = []  # armed machine.Timer objects; sleeps are sliced while there are any
repl_mode = "friendly"  # of the prompt, kept over a soft reset; in "raw" main.py is not run
attended = False  # somebody is at the prompt and may press Ctrl-C: sleeps are sliced too

RTC_MEMORY = 2048
_CONTROLS = 10 + RTC_MEMORY
_PROTECTED_END = 0x8C00  # bootloader and partition table

_sleep_ms = time.sleep_ms
_wire = None
_rtc = None
_main_thread = None
_flag = bytearray(1)
_buf = bytearray(4096)  # for reading images: C code has no need of the user's heap


class Panic(Exception):
    """Never seen: `panic` does not return."""


def start(settings):
    """Open what the board's configuration names."""
    global running, attended, _wire, _rtc, _main_thread
    open_flash(settings)
    _wire = open(config["wire"], "wb")
    _rtc = open(config["rtc"], "r+b")
    attended = config["repl"] is not None
    _main_thread = _thread.get_ident()
    for part in partitions:
        if part.offset == config["running"] and part.type == table.TYPE_APP:
            running = part


def open_flash(settings):
    """Open the flash file and read its partition table."""
    global flash
    config.update(settings)
    size = config["flash_size"]
    stats = config.get("stats")
    fault = config.get("fault")
    trace = config.get("trace")
    unsteady = config.get("unsteady")
    flash = nor.Flash(
        open(config["flash"], "r+b"),
        size,
        stats=nor.Stats(open(stats, "r+b"), size) if stats else None,
        strict=config.get("strict", True),
        fault=nor.Fault(*fault) if fault else None,
        trace=open(trace, "ab") if trace else None,
        unsteady=open(unsteady, "r+b") if unsteady else None,
    )
    flash.on_cut = power_cut
    raw = bytearray(table.TABLE_SIZE)
    flash.read(table.TABLE_OFFSET, raw)
    partitions.extend(table.parse(raw, require_md5=True))
    _add_vfs(size)


def _add_vfs(flash_size):
    """MicroPython registers the rest of flash as `vfs` if the table has no volume of its own.

    Source: MicroPython ports/esp32/main.c.
    """
    end = 0
    for part in partitions:
        if part.type == table.TYPE_DATA and part.label in ("vfs", "ffat"):
            return
        end = max(end, part.offset + part.size)
    if partitions and end < flash_size:
        part = table.Partition("vfs", table.TYPE_DATA, 0x81, end, flash_size - end, 0)
        partitions.append(part)


def find(kind, subtype=0xFF, label=None):
    """Return the partitions of a type (0xFF: any) as esp_partition_find does."""
    if kind == 0xFF and subtype != 0xFF:
        return []
    return [
        p
        for p in partitions
        if kind in (0xFF, p.type)
        and subtype in (0xFF, p.subtype)
        and (label is None or label == p.label)
    ]


def slot_reader(part):
    """Return read(offset, buf) relative to a partition."""

    def read(offset, buf):
        flash.read(part.offset + offset, buf)

    return read


def verify(part):
    """Verify the image in a slot as ESP-IDF does. Raises image.ImageError."""
    image.verify(slot_reader(part), part.size, config["chip"], part.offset, buf=_buf)


def load_tree():
    """Return the ROMFS that the running image carries, or None for a genuine image.

    Only its frame is checked; the bootloader has verified the contents.
    """
    read = slot_reader(running)
    info = image.verify(read, running.size, config["chip"], running.offset, data=False, buf=_buf)
    found = image.find_tree(read, info)
    if found is None:
        return None
    tree = bytearray(found[1])
    read(found[0], tree)
    return tree


# ---- the wire


def event(name, **fields):
    """Tell the parent something."""
    flash.stats.save()
    fields["event"] = name
    _wire.write((json.dumps(fields) + "\n").encode())


def feed():
    """Tell the parent that the watchdog was fed."""
    _wire.write(b"\n")


def halt(*_):
    """Stand still until the parent kills this process."""
    while True:
        try:
            _sleep_ms(1000)
        except KeyboardInterrupt:
            pass


def end(name, **fields):
    """End this boot: tell the parent, then stand still. Other threads lose the flash at once."""
    try:
        flash.read = flash.program = flash.erase = halt
        timers.clear()
        event(name, **fields)
    finally:
        halt()


# ---- what the parent may want at any time


def _control(index):
    _rtc.seek(_CONTROLS + index)
    _rtc.readinto(_flag)
    return _flag[0] != 0


def heed():
    """Raise KeyboardInterrupt if Ctrl-C was pressed. Called by whatever waits.

    A signal would do without, but this interpreter raises from its handler, in the middle of
    whatever C code runs; the parent resorts to one when code waits for nothing.
    """
    if attended and _thread.get_ident() == _main_thread and take_interrupt():
        raise KeyboardInterrupt


def take_interrupt():
    """True if Ctrl-C was pressed since the last call."""
    if not _control(0):
        return False
    _rtc.seek(_CONTROLS)
    _rtc.write(b"\0")
    return True


def in_reach():
    """True if there is a network to join."""
    return not _control(1)


def power_cut():
    end("power-cut")


def panic(why):
    """What ESP-IDF's abort() does: a line on the console, and a reset with cause 2."""
    print("\nabort() was called: %s\n\nRebooting..." % why)
    end("panic", why=why)


def check_write(offset, size):
    """Abort the chip on a write to the running slot, the bootloader or the partition table.

    Source: ESP-IDF spi_flash, CONFIG_SPI_FLASH_DANGEROUS_WRITE_ABORTS.
    """
    if offset < _PROTECTED_END:
        panic("flash write to 0x%x, below 0x%x" % (offset, _PROTECTED_END))
    if running and offset < running.offset + running.size and offset + size > running.offset:
        panic("flash write to 0x%x, in the running slot %s" % (offset, running.label))


# ---- RTC domain


def _host_us():
    """The host's time, us since 1970; where the board's runs faster, since `origin`."""
    now = time.time_ns() // 1000
    return now + (now - config["origin"]) * (config["speed"] - 1)


def clock_us():
    """Microseconds since 2000-01-01 by the board's clock."""
    _rtc.seek(0)
    return _host_us() - struct.unpack("<q", _rtc.read(8))[0]


def set_clock_us(value):
    _rtc.seek(0)
    _rtc.write(struct.pack("<q", _host_us() - value))


def rtc_memory():
    _rtc.seek(8)
    size = struct.unpack("<H", _rtc.read(2))[0]
    return _rtc.read(size)


def set_rtc_memory(data):
    _rtc.seek(8)
    _rtc.write(struct.pack("<H", len(data)) + bytes(data))
