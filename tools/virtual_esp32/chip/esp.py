"""The `esp` module of the virtual board: raw flash access past the partition table.

Source: MicroPython ports/esp32/modesp.c.
"""

import errno

import soc

LOG_NONE = 0
LOG_ERROR = 1
LOG_WARNING = 2
LOG_INFO = 3
LOG_DEBUG = 4
LOG_VERBOSE = 5


def osdebug(level, log_level=None):
    pass


def flash_size():
    return soc.flash.size


def flash_user_start():
    for part in soc.find(1):
        if part.label in ("vfs", "ffat"):
            return part.offset
    return 0x200000


def _check(offset, size):
    if offset < 0 or offset + size > soc.flash.size:
        raise OSError(errno.EIO)


def flash_read(offset, buf):
    _check(offset, len(buf))
    soc.flash.read(offset, buf)


def flash_write(offset, buf):
    _check(offset, len(buf))
    soc.check_write(offset, len(buf))
    soc.flash.program(offset, buf)


def flash_erase(sector):
    _check(sector * 4096, 4096)
    soc.check_write(sector * 4096, 4096)
    soc.flash.erase(sector * 4096, 4096)
