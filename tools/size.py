"""Say what the device package costs: bytes of .mpy per module, and heap while it runs.

    python tools/size.py        # or  make size; exit code 1: a module does not compile

Bytecode is the same for every architecture; only a module with native code differs, and each
architecture is compiled, so that none is forgotten.

The heap is that of the unix port on a virtual board, once with the library on the volume, where
`twinslot flash` puts it, and once in the firmware (as a ROMFS: what is frozen takes less still).
Objects of that 64-bit port are about twice as large as an ESP32's; bytecode is not. TLS is left
out: an ESP32 has it in another heap.
"""

import functools
import http.server
import json
import sys
import tempfile
import threading
from pathlib import Path

from rich.console import Console
from rich.table import Table

from twinslot_tools import keys, publish
from twinslot_tools.device_files import (
    ARCHITECTURES,
    EXTRAS,
    OPTIMISE,
    FilesError,
    compile_mpy,
    library_files,
    modules,
)
from twinslot_tools.virtual_esp32 import build, firmware, layout, vfs
from twinslot_tools.virtual_esp32.board import Board

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "twinslot"

_MARK = "@heap"
_MAIN = f"""
import asyncio, gc, time

def tell(what):
    gc.collect()
    print("{_MARK}", what, gc.mem_alloc() - before)

async def wait():
    await asyncio.sleep_ms(200)  # until it has given back what a poll takes
    tell("polling")

gc.collect()
since = time.ticks_ms()
before = gc.mem_alloc()
import twinslot
tell("import")
agent = twinslot.Agent.from_config("/ota.json")
print("{_MARK}", "ms", time.ticks_diff(time.ticks_ms(), since))
tell("agent")
agent.on_event(lambda name, data: name == "idle" and asyncio.create_task(wait()))
asyncio.run(agent.run())
"""
_STAGES = {
    "import": "import twinslot",
    "agent": "an Agent made",
    "polling": "it has asked, and waits",
}
_TIMEOUT_S = 30


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A plain web server that doesn't talk."""

    def log_message(self, *_: object) -> None:
        pass


def sizes(library: Path) -> list[tuple[str, str, list[int]]]:
    """Return (part, module, bytes for each architecture) of every module.

    Raises:
        FilesError: one does not compile.
    """
    return [
        (
            part,
            source.relative_to(library.parent).as_posix(),
            [len(compile_mpy(source, arch, library)) for arch in ARCHITECTURES],
        )
        for part, sources in modules(library).items()
        for source in sources
    ]


def show_sizes(rows: list[tuple[str, str, list[int]]]) -> Table:
    table = Table(title=f"lib/twinslot, bytes of .mpy ({OPTIMISE})", title_justify="left")
    table.add_column("module")
    for name, chips in ARCHITECTURES.items():
        shown = ", ".join(chip.removeprefix("esp32").upper() or "ESP32" for chip in chips[:3])
        table.add_column(f"{name}\n{shown}", justify="right")
    for part in ("core", *EXTRAS):
        mine = [row for row in rows if row[0] == part]
        for _, module, columns in mine:
            table.add_row(module, *(f"{size:,}" for size in columns))
        _add_total(table, "core" if part == "core" else f"extra {part}", mine)
        table.add_section()
    _add_total(table, "all", rows)
    return table


def _add_total(table: Table, what: str, rows: list[tuple[str, str, list[int]]]) -> None:
    totals = [sum(columns) for columns in zip(*(row[2] for row in rows), strict=True)]
    table.add_row(what, *(f"{total:,}" for total in totals), style="bold")


def heap(frozen: bool) -> dict[str, int]:
    """Return the bytes in use at each stage, on a board that polls and finds nothing new, and in
    ``ms`` how long it took to make an Agent.

    Raises:
        FilesError: the board did not get there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = folder / "tree" if frozen else None
        if tree:
            _copy_library(tree)
        image = folder / "image.bin"
        image.write_bytes(
            firmware.make_firmware(tree, chip="esp32", version="1.0.0", project="size")
        )
        key = folder / "size.key"
        keys.generate(key, 2048)
        spec = publish.Spec(version="1.0.0", product="size", hardware=("ESP32_GENERIC",))
        publish.publish(image, spec, keys.load_private(key), folder / "site")
        with _Site(folder / "site") as url:
            return _run(folder, image, key, url, frozen)


def _copy_library(tree: Path) -> None:
    for sources in modules(LIBRARY).values():
        for source in sources:
            target = tree / source.relative_to(LIBRARY.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def _run(folder: Path, image: Path, key: Path, url: str, frozen: bool) -> dict[str, int]:
    flash = folder / "flash.bin"
    partitions = layout.load_layout("4MiB")
    flash.write_bytes(
        build.make_flash("esp32", 4 << 20, partitions, {"ota_0": image.read_bytes()})
    )
    settings = {"product": "size", "url": url, "keys": "/keys.json", "ntp": "", "poll": 5}
    settings["allow_http"] = True  # TLS is not in this heap
    files = {
        "/main.py": _MAIN.encode(),
        "/ota.json": json.dumps(settings).encode(),
        "/keys.json": keys.public_path(key).read_bytes(),
    }
    vfs.write_files(flash, files if frozen else files | library_files("x64", LIBRARY))
    found: dict[str, int] = {}

    def hear(event: dict) -> bool:
        words = event.get("line", "").split()
        if words[:1] == [_MARK]:
            found.setdefault(words[1], int(words[2]))
        return "polling" in found

    result = Board(flash, heap="512K").run(max_boots=1, timeout=_TIMEOUT_S, until=hear)
    if "polling" not in found:
        raise FilesError(f"the board did not get to polling: {result.console[-1000:]}")
    return found


class _Site:
    """The published folder on a port of loopback."""

    def __init__(self, folder: Path):
        handler = functools.partial(Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def show_heap(volume: dict[str, int], frozen: dict[str, int]) -> Table:
    table = Table(title="heap in use, bytes (unix port, 64 bits)", title_justify="left")
    table.add_column("after")
    table.add_column("library on the volume", justify="right")
    table.add_column("in the firmware", justify="right")
    for stage, text in _STAGES.items():
        table.add_row(text, f"{volume[stage]:,}", f"{frozen[stage]:,}")
    return table


def main() -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        console.print(show_sizes(sizes(LIBRARY)))
        console.print(show_heap(heap(frozen=False), heap(frozen=True)))
    except FilesError as exc:
        print(f"twinslot: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
