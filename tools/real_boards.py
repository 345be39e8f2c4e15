"""Virtual boards for a fleet: MicroPython, flash and bootloader, against a server that runs.

Each has an empty slot, keys and an ``ota.json`` as ``twinslot flash`` writes them. What became of
one is told by its flash and its console, not by the server.
"""

import threading
import time
from pathlib import Path
from typing import Any

from .lab import TimeServer, flash_board, read_event
from .virtual_esp32 import show
from .virtual_esp32.board import Board

_ENDS = ("confirmed", "rolledback", "failed")
_STEPS = ("staging", "staged", "trial")


class RealBoard:
    """One virtual board; ``device_id``, ``version``, ``build`` and ``state`` are what is so.

    Args:
        flash: its flash, written.
        number: makes its MAC, and so its name.
        hardware: build name of its MicroPython.
    """

    def __init__(self, flash: Path, number: int, hardware: str):
        self._flash = flash
        mac = b"\x24\x0a\xc4" + number.to_bytes(3, "big")
        self._board = Board(flash, mac=mac, hardware=hardware)
        self.device_id = mac.hex()
        self.state = "idle"
        self.busy = False
        self._thread: threading.Thread | None = None

    def start(self, limit_s: float) -> None:
        def run() -> None:
            self._board.run(timeout=limit_s, on_console=self._hear, stop_when_idle=False)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread:
            self._board.stop()
            self._thread.join()

    def _hear(self, line: str) -> None:
        name, _ = read_event(line)
        if name in _ENDS:
            self.state, self.busy = name, False
        elif name in _STEPS:
            self.busy = True

    @property
    def _slot(self) -> dict[str, Any]:
        found = show.describe(self._flash.read_bytes())
        return next(slot for slot in found["slots"] if slot["label"] == found["boots"])

    @property
    def version(self) -> str:
        return self._slot["version"]

    @property
    def build(self) -> str:
        return self._slot["build"]


class RealBoards:
    """Several of them, with a clock to set theirs by. Use as a context manager.

    Args:
        folder: their flash lies here.
        image: the firmware they run at first.
        settings: members of their ``ota.json``.
        files: of their ``/ota``.
        limit_s: they are switched off after so long.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        image: Path,
        settings: dict[str, Any],
        files: dict[str, Path],
        hardware: str,
        limit_s: float,
    ):
        self._time = TimeServer()
        self._limit_s = limit_s
        settings = {**settings, "ntp": f"127.0.0.1:{self._time.port}"}
        self.boards = []
        for number in range(count):
            flash = folder / f"board-{number}.bin"
            flash_board(flash, image, settings, files)
            self.boards.append(RealBoard(flash, number, hardware))

    def __enter__(self) -> "RealBoards":
        self._time.start()
        for board in self.boards:
            board.start(self._limit_s)
        return self

    def __exit__(self, *_: object) -> None:
        for board in self.boards:
            board.stop()
        self._time.close()

    def rest(self, limit_s: float) -> None:
        """Wait until none is in the middle of an update."""
        deadline = time.monotonic() + limit_s
        while any(board.busy for board in self.boards) and time.monotonic() < deadline:
            time.sleep(0.2)
