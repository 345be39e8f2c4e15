"""Put files on a board's volume and read them back, with the board switched off.

    write_files("flash.bin", {"/main.py": b"print('hello')"})
    read_files("flash.bin")["/main.py"]

The file system is MicroPython's own (littlefs2, or FAT on an `ffat` partition), run over the
virtual flash; a blank volume is formatted. Works on a flash dump of a real board too.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import show
from .process import chip_modules, command, find_micropython

_HEAP = 8 << 20  # bytes


class VolumeError(ValueError):
    """The volume can't be read or written; the text says why."""


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return {"/path": contents} of a host folder, without caches and hidden files."""
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            files["/" + "/".join(parts)] = path.read_bytes()
    return files


def write_files(
    flash_path: Path | str,
    files: Mapping[str, bytes],
    *,
    remove: Iterable[str] = (),
    micropython: str | None = None,
) -> None:
    """Write files, making their folders; first remove those named, trees included.

    Args:
        flash_path: the whole flash.
        files: {absolute path: contents}.
        remove: absolute paths; one that isn't there is no error.
    Raises:
        VolumeError: no volume, not enough space, a corrupt file system, a relative path.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sources = {}
        for i, (path, data) in enumerate(files.items()):
            source = Path(scratch) / str(i)
            source.write_bytes(data)
            sources[_absolute(path)] = str(source)
        removed = [_absolute(path) for path in remove]
        _run(flash_path, {"write": sources, "remove": removed, "read": None}, micropython)


def read_files(flash_path: Path | str, *, micropython: str | None = None) -> dict[str, bytes]:
    """Return {absolute path: contents} of all files.

    Raises:
        VolumeError: no volume, or a corrupt file system.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = _run(flash_path, {"write": {}, "remove": [], "read": scratch}, micropython)
        return {path: Path(copy).read_bytes() for path, copy in sorted(found["files"].items())}


def _absolute(path: str) -> str:
    if not path.startswith("/") or path.endswith("/") or "//" in path:
        raise VolumeError(f"path {path!r}: expected an absolute one, like /lib/app.py")
    return path


def _run(flash_path: Path | str, job: dict, micropython: str | None) -> dict:
    path = Path(flash_path).resolve()
    data = path.read_bytes()
    chip = show.identify_chip(data)
    job = {**job, "flash": str(path), "flash_size": len(data), "chip": chip and chip.name}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(job, config)
        config.flush()
        interpreter = micropython or find_micropython()
        code = (
            f"import sys;sys.path.insert(0,{str(chip_modules(interpreter))!r});"
            f"import volume;volume.main({config.name!r})"
        )
        words = [*command(interpreter), "-X", f"heapsize={_HEAP}"]
        done = subprocess.run(
            [*words, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = (done.stderr + done.stdout).strip().splitlines() or ["no output"]
        raise VolumeError(f"{path.name}: {why[-1]}") from None
    if answer["error"] is not None:
        raise VolumeError(f"volume of {path.name}: {_explain(answer['error'])}")
    return answer


def _explain(error: str) -> str:
    if "ENODEV" in error or "19" in error:
        return f"{error} (no file system that MicroPython knows)"
    if "28" in error or "ENOSPC" in error:
        return "no space left"
    return error
