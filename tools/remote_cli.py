"""Commands for a board on a serial port: push, status, doctor, confirm, rollback.

Thin over `remote.py` and `push.py`.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import push as pushing
from . import trust_cli
from .remote import Device, RemoteError

talk = Console(stderr=True, highlight=False)
out = Console(highlight=False)

_WAIT_S = 360.0  # a trial's deadline of 300 s, and the way there

Port = Annotated[
    str,
    typer.Option(
        envvar="TWINSLOT_PORT",
        help="Serial port, or socket://HOST:PORT, rfc2217://HOST:PORT; $TWINSLOT_PORT.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def push(
    file: Annotated[
        Path,
        typer.Argument(help="Application image, or r/VERSION.jws of a site.", exists=True),
    ],
    port: Port,
    key: Annotated[
        Path | None, typer.Option(help="Private key that signs an image on the fly.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Of the image (default: what it says itself).")
    ] = None,
    security_version: Annotated[
        int | None,
        typer.Option(min=0, help="Anti-rollback floor (default: 0, none)."),
    ] = None,
    downgrade: Annotated[
        bool, typer.Option("--downgrade", help="May replace a newer version.")
    ] = False,
    notes: Annotated[str | None, typer.Option(help="What a user should know.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even what failed on this board before.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the trial's end; 0: don't.")
    ] = _WAIT_S,
    sign_command: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Program that signs what it reads, instead of --key."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Public key of the --sign-command (NAME.pub.json).")
    ] = None,
    passphrase_fd: Annotated[
        int | None, typer.Option(metavar="N", help="Read the passphrase from descriptor N.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Update a board over its cable: send an image, let the board verify and try it.

    The board takes only what one of its keys has signed, and only what it would take over the
    air. A push that was cut goes on where it stopped. The application is interrupted; at the end
    the board resets into the new image. Exit code 1: refused, or rolled back.
    """
    signed = _is_release(file)
    signer = None
    if signed:
        _refuse_wishes(
            key=key,
            version=version,
            security_version=security_version,
            downgrade=downgrade or None,
            notes=notes,
        )
    else:
        signer = trust_cli.signer(key, sign_command, public, passphrase_fd)
    with (
        tempfile.TemporaryDirectory(prefix="twinslot-") as scratch,
        _opened(port, fresh=True) as device,
        _bar(as_json) as progress,
    ):
        facts = pushing.hello(device)
        if signer:
            wish = pushing.Wish(version, security_version, downgrade, notes)
            file = pushing.make_release(file, wish, facts, signer, Path(scratch), progress)
        if not as_json:
            _say("the board {device_id} runs {product} {current_version}".format(**facts))
        done = pushing.send(device, file, force=force, progress=progress)
        if done.state == "ready":
            if not as_json:
                _say(_sent(done))
            pushing.activate(device, done, wait, lambda line: _hear(line, as_json))
    if as_json:
        print(json.dumps({**asdict(done), "device_id": facts["device_id"]}, indent=2))
    else:
        print(_outcome(done))
    if done.state == "rolledback":
        raise typer.Exit(1)


def _is_release(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(3) == b"eyJ"  # base64url of '{"'


def _refuse_wishes(**wishes: Any) -> None:
    """A release says all this itself, and is signed."""
    for name, value in wishes.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter("a release is signed already", param_hint=option)


def _sent(done: pushing.Outcome) -> str:
    rate = done.sent / max(done.seconds, 0.01) / 1000
    began = f" from byte {done.start:,} on" if done.start else ""
    return (
        f"{done.version} verified in its slot: {done.sent:,} bytes ({done.encoding}) sent{began}"
        f" in {done.seconds:.1f} s, {rate:.1f} kB/s"
        if done.sent
        else f"{done.version} lies in its slot already, verified"
    )


def _outcome(done: pushing.Outcome) -> str:
    return {
        "same": f"{done.version} is what the board runs: nothing to do",
        "activated": f"{done.version} is activated: the board tries it now",
        "confirmed": f"{done.version} confirmed",
        "rolledback": f"{done.version} rolled back: {done.reason}",
        "unknown": f"{done.version} is activated; nothing was heard of the end of its trial yet:"
        " twinslot status will tell",
    }[done.state]


def _hear(line: str, quiet: bool) -> None:
    if line.startswith("twinslot: ") and not quiet:
        _say(line.removeprefix("twinslot: "), style="dim")


def status(port: Port, as_json: Json = False) -> None:
    """Say what is in the slots of a board, which runs, and what failed."""
    with _opened(port) as device:
        facts = device.call("twinslot.status()")
        facts["on_trial"] = device.on_trial
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table("slot", "version", "build", "state", "", box=None, pad_edge=False)
    for prefix, name in (("", facts["running"]), ("inactive_", facts["inactive"])):
        build = facts[prefix + "build"]
        version = facts["versions"].get(build) if prefix else facts["version"]
        where = "" if prefix else "runs"
        if facts["boot"] == name:
            where = "runs, boots next" if where else "boots next"
        state = facts[prefix + "state"] or "-"
        table.add_row(Text(name), Text(version or "?"), build[:12] or "empty", state, where)
    out.print(table)
    for failure in facts["failed"]:
        print(f"failed  {failure[1]}: {failure[2]}")
    _warn_of_trial(device)


def doctor(port: Port, as_json: Json = False) -> None:
    """Let a board say whether it can be updated, and what to do if not (exit code 1)."""
    with _opened(port) as device:
        found = device.call("twinslot.doctor()")
    bad = any(level == "fail" for level, *_ in found)
    if as_json:
        names = ("level", "topic", "text", "remedy")
        print(json.dumps([dict(zip(names, line, strict=True)) for line in found], indent=2))
    else:
        styles = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for level, topic, text, remedy in found:
            table.add_row(Text(level, styles[level]), topic, Text(text))
            if remedy:
                table.add_row("", "", Text(f"-> {remedy}", "bold"))
        out.print(table)
        print("This board can't be updated." if bad else "This board can be updated.")
        _warn_of_trial(device)
    if bad:
        raise typer.Exit(1)


def confirm(port: Port, as_json: Json = False) -> None:
    """End the trial of a board's image by hand: keep it for good."""
    with _opened(port) as device:
        device.call("twinslot.confirm()")
        facts = device.call("twinslot.status()")
    version = facts["version"] or "?"
    if as_json:
        print(json.dumps({"confirmed": facts["build"], "version": version}))
    else:
        print(f"{version} in {facts['running']} is confirmed")


def rollback(port: Port, as_json: Json = False) -> None:
    """Send a board back to the image in its other slot, now."""
    with _opened(port) as device:
        end = time.monotonic() + 60
        label = ""
        for line in device.let_go("import twinslot\ntwinslot.rollback()"):
            if line and line.startswith("twinslot: reset into"):
                label = line.split()[-1]
                break
            if time.monotonic() > end:
                raise RemoteError(f"{port}: no answer")
    if as_json:
        print(json.dumps({"boots": label}))
    else:
        print(f"the board resets into {label}")


# ---- what they share


@contextmanager
def _opened(port: str, *, fresh: bool = False) -> Iterator[Device]:
    with talk.status(f"connecting to {port}"):
        device = Device.open(port, fresh=fresh)
    with device:
        yield device


def _warn_of_trial(device: Device) -> None:
    if device.on_trial:
        _say("The image is on trial: the board goes on proving it, unless you decide:")
        _say("twinslot confirm, or twinslot rollback")


def _say(text: str, style: str | None = None) -> None:
    talk.print(Text(text), style=style, soft_wrap=True)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr, if somebody is there to see it."""
    if quiet or not talk.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield show
