"""What the fleet's commands share: which server, as whom, and how answers are printed.

``--server``, ``--token``, ``--ca``, or the environment's ``TWINSLOT_URL``, ``TWINSLOT_TOKEN``,
``TWINSLOT_CA``.
"""

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .fleet_http import Api

out = Console(highlight=False)
talk = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print the API's answer.")]
Server = Annotated[str, typer.Option(envvar="TWINSLOT_URL", help="https://host:port")]
Token = Annotated[str, typer.Option(envvar="TWINSLOT_TOKEN", help="An API token.")]
Ca = Annotated[Path | None, typer.Option(envvar="TWINSLOT_CA", help="The server's certificate.")]


def connect(
    context: typer.Context,
    server: Server = "https://127.0.0.1:8443",
    token: Token = "",
    ca: Ca = None,
) -> None:
    """The callback of a group of commands: they find the server's API in ``context.obj``."""
    context.obj = Api(server, token, ca)


def print_json(value: Any) -> None:
    """Print the API's own answer."""
    print(json.dumps(value, indent=2))


def table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows: a table for people, tab-separated lines for programs."""
    if not out.is_terminal:  # for other programs: nothing is cut to a width
        for row in rows:
            print("\t".join(cell(row.get(name)) for name in columns))
        return
    shown = Table(box=None, pad_edge=False)
    for name in columns:
        shown.add_column(name.replace("_", " "))
    for row in rows:
        shown.add_row(*(Text(cell(row.get(name))) for name in columns))
    out.print(shown)


def cell(value: Any) -> str:
    """One value as people read it, on one line."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def query(**members: Any) -> str:
    """A URL's query of those members that say something."""
    return urlencode({k: v for k, v in members.items() if v not in (None, "")})
