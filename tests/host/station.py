"""A virtual board that does one update after another as told, in one boot; and its server.

    with Station(folder) as station:
        station.fresh(url=station.door("http"))
        station.update()["code"]         # "installed", "idle", or the code of an OtaError

The board is the real agent over real sockets (`case_main.py` is its main.py). Its time passes
`SPEED` times as fast as the host's, so that a long timeout costs little. What
flash holds is read from the flash file, from outside, and judged with the bootloader's model.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import faultserver as fs
from servers import HARDWARE, PRODUCT, public_keys, serving, signing_key

from twinslot_tools import publish
from twinslot_tools.virtual_esp32 import bootloader, build, layout, vfs
from twinslot_tools.virtual_esp32.board import Board
from twinslot_tools.virtual_esp32.firmware import make_firmware

LIB = Path(__file__).parents[2] / "lib" / "twinslot"
MAIN = Path(__file__).with_name("case_main.py")
FLASH = 2 << 20
TABLE = """
nvs,     data, nvs,   0x9000,   0x4000,
otadata, data, ota,   0xd000,   0x2000,
ota_0,   app,  ota_0, 0x10000,  0x80000,
ota_1,   app,  ota_1, 0x90000,  0x80000,
vfs,     data, fat,   0x110000, 0x40000,
"""
PARTITIONS = {p.label: p for p in layout.parse_csv(TABLE, FLASH)}
OLD, NEW = "1.2.3", "2.0.1"
SPEED = 25
TIMEOUT_S = 250  # of the board, for one network wait: this machine may be busy
SHORT_S = 8  # where waiting in vain is what happens
# For boards with memory to spare: the guard's own threshold would take half of all the time.
LEISURE = "import gc; gc.threshold(150000)"


@cache
def new_image(size: int) -> bytes:
    return make_firmware(None, chip="esp32", version=NEW, project=PRODUCT, size=size, seed=size)


class Proxy:
    """The process of `proxy.py`."""

    def __init__(self, target: int, folder: Path):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("proxy.py")), str(target), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ports: dict[str, int] = self.hear()

    def hear(self) -> dict[str, Any]:
        return json.loads(self._process.stdout.readline())

    def tell(self, **command: Any) -> None:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def plan(self, plan: dict[str, Any]) -> None:
        self.tell(plan=plan)
        assert self.hear() == {"begun": 1}

    def report(self) -> dict[str, Any]:
        self.tell(report=1)
        return self.hear()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Station:
    """See the module.

    Args:
        size: bytes of the new image.
        tree: package the board runs instead of lib/twinslot.
        board_options: of `Board`.
    """

    def __init__(self, folder: Path, *, size: int = 139_000, tree: Path = LIB, **board_options):
        self.folder = folder
        self.tree = tree
        self.image = new_image(size)
        self.size = len(self.image)
        self._options = {"speed": SPEED, "clock": "host", **board_options}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Station:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._serve()
            self._make_board()
            self._power_on()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- making

    def _serve(self) -> None:
        site = self.folder / "site"
        image = self.folder / "new.bin"
        image.write_bytes(self.image)
        self.site = site
        spec = publish.Spec(product=PRODUCT, version=NEW, hardware=(HARDWARE,))
        self.published = publish.publish(image, spec, signing_key(), site)
        self._served = contextlib.ExitStack()
        self._stack.callback(self._stop_serving)
        self.server = self._served.enter_context(serving(site, "--name", "localhost"))
        self.token = self.server.token("device")
        certificates = self.folder / "certificates"
        certificates.mkdir(exist_ok=True)
        shutil.copy(self.server.data / "server.crt", certificates)
        self.ca = fs.make_identity("Test CA", is_ca=True)
        make = fs.make_identity
        names = {
            "proxy": make(issuer=self.ca),
            "renewed": make(issuer=self.ca),
            "stranger": make(issuer=make("Stranger CA", is_ca=True)),
            "self_signed": make(),
            "wrong_name": make("elsewhere.example", names=("elsewhere.example",), issuer=self.ca),
            "expired": make(issuer=self.ca, begins_days=-30, ends_days=-1),
        }
        for name, identity in names.items():
            (certificates / f"{name}.crt").write_bytes(identity.pem)
            (certificates / f"{name}.key").write_bytes(identity.key_pem)
        self.port = int(self.server.url.rsplit(":", 1)[1])
        self.proxy = Proxy(self.port, certificates)
        self._stack.callback(self.proxy.stop)

    def blob(self) -> Path:
        """Where the payload lies in the site."""
        payload = self.published.manifest["images"][0]["payloads"][0]
        return self.site / PRODUCT / payload["url"]

    def restart_server(self, how: str) -> None:
        """End the server when the proxy holds a connection, start it again, let go."""
        assert "held" in self.proxy.hear()
        number = signal.SIGKILL if how == "killed" else signal.SIGTERM
        self.server.stop(number)
        self._served.close()
        self._served = contextlib.ExitStack()
        site = serving(self.site, "--name", "localhost", "--port", str(self.port))
        self.server = self._served.enter_context(site)
        self.proxy.tell(go=1)

    def _stop_serving(self) -> None:
        self._served.close()

    def _make_board(self) -> None:
        tree = self.folder / "tree"
        shutil.copytree(self.tree, tree / "twinslot", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(MAIN, tree / "main.py")
        old = make_firmware(tree, chip="esp32", version=OLD, project=PRODUCT, seed=7)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stack.callback(self._listener.close)
        self.flash = self.folder / "flash.bin"
        self.flash.write_bytes(
            build.make_flash("esp32", FLASH, PARTITIONS.values(), {"ota_0": old})
        )
        vfs.write_files(
            self.flash,
            {
                "/station.json": json.dumps({"port": self._listener.getsockname()[1]}).encode(),
                "/keys.json": public_keys(self.folder).read_bytes(),
                "/proxy.pem": self.ca.pem,
                "/server.pem": (self.server.data / "server.crt").read_bytes(),
            },
        )
        self.pristine = self.flash.read_bytes()

    def _power_on(self) -> None:
        self.board = Board(self.flash, **self._options)
        self.result = None

        def run() -> None:
            self.result = self.board.run(max_boots=1, timeout=3600, stop_when_idle=False)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._listener.settimeout(60)
        try:
            self._wire, _ = self._listener.accept()
        except TimeoutError:
            self.board.stop()
            thread.join()
            raise AssertionError(self.result.console) from None
        self._wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire.settimeout(300)
        self._lines = self._wire.makefile("rb")

        def off() -> None:
            self._lines.close()
            self._wire.close()
            self.board.stop()
            thread.join()

        self._stack.callback(off)

    # -- the board

    def ask(self, do: str, **arguments: Any) -> Any:
        self._wire.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        line = self._lines.readline()
        assert line, "the board died: " + (self.result.console[-2000:] if self.result else "")
        return json.loads(line)

    def settings(self, door: str = "http", **more: Any) -> dict[str, Any]:
        """Settings of an agent that reaches the server through that door of the proxy."""
        scheme = "http" if door in ("http", "elsewhere") else "https"
        port = self.port if door == "direct" else self.proxy.ports[door]
        settings = {
            "product": PRODUCT,
            "url": f"{scheme}://localhost:{port}/",
            "keys": "/keys.json",
            "ntp": "",
            "timeout": TIMEOUT_S,
            "poll": 60,
        }
        if scheme == "http":
            settings["allow_http"] = True
        else:
            settings["token"] = self.token
            settings["ca"] = "/server.pem" if door in ("through", "direct") else "/proxy.pem"
        return {**settings, **more}

    def fresh(self, settings: dict[str, Any], **more: Any) -> None:
        """Put the board back to before the update. The chip waits meanwhile."""
        with self.flash.open("r+b", buffering=0) as f:
            for label in ("otadata", "ota_1"):
                part = PARTITIONS[label]
                f.seek(part.offset)
                f.write(self.pristine[part.offset : part.offset + part.size])
        self.ask("fresh", settings=settings, **more)

    def reboot(self, settings: dict[str, Any], **more: Any) -> None:
        """A new agent that knows what flash holds, and no more."""
        self.ask("begin", settings=settings, **more)

    def update(self, **how: bool) -> dict[str, Any]:
        return self.ask("update", **how)

    # -- what flash holds

    def check(self, complete: bool = False) -> None:
        """Fail unless the board would boot the old image, or the new one, every byte of it."""
        flash = self.flash.read_bytes()
        old, new = PARTITIONS["ota_0"], PARTITIONS["ota_1"]
        kept = slice(old.offset, old.offset + old.size)
        assert flash[kept] == self.pristine[kept], "the running slot was written"
        boots = bootloader.predict(flash, "esp32").partition
        assert boots is not None, "nothing boots"
        whole = flash[new.offset : new.offset + self.size] == self.image
        if boots.label == "ota_1":
            assert whole, "boots an image that is not the release"
        elif flash[new.offset : new.offset + 32] != b"\xff" * 32:
            assert whole, "unverified bytes have a header"
        assert not complete or boots.label == "ota_1", "the update is not complete"

    def console(self) -> str:
        """All the board has printed; switches it off."""
        self._stack.close()
        return self.result.console
