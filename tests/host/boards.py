"""Boards for tests: stock image in both slots, files on the volume."""

from functools import cache
from pathlib import Path

from twinslot_tools.virtual_esp32 import build, layout, vfs
from twinslot_tools.virtual_esp32.board import Board
from twinslot_tools.virtual_esp32.firmware import make_firmware

SIZE = 4 << 20


@cache
def stock(chip="esp32", seed=0):
    """A firmware that carries no tree: the files on the volume run."""
    return make_firmware(None, chip=chip, version="", project="", seed=seed)


def firmware(folder, files, version="1.0.0", **kw):
    """A firmware with these frozen modules: {file name: source}."""
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return make_firmware(folder, chip="esp32", version=version, project="test", **kw)


def flash_file(path, files=None, slots=None, *, chip="esp32", size=SIZE, table=None, **kw):
    """Make a flash file with {file name: source} on its volume."""
    parts = table or layout.load_layout(f"{size >> 20}MiB", size)
    if slots is None:
        slots = {p.label: stock(chip) for p in parts if p.type == 0}
    path = Path(path)
    path.write_bytes(build.make_flash(chip, size, parts, slots, **kw))
    if files:
        vfs.write_files(path, {f"/{name}": source.encode() for name, source in files.items()})
    return path


def new_board(folder, main=None, *, files=None, slots=None, chip="esp32", **kw):
    """A board of 4 MiB with this main.py; further arguments go to `Board`."""
    files = dict(files or {})
    if main is not None:
        files["main.py"] = main
    path = flash_file(folder / "flash.bin", files, slots, chip=chip)
    return Board(path, **kw)
