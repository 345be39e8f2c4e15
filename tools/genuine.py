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
import subprocess
import sys
import zipfile
from pathlib import Path

import detools

from .device_files import library_files
from .lab import PRODUCT, Lab, flash_board, temporary
from .virtual_esp32 import layout
from .virtual_esp32.board import Board

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "genuine"
CHIP, HARDWARE = "esp32c5", "ESP32_GENERIC_C5"
MEMBER = "shuttle/firmware/esp32c5/devboard.ino.bin"
IMAGES = {  # version: SHA-256 of the image
    "0.3.2": "48c5cce2d42447ce6bc103fba159de820f4d5bf92003cd7e2a7b9be153fa0c63",
    "1.0.0": "90ca716984cb43f4c482d13c193e0623ce69d8722c026816c860c5f33a07b70b",
}
_TIMEOUT_S = 120


class GenuineError(RuntimeError):
    """An image can't be had, or the update went wrong; the text says which and how."""


def fetch(version: str, folder: Path = CACHE) -> Path:
    """Return the image of a release, from ``folder`` or from PyPI.

    Raises:
        GenuineError: pip can't fetch it, or it is another file than it was.
    """
    image = folder / f"devboard-{version}.bin"
    if image.exists():
        data = image.read_bytes()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--retries", "1", "--only-binary", ":all:", "--dest", str(folder)]
        command += [f"lr-shuttle=={version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise GenuineError(f"pip can't fetch lr-shuttle {version}: {done.stderr.strip()}")
        wheel = next(folder.glob(f"lr_shuttle-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
        wheel.unlink()
    seen = hashlib.sha256(data).hexdigest()
    if seen != IMAGES[version]:
        raise GenuineError(f"{image}: saw SHA-256 {seen}, expected {IMAGES[version]}")
    if not image.exists():
        image.write_bytes(data)
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


def update(lab: Lab, images: dict[str, Path]) -> int:
    """Let a board with the old image update itself. Returns the bytes of payload it fetched.

    Raises:
        GenuineError: it doesn't come to run the new one.
    """
    (version, old), (_, new) = images.items()
    flash = lab.folder / "genuine.bin"
    settings = {
        "product": PRODUCT,
        "url": lab.url,
        "source": "static",
        "ntp": lab.ntp,
        "version": version,
        "poll": 1,
        "stable": 1,
    }
    volume = {f"/{name}": (ROOT / name).read_bytes() for name in ("boot.py", "main.py")}
    volume |= library_files("x64")  # where the virtual board runs
    flash_board(flash, old, settings, lab.trusted, CHIP, volume)
    lab.board = Board(flash)
    lab.power_on()
    ends = ("confirmed", "failed", "rolledback")
    try:
        event = lab.wait(lambda e: e.name in ends, timeout=_TIMEOUT_S)
    except TimeoutError as exc:
        raise GenuineError(str(exc)) from exc
    lab.power_off()
    for line in lab.console:
        print("  " + line)
    where = next(p for p in layout.load_layout("4MiB") if p.label == "ota_1").offset
    if event.name != "confirmed" or not flash.read_bytes()[where:].startswith(new.read_bytes()):
        raise GenuineError(f"the update ended with {event.name}")
    return next(int(e.data["bytes"]) for e in lab.events if e.name == "staged")


def main() -> int:
    try:
        images = {version: fetch(version) for version in IMAGES}
        old, new = (image.read_bytes() for image in images.values())
        with temporary() as lab:
            publish(lab, images)
            restore(lab, old, new)
            fetched = update(lab, images)
    except GenuineError as exc:
        print(f"genuine: {exc}", file=sys.stderr)
        return 1
    share = 100 * fetched / len(new)
    print(f"the board fetched {fetched:,} bytes for an image of {len(new):,}: {share:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
