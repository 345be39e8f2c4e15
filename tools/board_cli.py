"""`twinslot board ...`: make, run and look at virtual boards. Thin over `virtual_esp32`."""

import json
import math
import sys
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .virtual_esp32 import board as boards
from .virtual_esp32 import build, layout, show, vfs
from .virtual_esp32.bootloader import boot as run_bootloader
from .virtual_esp32.chip import otadata, table
from .virtual_esp32.chip.flash import Fault, Flash
from .virtual_esp32.chip.image import CHIPS
from .virtual_esp32.firmware import make_firmware
from .virtual_esp32.port import open_port

app = typer.Typer(
    help="Virtual ESP32 boards: make one, run it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_TIMEOUT_S = 60.0

talk = Console(stderr=True, highlight=False)

Chip = Enum("Chip", {name: name for name in CHIPS}, type=str)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
FlashFile = Annotated[Path, typer.Argument(help="The whole flash.", exists=True, dir_okay=False)]


class Torn(StrEnum):
    before = "before"
    half = "half"
    random = "random"
    after = "after"


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  $ twinslot board {line}" for line in lines)


@app.command(
    epilog=_examples(
        "new --files app/ --out flash.bin",
        "new --chip esp32s3 --flash 8MiB --slot ota_0=image.bin --files app/ --out flash.bin",
    )
)
def new(
    out: Annotated[Path, typer.Option(help="Flash file to write.", dir_okay=False)],
    chip: Annotated[Chip, typer.Option(help="Chip.")] = Chip.esp32,
    flash: Annotated[str, typer.Option(help="Flash size.", metavar="SIZE")] = "4MiB",
    partitions: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="FILE",
            help="Partition table: CSV, binary, or the name of a built-in layout. "
            "Default: the layout named like the flash size.",
        ),
    ] = None,
    slot: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=IMAGE",
            help="Image for a slot; may be repeated. Default: a stock image in the first slot.",
        ),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(help="Folder that goes onto the volume.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Make the flash of a new board."""
    size = boards.parse_size(flash)
    parts = layout.load_layout(partitions or f"{size >> 20}MiB", size)
    data = build.make_flash(chip.value, size, parts, _slot_images(slot or [], parts, chip.value))
    out.write_bytes(data)
    contents = vfs.folder_files(files) if files else {}
    if contents:
        vfs.write_files(out, contents)
    talk.print(
        f"{out}: {chip.value}, {size >> 20} MiB, {len(parts)} partitions, "
        f"{len(contents)} files on the volume"
    )


def _slot_images(given: list[str], parts: list[table.Partition], chip: str) -> dict[str, bytes]:
    images = {}
    for item in given:
        label, equals, path = item.partition("=")
        if not (label and equals and path):
            raise typer.BadParameter(f"{item!r}: expected LABEL=IMAGE, e.g. ota_0=micropython.bin")
        images[label] = Path(path).read_bytes()
    apps = [p.label for p in parts if p.type == table.TYPE_APP]
    if not images and apps:
        images[apps[0]] = make_firmware(None, chip=chip, version="", project="")
    return images


@app.command(
    epilog=_examples(
        "run flash.bin",
        "run flash.bin --max-boots 3 --timeout 20 --heap 128K --json",
        "run flash.bin --repl tcp:8765",
        "run flash.bin --cut-at 40 --torn random --seed 7",
    )
)
def run(
    flash: FlashFile,
    max_boots: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many boots.", show_default="no limit")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Seconds for the whole run.", show_default="60; with --repl no limit"
        ),
    ] = None,
    heap: Annotated[
        str | None,
        typer.Option(help="What user code may allocate.", metavar="SIZE", show_default="256K"),
    ] = None,
    cut_at: Annotated[
        int | None,
        typer.Option(min=1, help="Cut the power at this flash operation, counted from 1."),
    ] = None,
    torn: Annotated[
        Torn, typer.Option(help="What the cut leaves of that operation.")
    ] = Torn.before,
    seed: Annotated[int, typer.Option(help="For --torn random.")] = 0,
    strict: Annotated[
        bool,
        typer.Option(help="Programming a 0 bit back to 1 is an error; otherwise flash ANDs."),
    ] = True,
    clock: Annotated[
        str | None,
        typer.Option(help='"host" sets the clock at power-on; otherwise it reads 2000-01-01.'),
    ] = None,
    network: Annotated[bool, typer.Option(help="Whether Wi-Fi connects.")] = True,
    repl: Annotated[
        str | None,
        typer.Option(
            metavar="pty|tcp:PORT", help="Give it a serial port with a prompt; tcp:0 takes any."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Switch a board on; its console goes to stdout.

    Ends when boot.py and main.py are done and nothing else can happen, at the last boot, or when
    the time is up. Exit code 1: nothing to boot, the chip crashed, or its program failed.

    With --repl its first line names the serial port, for mpremote, twinslot push and all others,
    and it runs until Ctrl-C.
    """
    if clock not in (None, "host"):
        raise typer.BadParameter(f"clock {clock!r}: expected host")
    board = boards.Board(flash, heap=heap, strict=strict, clock=clock, network=network)
    port = open_port(repl) if repl else None
    if port and not as_json:
        _print_line(f"port {port.url}")
    result = board.run(
        max_boots,
        timeout or (math.inf if port else _TIMEOUT_S),
        port=port,
        fault=None if cut_at is None else make_fault(cut_at, torn.value, seed),
        on_console=None if as_json else _print_line,
        on_event=None if as_json else _tell,
    )
    last = result.boots[-1]
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _summary(result)
    if last.outcome in ("crash", "no-boot"):
        raise boards.BoardError(f"{flash.name}: {last.outcome}: {last.why}")
    if last.error is not None:
        raise typer.Exit(1)


# The number of bytes that a torn operation finishes is seed % (length + 1): this seed halves
# bitmap words, otadata entries, pages, sectors and blocks alike.
_HALVED = (4, 32, 256, 4096, 65536)


def _half_seed() -> int:
    product = math.prod(n + 1 for n in _HALVED)
    seed = 0
    for n in _HALVED:  # the Chinese remainder theorem; the n + 1 have no common factor
        others = product // (n + 1)
        seed += n // 2 * others * pow(others, -1, n + 1)
    return seed % product


def make_fault(op: int, torn: str, seed: int = 0) -> Fault:
    """A power cut at flash operation `op`: before, half, random or after."""
    if torn == "half":
        return Fault(op, "torn", "prefix", _half_seed())
    if torn == "random":
        return Fault(op, "torn", None, seed)
    return Fault(op, torn, None, seed)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == "boot":
        cause = boards.CAUSE_NAMES[event["reset_cause"]]
        talk.print(f"[dim]-- boots {event['partition']} (reset cause: {cause})[/]")
    elif event["event"] == "boot-end":
        talk.print(f"[dim]-- {event['outcome']}[/]")


def _summary(result: boards.RunResult) -> None:
    flash = result.flash
    start = result.boots[-1].heap.get("start", {})
    talk.print(
        f"[dim]{len(result.boots)} boots; flash: {flash['ops']} operations, "
        f"{flash['sector_erases']} sector and {flash['block_erases']} block erases, "
        f"{flash['bytes_programmed']:,} bytes programmed, about {flash['busy_us'] / 1e6:.1f} s; "
        f"heap: {start.get('free', 0):,} bytes free at start[/]"
    )


@app.command("show", epilog=_examples("show flash.bin", "show dump-of-a-real-board.bin --json"))
def show_flash(flash: FlashFile, as_json: Json = False) -> None:
    """Say what a flash holds: table, otadata, slots, who boots next and why."""
    description = show.describe(flash.read_bytes())
    if as_json:
        print(json.dumps(description))
    else:
        Console().print(show.render(description))


@app.command(epilog=_examples("boot flash.bin --json"))
def boot(flash: FlashFile, as_json: Json = False) -> None:
    """Run the bootloader alone, once, as after a power-on. It writes otadata as the real one does.

    Exit code 1: it found nothing to boot.
    """
    chip = show.identify_chip(flash.read_bytes())
    if chip is None:
        raise boards.BoardError(f"{flash.name}: no bootloader of a known chip; is it a flash?")
    with flash.open("r+b", buffering=0) as f:
        result = run_bootloader(Flash(f, flash.stat().st_size), chip)
    label = result.partition.label if result.partition else None
    entries = _entries(flash.read_bytes())
    if as_json:
        print(json.dumps({"boots": label, "otadata": entries, "log": result.log}))
    else:
        for line in result.log:
            print(line)
        talk.print(f"boots {label or 'nothing'}: {result.why}")
    if label is None:
        raise typer.Exit(1)


def _entries(data: bytes) -> list[dict[str, Any]]:
    """The otadata entries of a flash; empty without an otadata partition."""
    parts = table.parse(data[table.TABLE_OFFSET :], require_md5=True)
    where = table.find(parts, table.TYPE_DATA, table.DATA_OTA)
    if where is None:
        return []

    def read(offset: int, buf: bytearray) -> None:
        buf[:] = data[offset : offset + len(buf)]

    entries = otadata.read_entries(read, where.offset)
    return [
        {"seq": e.seq, "state": otadata.state_name(e.state), "crc_ok": otadata.crc_ok(e)}
        for e in entries
    ]


@app.command(epilog=_examples("firmware app/ --version 1.1.0 --out image.bin"))
def firmware(
    tree: Annotated[
        Path, typer.Argument(help="Folder that becomes the frozen modules.", file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Image to write.", dir_okay=False)],
    version: Annotated[str, typer.Option(help="Version in the app descriptor.")] = "",
    project: Annotated[str, typer.Option(help="Project name in the app descriptor.")] = "",
    chip: Annotated[Chip, typer.Option(help="Chip.")] = Chip.esp32,
    size: Annotated[
        str | None, typer.Option(help="Grow the image to this size.", metavar="SIZE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a virtual firmware image: a real ESP image that carries a Python tree."""
    data = make_firmware(
        tree,
        chip=chip.value,
        version=version,
        project=project,
        size=boards.parse_size(size) if size else None,
    )
    out.write_bytes(data)
    digest = data[-32:].hex()
    if as_json:
        print(json.dumps({"path": str(out), "size": len(data), "build": digest}))
    else:
        talk.print(f"{out}: {len(data):,} bytes, build {digest[:16]}")


if __name__ == "__main__":
    sys.exit(app())
