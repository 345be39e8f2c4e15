"""What an operator configures: ``config/server.yml``, then the environment, then the command line.

Every member is checked before anything starts; a message names the member, what it saw and what it
expected. ``TWINSLOT_`` and the member's name in capitals, ``__`` for a dot, is its variable:
``TWINSLOT_POLL__DEFAULT=600``.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .offers import DEFAULT_POLL_S
from .presign import VALID_MAX_S

PREFIX = "TWINSLOT_"
_POLL_MAX_S = 7 * 86400

Seconds = Annotated[int, Field(ge=1, le=_POLL_MAX_S)]


class SettingsError(Exception):
    """A configuration that can't be used."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Poll(_Part):
    default: Seconds = DEFAULT_POLL_S
    labels: dict[str, Seconds] = {}

    @field_validator("labels")
    @classmethod
    def _key_value(cls, value: dict[str, int]) -> dict[str, int]:
        for label in value:
            if "=" not in label:
                raise ValueError(f"{label!r}: expected key=value")
        return value


class Enrolment(_Part):
    default: Literal["accepted", "pending"] = "accepted"
    accept: list[dict[Literal["product", "hardware", "channel", "mac"], str]] = []


class Changes(_Part):
    """Members an administrator may set while the server runs; null: as configured again."""

    poll: Poll | None = None
    enrolment: Enrolment | None = None


class Signing(_Part):
    """Signs the URLs that payloads are redirected to, for an S3-compatible store."""

    region: Annotated[str, Field(min_length=1)]
    key_id: Annotated[str, Field(min_length=1)]
    secret: Annotated[str, Field(min_length=1)]
    valid_s: Annotated[int, Field(ge=60, le=VALID_MAX_S)] = 900


class ProxyLogin(_Part):
    """A proxy in front that logs people in, by OpenID Connect or whatever it can."""

    header: Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9-]{0,63}$")]
    secret: str

    @field_validator("secret")
    @classmethod
    def _of_a_header(cls, value: str) -> str:
        if not re.fullmatch("[!-~]{16,256}", value):
            raise ValueError("expected 16 to 256 characters of ASCII, none of them a space")
        return value


class Settings(_Part):
    """See the module. Paths are relative to the configuration file's folder."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8443
    tls: bool = True
    certificate: Path | None = None
    key: Path | None = None
    data: Path | None = None
    keys: Path | None = None
    names: list[str] = []
    database: str | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    device_token: str | None = None
    operator_token: str | None = None
    poll: Poll = Poll()
    enrolment: Enrolment = Enrolment()
    downloads: Literal["public", "token"] = "public"
    proxy_login: ProxyLogin | None = None
    payload_url: str | None = None
    payload_signing: Signing | None = None
    firmware_bytes: Annotated[int, Field(ge=1024, le=16 << 20)] = 3_900_000
    keep_days: Annotated[int, Field(ge=7, le=36500)] = 365
    schedules: Path | None = None
    webhooks_to_private: bool = False

    @field_validator("payload_url")
    @classmethod
    def _https(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("https://", "http://")):
            raise ValueError("expected a URL")
        return value.rstrip("/") if value else value

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if self.payload_signing and not self.payload_url:
            raise ValueError("payload_signing: expected payload_url with it")
        return self

    @property
    def poll_s(self) -> int:
        return self.poll.default

    @property
    def poll_by_label(self) -> Mapping[str, int]:
        return self.poll.labels

    def public(self) -> dict[str, Any]:
        """What decides how boards are treated; no secret, no path of this machine."""
        return {
            "poll": self.poll.model_dump(),
            "enrolment": self.enrolment.model_dump(),
            "downloads": self.downloads,
            "payload_url": self.payload_url,
            "firmware_bytes": self.firmware_bytes,
            "keep_days": self.keep_days,
        }

    def enrolment_of(self, facts: Mapping[str, Any]) -> str:
        """How a board that says ``facts`` begins: a rule accepts it if all its members match."""
        for rule in self.enrolment.accept:
            if rule and all(facts.get(name) == value for name, value in rule.items()):
                return "accepted"
        return self.enrolment.default


def load(
    path: Path | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Read and check the configuration.

    Args:
        path: YAML file, or None.
        overrides: members given on the command line, dotted names; None is not given.
        environment: variables.

    Raises:
        SettingsError: what is wrong and where.
        OSError: no such file.
    """
    found = _read(path) if path else {}
    for name in ("data", "keys", "certificate", "key", "schedules"):
        if path and isinstance(found.get(name), str):
            found[name] = path.parent / found[name]
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        root = name.split("__")[0]
        if variable.startswith(PREFIX) and root in Settings.model_fields:
            if root.endswith("_token"):
                continue  # read by ``tokens``, which says where a bad one came from
            is_secret = name.endswith("secret")
            _put(found, name.split("__"), text if is_secret else _scalar(variable, text))
    for name, value in overrides.items():
        if value is not None:
            _put(found, name.split("."), value)
    try:
        return Settings.model_validate(found)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if where:
            secret = where.endswith(("_token", "secret")) or isinstance(first["input"], dict)
            quiet = secret or first["type"] == "extra_forbidden"
            saw = "" if quiet else f": saw {str(first['input'])[:80]!r}"
            message = f"{where}{saw}: {message}"
        raise SettingsError(f"{path or 'settings'}: {message}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as exc:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(exc).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"{path}: expected members such as port: 8443")
    return found


def _scalar(variable: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"${variable}: not a value") from None


def _put(found: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        inner = found.get(name)
        found[name] = inner = dict(inner) if isinstance(inner, dict) else {}
        found = inner
    found[names[-1]] = value
