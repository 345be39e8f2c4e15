"""``twinslot log``: what a board has noted of its updates, out of its flash or over its prompt.

FLASH is a virtual board's flash file, or a dump of a real one (``esptool read_flash 0 ALL``);
``--port`` asks the board itself. Reads the NVS partition; writes nothing. A journal that can't be
read is told as such: on the board it would mean "nothing known".
"""

import datetime as dt
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twinslot import journal
from twinslot.errors import FormatError

from .virtual_esp32.chip import nvs, table
from .virtual_esp32.chip.flash import Flash

_NAMESPACE = "twinslot"
_KEYS = ("journal", "checkpoint", "log")


@dataclass(frozen=True)
class Notes:
    """What NVS holds of ours.

    Attributes:
        attempts: newest last: [time (Unix, 0: unknown), version, status, reason].
        journal, checkpoint: as the agent finds them; {} where there is none.
        starts: that failed in a row.
        damaged: keys whose content can't be read.
    """

    attempts: list[list[Any]]
    journal: dict[str, Any]
    checkpoint: dict[str, Any]
    starts: int
    damaged: list[str]


class _Host:
    """`esp32.NVS` over a dump, for the device's own journal code."""

    def __init__(self, store: nvs.Nvs, namespace: int):
        self._store, self._namespace = store, namespace

    def get_blob(self, key: str, buf: bytearray) -> int:
        data = self._read(self._store.get_blob, key)
        if len(data) > len(buf):
            raise OSError(-nvs.ERR_INVALID_LENGTH)
        buf[: len(data)] = data
        return len(data)

    def get_i32(self, key: str) -> int:
        return self._read(self._store.get_i32, key)

    def holds(self, key: str) -> bool:
        try:
            return bool(self._read(self._store.get_blob, key))
        except OSError:
            return False

    def _read(self, read: Any, key: str) -> Any:
        try:
            return read(self._namespace, key)
        except nvs.NvsError as exc:
            raise OSError(exc.code) from None


def read(flash: bytes) -> Notes:
    """Return the notes in a whole flash.

    Raises:
        FormatError: no partition table, or no NVS partition in it.
    """
    try:
        parts = table.parse(flash[table.TABLE_OFFSET :][: table.TABLE_SIZE])
    except table.TableError as exc:
        raise FormatError(f"no flash of a board: {exc}") from None
    part = table.find(parts, table.TYPE_DATA, table.DATA_NVS)
    if part is None or part.offset + part.size > len(flash):
        raise FormatError("the flash holds no NVS partition")
    copy = Flash(io.BytesIO(flash), len(flash))  # what mends itself does so in memory
    try:
        store = nvs.Nvs(copy, part.offset, part.size)
        namespace = store.namespaces().get(_NAMESPACE)
    except (nvs.NvsError, ValueError):
        namespace = None  # the board will erase it at its next boot
    if namespace is None:
        return Notes([], {}, {}, 0, [])
    host = _Host(store, namespace)
    found = journal.Journal(host)
    damaged = [key for key in _KEYS if host.holds(key) and not found._load(key)]
    return Notes(found.log(), found._data, found.checkpoint(), found.starts(), damaged)


_ASK = """\
import json
from twinslot.journal import Journal
_j = Journal.shared()
print(json.dumps([_j.log(), _j._data, _j.checkpoint(), _j.starts(), []]))
"""


def ask(port: str) -> Notes:
    """Return the notes of the board at a serial port.

    Raises:
        RemoteError: there is none, or it has no Twinslot.
    """
    from .remote import Device

    with Device.open(port) as device:
        return Notes(*device.ask(_ASK))


def log(
    flash: Annotated[
        Path | None, typer.Argument(help="Flash file of a board, or a dump of one.")
    ] = None,
    port: Annotated[
        str | None,
        typer.Option(help="Instead of a flash: serial port, or socket:// or rfc2217:// URL."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Show what a board has noted of its attempts to update."""
    if (flash is None) == (port is None):
        raise typer.BadParameter("give one of FLASH and --port")
    if flash is None:
        notes = ask(port or "")
    else:
        content = flash.read_bytes()
        if not content or len(content) % 4096:
            raise FormatError(f"{flash}", f"{len(content)} bytes", "a whole flash")
        notes = read(content)
    if as_json:
        print(json.dumps(notes.__dict__, indent=2))
        return
    out = Console(highlight=False)
    rows = Table(box=None, pad_edge=False)
    for name in ("when", "version", "outcome", "why"):
        rows.add_column(name)
    for when, version, status, reason in notes.attempts:
        rows.add_row(_date(when), *(Text(_plain(str(t))) for t in (version, status, reason)))
    if notes.attempts:
        out.print(rows)
    else:
        out.print("no attempts noted")
    for line in _facts(notes):
        out.print(Text(_plain(line)))


def _facts(notes: Notes) -> list[str]:
    lines = []
    trial, kept = notes.journal.get("trial"), notes.checkpoint
    if trial:
        lines.append(f"on trial: {trial.get('version')}")
    for build, version, reason, _ in notes.journal.get("failed", []):
        lines.append(f"failed here: {version} ({build[:12]}): {reason}")
    if kept:
        lines.append(f"download kept up to byte {kept.get('offset')} of the image")
    if notes.starts:
        lines.append(f"starts that failed in a row: {notes.starts}")
    lines += [f"{key}: unreadable, the board takes it for empty" for key in notes.damaged]
    return lines


def _date(when: Any) -> str:
    if type(when) is not int or not 0 < when < 1 << 34:
        return "unknown"
    return dt.datetime.fromtimestamp(when, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _plain(text: str) -> str:
    """A flash may hold anything: nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
