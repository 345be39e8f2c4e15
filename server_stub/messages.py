"""The shapes of what boards send: bounded, typed, and blind to members not known here.

A newer agent may say more than this server understands; that must never cost it an update.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
)

DEVICE_ID = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$"
_MESSAGE_CHARS = 500
LOG_CHARS = 4096

DeviceId = Annotated[str, StringConstraints(pattern=DEVICE_ID), Field(examples=["attic"])]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, StringConstraints(max_length=64)]
LongText = Annotated[str, StringConstraints(max_length=200)]
LabelText = Annotated[str, StringConstraints(pattern=r"^[^=]{1,64}=.{0,64}$")]  # key=value
Id = Annotated[int, Field(ge=1, le=0x7FFF_FFFF)]  # what the databases number rows with
Attempt = Annotated[
    str,
    BeforeValidator(lambda v: str(v) if type(v) is int else v),
    StringConstraints(min_length=1, max_length=64),
    WithJsonSchema({"type": ["string", "integer"], "minLength": 1, "maxLength": 64}),
]

RESET_CAUSES = {1: "power on", 2: "hard", 3: "watchdog", 4: "deep sleep", 5: "soft"}
"""``machine.reset_cause()`` by number. Source: MicroPython ports/esp32/modmachine.c."""

# What is merely shown must never cost a board its update: what can't be is not known.
Bytes = Annotated[
    int | None,
    BeforeValidator(lambda v: v if type(v) is int and 0 <= v < 1 << 40 else None),
    WithJsonSchema({"description": "a number of bytes; anything else is not known"}),
]
ResetCause = Annotated[
    str | None,
    BeforeValidator(lambda v: RESET_CAUSES.get(v) if type(v) is int else None),
    WithJsonSchema({"description": "machine.reset_cause(); anything else is not known"}),
]

Status = Literal["checking", "staging", "staged", "trial", "confirmed", "rolledback", "failed"]


def _shorten(message: Any) -> Any:
    # A report that is refused for its long text would be lost, and with it the reason.
    return message[:_MESSAGE_CHARS] if isinstance(message, str) else message


def _end(text: Any) -> Any:
    """The end of a log: what came last tells most. Anything but text is not known."""
    return text[-LOG_CHARS:] if isinstance(text, str) else None


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class CheckUpdate(_Message):
    """``POST /api/v1/check-update``"""

    device_id: DeviceId
    product: Name
    hardware: Name
    current_version: Text
    channel: Name = "stable"
    current_build: Text | None = None
    chip_id: Annotated[int, Field(ge=0, le=0xFFFF)] | None = None
    mac: Text | None = None
    labels: Annotated[list[Text], Field(max_length=32)] = []
    agent: LongText | None = None
    micropython: LongText | None = None
    staged: Text | None = None  # None: an agent that installs at once what it has fetched
    flash: Bytes = None
    free: Bytes = None  # of the file system
    reset_cause: ResetCause = None


Log = Annotated[
    str | None,
    BeforeValidator(_end),
    WithJsonSchema({"description": "text, of which the end is kept; anything else is not known"}),
]


class ErrorReport(_Message):
    """What an error of the device package says of itself."""

    code: Text
    number: Text | None = None
    message: Annotated[str, BeforeValidator(_shorten)] = ""


class ReportStatus(_Message):
    """``POST /api/v1/report-status``"""

    device_id: DeviceId
    attempt: Attempt
    status: Status
    version: Text | None = None
    build: Text | None = None
    error: ErrorReport | None = None
    bytes: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    log: Log = None
    current_version: Text | None = None
    current_build: Text | None = None
