"""A board at the end of a serial line: run device functions over its REPL, through mpremote.

    with Device.open("/dev/ttyUSB0") as device:
        facts = device.call("twinslot.status()")

mpremote's own transport does the talking (raw paste, with its flow control), so every port that
pyserial opens will do: ``socket://host:port`` and ``rfc2217://host:port`` too. Opening interrupts
the application; closing starts it again by a soft reset, which ends no trial.
"""

import contextlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from mpremote.transport import TransportError
from mpremote.transport_serial import SerialTransport
from serial import SerialException

BAUD = 115200
_TIMEOUT_S = 30.0  # for one answer: the slowest is a hash of a whole slot
_BOOT_S = 30  # until a board that was reset takes a raw REPL
# Nobody feeds the guard now. Should this end here, it resets the board, but not soon.
_FIRST = """\
import json
from twinslot import console, guard
guard.feed(120)
print(json.dumps(console.on_trial()))
"""
_NO_LIBRARY = "no module named 'twinslot"


class RemoteError(ValueError):
    """The board can't be reached, or answered with an error; the text says what to do."""


@dataclass
class Device:
    """See the module. ``said`` holds what the board printed beside the answers."""

    port: str
    transport: SerialTransport
    on_trial: bool = False
    said: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, port: str, *, fresh: bool = False) -> Self:
        """Interrupt what runs and take the REPL.

        Args:
            port: as pyserial names it.
            fresh: soft-reset it first: boot.py runs, main.py does not.

        Raises:
            RemoteError: no such port, or nobody answers.
        """
        try:
            transport = SerialTransport(port, BAUD, timeout=_TIMEOUT_S)
        except (TransportError, SerialException, OSError, ValueError) as exc:
            raise RemoteError(f"{port}: can't be opened: {exc}") from exc
        device = cls(port, transport)
        try:
            device._enter(False)
            device.on_trial = device.ask(_FIRST)
            if fresh:
                device._enter(True)
        except BaseException:
            device.close()  # who knows what this board is: it stays at its prompt
            raise
        return device

    def _enter(self, soft_reset: bool) -> None:
        said = io.StringIO()  # mpremote prints what came instead
        try:
            with contextlib.redirect_stdout(said):
                self.transport.enter_raw_repl(soft_reset=soft_reset, timeout_overall=_BOOT_S)
        except (TransportError, SerialException, OSError) as exc:
            raise RemoteError(
                f"{self.port}: {exc}: no MicroPython prompt there; is it the right port, and not"
                " in use by another program?"
            ) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the board go on as it was found, and close the port."""
        try:
            if self.transport.in_raw_repl:
                self.transport.serial.write(b"\x03")
                self.transport.exit_raw_repl()
                self.transport.serial.write(b"\x04")
                self.transport.serial.flush()
        except (SerialException, OSError):
            pass
        self.close()

    def close(self) -> None:
        with contextlib.suppress(SerialException, OSError):
            self.transport.close()

    def run(self, code: str, timeout: float = _TIMEOUT_S) -> list[str]:
        """Run code; return the lines it printed.

        Raises:
            RemoteError: it raised, or the line broke.
        """
        try:
            output, error = self.transport.exec_raw(code, timeout)
        except (TransportError, SerialException, OSError) as exc:
            raise RemoteError(f"{self.port}: {exc}") from exc
        if error:
            raise RemoteError(f"{self.port}: {_explain(error.decode(errors='replace'))}")
        return output.decode(errors="replace").splitlines()

    def call(self, expression: str) -> Any:
        """Evaluate ``twinslot.`` something on the board; its value must fit into JSON."""
        return self.ask(f"import json, twinslot\nprint(json.dumps({expression}))")

    def ask(self, code: str) -> Any:
        """Run code whose last line of output is JSON; return that."""
        lines = self.run(code)
        self.said += lines[:-1]
        try:
            return json.loads(lines[-1])
        except (IndexError, ValueError):
            raise RemoteError(f"{self.port}: unexpected answer {lines[-1:]}") from None

    def let_go(self, code: str) -> Iterator[str]:
        """Run code that resets the board; yield the lines of its console from then on, None where
        it is silent for a second.

        Raises:
            RemoteError: the code raised, or the line broke.
        """
        try:
            self.transport.exec_raw_no_follow(code)
            self.transport.in_raw_repl = False
        except (TransportError, SerialException, OSError) as exc:
            raise RemoteError(f"{self.port}: {exc}") from exc
        yield from self._listen()

    def _listen(self) -> Iterator[Any]:
        line = b""
        while True:
            try:
                new = self.transport.read_until(1, b"\n", timeout=1)
            except (TransportError, SerialException, OSError) as exc:
                self._reopen(exc)
                new = b""
            if b"\x04" in new:  # the code came back: what follows is its traceback
                raise RemoteError(f"{self.port}: {_explain(self._rest(new))}")
            line += new
            if line.endswith(b"\n"):
                yield line.decode(errors="replace").strip()
                line = b""
            elif not new:
                yield None

    def _rest(self, begun: bytes) -> str:
        rest = self.transport.read_until(1, b"\x04", timeout=5)
        return (begun + rest).decode(errors="replace").strip("\x04>")

    def _reopen(self, error: Exception) -> None:
        """The port of a chip with USB of its own goes away with the reset."""
        self.close()
        end = time.monotonic() + _BOOT_S
        while True:
            try:
                self.transport = SerialTransport(self.port, BAUD, timeout=_TIMEOUT_S)
                return
            except (TransportError, SerialException, OSError):
                if time.monotonic() > end:
                    raise RemoteError(f"{self.port}: {error}") from error
                time.sleep(0.5)


def _explain(traceback: str) -> str:
    """The last line of a traceback; for what everybody meets once, what to do."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip(" \x04>")]
    last = lines[-1] if lines else "the board reset"
    if _NO_LIBRARY in last:
        return f"{last}: twinslot is not on this board, or not all of it: see twinslot flash"
    return last
