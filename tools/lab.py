"""A workbench: keys, a site, the real server, a time server and a virtual board in one folder.

    with Lab(folder) as lab:
        lab.power_on()
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.wait(lambda e: e.name == "confirmed")

The demo, the benchmarks and the whole-system tests all stand on it. It only observes: what it
tells comes from the board's console, its flash and the server's API.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from joserfc.jwk import RSAKey

import twinslot

from . import keys, publish, sample
from .virtual_esp32 import build, firmware, layout, show, vfs
from .virtual_esp32.board import Board, RunResult

PRODUCT = "sensor-node"
HARDWARE = "ESP32_GENERIC"
_START_TIMEOUT_S = 20
_ROOT = Path(__file__).parent.parent
_NTP_EPOCH = 2208988800  # seconds from 1900 to 1970, RFC 5905
_EVENT = re.compile(r"twinslot: (\w+) ?(.*)")
_FIELD = re.compile(r"(\w+)=(.*?)(?= \w+=|$)")

# What the application in main.py does first in a release that is no good.
CRASH = '    raise OSError("the sensor driver is missing")\n'
HANG = "    while True:\n        pass\n"


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of the agent on the board's console: ``twinslot: staged version=1.1.0``."""

    name: str
    data: dict[str, str]
    boot: int  # number of the boot, from 1


def read_event(line: str) -> tuple[str, dict[str, str]]:
    """Read a line of a console; the name is "" if it is not of the agent."""
    match = _EVENT.match(line)
    return (match[1], dict(_FIELD.findall(match[2]))) if match else ("", {})


class TimeServer(threading.Thread):
    """SNTP on a free UDP port of loopback, RFC 4330: the board boots without a clock."""

    def __init__(self, offset: float = 0):
        super().__init__(daemon=True)
        self.offset = offset
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                request, client = self._socket.recvfrom(256)
                if client is None:  # closed meanwhile
                    return
                now = time.time() + self.offset + _NTP_EPOCH
                stamp = struct.pack("!II", int(now), int(now % 1 * (1 << 32)))
                head = struct.pack("!BBBb II 4s", 0x24, 1, 4, -20, 0, 0, b"LOCL")
                self._socket.sendto(head + stamp + request[40:48] + stamp + stamp, client)

    def close(self) -> None:
        self._socket.close()


def virtual_firmware(
    folder: Path, version: str, fault: str = "", main: bool = True, **made_with: Any
) -> Path:
    """Make a virtual firmware image in ``folder``: this package, ``boot.py`` and ``main.py`` as
    its frozen modules (without ``main``, only the package).

    Args:
        fault: put in as the application's first lines.
        made_with: arguments of ``make_firmware``.
    """
    tree = folder / f"tree-{version}"
    shutil.rmtree(tree, ignore_errors=True)
    package = Path(twinslot.__path__[0])
    shutil.copytree(package, tree / "twinslot", ignore=shutil.ignore_patterns("__pycache__"))
    if main:
        shutil.copy(_ROOT / "boot.py", tree)
        text = (_ROOT / "main.py").read_text()
        anchor = "async def application():\n    global beats\n"
        if anchor not in text:
            raise RuntimeError("main.py has another application than the lab knows")
        (tree / "main.py").write_text(text.replace(anchor, anchor + fault))
    image = folder / f"firmware-{version}.bin"
    made_with = {"chip": "esp32", "project": PRODUCT, **made_with}
    image.write_bytes(firmware.make_firmware(tree, version=version, **made_with))
    return image


def flash_board(
    flash: Path,
    image: Path,
    settings: dict[str, Any],
    files: dict[str, Path],
    chip: str = "esp32",
    volume: dict[str, bytes] | None = None,
) -> None:
    """Flash a board, as over USB: ``image`` in its first slot; ota.json, which names the files of
    its ``/ota`` that are there with ``files``, on its volume, and what else ``volume`` has."""
    partitions = layout.load_layout("4MiB")
    slots = {"ota_0": image.read_bytes()}
    flash.write_bytes(build.make_flash(chip, 4 << 20, partitions, slots))
    contents = {f"/ota/{name}": path.read_bytes() for name, path in files.items()}
    contents |= volume or {}
    settings = {"source": "server", "ca": "/ota/ca.pem", "keys": "/ota/keys.json", **settings}
    vfs.write_files(flash, {"/ota.json": json.dumps(settings).encode(), **contents})


class Lab:
    """See the module. Use as a context manager.

    Args:
        folder: everything lives here; made if absent.
        settings: members of ``ota.json`` that differ from the lab's.
        keys_known: the server verifies releases with the public key; False for a server in an
            attacker's hands.
        image_size: bytes of each firmware.
        compressible: its content is like a genuine one's, and like that of other versions (see
            ``sample``); else it is noise, and published as it is.
        application: first lines of the application of the firmware flashed by cable.
        board_options: arguments of ``Board``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: dict[str, Any] | None = None,
        keys_known: bool = True,
        image_size: int = 400_000,
        compressible: bool = False,
        application: str = "",
        **board_options: Any,
    ):
        self.folder = folder
        self.site = folder / "site"
        self.site.mkdir(parents=True, exist_ok=True)
        self.flash = folder / "flash.bin"
        self.events: list[Event] = []
        self.console: list[str] = []
        self.boots: list[dict[str, Any]] = []
        self.on_event: Callable[[Event], object] = lambda event: None
        self.result: RunResult | None = None
        self._settings = settings or {}
        self._keys_known = keys_known
        self._image_size = image_size
        self._compressible = compressible
        self._application = application
        self._board_options = board_options
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._server: subprocess.Popen | None = None
        self._time = TimeServer()
        self.board: Board
        self.key: RSAKey
        self.url: str

    def __enter__(self) -> Lab:
        try:
            self._time.start()
            self.key = self.new_key("release")
            self.start_server()
            self.make_board()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()
        self.stop_server()
        self._time.close()

    @property
    def ntp(self) -> str:
        """Where the lab's time server listens: host and port."""
        return f"127.0.0.1:{self._time.port}"

    @property
    def trusted(self) -> dict[str, Path]:
        """What a board of this lab trusts: files of its ``/ota``."""
        return {
            "ca.pem": self.folder / "server" / "server.crt",
            "keys.json": keys.public_path(self.folder / "release.key"),
        }

    # -- making things ------------------------------------------------------------------------

    def new_key(self, name: str) -> RSAKey:
        """A signing key as ``twinslot keygen`` makes it."""
        path = self.folder / f"{name}.key"
        if not path.exists():
            keys.generate(path)
        return keys.load_private(path)

    def firmware(
        self, version: str, fault: str = "", size: int | None = None, main: bool = True
    ) -> Path:
        """An image of ``virtual_firmware``, of this lab's size and content."""
        size = size or self._image_size
        seed = len(version) + sum(version.encode())
        filler = sample.code(size, changes=seed % 40) if self._compressible else None
        return virtual_firmware(
            self.folder, version, fault, main, size=size, seed=seed, filler=filler
        )

    def publish(
        self, image: Path, version: str, key: RSAKey | None = None, **spec: Any
    ) -> publish.Published:
        """Publish an image as a release, as ``twinslot publish`` does."""
        spec.setdefault("hardware", (HARDWARE,))
        spec.setdefault("product", PRODUCT)
        return publish.publish(
            image, publish.Spec(version=version, **spec), key or self.key, self.site
        )

    def blob(self, published: publish.Published) -> Path:
        """Where the payload of a release lies in the site."""
        payload = published.manifest["images"][0]["payloads"][0]
        return self.site / PRODUCT / payload["url"]

    def make_board(self, version: str = "1.0.0", frozen_main: bool = True) -> None:
        """Flash a board, as over USB: ``version`` in its first slot, keys and ota.json on its
        volume."""
        settings = {
            "product": PRODUCT,
            "url": self.url,
            "token": self._token("device"),
            "ntp": self.ntp,
            "poll": 1,
            "timeout": 5,
            "stable": 1,
            "deadline": 8,
            "hang": 3,
            **self._settings,
        }
        image = self.firmware(version, self._application, main=frozen_main)
        flash_board(self.flash, image, settings, self.trusted)
        self.board = Board(self.flash, **self._board_options)

    # -- the server ---------------------------------------------------------------------------

    def start_server(self, port: int = 0) -> None:
        """Start ``twinslot_server`` and wait until it listens."""
        command = [sys.executable, "-m", "twinslot_server", str(self.site), "--poll", "1"]
        command += ["--data", str(self.folder / "server"), "--port", str(port)]
        if self._keys_known:
            command += ["--keys", str(keys.public_path(self.folder / "release.key"))]
        log = (self.folder / "server.log").open("ab")
        with log:
            self._server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        out = self._server.stdout
        threading.Thread(target=lambda: [lines.put(line) for line in out], daemon=True).start()
        try:
            line = lines.get(timeout=_START_TIMEOUT_S)
        except queue.Empty:
            line = ""
        if not line.startswith("listening "):
            self.stop_server()
            text = (self.folder / "server.log").read_text()
            raise RuntimeError(f"the server did not start: {text[-800:]}")
        self.url = line.split()[1]

    def stop_server(self) -> None:
        if self._server:
            self._server.terminate()
            self._server.wait()
            self._server.stdout.close()
            self._server = None

    def _token(self, role: str) -> str:
        return (self.folder / "server" / f"{role}-token").read_text().strip()

    def device(self) -> dict[str, Any]:
        """What the server's database knows of the board; {} before its first contact."""
        try:
            return self.api("GET", f"devices/{self.board.mac.hex()}")
        except urllib.error.HTTPError as exc:
            with exc:
                if exc.code == 404:
                    return {}
                raise

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the server's API as its administrator.

        Raises:
            urllib.error.HTTPError: it refused.
        """
        context = ssl.create_default_context(cafile=str(self.folder / "server" / "server.crt"))
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}",
            None if body is None else json.dumps(body).encode(),
            headers={"Authorization": "Bearer " + self._token("operator")},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return json.load(answer)

    # -- the board ----------------------------------------------------------------------------

    def power_on(self, timeout: float = 120, **options: Any) -> None:
        """Run the board in a thread until ``power_off``."""

        def run() -> None:
            self.result = self.board.run(
                timeout=timeout,
                on_console=self._hear,
                on_event=self._happen,
                stop_when_idle=False,
                **options,
            )
            with self._changed:
                self._changed.notify_all()

        self.result = None
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def power_off(self) -> RunResult | None:
        """Stop the board; return what ran."""
        if self._thread:
            self.board.stop()
            self._thread.join()
            self._thread = None
        return self.result

    def _happen(self, event: dict[str, Any]) -> None:
        if event["event"] in ("boot", "boot-end"):
            with self._changed:
                self.boots.append(event)
                self._changed.notify_all()

    def _hear(self, line: str) -> None:
        name, data = read_event(line)
        boot = sum(b["event"] == "boot" for b in self.boots)
        event = Event(name, data, boot) if name else None
        if event:
            self.on_event(event)
        with self._changed:
            self.console.append(line)
            if event:
                self.events.append(event)
            self._changed.notify_all()

    def wait(
        self, wanted: Callable[[Event], object], timeout: float = 30, start: int = 0
    ) -> Event:
        """Wait for an event of the agent, from event number ``start`` on.

        Raises:
            TimeoutError: it did not come; the text holds the end of the console.
        """

        def found() -> Event | None:
            return next((e for e in self.events[start:] if wanted(e)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self.result, timeout)
            event = found()
        if event is None:
            raise TimeoutError("the board did not get there:\n" + "\n".join(self.console[-25:]))
        return event

    def wait_for_server(
        self, wanted: Callable[[dict[str, Any]], object], timeout: float = 15
    ) -> dict[str, Any]:
        """Ask the server until its row of the board is as ``wanted``."""
        deadline = time.monotonic() + timeout
        while True:
            device = self.device()
            if device and wanted(device):
                return device
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server still says {device}")
            time.sleep(0.1)

    def describe(self) -> dict[str, Any]:
        """What the flash holds, as ``twinslot board show`` tells it."""
        return show.describe(self.flash.read_bytes())


@contextlib.contextmanager
def temporary(**options: Any) -> Iterator[Lab]:
    """A Lab in a folder that is removed afterwards."""
    import tempfile

    with (
        tempfile.TemporaryDirectory(prefix="twinslot-") as folder,
        Lab(Path(folder), **options) as lab,
    ):
        yield lab
