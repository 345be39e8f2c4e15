"""``twinslot fleet window | schedule | label | filter | job | user | webhook``.

Rules, jobs and people: each is a list with what makes, and what removes, one of it; the server
judges what is asked for.
"""

import getpass
from typing import Annotated, Any

import typer

from . import passphrase
from .fleet_base import Json, cell, print_json, query, table

window = typer.Typer(help="When boards may download and install.", no_args_is_help=True)
schedule = typer.Typer(help="What the server does by itself, and when.", no_args_is_help=True)
label = typer.Typer(help="What labels there are, and what they are for.", no_args_is_help=True)
searches = typer.Typer(help="Searches for boards that have a name.", no_args_is_help=True)
job = typer.Typer(help="One release onto a list of boards at once.", no_args_is_help=True)
user = typer.Typer(help="People, and what they may do.", no_args_is_help=True)
webhook = typer.Typer(help="Who is told of what happens.", no_args_is_help=True)

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def add_to(fleet: typer.Typer) -> None:
    """Put the groups of this module into ``twinslot fleet``."""
    for group, name in (
        (window, "window"),
        (schedule, "schedule"),
        (label, "label"),
        (searches, "filter"),
        (job, "job"),
        (user, "user"),
        (webhook, "webhook"),
    ):
        fleet.add_typer(group, name=name)


def _list(context: typer.Context, path: str, member: str, columns: list[str], raw: bool) -> None:
    found = context.obj.call("GET", path)
    if raw:
        print_json(found)
    else:
        table(found[member], columns)


# ---- windows


@window.command("list")
def window_list(context: typer.Context, as_json: Json = False) -> None:
    """List maintenance windows."""
    found = context.obj.call("GET", "windows")
    if as_json:
        print_json(found)
        return
    rows = [{**w, "days": ",".join(_DAYS[day] for day in w["days"])} for w in found["windows"]]
    table(rows, ["id", "label", "kind", "days", "start", "end", "zone"])


@window.command("add")
def window_add(
    context: typer.Context,
    start: Annotated[str, typer.Argument(help="HH:MM")],
    end: Annotated[str, typer.Argument(help="HH:MM; on the next day, if not after START")],
    label: Annotated[str, typer.Option(help="key=value, or * for all boards.")] = "*",
    kind: Annotated[str, typer.Option(help="install or download")] = "install",
    zone: Annotated[str, typer.Option(help="As in Europe/Berlin.")] = "UTC",
    days: Annotated[str, typer.Option(help="As in mon,tue.")] = ",".join(_DAYS),
    as_json: Json = False,
) -> None:
    """Let boards download or install only between START and END."""
    body = {"label": label, "kind": kind, "zone": zone, "start": start, "end": end}
    made = context.obj.call("POST", "windows", {**body, "days": _days(days)})
    _made(made, f"window {made['id']}", as_json)


def _days(text: str) -> list[int]:
    unknown = [day for day in text.split(",") if day not in _DAYS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: expected some of {','.join(_DAYS)}")
    return [_DAYS.index(day) for day in text.split(",")]


@window.command("remove")
def window_remove(context: typer.Context, number: int) -> None:
    """Remove a window."""
    context.obj.call("DELETE", f"windows/{number}")
    print(f"window {number} removed")


def _made(made: dict[str, Any], says: str, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        print(says)


# ---- schedules


@schedule.command("list")
def schedule_list(context: typer.Context, as_json: Json = False) -> None:
    """List schedules, and what came of their last run."""
    columns = ["id", "name", "cron", "zone", "action", "source", "last_run", "last_result"]
    _list(context, "schedules", "schedules", columns, as_json)


@schedule.command("add")
def schedule_add(
    context: typer.Context,
    name: str,
    cron: Annotated[str, typer.Argument(help='As in "0 9 * * mon".')],
    do: Annotated[str, typer.Argument(help="As in start_rollout, gc.")],
    rollout: Annotated[int | None, typer.Option(help="Its number.")] = None,
    zone: Annotated[str, typer.Option(help="As in Europe/Berlin.")] = "UTC",
    as_json: Json = False,
) -> None:
    """Make a schedule, or replace the one of that name."""
    action = {"do": do} if rollout is None else {"do": do, "rollout": rollout}
    body = {"name": name, "cron": cron, "zone": zone, "action": action}
    made = context.obj.call("POST", "schedules", body)
    _made(made, f"schedule {made['id']} {name}", as_json)


@schedule.command("remove")
def schedule_remove(context: typer.Context, number: int) -> None:
    """Remove a schedule; one of the server's file comes back at its next start."""
    context.obj.call("DELETE", f"schedules/{number}")
    print(f"schedule {number} removed")


# ---- labels


@label.command("list")
def label_list(context: typer.Context, as_json: Json = False) -> None:
    """List labels, how many boards have each value, and what they are for."""
    _list(context, "labels", "labels", ["key", "values", "description"], as_json)


@label.command()
def describe(context: typer.Context, key: str, text: str) -> None:
    """Say what a label is for."""
    print(cell(context.obj.call("PUT", f"labels/{key}", {"description": text})))


# ---- filters


@searches.command("list")
def filter_list(context: typer.Context, as_json: Json = False) -> None:
    """List filters, and how many boards each finds."""
    _list(context, "filters", "filters", ["name", "query", "devices"], as_json)


@searches.command("save")
def filter_save(
    context: typer.Context,
    name: str,
    label: Annotated[str, typer.Option(help="key=value")] = "",
    status: str = "",
    product: str = "",
    hardware: str = "",
    version: str = "",
    enrolment: Annotated[str, typer.Option(help="pending, accepted, decommissioned")] = "",
    search: Annotated[str, typer.Option(help="Part of an id or MAC.")] = "",
    as_json: Json = False,
) -> None:
    """Give a search for boards a name, for `device list --filter NAME` and the page."""
    body = {"label": label, "status": status, "product": product, "hardware": hardware}
    body |= {"version": version, "enrolment": enrolment, "q": search}
    made = context.obj.call("PUT", f"filters/{name}", body)
    _made(made, f"filter {name} finds {made['devices']}", as_json)


@searches.command("remove")
def filter_remove(context: typer.Context, name: str) -> None:
    """Forget a filter."""
    context.obj.call("DELETE", f"filters/{name}")
    print(f"filter {name} removed")


# ---- jobs


@job.command("list")
def job_list(
    context: typer.Context,
    status: Annotated[str, typer.Option(help="As in pending, in_progress, failed.")] = "",
    as_json: Json = False,
) -> None:
    """List update jobs."""
    path = f"ota/updates?{query(status=status)}"
    columns = ["id", "product", "version", "status", "target", "force_update", "created"]
    _list(context, path, "updates", columns, as_json)


@job.command("pending")
def job_pending(
    context: typer.Context,
    gateway: Annotated[str, typer.Option(help="Only boards labelled gateway=ID.")] = "",
    as_json: Json = False,
) -> None:
    """What a gateway has to do."""
    path = f"ota/updates/pending?{query(gateway=gateway)}"
    _list(context, path, "updates", ["id", "product", "version", "nodes"], as_json)


@job.command("create")
def job_create(
    context: typer.Context,
    number: Annotated[int, typer.Argument(help="Of the release, as release list shows it.")],
    node: Annotated[list[str] | None, typer.Option(help="A board's id (repeatable).")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value (repeatable).")] = None,
    node_type: Annotated[str, typer.Option(help="Boards labelled node_type=TYPE.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Past windows and failures.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many.")] = False,
    as_json: Json = False,
) -> None:
    """Offer a release to these boards, or to all."""
    if dry_run:
        wanted = [*(label or ()), *([f"node_type={node_type}"] if node_type else [])]
        labels = "&".join(query(label=text) for text in wanted)
        found = context.obj.call("GET", f"firmware/{number}/reach?{labels}")
        print(f"boards to move: {len(node) if node else found['devices']}")
        return
    target: dict[str, Any] = {"label": label or []}
    if node:
        target["nodes"] = node
    if node_type:
        target["node_type"] = node_type
    body = {"firmware_id": number, "target": target, "force_update": force}
    _show_job(context.obj.call("POST", "ota/updates", body), as_json)


@job.command("show")
def job_show(context: typer.Context, number: int, as_json: Json = False) -> None:
    """Show how far each board of a job is."""
    _show_job(context.obj.call("GET", f"ota/updates/{number}"), as_json)


@job.command("cancel")
def job_cancel(context: typer.Context, number: int, as_json: Json = False) -> None:
    """Offer it to nobody more; boards in the middle of it finish."""
    _show_job(context.obj.call("DELETE", f"ota/updates/{number}"), as_json)


@job.command("progress")
def job_progress(
    context: typer.Context,
    number: int,
    node: str,
    part: Annotated[int, typer.Option(help="Parts it has.")] = 0,
    status: Annotated[str, typer.Option(help="in_progress, completed, failed")] = "in_progress",
    error: str = "",
) -> None:
    """Say for a gateway how far one of its boards is."""
    body = {"node_id": node, "current_part": part, "status": status}
    body |= {"error_message": error} if error else {}
    print(context.obj.call("POST", f"ota/updates/{number}/progress", body)["status"])


def _show_job(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print(f"job {found['id']} {found['product']} {found['version']}: {found['status']}")
    table(found["nodes"], ["node_id", "status", "current_part", "total_parts", "error_message"])


# ---- people, and the world outside


@user.command("list")
def user_list(context: typer.Context, as_json: Json = False) -> None:
    """List people and their roles."""
    _list(context, "users", "users", ["name", "role", "password", "created"], as_json)


@user.command("set")
def user_set(
    context: typer.Context,
    name: str,
    role: Annotated[str, typer.Argument(help="viewer, operator or admin")],
    password: Annotated[
        bool, typer.Option("--password", help="Ask for one, for the page.")
    ] = False,
    password_fd: Annotated[
        int | None, typer.Option(help="Read it from this file descriptor.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make somebody known, or change them; prints their new API token, this once."""
    body = {"role": role}
    if password_fd is not None:
        body["password"] = passphrase.from_fd(password_fd).decode()
    elif password:
        body["password"] = getpass.getpass(f"Password of {name}: ")
    made = context.obj.call("PUT", f"users/{name}", body)
    _made(made, made["token"], as_json)


@user.command("remove")
def user_remove(context: typer.Context, name: str) -> None:
    """Remove somebody; their token and sessions end."""
    context.obj.call("DELETE", f"users/{name}")
    print(f"{name} removed")


@webhook.command("list")
def webhook_list(context: typer.Context, as_json: Json = False) -> None:
    """List webhooks, and how many deliveries were given up."""
    found = context.obj.call("GET", "webhooks")
    if as_json:
        print_json(found)
        return
    rows = [{**row, "given_up": len(row["dead"])} for row in found["webhooks"]]
    table(rows, ["id", "url", "events", "given_up"])


@webhook.command("add")
def webhook_add(
    context: typer.Context,
    url: str,
    event: Annotated[list[str] | None, typer.Option(help="As in rollout.* (repeatable).")] = None,
    as_json: Json = False,
) -> None:
    """Tell URL of events; prints the secret that signs them, this once."""
    made = context.obj.call("POST", "webhooks", {"url": url, "events": event or ["*"]})
    _made(made, made["secret"], as_json)


@webhook.command("remove")
def webhook_remove(context: typer.Context, number: int) -> None:
    """Remove a webhook and what it has not delivered."""
    context.obj.call("DELETE", f"webhooks/{number}")
    print(f"webhook {number} removed")
