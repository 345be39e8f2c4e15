"""Start the real server as its own process, over real TLS, and build what it serves."""

import contextlib
import functools
import json
import os
import queue
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from joserfc.jwk import RSAKey

from twinslot_tools import keys, publish
from twinslot_tools.virtual_esp32.firmware import make_firmware

START_TIMEOUT_S = 60  # a machine that is busy
HARDWARE = "ESP32_GENERIC"
PRODUCT = "sensor-node"


@functools.cache
def firmware(
    version: str = "1.0.0", chip: str = "esp32", size: int = 40_000, seed: int = 0
) -> bytes:
    """A virtual firmware image without a Python tree."""
    return make_firmware(None, chip=chip, version=version, project=PRODUCT, size=size, seed=seed)


def signing_key(number: int = 0) -> RSAKey:
    """A private key; another number is another key."""
    return _key(number)


@functools.cache
def _key(_number: int) -> RSAKey:
    return keys._named(RSAKey.generate_key(2048))


def publish_version(site: Path, version: str, **options) -> publish.Published:
    """Publish a firmware of that version; ``options`` are members of ``publish.Spec``."""
    image = site.parent / f"{version}.bin"
    image.write_bytes(firmware(version))
    members = {"product": PRODUCT, "hardware": (HARDWARE,), **options}
    spec = publish.Spec(version=version, **members)
    return publish.publish(image, spec, signing_key(), site)


def public_keys(folder: Path, number: int = 0) -> Path:
    path = folder / f"trusted-{number}.pub.json"
    path.write_text(keys.public_set(signing_key(number)))
    return path


@dataclass
class Running:
    """A server process that listens."""

    process: subprocess.Popen
    url: str
    data: Path
    errors: Path

    def client(self, token: str | None = None, **options) -> httpx.Client:
        context = ssl.create_default_context(cafile=self.data / "server.crt")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, verify=context, headers=headers, **options)

    def token(self, role: str) -> str:
        return (self.data / f"{role}-token").read_text().strip()

    def log(self) -> list[dict]:
        return [json.loads(line) for line in self.errors.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(START_TIMEOUT_S)


@contextlib.contextmanager
def serving(
    site: Path, *arguments: str, data: Path | None = None, program: list[str] | None = None, **env
) -> Iterator[Running]:
    """Run ``python -m twinslot_server`` (or ``program``) until the block ends."""
    data = data or site.parent / "data"
    errors = site.parent / "server.log"
    program = program or [sys.executable, "-m", "twinslot_server"]
    with errors.open("ab") as log:
        process = subprocess.Popen(
            [*program, str(site), "--port", "0", "--data", str(data), *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **env},
        )
    try:
        line = _first_line(process)
        assert line.startswith("listening https://"), (line, errors.read_text())
        yield Running(process, line.split()[1], data, errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _first_line(process: subprocess.Popen) -> str:
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    try:
        return lines.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        raise AssertionError("the server did not say where it listens") from None
