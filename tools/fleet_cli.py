"""``twinslot device | release | rollout | fleet``: run a fleet from the command line.

Which server, and as whom: see ``fleet_base``. ``--json`` prints the API's own answer. The rest of
``twinslot fleet`` is in ``fleet_admin_cli``.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import fleet_admin_cli
from .fleet_base import Json, cell, connect, out, print_json, query, table, talk
from .fleet_http import Api, ApiError, Pool, multipart, run

if TYPE_CHECKING:
    from .real_boards import RealBoards

_REST_S = 60.0  # for virtual boards to finish what they are at

device = typer.Typer(help="See and steer the boards of a fleet.", no_args_is_help=True)
release = typer.Typer(help="Upload, flag, block and promote releases.", no_args_is_help=True)
rollout = typer.Typer(help="Bring a release to a fleet, stage by stage.", no_args_is_help=True)
fleet = typer.Typer(
    help="The server: rules, people, jobs, audit, backup, simulation.", no_args_is_help=True
)

for _app in (device, release, rollout, fleet):
    _app.callback()(connect)
fleet_admin_cli.add_to(fleet)


# ---- device


@device.command("list")
def device_list(
    context: typer.Context,
    label: Annotated[str, typer.Option(help="key=value")] = "",
    status: str = "",
    product: str = "",
    version: str = "",
    enrolment: Annotated[str, typer.Option(help="pending, accepted, decommissioned")] = "",
    search: Annotated[str, typer.Option(help="Part of an id or MAC.")] = "",
    hardware: str = "",
    saved: Annotated[str, typer.Option("--filter", help="As fleet filter save named it.")] = "",
    limit: int = 100,
    after: Annotated[str, typer.Option(help="Go on behind this board.")] = "",
    as_json: Json = False,
) -> None:
    """List boards."""
    wanted = query(
        label=label,
        status=status,
        product=product,
        version=version,
        enrolment=enrolment,
        q=search,
        hardware=hardware,
        filter=saved,
        limit=limit,
        after=after,
    )
    found = context.obj.call("GET", f"devices?{wanted}")
    if as_json:
        print_json(found)
    else:
        columns = ["device_id", "product", "current_version", "status", "enrolment", "last_seen"]
        table(found["devices"], columns)


@device.command()
def show(context: typer.Context, device_id: str, as_json: Json = False) -> None:
    """Show one board and its attempts."""
    found = context.obj.call("GET", f"devices/{device_id}")
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if name not in ("history", "attempts"):
            out.print(Text(f"{name:16} {cell(value)}"))
    columns = ["version", "state", "reason", "origin", "offered", "ended"]
    table(found["attempts"], columns)


@device.command("log")
def device_log(
    context: typer.Context,
    device_id: str,
    attempt: Annotated[str, typer.Option(help="Only this one of its attempts.")] = "",
) -> None:
    """Print what a board has said of its attempts, with its own logs."""
    for row in context.obj.call("GET", f"devices/{device_id}")["history"]:
        if attempt not in ("", row["attempt"]):
            continue
        error = row["error"] or {}
        said = (row[n] for n in ("received", "attempt", "status", "version"))
        print(" ".join(cell(value) for value in (*said, error.get("message"))))
        for line in (row["log"] or "").splitlines():
            print(f"  {cell(line)}")


@device.command()
def explain(context: typer.Context, device_id: str, as_json: Json = False) -> None:
    """Say in one sentence what the board would be offered now, and why."""
    found = context.obj.call("GET", f"devices/{device_id}/explain")
    if as_json:
        print_json(found)
    else:
        print("\n".join([found["sentence"], *found["notes"]]))


@device.command("label")
def device_label(
    context: typer.Context,
    device_id: str,
    labels: Annotated[list[str], typer.Argument(help="key=value, or key- to remove")],
) -> None:
    """Set or remove labels."""
    wanted: dict[str, str | None] = {}
    for text in labels:
        key, sign, value = text.partition("=")
        wanted[key if sign else text.removesuffix("-")] = value if sign else None
    print(cell(context.obj.call("PATCH", f"devices/{device_id}", {"labels": wanted})["tags"]))


@device.command()
def accept(
    context: typer.Context,
    device_ids: Annotated[list[str] | None, typer.Argument()] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All that wait and fit.")] = False,
    label: Annotated[str, typer.Option(help="key=value")] = "",
    product: str = "",
    version: str = "",
    search: Annotated[str, typer.Option(help="Part of an id or MAC.")] = "",
) -> None:
    """Accept boards that wait: these, or with --all those that fit the options."""
    if bool(device_ids) == everyone:
        raise typer.BadParameter("expected ids of boards, or --all")
    body = {"label": label, "product": product, "version": version, "q": search}
    which = {"all": True} if everyone else {"devices": device_ids}
    found = context.obj.call("POST", "devices/accept", {**which, **body})
    print(f"{found['accepted']} accepted")


@device.command()
def hold(context: typer.Context, device_ids: list[str]) -> None:
    """Offer boards nothing until they are accepted again."""
    for device_id in device_ids:
        context.obj.call("PATCH", f"devices/{device_id}", {"enrolment": "pending"})
        print(f"{device_id} waits")


@device.command()
def pin(
    context: typer.Context,
    device_id: str,
    version: Annotated[str | None, typer.Argument(help="None removes the pin.")] = None,
) -> None:
    """Hold one board to a version, or let it go."""
    context.obj.call("PATCH", f"devices/{device_id}", {"pin": version})
    print(f"{device_id} {'pinned to ' + version if version else 'is free'}")


@device.command("token")
def device_token(context: typer.Context, device_id: str) -> None:
    """Make a token of its own for a board; it is shown this once."""
    print(context.obj.call("POST", f"devices/{device_id}/token")["token"])


@device.command()
def decommission(context: typer.Context, device_id: str) -> None:
    """Retire a board; its history stays."""
    context.obj.call("DELETE", f"devices/{device_id}")
    print(f"{device_id} decommissioned")


@device.command("import")
def device_import(context: typer.Context, file: Path) -> None:
    """Register boards from a CSV file; new tokens go to stdout."""
    found = context.obj.call("POST", "devices/import", raw=file.read_bytes(), kind="text/csv")
    talk.print(f"{found['imported']} boards, {found['new']} of them new")
    for device_id, token in found["tokens"].items():
        print(f"{device_id},{token}")


# ---- release


@release.command("upload")
def release_upload(
    context: typer.Context,
    site: Annotated[Path, typer.Argument(help="Folder made by publish.")],
    product: str,
    version: str,
    channel: str = "stable",
    pilot_ready: Annotated[bool, typer.Option("--pilot-ready")] = False,
    as_json: Json = False,
) -> None:
    """Upload a release that publish has made."""
    from . import publish

    body, kind = multipart({"channel": channel}, publish.parts(site, product, version))
    found = context.obj.call("POST", "firmware/upload", raw=body, kind=kind)
    if pilot_ready:
        found = context.obj.call("PATCH", f"firmware/{found['id']}", {"pilot_ready": True})
    if as_json:
        print_json(found)
    else:
        print(f"firmware {found['id']}: {found['product']} {found['version']} {found['sha256']}")


@release.command("list")
def release_list(context: typer.Context, product: str = "", as_json: Json = False) -> None:
    """List releases."""
    found = context.obj.call("GET", f"firmware?{query(product=product)}")
    if as_json:
        print_json(found)
    else:
        columns = ["id", "product", "version", "channel", "size", "pilot_ready", "stable"]
        table(found["firmware"], [*columns, "blocked"])


@release.command("show")
def release_show(context: typer.Context, number: int, as_json: Json = False) -> None:
    """Show one release."""
    _show_release(context.obj.call("GET", f"firmware/{number}"), as_json)


def _show_release(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        out.print(Text(f"{name:16} {cell(value)}"))


@release.command()
def download(context: typer.Context, number: int, to: Path) -> None:
    """Fetch a release's image into a file."""
    content = context.obj.fetch(f"firmware/{number}/download")
    to.write_bytes(content)
    print(f"{to}: {len(content)} bytes")


@release.command()
def mark(
    context: typer.Context,
    number: int,
    pilot_ready: Annotated[bool | None, typer.Option("--pilot-ready/--not-pilot-ready")] = None,
    stable: Annotated[bool | None, typer.Option("--stable/--not-stable")] = None,
    notes: Annotated[str | None, typer.Option(help="Release notes.")] = None,
    as_json: Json = False,
) -> None:
    """Say how far a release may go, and what it brings."""
    flags = {"pilot_ready": pilot_ready, "stable": stable, "notes": notes}
    wanted = {name: value for name, value in flags.items() if value is not None}
    _show_release(context.obj.call("PATCH", f"firmware/{number}", wanted), as_json)


@release.command("remove")
def release_remove(context: typer.Context, number: int) -> None:
    """Remove a release that nothing needs, and its files."""
    context.obj.call("DELETE", f"firmware/{number}")
    print(f"firmware {number} removed")


@release.command("gc")
def release_gc(context: typer.Context) -> None:
    """Remove payloads that no release names, and leftovers of broken uploads."""
    print(cell(context.obj.call("POST", "firmware/gc")))


@release.command()
def block(context: typer.Context, number: int, why: str) -> None:
    """Stop offering a release at once, everywhere."""
    context.obj.call("PATCH", f"firmware/{number}", {"blocked": why})
    print(f"firmware {number} is blocked")


@release.command()
def unblock(context: typer.Context, number: int) -> None:
    """Offer a release again."""
    context.obj.call("PATCH", f"firmware/{number}", {"blocked": None})
    print(f"firmware {number} may be offered")


@release.command()
def promote(
    context: typer.Context,
    number: int,
    channel: str,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many move.")] = False,
) -> None:
    """Make a channel offer a release."""
    if dry_run:
        found = context.obj.call("GET", f"firmware/{number}/reach?{query(channel=channel)}")
        print(f"boards to move: {found['devices']}")
        return
    found = context.obj.call("POST", f"firmware/{number}/promote", {"channel": channel})
    print(f"{found['product']}/{channel} -> {found['release']}")


# ---- rollout


@rollout.command("create")
def rollout_create(
    context: typer.Context,
    product: str,
    version: str,
    stage: Annotated[
        list[str] | None, typer.Option(help="5%, 20 (boards) or key=value (repeatable).")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only these boards.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="name=value, as in bake_s=600.")] = None,
    name: str = "",
    at: Annotated[str, typer.Option(help="Start by itself then: 2026-12-01T09:00+01:00.")] = "",
    start: Annotated[bool, typer.Option("--start", help="Start now.")] = False,
    as_json: Json = False,
) -> None:
    """Make a rollout; without --start it waits as a draft that says how many it will move."""
    body: dict[str, Any] = {"product": product, "version": version, "start": start, "name": name}
    if at:
        body["starts_at"] = at
    if stage:
        body["stages"] = [_stage(text) for text in stage]
    if label:
        body["target"] = {"label": label}
    body["policy"] = _policy(policy)
    found = context.obj.call("POST", "rollouts", body)
    _show_rollout(found, as_json)


def _policy(members: list[str] | None) -> dict[str, Any]:
    try:
        return {
            name: json.loads(value)
            for name, _, value in (text.partition("=") for text in members or ())
        }
    except ValueError:
        raise typer.BadParameter("expected name=value, as in bake_s=600 or gate=true") from None


def _stage(text: str) -> dict[str, Any]:
    if text.endswith("%"):
        value = float(text[:-1])
        return {"percent": int(value) if value == int(value) else value}
    return {"count": int(text)} if text.isdigit() else {"label": text}


def _show_rollout(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    counts = " ".join(f"{n}={v}" for n, v in found["counts"].items())
    stage = f"stage {found['stage'] + 1} of {len(found['stages'])}"
    print(f"rollout {found['id']} {found['name']}: {found['state']}, {stage}: {found['why']}")
    print(f"  {counts}")
    if "preview" in found:
        print(f"  stages will move {', '.join(map(str, found['preview']))} boards")
        channel = found["promotes"]
        print(f"  then channel {channel} offers it" if channel else "  no channel will offer it")


@rollout.command("list")
def rollout_list(
    context: typer.Context,
    limit: int = 50,
    before: Annotated[int | None, typer.Option(help="Only those older than this one.")] = None,
    as_json: Json = False,
) -> None:
    """List rollouts, the newest first."""
    wanted = query(limit=limit, before=before)
    found = context.obj.call("GET", f"rollouts?{wanted}")
    if as_json:
        print_json(found)
    else:
        table(found["rollouts"], ["id", "name", "state", "stage", "why"])


@rollout.command("show")
def rollout_show(context: typer.Context, number: int, as_json: Json = False) -> None:
    """Show how a rollout stands."""
    _show_rollout(context.obj.call("GET", f"rollouts/{number}"), as_json)


@rollout.command()
def wait(context: typer.Context, number: int, timeout: float = 3600) -> None:
    """Wait for the end: exit code 0 when complete, 1 when paused or aborted. For CI."""
    deadline = time.monotonic() + timeout
    while True:
        found = context.obj.call("GET", f"rollouts/{number}")
        if found["state"] in ("complete", "paused", "aborted"):
            _show_rollout(found, False)
            raise typer.Exit(0 if found["state"] == "complete" else 1)
        if time.monotonic() > deadline:
            raise ApiError(f"rollout {number} is still {found['state']}: {found['why']}")
        time.sleep(1)


def _action(name: str, text: str) -> None:
    @rollout.command(name, help=text)
    def act(context: typer.Context, number: int, why: str = "", as_json: Json = False) -> None:
        _show_rollout(context.obj.call("POST", f"rollouts/{number}/{name}", {"why": why}), as_json)


_action("start", "Start a draft.")
_action("pause", "Stop offering at once; boards in flight finish.")
_action("resume", "Go on.")
_action("abort", "End it for good.")
_action("expand", "Open the gate to the next stage.")


@rollout.command()
def back(context: typer.Context, number: int, version: str, as_json: Json = False) -> None:
    """Send everyone back, to a version that was signed as a downgrade."""
    _show_rollout(
        context.obj.call("POST", f"rollouts/{number}/back", {"version": version}), as_json
    )


@rollout.command()
def target(
    context: typer.Context,
    number: int,
    labels: Annotated[list[str] | None, typer.Argument(help="key=value; none: everybody.")] = None,
    as_json: Json = False,
) -> None:
    """Change whom a rollout is for; those that are in stay in."""
    body = {"target": {"label": labels or []}}
    _show_rollout(context.obj.call("PATCH", f"rollouts/{number}", body), as_json)


@rollout.command("policy")
def rollout_policy(
    context: typer.Context,
    number: int,
    members: Annotated[list[str], typer.Argument(help="name=value, as in failure_percent=10.")],
    as_json: Json = False,
) -> None:
    """Change how careful a rollout is, also one that has paused itself."""
    body = {"policy": _policy(members)}
    _show_rollout(context.obj.call("PATCH", f"rollouts/{number}", body), as_json)


# ---- fleet


@fleet.command("status")
def fleet_status(context: typer.Context, as_json: Json = False) -> None:
    """The fleet at a glance: boards, what they run, rollouts under way."""
    found = context.obj.call("GET", "fleet")
    if as_json:
        print_json(found)
        return
    print(f"{found['total']} boards, {found['seen']} seen within a day, {found['pending']} wait")
    for what in ("versions", "statuses"):
        shown = " ".join(f"{cell(row['value'])}={row['boards']}" for row in found[what])
        print(f"{what:9} {shown}")
    table(found["rollouts"], ["id", "name", "state", "stage", "why"])


@fleet.command("settings")
def fleet_settings(context: typer.Context) -> None:
    """How the server treats boards, as JSON; `set` names what was set, not configured."""
    print_json(context.obj.call("GET", "settings"))


@fleet.command("set")
def fleet_set(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="poll or enrolment")],
    value: Annotated[str, typer.Argument(help="JSON, whole; null: as configured again.")],
) -> None:
    """Set how often boards ask (poll), or who is accepted (enrolment), while the server runs."""
    try:
        body = {name: json.loads(value)}
    except ValueError:
        raise typer.BadParameter('expected JSON, as in {"default": 600}') from None
    print_json(context.obj.call("PATCH", "settings", body)[name])


@fleet.command()
def audit(context: typer.Context, limit: int = 50, as_json: Json = False) -> None:
    """Who changed what."""
    found = context.obj.call("GET", f"audit?{query(limit=limit)}")
    if as_json:
        print_json(found)
    else:
        table(found["audit"], ["at", "who", "action", "target", "before", "after"])


@fleet.command()
def export(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="devices, attempts, downloads or audit")],
    as_json: Json = False,
) -> None:
    """Print everything as CSV or JSON."""
    kind = "json" if as_json else "csv"
    found = context.obj.call("GET", f"export/{what}?format={kind}")
    if as_json:
        print_json(found)
    else:
        print(found, end="")


@fleet.command()
def call(
    context: typer.Context,
    method: str,
    path: Annotated[str, typer.Argument(help="As in windows or users/anna.")],
    body: Annotated[str | None, typer.Argument(help="JSON.")] = None,
) -> None:
    """Call the API as it is."""
    print_json(context.obj.call(method.upper(), path, json.loads(body) if body else None))


@fleet.command()
def certificate(
    folder: Annotated[Path, typer.Argument(help="Where the authority is, or shall be.")],
    name: Annotated[
        list[str] | None, typer.Option(help="Host name or address of the server (repeatable).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an authority for boards to trust, and a certificate of it for the server. Again, to
    renew the certificate: boards that trust the authority notice nothing."""
    command = [sys.executable, "-m", "twinslot_server.authority", str(folder)]
    command += [f"--name={text}" for text in name or ()] + ["--json"] * as_json
    raise typer.Exit(subprocess.call(command))


@fleet.command()
def move(
    data: Annotated[Path, typer.Argument(help="The private folder of a server that is stopped.")],
    url: Annotated[
        str, typer.Argument(envvar="TWINSLOT_DATABASE", help="postgresql+psycopg://user@host/name")
    ],
) -> None:
    """Copy a server's SQLite database into an empty PostgreSQL one."""
    command = [sys.executable, "-m", "twinslot_server.move", str(data)]
    environment = {**os.environ, "TWINSLOT_DATABASE": url}
    raise typer.Exit(subprocess.call(command, env=environment))


@fleet.command()
def backup(
    data: Annotated[Path, typer.Argument(help="The server's private folder.")], to: Path
) -> None:
    """Copy a running server's database, certificate and hashed tokens into one file."""
    command = [sys.executable, "-m", "twinslot_server.backup", str(data), str(to)]
    raise typer.Exit(subprocess.call(command))


@fleet.command()
def sim(
    context: typer.Context,
    product: str,
    version: Annotated[str, typer.Argument(help="The release to roll out.")],
    hardware: Annotated[str, typer.Option("--hardware", "-H")] = "ESP32_GENERIC",
    boards: int = 1000,
    bad: Annotated[str, typer.Option(help="Share on which the release fails, as in 3%.")] = "0%",
    asleep: Annotated[str, typer.Option(help="Share that calls once and never again.")] = "0%",
    slow: Annotated[str, typer.Option(help="Share with slow links.")] = "0%",
    cut: Annotated[str, typer.Option(help="Share that loses power in mid-update.")] = "0%",
    poll: Annotated[float, typer.Option(help="Seconds between two polls of a board.")] = 10,
    device_token: Annotated[str, typer.Option(envvar="TWINSLOT_DEVICE_TOKEN")] = "",
    stage: Annotated[list[str] | None, typer.Option(help="As in rollout create.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="As in rollout create.")] = None,
    connections: int = 64,
    timeout: float = 1800,
    start_version: Annotated[str, typer.Option(help="What the boards run at first.")] = "0.0.1",
    real: Annotated[
        int, typer.Option(help="Virtual boards among them; they ask as often as the server says.")
    ] = 0,
    keys: Annotated[
        Path | None, typer.Option(help="What virtual boards trust: release.pub.json.")
    ] = None,
) -> None:
    """Roll a release out to simulated boards and compare, at the end, what each of them runs with
    what the server believes. `met` counts the boards that have started each version: never more
    than the stages so far hold and may update at once (at the end that is `bound`); `over` is by
    how many it was more, at worst. Exit code 1: they differ, it was, or it came to no end."""
    from .fake_device import Behaviour, Fleet, differences

    api: Api = context.obj
    if real and not (keys and api.ca):
        raise typer.BadParameter("--real needs --keys and --ca (or TWINSLOT_CA)")
    plan = stage or ["1%", "5%", "10%", "25%", "50%", "100%"]
    body = {
        "product": product,
        "version": version,
        "stages": [_stage(text) for text in plan],
        "policy": {"bake_s": 0, "max_concurrent": 500, "promote": False, **_policy(policy)},
    }
    behaviour = Behaviour(
        bad=_share(bad),
        asleep=_share(asleep),
        slow=_share(slow),
        cut=_share(cut),
        poll_s=poll,
    )

    async def play(extra: "RealBoards | None") -> dict[str, Any]:
        pool = Pool(api.url, connections, api.tls())
        simulated = Fleet(
            pool, device_token, product, hardware, boards, start_version, "0" * 64, behaviour
        )
        started = time.monotonic()
        done = asyncio.Event()
        running = asyncio.create_task(simulated.until(done))
        watching = _watch(api, body, boards + real, done, timeout, lambda: simulated.met(version))
        found = await asyncio.gather(running, watching)
        result = {**simulated.summary(time.monotonic() - started), **found[1]}
        # What was under way at the end has been finished since.
        result["over"] = max(result["over"], simulated.met(version) - result["bound"])
        await pool.close()
        everyone: list[Any] = [*simulated.boards]
        if extra:
            await asyncio.to_thread(extra.rest, _REST_S)
            everyone += extra.boards
            result["real"] = {board.device_id: board.state for board in extra.boards}
        known = await asyncio.to_thread(api.call, "GET", "export/devices")
        tried = await asyncio.to_thread(api.call, "GET", "export/attempts")
        wrong = differences(everyone, known, tried)
        return {**result, "differences": len(wrong), "examples": wrong[:10]}

    with contextlib.ExitStack() as stack:
        extra = None
        if real:
            assert keys and api.ca
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            settings = {"product": product, "url": api.url, "token": device_token}
            settings |= {"poll": max(1, round(poll)), "stable": 2, "deadline": 60}
            files = {"ca.pem": api.ca, "keys.json": keys}
            maker = _real_boards(folder, real, start_version, settings, files, hardware, timeout)
            extra = stack.enter_context(maker)
        result = run(play(extra))
    print_json(result)
    if result["differences"] or result["over"] or result["state"] not in ("complete", "paused"):
        raise typer.Exit(1)


def _real_boards(
    folder: Path,
    count: int,
    version: str,
    settings: dict[str, Any],
    files: dict[str, Path],
    hardware: str,
    limit_s: float,
) -> "RealBoards":
    from .lab import virtual_firmware
    from .real_boards import RealBoards

    image = virtual_firmware(folder, version, project=settings["product"])
    return RealBoards(folder, count, image, settings, files, hardware, limit_s)


def _share(text: str) -> float:
    value = float(text.removesuffix("%")) / 100
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text}: expected 0% to 100%")
    return value


async def _watch(
    api: Api,
    body: dict[str, Any],
    boards: int,
    done: asyncio.Event,
    limit_s: float,
    met: Callable[[], int],
) -> dict[str, Any]:
    """Wait for the boards to be known, roll out, wait for the end.

    ``met`` counts boards that have started the release, and is compared all the time with what the
    stages so far allow.
    """
    started = time.monotonic()
    over = 0
    try:
        made = await asyncio.to_thread(api.call, "POST", "rollouts", body)
        while made["preview"][-1] < boards and time.monotonic() - started < limit_s:
            await asyncio.sleep(1)
            made = await asyncio.to_thread(api.call, "GET", f"rollouts/{made['id']}")
        number = made["id"]
        talk.print(f"rollout {number} to {made['preview']} boards")
        await asyncio.to_thread(api.call, "POST", f"rollouts/{number}/start", {})
        seen = ""
        while True:
            so_far = met()  # looked at first: a stage that begins meanwhile only allows more
            found = await asyncio.to_thread(api.call, "GET", f"rollouts/{number}")
            bound = made["preview"][found["stage"]] + body["policy"]["max_concurrent"]
            over = max(over, so_far - bound)
            line = f"{found['state']} stage {found['stage'] + 1}: {found['why']}"
            if line != seen:
                talk.print(f"{time.monotonic() - started:6.1f} s  {line}")
                seen = line
            if found["state"] in ("complete", "paused", "aborted"):
                break
            if time.monotonic() - started > limit_s:
                break
            await asyncio.sleep(0.5)
    finally:
        done.set()
    return {
        "rollout": number,
        "state": found["state"],
        "stage": found["stage"] + 1,
        "why": found["why"],
        "planned": made["preview"],
        "bound": bound,
        "over": over,
    }
