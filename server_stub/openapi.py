"""The OpenAPI document: what FastAPI knows of the routes, and what it can't know.

Bodies are parsed by hand, after the token, so that a stranger learns nothing of their shape;
refusals are made by handlers; the token is looked up by a dependency. All three are told here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from twinslot import __version__

from . import answers, api_admin, api_firmware, api_fleet, api_rollouts, messages

_REF = "#/components/schemas/{model}"
_STRING = {"type": "string"}
_BYTES = {"type": "string", "contentMediaType": "application/octet-stream"}

# By the names of the functions that answer.
_ANSWERS = {
    "check_update": answers.Offer,
    "report_status": answers.Ok,
    "fleet": answers.Fleet,
    "list_devices": answers.Devices,
    "import_devices": answers.Imported,
    "accept_devices": answers.Accepted,
    "device": answers.DeviceDetail,
    "explain": answers.Explained,
    "change_device": answers.DeviceDetail,
    "decommission": answers.DeviceDetail,
    "new_token": answers.DeviceToken,
    "labels": answers.LabelUses,
    "describe_label": answers.Label,
    "list_filters": answers.Filters,
    "save_filter": answers.Filter,
    "remove_filter": answers.Removed,
    "read_audit": answers.AuditLines,
    "upload": answers.Firmware,
    "list_firmware": answers.Firmwares,
    "firmware": answers.Firmware,
    "reach": answers.Reach,
    "change_firmware": answers.Firmware,
    "promote": answers.Promoted,
    "remove": answers.Removed,
    "collect": answers.Collected,
    "create_update": answers.Job,
    "list_updates": answers.Jobs,
    "pending_updates": answers.PendingJobs,
    "get_update": answers.Job,
    "cancel_update": answers.Job,
    "progress": answers.NodeStatus,
    "list_rollouts": answers.Rollouts,
    "create_rollout": answers.Rollout,
    "get_rollout": answers.Rollout,
    "change_rollout": answers.Rollout,
    "send_back": answers.Rollout,
    "act": answers.Rollout,
    "list_windows": answers.Windows,
    "create_window": answers.Window,
    "remove_window": answers.Removed,
    "list_schedules": answers.Schedules,
    "create_schedule": answers.Schedule,
    "remove_schedule": answers.Removed,
    "read_settings": answers.Settings,
    "change_settings": answers.Settings,
    "list_users": answers.Users,
    "set_user": answers.UserToken,
    "remove_user": answers.Removed,
    "list_webhooks": answers.Webhooks,
    "create_webhook": answers.NewHook,
    "remove_webhook": answers.Removed,
}
_BODIES = {
    "check_update": messages.CheckUpdate,
    "report_status": messages.ReportStatus,
    "change_device": api_fleet.ChangeDevice,
    "describe_label": api_fleet.DescribeLabel,
    "save_filter": api_fleet.Search,
    "change_firmware": api_firmware.ChangeFirmware,
    "promote": api_firmware.Promote,
    "create_update": api_firmware.NewUpdate,
    "progress": api_firmware.NodeProgress,
    "create_rollout": api_rollouts.NewRollout,
    "change_rollout": api_rollouts.ChangeRollout,
    "send_back": api_rollouts.SendBack,
    "act": api_rollouts.Why,
    "create_window": api_rollouts.NewWindow,
    "create_schedule": api_rollouts.NewSchedule,
    "set_user": api_admin.NewUser,
    "create_webhook": api_admin.NewWebhook,
}
_UPLOAD = {
    "type": "object",
    "required": ["release"],
    "properties": {
        "release": _BYTES,
        "file": {"type": "array", "items": _BYTES},
        "channel": _STRING,
        "notes": _STRING,
    },
}
_OTHER_BODIES = {
    "upload": {"multipart/form-data": {"schema": _UPLOAD}},
    "import_devices": {"text/csv": {"schema": _STRING}},
}
_EXPORT = {
    "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
    "text/csv": {"schema": _STRING},
}
_REFUSALS = {
    400: "not HTTP as it should be",
    401: "no valid token of the right kind",
    403: "the token's role may not",
    404: "there is no such thing",
    408: "the body did not arrive in time",
    409: "not in this state",
    413: "too large",
    422: "malformed",
    503: "busy; Retry-After says when to come again",
    507: "no space left for it",
}
_OF_READING = (401, 403, 422, 503)


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of ``app``.

    Raises:
        KeyError: a route that is not told of here.
    """
    made = get_openapi(title=app.title, version=__version__, routes=app.routes)
    models = [*_ANSWERS.values(), *_BODIES.values(), answers.Refusal]
    _, shapes = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
    made["components"] = {
        "schemas": shapes["$defs"],
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    made["security"] = [{"token": []}]
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in route.methods:
                _tell(made["paths"][route.path_format][method.lower()], route, method)
    return made


def _tell(operation: dict[str, Any], route: APIRoute, method: str) -> None:
    name = route.name
    operation["operationId"] = name
    if name in _BODIES or name in _OTHER_BODIES:
        content = _OTHER_BODIES.get(name) or {"application/json": _schema(_BODIES[name])}
        operation["requestBody"] = {"required": True, "content": content}
    codes = set(_REFUSALS if method != "GET" else _OF_READING)
    if "{" in route.path_format or name == "list_devices":  # that names a filter
        codes.add(404)
    responses = {str(code): _refusal(code) for code in sorted(codes)}
    responses.update(_good(name, route.status_code or 200))
    operation["responses"] = responses


def _good(name: str, status: int) -> dict[str, Any]:
    if name == "download":
        return {"302": {"description": "where the payload lies"}}
    if name == "export":
        return {"200": {"description": "all there is", "content": _EXPORT}}
    content = {"application/json": _schema(_ANSWERS[name])}
    found: dict[str, Any] = {str(status): {"description": "done", "content": content}}
    if name == "upload":
        found["200"] = {"description": "it was there already", "content": content}
    if name == "check_update":
        found["304"] = {"description": "the answer has the ETag of If-None-Match"}
    return found


def _schema(model: type) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}


def _refusal(code: int) -> dict[str, Any]:
    content = {"application/problem+json": _schema(answers.Refusal)}
    return {"description": _REFUSALS[code], "content": content}
