"""The ``twinslot`` command: thin functions over the library, one per command.

Data goes to stdout, talk to stderr. Exit code 0: done; 1: refused or failed, with one line
``twinslot: what: why`` on stderr; 2: wrong usage.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

import twinslot
from twinslot.errors import OtaError

# Commands of other modules, imported only when asked for: ``twinslot --help`` stays quick.
_ELSEWHERE = {
    "board": ("board_cli", "app", "Make, run and look into virtual boards and flash dumps."),
    "flash": ("flash_cli", "flash", "Put MicroPython, Twinslot and your files onto a board."),
    "push": ("remote_cli", "push", "Update a board over its cable."),
    "status": ("remote_cli", "status", "What is in the slots of a board on a serial port."),
    "doctor": ("remote_cli", "doctor", "Whether a board can be updated, and what to do if not."),
    "confirm": ("remote_cli", "confirm", "Keep the image that a board has on trial."),
    "rollback": ("remote_cli", "rollback", "Send a board back to its other slot."),
    "keyring": ("trust_cli", "keyring_command", "Say who may sign releases, and who no longer."),
    "log": ("log_cli", "log", "Show what a board noted of its updates."),
    "sign": ("trust_cli", "sign", "Sign a document made elsewhere."),
    "verify": ("trust_cli", "verify", "Judge a release or keyring as a board does."),
    "device": ("fleet_cli", "device", "See and steer the boards of a fleet."),
    "release": ("fleet_cli", "release", "Upload, flag, block and promote releases."),
    "rollout": ("fleet_cli", "rollout", "Bring a release to a fleet, stage by stage."),
    "fleet": (
        "fleet_cli",
        "fleet",
        "The server: rules, people, jobs, audit, backup, simulation.",
    ),
    "demo": ("demo", "demo", "Watch a virtual board update itself and survive a bad release."),
}


class _Lazy(TyperGroup):
    """A command group that knows the names and one line of help of what it has not loaded."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _ELSEWHERE:
            return TyperCommand(cmd_name, help=_ELSEWHERE[cmd_name][2])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _ELSEWHERE:
            return args[0], _load(args[0]), args[1:]
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    module, attribute, _ = _ELSEWHERE[name]
    loaded = getattr(importlib.import_module(f"twinslot_tools.{module}"), attribute)
    if not isinstance(loaded, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name)(loaded)
        loaded = single
    return typer.main.get_command(loaded)


app = typer.Typer(
    cls=_Lazy,
    help="Over-the-air updates for MicroPython on the ESP32 that never leave a board dead.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
talk = Console(stderr=True, highlight=False)
out = Console(highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

_PROGRESS_BYTES = 1 << 20  # a smaller file is done before a bar could be read


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="twinslot")
    except (OtaError, OSError, ValueError) as exc:
        if os.environ.get("TWINSLOT_TRACEBACK"):
            raise
        # Not through rich: a path in brackets must not turn into markup.
        print(f"twinslot: {_one_line(exc)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.filename:
        return _plain(f"{exc.filename}: {exc.strerror}")
    return _plain(" ".join(str(exc).split()))


def _plain(text: str) -> str:
    """Show what a terminal would obey (a file's content may hold anything) as text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(twinslot.__version__)
        raise typer.Exit


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(metavar="NAME.key", help="The private key's file.")],
    bits: Annotated[int, typer.Option(help="2048, 3072 or 4096.")] = 3072,
    root: Annotated[
        bool, typer.Option("--root", help="A key that signs keyrings instead of releases.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="A sample: refused by all but demo boards.")
    ] = False,
    passphrase_fd: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read the passphrase from descriptor N."),
    ] = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the private key unprotected.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a signing key, and beside it NAME.pub.json, which is what devices get.

    Asks for a passphrase that encrypts the private key. Keep that key off servers and out of
    repositories; without it no device can be updated, and whoever has it can update all of them.
    """
    from . import keys, passphrase

    if no_passphrase and passphrase_fd is not None:
        raise typer.BadParameter("one or the other", param_hint="--no-passphrase")
    secret = None
    if not no_passphrase and not demo:
        secret = passphrase.source(passphrase_fd, path, twice=True)
    kid = keys.generate(path, bits, passphrase=secret, root=root, demo=demo)
    public = keys.public_path(path)
    if as_json:
        _print_json({"key": str(path), "public": str(public), "kid": kid, "bits": bits})
    else:
        print(f"{path}   the private key: keep it safe, keep a copy")
        print(f"{public}   the public key: goes onto devices")
        print(f"key id {kid}")


@app.command()
def publish(
    image: Annotated[
        Path, typer.Argument(help="Application image: MicroPython's micropython.bin.")
    ],
    version: Annotated[str, typer.Option(help="SemVer, as in 1.4.0.")],
    product: Annotated[str, typer.Option(help="What this software is.")],
    hardware: Annotated[
        list[str], typer.Option("--hardware", "-H", help="Board that may run it (repeatable).")
    ],
    site: Annotated[Path, typer.Option("--to", metavar="SITE", help="Folder to publish into.")],
    key: Annotated[Path | None, typer.Option(help="Private key made by keygen.")] = None,
    channel: Annotated[str, typer.Option(help="Who gets it.")] = "stable",
    security_version: Annotated[
        int | None, typer.Option(min=0, help="Anti-rollback floor (default: the channel's).")
    ] = None,
    downgrade: Annotated[
        bool, typer.Option("--downgrade", help="May replace a newer version.")
    ] = False,
    expires: Annotated[str | None, typer.Option(help="365d, or a date (default: never).")] = None,
    notes: Annotated[str | None, typer.Option(help="What a user should know.")] = None,
    rollout: Annotated[
        float | None, typer.Option(help="Percent of devices (default: all).")
    ] = None,
    poll: Annotated[int | None, typer.Option(help="Seconds until devices ask again.")] = None,
    sign_command: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Program that signs what it reads, instead of --key."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Public key of the --sign-command (NAME.pub.json).")
    ] = None,
    roots: Annotated[
        Path | None,
        typer.Option(help="Boards' key file: other keys in a keyring by its root count, too."),
    ] = None,
    passphrase_fd: Annotated[
        int | None, typer.Option(metavar="N", help="Read the passphrase from descriptor N.")
    ] = None,
    bases: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="OLD",
            help="Build a delta from this image or version, or 'fleet': from what the boards of"
            " --server run (repeatable).",
        ),
    ] = None,
    server: Annotated[
        str, typer.Option(envvar="TWINSLOT_URL", help="For --from fleet: https://host:port")
    ] = "https://127.0.0.1:8443",
    token: Annotated[str, typer.Option(envvar="TWINSLOT_TOKEN", help="An API token.")] = "",
    ca: Annotated[
        Path | None, typer.Option(envvar="TWINSLOT_CA", help="The server's certificate.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a release and put it into a folder that any web server can hand out.

    Publish the same thing again with another --rollout to widen it, or with another --channel to
    promote it: the release itself never changes.
    """
    from . import fleet_bases, images, trust_cli
    from . import keys as key_files
    from . import publish as publishing
    from .fleet_http import Api

    named = [text for text in bases or () if text != fleet_bases.FLEET]
    running: list[fleet_bases.Running] = []
    if len(named) < len(bases or ()):
        api = Api(server, token, ca)
        running = fleet_bases.find(api, site, product, images.load(image), len(named))
        for one in running:
            if not one.taken:
                talk.print(f"no delta from {one}: {one.why}", soft_wrap=True, markup=False)
        named += [one.version for one in running if one.taken]
    spec = publishing.Spec(
        product=product,
        version=version,
        hardware=tuple(dict.fromkeys(hardware)),
        channel=channel,
        security_version=security_version,
        downgrade=downgrade,
        expires=trust_cli.when(expires),
        notes=notes,
        rollout=rollout,
        poll=poll,
        bases=tuple(named),
    )
    signer = trust_cli.signer(key, sign_command, public, passphrase_fd)
    with _bar(as_json) as progress:
        known = key_files.load_trusted(roots)[0] if roots else None
        done = publishing.publish(image, spec, signer, site, progress, known)
    if done.ignored:
        said = _plain(f"not gone on from: {done.ignored}")
        talk.print(said, soft_wrap=True, markup=False)
    if as_json:
        _print_json(_published(done, spec, site) | {"fleet": [asdict(one) for one in running]})
    else:
        _show_published(done, spec, site)


def _published(done: Any, spec: Any, site: Path) -> dict[str, Any]:
    image = done.manifest["images"][0]
    return {
        "product": spec.product,
        "version": spec.version,
        "channel": spec.channel,
        "site": str(site),
        "release": done.release,
        "pointer": done.pointer,
        "offer": done.offer,
        "build": image["build"],
        "sha256": image["sha256"],
        "size": image["size"],
        "payloads": image["payloads"],
        "sizes": _sizes(done),
        "security_version": done.manifest["security_version"],
        "expires": done.manifest.get("expires"),
        "kid": done.kid,
        "new": done.new,
    }


def _show_published(done: Any, spec: Any, site: Path) -> None:
    image = done.manifest["images"][0]
    state = "published" if done.new else "published before, unchanged"
    share = done.offer.get("rollout", {}).get("percent", 100)
    print(f"{spec.product} {spec.version}  {state}, {image['size']:,} bytes")
    print(f"  for       {', '.join(spec.hardware)}")
    print(f"  build     {image['build']}")
    print(f"  release   {site / done.release}")
    print(f"  channel   {site / done.pointer}  ->  {share} % of devices")
    if spec.bases and not done.new:
        talk.print("--from has no effect: the payloads of a published release stay as they are")
    table = Table("payload", "bytes", "of the image", "", box=None, pad_edge=False)
    for name in ("bytes", "of the image"):
        next(c for c in table.columns if c.header == name).justify = "right"
    for row in _sizes(done):
        note = "" if row["kept"] else "left out, it saves too little"
        share = f"{row['bytes'] / image['size']:.1%}"
        table.add_row(Text(_plain(row["payload"])), f"{row['bytes']:,}", share, note)
    out.print(table)


def _sizes(done: Any) -> list[dict[str, Any]]:
    """Rows of the size table: what was built, or what the published release has."""
    rows = [
        (f"delta from {p.base.name}" if p.base else p.encoding, len(p.content), p.kept)
        for p in done.packed
    ]
    if not rows:
        rows = [
            (f"delta from {p['base'][:12]}" if "base" in p else p["encoding"], p["size"], True)
            for p in done.manifest["images"][0]["payloads"]
        ]
    return [dict(zip(("payload", "bytes", "kept"), row, strict=True)) for row in rows]


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Image, release, pointer, keys, table or dump.")],
    keys: Annotated[
        Path | None, typer.Option(help="Public key set (NAME.pub.json) to judge a signature with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a file is, what is in it, and whether it holds (exit code 1: it does not)."""
    from . import inspection
    from . import keys as key_files

    roots, trusted = key_files.load_trusted(keys) if keys else (None, None)
    found = inspection.inspect(file, trusted, roots)
    if as_json:
        _print_json({"file": str(file), **found})
    else:
        _show_found(file, found)
    if not found["ok"]:
        raise typer.Exit(1)


def _show_found(file: Path, found: dict[str, Any]) -> None:
    if found["kind"] == "flash":
        from .virtual_esp32 import show

        out.print(show.render(found))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("file", Text(str(file)))
    for name, value in _flat(found):
        table.add_row(Text(_plain(name)), value)
    out.print(table)


def _flat(found: Any, name: str = "") -> Iterator[tuple[str, Text]]:
    """Turn nested data into rows ``images.0.size  1500000``; as Text: a file is no markup."""
    if isinstance(found, dict) and found:
        for key, value in found.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, list) and found:
        if all(isinstance(item, str) for item in found):
            yield name, Text(_plain(", ".join(found)))
            return
        for number, item in enumerate(found):
            yield from _flat(item, f"{name}.{number}")
    else:
        if found is None or isinstance(found, bool):
            found = {True: "yes", False: "no", None: "-"}[found]
        yield name, Text(_plain(str(found)))


@app.command()
def serve(
    site: Annotated[Path, typer.Argument(help="Folder made by publish.")],
    host: Annotated[
        str | None, typer.Option(help="0.0.0.0 for every network (127.0.0.1).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes any free one (8443).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Private folder: certificate, tokens, database.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="Offer only what these keys signed.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name or address boards use (repeatable).")
    ] = None,
    poll: Annotated[
        int | None, typer.Option(min=1, help="Seconds until a board asks again.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML: see docs/server.md.")] = None,
) -> None:
    """Hand out a published folder over HTTPS, decide who gets what, and keep reports."""
    from .serve import serve as run

    options: list[tuple[str, Any]] = [("--data", data), ("--keys", keys), ("--poll", poll)]
    options += [("--host", host), ("--port", port), ("--config", config)]
    options += [("--name", n) for n in name or []]
    arguments = [str(site)]
    for option, value in options:
        if value is not None:
            arguments += [option, str(value)]
    raise typer.Exit(run(arguments))


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress of long work on stderr, if somebody is there to see it."""
    if quiet or not talk.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(),
        console=talk,
        transient=True,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if total < _PROGRESS_BYTES:
                return
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield show


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
