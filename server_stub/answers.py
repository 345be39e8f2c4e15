"""What the API answers, for its OpenAPI document; tests hold the server to it.

Nothing here runs when a request is answered: a board's poll is not held up by a description.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .messages import Status

Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]  # RFC 3339
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Refusal(_Answer):
    """RFC 9457, with one stable word in ``code``."""

    type: str
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    code: str
    detail: str


class Share(_Answer):
    percent: float
    seed: str


class Offer(_Answer):
    """What a board is told; without ``release`` there is nothing to do, for ``reason``."""

    update_available: bool
    poll: Annotated[int, Field(ge=1)]  # seconds
    keyring: int = 0
    reason: str = ""
    release: str = ""
    rollout: Share | None = None
    install: Annotated[int, Field(ge=1)] | None = None  # seconds until it may be installed


class Ok(_Answer):
    ok: Literal[True]


class Device(_Answer):
    device_id: str
    mac: str | None
    product: str | None
    channel: str | None
    hardware: str | None
    chip_id: int | None
    current_version: str | None
    current_build: str | None
    agent: str | None
    micropython: str | None
    labels: list[str]
    status: str | None
    status_version: str | None
    first_seen: Date | None
    last_seen: Date | None
    staged: str | None
    flash: int | None
    free: int | None
    reset_cause: str | None
    address: str | None
    enrolment: Literal["pending", "accepted", "decommissioned"]
    own_token: bool
    pin: str | None


class Devices(_Answer):
    devices: list[Device]
    next: str | None


class Query(_Answer):
    label: str = ""
    product: str = ""
    hardware: str = ""
    version: str = ""
    q: str = ""
    status: str = ""
    enrolment: str = ""


class Filter(_Answer):
    name: str
    query: Query
    devices: int  # that it finds now


class Filters(_Answer):
    filters: list[Filter]


class Report(_Answer):
    attempt: str
    version: str | None
    build: str | None
    status: Status
    error: dict[str, Any] | None
    bytes: int | None
    received: Date
    log: str | None


class Attempt(_Answer):
    id: int
    device_id: str
    attempt: str | None
    build: str
    version: str | None
    from_build: str | None
    from_version: str | None
    origin: Literal["pin", "job", "rollout", "channel", "board"]
    rollout_id: int | None
    job_id: int | None
    state: str
    reason: str | None
    presumed: bool
    said_confirmed: bool
    polled_new: Date | None
    waits_until: Date | None
    bytes: int | None
    offered: Date
    updated: Date
    ended: Date | None


class DeviceDetail(Device):
    tags: dict[str, str]
    history: list[Report]
    attempts: list[Attempt]


class Explained(_Answer):
    device_id: str
    update_available: bool
    reason: str
    sentence: str
    release: str | None
    version: str | None
    origin: str | None
    install_in_s: int
    notes: list[str]


class Imported(_Answer):
    imported: int
    new: int
    tokens: dict[str, str]


class Accepted(_Answer):
    accepted: int


class DeviceToken(_Answer):
    device_id: str
    token: str


class Label(_Answer):
    key: str
    description: str


class LabelUse(Label):
    values: dict[str, int]


class LabelUses(_Answer):
    labels: list[LabelUse]


class AuditLine(_Answer):
    id: int
    at: Date
    who: str
    role: str
    action: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditLines(_Answer):
    audit: list[AuditLine]


class Firmware(_Answer):
    id: int
    product: str
    version: str
    hardware: list[str]
    channel: str  # that it is meant for
    channels: list[str]  # that have named it: there it may stand in for a blocked one
    chip_id: int
    build: str
    size: int
    sha256: Hex
    md5: str | None
    security_version: int
    downgrade: bool
    expires: Date | None
    notes: str
    release: str
    payloads: list[str]
    pilot_ready: bool
    stable: bool
    blocked: str | None
    created: Date


class Firmwares(_Answer):
    firmware: list[Firmware]


class Reach(_Answer):
    devices: int


class Promoted(_Answer):
    product: str
    channel: str
    release: str


class Removed(_Answer):
    removed: int | str


class Collected(_Answer):
    removed: int
    bytes: int


class Node(_Answer):
    node_id: str
    status: str
    current_part: int
    total_parts: int
    error_message: str | None
    updated: Date


class _Job(_Answer):
    id: int
    firmware_id: int
    product: str
    version: str
    size: int
    sha256: Hex
    md5: str | None
    release: str
    payloads: list[str]
    target: dict[str, Any]
    force_update: bool
    status: Literal["pending", "in_progress", "completed", "failed", "cancelled"]
    nodes_by_status: dict[str, int]
    created: Date


class Job(_Job):
    nodes: list[Node]


class Jobs(_Answer):
    updates: list[_Job]


class PendingJob(_Job):
    nodes: list[str]


class PendingJobs(_Answer):
    updates: list[PendingJob]


class NodeStatus(_Answer):
    ok: Literal[True]
    status: str


class RolloutCounts(_Answer):
    members: int
    confirmed: int
    failed: int
    rolledback: int
    in_flight: int
    waiting: int


class Rollout(_Answer):
    id: int
    name: str
    release_id: int
    product: str
    version: str
    channel: str
    state: Literal["draft", "pilot", "expand", "complete", "paused", "aborted"]
    resume_state: str | None
    stage: int
    stage_started: Date | None
    passed_at: Date | None
    gate_open: bool
    policy: dict[str, float | bool]
    stages: list[dict[str, float | str]]
    target: dict[str, Any]
    seed: str
    starts_at: Date | None
    why: str
    created: Date
    updated: Date
    counts: RolloutCounts
    promotes: str | None  # the channel that points to the release in the end
    preview: list[int] = []


class Rollouts(_Answer):
    rollouts: list[Rollout]


class Grouped(_Answer):
    value: str | None
    boards: int


class Fleet(_Answer):
    total: int
    seen: int  # within a day
    pending: int
    versions: list[Grouped]
    statuses: list[Grouped]
    rollouts: list[Rollout]


class Window(_Answer):
    id: int
    label: str
    kind: Literal["download", "install"]
    zone: str
    days: list[int]
    start: str
    end: str


class Windows(_Answer):
    windows: list[Window]


class Schedule(_Answer):
    id: int
    name: str
    cron: str
    zone: str
    action: dict[str, Any]


class ScheduleRun(Schedule):
    source: Literal["api", "file"]
    created: Date | None
    last_run: Date | None
    last_result: str | None


class Schedules(_Answer):
    schedules: list[ScheduleRun]


class User(_Answer):
    name: str
    role: Literal["viewer", "operator", "admin"]
    password: bool
    created: Date


class Intervals(_Answer):
    default: int  # seconds
    labels: dict[str, int]


class Enrolment(_Answer):
    default: Literal["accepted", "pending"]
    accept: list[dict[str, str]]


class Settings(_Answer):
    poll: Intervals
    enrolment: Enrolment
    downloads: Literal["public", "token"]
    payload_url: str | None
    firmware_bytes: int
    keep_days: int
    set: list[str]  # members that stand in place of the configuration's


class Users(_Answer):
    users: list[User]


class UserToken(_Answer):
    name: str
    role: Literal["viewer", "operator", "admin"]
    token: str


class _Hook(_Answer):
    id: int
    url: str
    events: list[str]


class NewHook(_Hook):
    secret: str


class DeadDelivery(_Answer):
    body: str
    error: str | None


class Webhook(_Hook):
    created: Date
    dead: list[DeadDelivery]


class Webhooks(_Answer):
    webhooks: list[Webhook]
