"""A chip in download mode, through esptool: connect, read, erase, write, verify, reset.

    with Chip.connect("/dev/ttyUSB0") as chip:
        chip.name, chip.flash_size
        chip.write(0x1000, bootloader)

esptool's stub does the work on the chip; every write is read back by its MD5. Ports are those of
pyserial: ``socket://host:port`` and ``rfc2217://host:port`` too (over plain TCP nobody can press
the boot button: put the board into download mode by hand).

Source: esptool's cmds.py (its Python API) and docs/esptool/scripting.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Self

from serial import SerialException

FAST_BAUD = 460800
_ROM_BAUD = 115200

Progress = Callable[[int, int], object]
"""Called with bytes done and bytes in all."""


class DownloadError(ValueError):
    """The chip can't be reached, or refuses; the text says what to do."""


def _quiet(_done: int, _total: int) -> None:
    """No progress is shown."""


class Chip:
    """See the module. Use as a context manager: at the end the chip is reset and runs.

    Attributes:
        name: as esptool spells it, e.g. esp32s3.
        mac: e.g. 24:0a:c4:00:00:01.
        flash_size: detected, bytes; None where the flash doesn't tell.
    """

    def __init__(self, esp: Any, log: Any):
        self._esp = esp
        self._log = log
        self.name: str = esp.CHIP_NAME.lower().replace("-", "")
        self.mac = ":".join(f"{byte:02x}" for byte in esp.read_mac("BASE_MAC"))
        self.flash_size = self._detect_size()

    @classmethod
    def connect(cls, port: str, baud: int = FAST_BAUD) -> Self:
        """Put the chip at ``port`` into download mode and start esptool's stub on it.

        Raises:
            DownloadError: nobody answers, or the chip's security features forbid it.
        """
        from esptool import cmds
        from esptool.util import FatalError

        log = _install_log()
        esp = None
        try:
            esp = cmds.detect_chip(port, _ROM_BAUD)
            _refuse_secured(esp)
            esp = cmds.run_stub(esp)
            if not esp.IS_STUB:
                raise DownloadError(f"{port}: esptool's stub does not run on this chip")
            if not port.startswith("socket:"):  # the far end would stay at its own speed
                esp.change_baud(baud)
            cmds.attach_flash(esp)
            return cls(esp, log)
        except (FatalError, SerialException, OSError) as exc:
            _close(esp)
            raise DownloadError(f"{port}: {_first_line(exc)}{_hint(port)}") from exc
        except BaseException:
            _close(esp)
            raise

    def _detect_size(self) -> int | None:
        from esptool import cmds
        from esptool.util import flash_size_bytes

        text = cmds.detect_flash_size(self._esp)
        if text is None:
            return None
        size = flash_size_bytes(text)
        self._esp.flash_set_parameters(size)
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Reset the chip into what its flash holds, and close the port."""
        from esptool import cmds

        try:
            self._call(cmds.reset_chip, self._esp, "hard-reset")
        except DownloadError:
            if kind is None:  # else there is a better reason already
                raise
        finally:
            _close(self._esp)

    def read(self, offset: int, size: int) -> bytes:
        """Read flash.

        Raises:
            DownloadError: the connection failed.
        """
        return self._call(self._esp.read_flash, offset, size)

    def erase(self, offset: int, size: int, progress: Progress = _quiet) -> None:
        """Erase whole sectors; in pieces, so that progress is seen."""
        piece = 1 << 20
        for done in range(0, size, piece):
            self._call(self._esp.erase_region, offset + done, min(piece, size - done))
            progress(min(done + piece, size), size)

    def write(self, offset: int, data: bytes, progress: Progress = _quiet) -> None:
        """Erase, write and verify by MD5. What shares its last sector is erased.

        Raises:
            DownloadError: the connection failed, or flash does not hold what was written.
        """
        from esptool import cmds

        self._log.progress = progress
        try:
            # All "keep": the bootloader's header is right already (stock.with_flash_size).
            self._call(cmds.write_flash, self._esp, [(offset, data)])
        finally:
            self._log.progress = _quiet

    def _call(self, function: Callable, *args: Any) -> Any:
        from esptool.util import FatalError

        try:
            return function(*args)
        except (FatalError, SerialException, OSError) as exc:
            raise DownloadError(f"{self._esp.serial_port}: {_first_line(exc)}") from exc


def _refuse_secured(esp: Any) -> None:
    """Raise DownloadError for a chip that runs nothing written in the clear."""
    if esp.secure_download_mode:
        raise DownloadError("this chip is in secure download mode: it can't be flashed")
    if esp.get_flash_encryption_enabled():
        raise DownloadError("this chip encrypts its flash: stock firmware does not run on it")
    if esp.get_secure_boot_enabled():
        raise DownloadError("secure boot is on: this chip runs only what its owner signed")


def _close(esp: Any) -> None:
    if esp is not None:
        esp._port.close()


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(exc).__name__


def _hint(port: str) -> str:
    if port.startswith("socket:"):
        return ": over TCP the board must be put into download mode by hand (BOOT, then EN)"
    return ": is the board connected? Hold BOOT, press EN, try again"


@cache
def _install_log() -> Any:
    """Make esptool silent, but for its progress. It has one logger per process."""
    from esptool.logger import TemplateLogger, log

    class Log(TemplateLogger):
        progress: Progress = staticmethod(_quiet)

        def print(self, *args: Any, **kwargs: Any) -> None:
            pass

        def note(self, message: str) -> None:
            pass

        def warning(self, message: str) -> None:
            pass

        def error(self, message: str) -> None:
            pass

        def stage(self, finish: bool = False) -> None:
            pass

        def progress_bar(
            self,
            cur_iter: int,
            total_iters: int,
            prefix: str = "",
            suffix: str = "",
            bar_length: int = 30,
        ) -> None:
            self.progress(cur_iter, total_iters)

        def set_verbosity(self, verbosity: str) -> None:
            pass

    installed = Log()
    log.set_logger(installed)
    return installed
