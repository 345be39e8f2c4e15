"""`twinslot flash`: the command over `flash.py`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import stock
from .download_mode import FAST_BAUD, Chip
from .files import write_whole
from .flash import FlashError, Plan, Step, contents, flash_of, install, make_plan, steps
from .virtual_esp32 import layout
from .virtual_esp32.chip.table import Partition

talk = Console(stderr=True, highlight=False)

_DEFAULT_FLASH = 4 << 20  # bytes, of a file


def flash(
    firmware: Annotated[
        Path, typer.Option(help="MicroPython's .bin for the board, as downloaded.")
    ],
    config: Annotated[
        Path, typer.Option(help="The board's ota.json; files it names lie beside it.")
    ],
    port: Annotated[
        str | None, typer.Option(help="Serial port, or socket://HOST:PORT, rfc2217://HOST:PORT.")
    ] = None,
    to_file: Annotated[
        Path | None, typer.Option(metavar="FLASH", help="Write the whole flash into a file.")
    ] = None,
    table: Annotated[
        str, typer.Option(help="Partition table: auto, a built-in one's name, CSV or binary.")
    ] = "auto",
    files: Annotated[
        Path | None,
        typer.Option(
            help="Folder with your boot.py, main.py, lib/ ...", exists=True, file_okay=False
        ),
    ] = None,
    flash_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="E.g. 8MiB (default: the board's; for a file 4MiB)."),
    ] = None,
    baud: Annotated[int, typer.Option(help="Speed of the serial port.")] = FAST_BAUD,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Erase what the board holds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Put stock MicroPython in two-slot form, Twinslot and your files onto a board.

    Everything is checked before anything is written. All files and settings on the board are
    lost; a board that holds some is erased only after a question, or with --yes.
    """
    if (port is None) == (to_file is None) and not (dry_run and port is None):
        raise typer.BadParameter("give one of --port and --to-file")
    size = layout.parse_size(flash_size) if flash_size else None
    options = {"table": table, "extra": files}
    if port is None:
        built_in = table in layout.builtin_layouts()
        size = size or (flash_of(table) if built_in else _DEFAULT_FLASH)
        plan = make_plan(firmware, config, flash_size=size, **options)
        if to_file and not dry_run:
            write_whole(to_file, plan.flash)
        _report(plan, {"to_file": str(to_file) if to_file else None}, as_json, dry_run)
        return
    stock.load(firmware)  # a wrong file is refused before the board is reset
    with talk.status(f"connecting to {port}"):
        board = Chip.connect(port, baud)
    with board:
        size = size or board.flash_size
        if size is None:
            raise FlashError(
                f"{port}: the flash doesn't tell its size: add e.g. --flash-size 4MiB"
            )
        plan = make_plan(firmware, config, flash_size=size, chip=board.name, **options)
        lost = contents(board.read, size)
        if not dry_run:
            _ask(port, lost, yes)
            with _bar(plan) as progress:
                install(plan, board, progress)
    found = {"port": port, "mac": board.mac, "erases": lost}
    _report(plan, found, as_json, dry_run)


def _ask(port: str, lost: list[str], yes: bool) -> None:
    """Go on only if nothing is lost, or somebody agrees.

    Raises:
        FlashError: nobody did.
    """
    if not lost or yes:
        return
    what = f"the board at {port} holds {'; '.join(lost)}"
    if not sys.stdin.isatty():
        raise FlashError(f"{what}: all of it would be lost: say --yes")
    if not typer.confirm(f"{what}. Erase all of it?", err=True):
        raise FlashError("nothing was changed")


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[Step, int, int], None]]:
    """Show a bar on stderr, if somebody is there to see it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    begins, total = {}, 0
    for step in steps(plan):
        begins[step.offset, step.what] = total
        total += step.size
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, disable=not talk.is_terminal) as progress:
        bar = progress.add_task("", total=total)

        def show(step: Step, done: int, of: int) -> None:
            position = begins[step.offset, step.what] + step.size * done / max(of, 1)
            progress.update(bar, description=step.what, completed=position)

        yield show


def _report(plan: Plan, found: dict[str, Any], as_json: bool, dry_run: bool) -> None:
    if as_json:
        print(json.dumps({**describe(plan), **found, "dry_run": dry_run}, indent=2))
        return
    Console(highlight=False).print(render(plan))
    if dry_run:
        _say("nothing was written (--dry-run)")
    elif found.get("to_file"):
        _say(f"{found['to_file']}: {plan.flash_size:,} bytes; a board gets it with")
        _say(f"  esptool write-flash 0x0 {found['to_file']}")
    else:
        _say(f"{found['port']}: done, the board {found['mac']} runs")


def _say(line: str) -> None:
    """Print a line that may hold a path: not wrapped, and no markup."""
    talk.print(line, soft_wrap=True, markup=False)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain dicts and lists."""
    return {
        "chip": plan.stock.chip,
        "flash_size": plan.flash_size,
        "firmware": {
            "file": str(plan.stock.path),
            "micropython": plan.stock.micropython,
            "size": len(plan.stock.application),
            "build": plan.stock.build,
            "slot": plan.slot.label,
        },
        "table": plan.table,
        "partitions": [
            {
                "label": part.label,
                "type": layout.type_name(part.type),
                "subtype": layout.subtype_name(part.type, part.subtype),
                "offset": part.offset,
                "size": part.size,
                "gets": _what_it_gets(plan, part),
            }
            for part in plan.partitions
        ],
        "files": {path: len(data) for path, data in plan.files.items()},
        "notes": plan.notes,
    }


def _what_it_gets(plan: Plan, part: Partition) -> str:
    if part == plan.slot:
        free = 100 * (part.size - len(plan.stock.application)) // part.size
        return f"MicroPython {plan.stock.micropython or '?'}, {free} % free"
    if part == plan.volume:
        return f"{len(plan.files)} files, {sum(map(len, plan.files.values())):,} bytes"
    return "empty"


def render(plan: Plan) -> RenderableType:
    """Return the plan for a terminal."""
    rows = Table("partition", "gets", box=None, pad_edge=False)
    rows.add_column("offset", justify="right")
    rows.add_column("size", justify="right")
    for part in describe(plan)["partitions"]:
        size = f"{part['size'] >> 10:,} KiB"
        rows.add_row(part["label"], part["gets"], f"0x{part['offset']:x}", size)
    names = Table("file", box=None, pad_edge=False)
    names.add_column("bytes", justify="right")
    ours = [path for path in plan.files if path.startswith("/lib/twinslot/")]
    names.add_row(f"/lib/twinslot/ ({len(ours)} files)", f"{_total(plan, ours):,}")
    for path in plan.files:
        if path not in ours:
            names.add_row(Text(path), f"{len(plan.files[path]):,}")
    head = f"{plan.stock.chip}, {plan.flash_size >> 20} MiB of flash, table {plan.table}"
    notes = [Text(f"note: {note}", "yellow") for note in plan.notes]
    return Group(Text(head, "bold"), rows, Text(), names, *notes)


def _total(plan: Plan, paths: list[str]) -> int:
    return sum(len(plan.files[path]) for path in paths)
