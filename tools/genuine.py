"""Bring a virtual board from one genuine ESP32 image to the next, by delta.

    python -m twinslot_tools.genuine        # or  make genuine

The images are two releases of LumenRadio's devboard firmware for the ESP32-C5, as the package
lr-shuttle on PyPI brings them (MIT licence); pip fetches them. MicroPython's own images are on
micropython.org alone. What is in an image does not matter here: the virtual board runs
MicroPython on it as on any image without a tree of its own, with the library on its volume.

What is shown: the table of `twinslot publish`, what gunzip and detools make of the payloads, and
what the board fetches.

Exit code 1: the update does not come to its end, or one of the tools gives other bytes.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import detools

from . import keys
from .device_files import library_files
from .lab import PRODUCT, Lab, temporary
from .virtual_esp32 import build, layout, vfs
from .virtual_esp32.board import Board

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "genuine"
CHIP, HARDWARE = "esp32c5", "ESP32_GENERIC_C5"
MEMBER = "shuttle/firmware/esp32c5/devboard.ino.bin"
IMAGES = {  # version: SHA-256 of the image
    "0.3.2": "48c5cce2d42447ce6bc103fba159de820f4d5bf92003cd7e2a7b9be153fa0c63",
    "1.0.0": "90ca716984cb43f4c482d13c193e0623ce69d8722c026816c860c5f33a07b70b",
}
_MAIN = b"""\
import asyncio
import twinslot

asyncio.run(twinslot.Agent.from_config("/ota.json").run())
"""
_TIMEOUT_S = 120


class GenuineError(RuntimeError):
    """An image can't be had, or the update went wrong; the text says which and how."""


def fetch(version: str, folder: Path = CACHE) -> Path:
    """Return the image of a release, from ``folder`` or from PyPI.

    Raises:
        GenuineError: pip can't fetch it, or it is another file than it was.
    """
    image = folder / f"devboard-{version}.bin"
    if not image.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), f"lr-shuttle=={version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise GenuineError(f"pip can't fetch lr-shuttle {version}: {done.stderr.strip()}")
        wheel = next(folder.glob(f"lr_shuttle-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            image.write_bytes(archive.read(MEMBER))
        wheel.unlink()
    seen = hashlib.sha256(image.read_bytes()).hexdigest()
    if seen != IMAGES[version]:
        raise GenuineError(f"{image}: saw SHA-256 {seen}, expected {IMAGES[version]}")
    return image


def publish(lab: Lab, images: dict[str, Path]) -> None:
    """Publish the images one after the other, each with deltas from those before."""
    earlier: list[str] = []
    for version, image in images.items():
        command = ["twinslot", "publish", str(image), "--version", version, "--product", PRODUCT]
        command += ["--hardware", HARDWARE, "--key", str(lab.folder / "release.key")]
        command += ["--to", str(lab.site)]
        for base in earlier:
            command += ["--from", base]
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise GenuineError(done.stderr.strip())
        lines = done.stdout.splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("payload"))
        print(f"twinslot publish devboard-{version}.bin", *(f"--from {b}" for b in earlier))
        print("\n".join("  " + line.rstrip() for line in lines[at:]))
        earlier.append(version)


def restore(lab: Lab, old: bytes, new: bytes) -> None:
    """Undo the payloads with gunzip and detools, which know nothing of Twinslot."""
    for payload in sorted(lab.site.glob(f"{PRODUCT}/blobs/*/*.gz")):
        plain = gzip.decompress(payload.read_bytes())
        if plain[:1] == old[:1]:
            what = "gunzip"
        else:
            made = io.BytesIO()
            detools.apply_patch(io.BytesIO(old), io.BytesIO(plain), made)
            what, plain = "gunzip and detools", made.getvalue()
        if plain not in (old, new):
            raise GenuineError(f"{what} of {payload.name}: other bytes than the image")
        size = payload.stat().st_size
        print(f"{what}: {size:,} bytes give {'the old' if plain == old else 'the new'} image")


def update(lab: Lab, old: bytes, new: bytes, versions: list[str]) -> int:
    """Let a board with the old image update itself. Returns the bytes of payload it fetched."""
    partitions = layout.load_layout("4MiB")
    flash = lab.folder / "genuine.bin"
    flash.write_bytes(build.make_flash(CHIP, 4 << 20, partitions, {"ota_0": old}))
    settings = {
        "product": PRODUCT,
        "url": lab.url,
        "source": "static",
        "ca": "/ota/ca.pem",
        "keys": "/ota/keys.json",
        "ntp": lab.ntp,
        "version": versions[0],
        "poll": 1,
        "stable": 1,
    }
    vfs.write_files(
        flash,
        {
            **library_files("x64"),
            "/boot.py": (ROOT / "boot.py").read_bytes(),
            "/main.py": _MAIN,
            "/ota.json": json.dumps(settings).encode(),
            "/ota/ca.pem": (lab.folder / "server" / "server.crt").read_bytes(),
            "/ota/keys.json": keys.public_path(lab.folder / "release.key").read_bytes(),
        },
    )
    lab.board = Board(flash)
    lab.power_on()
    ends = ("confirmed", "failed", "rolledback")
    event = lab.wait(lambda e: e.name in ends, timeout=_TIMEOUT_S)
    lab.power_off()
    for line in lab.console:
        print("  " + line)
    where = next(p for p in partitions if p.label == "ota_1").offset
    if event.name != "confirmed" or flash.read_bytes()[where : where + len(new)] != new:
        raise GenuineError(f"the update ended with {event.name}")
    return next(int(e.data["bytes"]) for e in lab.events if e.name == "staged")


def main() -> int:
    try:
        images = {version: fetch(version) for version in IMAGES}
        old, new = (image.read_bytes() for image in images.values())
        with temporary() as lab:
            publish(lab, images)
            restore(lab, old, new)
            fetched = update(lab, old, new, list(images))
    except GenuineError as exc:
        print(f"genuine: {exc}", file=sys.stderr)
        return 1
    share = 100 * fetched / len(new)
    print(f"the board fetched {fetched:,} bytes for an image of {len(new):,}: {share:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
