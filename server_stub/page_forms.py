"""The page's forms: each does one change, by the function that does it for the API.

A form is a path, the line it leaves in the audit log, the role it needs, and its work. The work
returns what is shown this once (a new token), or nothing: then the browser goes on to ``back``.
"""

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection

from . import api_admin, api_firmware, api_fleet, api_rollouts, releases, rollouts
from .http import Note, Parts, change, checked, form_of
from .messages import Name
from .page_base import Guard, Renderer, fields, same_page, who
from .problems import Problem
from .settings import Changes

IMPORT = "/-/devices-import"
UPLOAD = "/-/releases-upload"

Fields = Mapping[str, str]
At = Mapping[str, Any]
Once = tuple[str, str] | None  # what it is, and the text to be copied now
Work = Callable[[Connection, Note, Fields, At], Any]

_POLICY = {
    "success_percent": float,
    "failure_percent": float,
    "min_sample": int,
    "bake_s": int,
    "max_concurrent": int,
    "timeout_s": int,
    "seen_within_s": int,
    "deadline_s": int,
}


@dataclass(frozen=True)
class _Form:
    path: str
    action: str
    back: str
    work: Work
    role: str = "operator"


def add_routes(app: FastAPI, parts: Parts, render: Renderer, guard: Guard) -> None:
    for form in (
        *_device_forms(parts),
        *_release_forms(parts),
        *_rollout_forms(),
        *_others(parts),
    ):
        _add(app, parts, render, guard, form)

    @app.post(UPLOAD, include_in_schema=False)
    async def upload(request: Request) -> Response:
        session = await guard.role(request, "operator")
        async with form_of(request, max_files=api_firmware.MAX_FILES) as form:
            same_page(session, form)
            await api_firmware.upload_one(parts, who(session), form)
        return RedirectResponse("/-/releases", 303)


def _add(app: FastAPI, parts: Parts, render: Renderer, guard: Guard, form: _Form) -> None:
    async def handle(request: Request) -> Response:
        session = await guard.role(request, form.role)
        async with form_of(request, max_files=1, max_fields=40) as sent:
            same_page(session, sent)
            values = await fields(sent)
        at = request.path_params
        once = await change(
            parts,
            who(session),
            form.action.format(**at),
            lambda c, note: form.work(c, note, values, at),
        )
        back = form.back.format(**at)
        if once is None:
            return RedirectResponse(back, 303)
        return render("once.html", session, what=once[0], text=once[1], back=back)

    app.post(form.path, include_in_schema=False)(handle)


# ---- devices


def _device_forms(parts: Parts) -> list[_Form]:
    def change_device(c: Connection, note: Note, values: Fields, at: At) -> None:
        api_fleet.change_one(c, note, at["device_id"], _device_change(values))

    def accept(c: Connection, note: Note, values: Fields, _: At) -> None:
        names = ("label", "product", "hardware", "version", "q")
        like = {n: values.get(n, "") for n in names}
        wanted = checked(api_fleet.AcceptDevices, {**like, "all": True})
        api_fleet.accept_all(c, note, wanted)

    def save_filter(c: Connection, note: Note, values: Fields, _: At) -> None:
        found = {n: values[n] for n in api_fleet.Search.model_fields if n in values}
        wanted = checked(api_fleet.Search, found)
        api_fleet.save_filter_one(c, note, _name(values.get("name", "")), wanted)

    def remove_filter(c: Connection, note: Note, _: Fields, at: At) -> None:
        api_fleet.remove_filter_one(c, note, at["name"])

    def retire(c: Connection, note: Note, _: Fields, at: At) -> None:
        api_fleet.decommission_one(c, note, at["device_id"])

    def token(c: Connection, note: Note, _: Fields, at: At) -> Once:
        made = api_fleet.new_token_one(c, note, at["device_id"])
        return f"Token of {made['device_id']}", made["token"]

    def import_csv(c: Connection, note: Note, values: Fields, _: At) -> Once:
        found = api_fleet.import_all(c, note, parts, values.get("file", ""))
        lines = [f"{device_id},{token}" for device_id, token in found["tokens"].items()]
        return (f"Tokens of {len(lines)} devices", "\n".join(lines)) if lines else None

    one = "/-/devices/{device_id}"
    return [
        _Form(one, "device.change", one, change_device),
        _Form(one + "/retire", "device.decommission", one, retire),
        _Form(one + "/token", "device.token", one, token),
        _Form("/-/devices-accept", "device.accept", "/-/devices", accept),
        _Form(IMPORT, "device.import", "/-/devices", import_csv),
        _Form("/-/filters", "filter.save", "/-/devices", save_filter),
        _Form("/-/filters/{name}/remove", "filter.remove", "/-/devices", remove_filter),
    ]


def _device_change(values: Fields) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if values.get("enrolment") in ("pending", "accepted"):
        wanted["enrolment"] = values["enrolment"]
    if "pin" in values:
        wanted["pin"] = values["pin"].strip()[:64] or None
    if key := values.get("key", "").strip():
        wanted["labels"] = {key: values.get("value", "").strip() or None}
    return wanted


# ---- releases


def _release_forms(parts: Parts) -> list[_Form]:
    def change_release(c: Connection, note: Note, values: Fields, at: At) -> None:
        api_firmware.change_one(c, note, at["number"], _release_change(values))

    def promote(c: Connection, note: Note, values: Fields, at: At) -> None:
        wanted = checked(api_firmware.Promote, {"channel": values.get("channel", "")})
        api_firmware.promote_one(c, note, parts, at["number"], wanted.channel)

    def remove(c: Connection, note: Note, _: Fields, at: At) -> None:
        api_firmware.remove_one(c, note, parts, at["number"])

    def collect(_: Connection, note: Note, __: Fields, ___: At) -> None:
        api_firmware.collect_one(note, parts)

    one, back = "/-/releases/{number:int}", "/-/releases"
    return [
        _Form(one, "firmware.change", back, change_release),
        _Form(one + "/promote", "firmware.promote", back, promote),
        _Form(one + "/remove", "firmware.remove", back, remove),
        _Form("/-/releases-collect", "firmware.gc", "/-/logs", collect, "admin"),
    ]


def _release_change(values: Fields) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        name: values[name] == "yes" for name in releases.FLAGS if name in values
    }
    if "notes" in values:
        wanted["notes"] = values["notes"].strip()[:2048]
    if "blocked" in values:
        wanted["blocked"] = values["blocked"].strip()[:300] or None
    return wanted


# ---- rollouts


def _rollout_forms() -> list[_Form]:
    def create(c: Connection, note: Note, values: Fields, _: At) -> None:
        api_rollouts.create_one(c, note, _new_rollout(values))

    def act(c: Connection, note: Note, values: Fields, at: At) -> None:
        if at["action"] not in rollouts.ACTIONS:
            raise Problem(404, "not_found", "no such action")
        why = values.get("why", "")[:300]
        api_rollouts.act_one(c, note, at["number"], at["action"], why)

    def back(c: Connection, note: Note, values: Fields, at: At) -> None:
        wanted = checked(api_rollouts.SendBack, {"version": values.get("version", "")})
        api_rollouts.back_one(c, note, at["number"], wanted)

    def target(c: Connection, note: Note, values: Fields, at: At) -> None:
        label = _words(values.get("label", ""))
        wanted = checked(api_rollouts.ChangeRollout, {"target": {"label": label}})
        api_rollouts.change_one(c, note, at["number"], wanted)

    def policy(c: Connection, note: Note, values: Fields, at: At) -> None:
        wanted = checked(api_rollouts.ChangeRollout, {"policy": _policy(values)})
        api_rollouts.change_one(c, note, at["number"], wanted)

    one, shown = "/-/rollouts/{number:int}", "/-/rollouts/{number}"
    return [
        _Form("/-/rollouts", "rollout.create", "/-/rollouts", create),
        _Form(one + "/back", "rollout.back", "/-/rollouts", back),
        _Form(one + "/target", "rollout.change", shown, target),
        _Form(one + "/policy", "rollout.change", shown, policy),
        _Form(one + "/{action}", "rollout.{action}", shown, act),
    ]


def _new_rollout(values: Fields) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "firmware_id": _number("release", values.get("firmware_id", ""), int),
        "name": values.get("name", ""),
        "policy": _policy(values),
        "start": "start" in values,
    }
    if stages := values.get("stages", "").split(","):
        wanted["stages"] = [stage_of(text.strip()) for text in stages if text.strip()]
    if label := _words(values.get("label", "")):
        wanted["target"] = {"label": label}
    if starts := values.get("starts_at"):
        wanted["starts_at"] = dt.datetime.fromisoformat(starts).replace(tzinfo=dt.UTC).isoformat()
    return checked(api_rollouts.NewRollout, wanted).model_dump()


def _policy(values: Fields) -> dict[str, Any]:
    numbers = {
        name: _number(name, values[name], kind)
        for name, kind in _POLICY.items()
        if values.get(name, "").strip()
    }
    return numbers | {n: values.get(n) == "yes" for n in ("gate", "include_new", "promote")}


def stage_of(text: str) -> dict[str, Any]:
    """A stage as people write it: ``5%``, ``20`` boards, ``ring=pilot``."""
    if text.endswith("%"):
        return {"percent": _number("stage", text[:-1], float)}
    return {"count": int(text)} if text.isdigit() else {"label": text}


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise Problem(422, "malformed", f"{name}: expected a number, saw {text[:32]!r}") from None
    return int(value) if value == value // 1 else value


def _name(text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise Problem(422, "malformed", f"{text[:32]!r}: not a name") from None


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


# ---- jobs, labels, windows, schedules, people


def _others(parts: Parts) -> list[_Form]:
    def settings(c: Connection, note: Note, values: Fields, _: At) -> None:
        wanted = checked(Changes, _settings(values))
        api_admin.change_settings_one(c, note, parts, wanted)

    return [
        _Form("/-/settings", "settings.change", "/-/rules", settings, "admin"),
        _Form("/-/updates", "update.create", "/-/updates", _create_update),
        _Form(
            "/-/updates/{number:int}/cancel",
            "update.cancel",
            "/-/updates/{number}",
            _cancel_update,
        ),
        _Form("/-/labels", "label.describe", "/-/rules", _describe_label),
        _Form("/-/windows", "window.create", "/-/rules", _create_window),
        _Form("/-/windows/{number:int}/remove", "window.remove", "/-/rules", _remove_window),
        _Form("/-/schedules", "schedule.create", "/-/rules", _create_schedule),
        _Form("/-/schedules/{number:int}/remove", "schedule.remove", "/-/rules", _remove_schedule),
        _Form("/-/users", "user.set", "/-/people", _set_user, "admin"),
        _Form("/-/users/{name}/remove", "user.remove", "/-/people", _remove_user, "admin"),
        _Form("/-/webhooks", "webhook.create", "/-/people", _create_webhook, "admin"),
        _Form(
            "/-/webhooks/{number:int}/remove",
            "webhook.remove",
            "/-/people",
            _remove_webhook,
            "admin",
        ),
    ]


def _settings(values: Fields) -> dict[str, Any]:
    """Labels as lines of ``key=value seconds``, rules as lines of ``product=... hardware=...``."""
    if "default" not in values:
        return {"poll": None, "enrolment": None}
    lines = {n: values.get(n, "").strip().splitlines() for n in ("labels", "accept")}
    labels = [line.strip().rpartition(" ") for line in lines["labels"] if line.strip()]
    rules = [line.split() for line in lines["accept"] if line.strip()]
    return {
        "poll": {
            "default": _number("default", values["default"], int),
            "labels": {label.strip(): _number(label, text, int) for label, _, text in labels},
        },
        "enrolment": {
            "default": values.get("enrolment", ""),
            "accept": [dict(word.partition("=")[::2] for word in words) for words in rules],
        },
    }


def _create_update(c: Connection, note: Note, values: Fields, _: At) -> None:
    target: dict[str, Any] = {"label": _words(values.get("label", ""))}
    if nodes := _words(values.get("nodes", "")):
        target["nodes"] = nodes
    wanted = {
        "firmware_id": _number("release", values.get("firmware_id", ""), int),
        "target": target,
        "force_update": values.get("force_update") == "yes",
    }
    api_firmware.create_update_one(c, note, checked(api_firmware.NewUpdate, wanted))


def _cancel_update(c: Connection, note: Note, _: Fields, at: At) -> None:
    api_firmware.cancel_update_one(c, note, at["number"])


def _describe_label(c: Connection, note: Note, values: Fields, _: At) -> None:
    wanted = checked(api_fleet.DescribeLabel, {"description": values.get("description", "")})
    key = _name(values.get("key", ""))
    api_fleet.describe_label_one(c, note, key, wanted.description[:500])


def _create_window(c: Connection, note: Note, values: Fields, _: At) -> None:
    wanted = {name: values.get(name, "") for name in ("label", "kind", "zone", "start", "end")}
    days = [day for day in range(7) if values.get(f"day{day}") == "yes"]
    wanted = checked(api_rollouts.NewWindow, {**wanted, "days": days})
    api_rollouts.create_window_one(c, note, wanted)


def _remove_window(c: Connection, note: Note, _: Fields, at: At) -> None:
    api_rollouts.remove_window_one(c, note, at["number"])


def _create_schedule(c: Connection, note: Note, values: Fields, _: At) -> None:
    action: dict[str, Any] = {"do": values.get("do", "")}
    if rollout := values.get("rollout", "").strip():
        action["rollout"] = _number("rollout", rollout, int)
    wanted = {name: values.get(name, "") for name in ("name", "cron", "zone")}
    wanted = checked(api_rollouts.NewSchedule, {**wanted, "action": action})
    api_rollouts.create_schedule_one(c, note, wanted)


def _remove_schedule(c: Connection, note: Note, _: Fields, at: At) -> None:
    api_rollouts.remove_schedule_one(c, note, at["number"])


def _set_user(c: Connection, note: Note, values: Fields, _: At) -> Once:
    password = values.get("password") or None
    wanted = checked(api_admin.NewUser, {"role": values.get("role", ""), "password": password})
    name = _name(values.get("name", ""))
    made = api_admin.set_user_one(c, note, name, wanted)
    return f"API token of {name}", made["token"]


def _remove_user(c: Connection, note: Note, _: Fields, at: At) -> None:
    api_admin.remove_user_one(c, note, at["name"])


def _create_webhook(c: Connection, note: Note, values: Fields, _: At) -> Once:
    events = _words(values.get("events", "")) or ["*"]
    wanted = checked(api_admin.NewWebhook, {"url": values.get("url", ""), "events": events})
    made = api_admin.create_webhook_one(c, note, wanted)
    return "Secret of the webhook", made["secret"]


def _remove_webhook(c: Connection, note: Note, _: Fields, at: At) -> None:
    api_admin.remove_webhook_one(c, note, at["number"])
