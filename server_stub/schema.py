"""The tables, as SQLAlchemy Core sees them; ``migrations/versions`` makes them, step by step.

Times are whole seconds since 1970 by the server's clock; a board's own may be unset.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy import String as _String

metadata = MetaData()


class String(TypeDecorator):
    """Text as every database takes it: PostgreSQL refuses NUL, and a board may say anything."""

    impl = _String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if value else value


_JSON = JSON(none_as_null=True)


def _device(**options) -> Column:
    key = ForeignKey("devices.device_id", ondelete="CASCADE")
    return Column("device_id", String, key, nullable=False, **options)


meta = Table(
    "meta", metadata, Column("key", String, primary_key=True), Column("value", BigInteger)
)

# Members of the configuration that an administrator has set since, each whole: poll, enrolment.
settings = Table(
    "settings",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", JSON, nullable=False),
)

# What each worker (host:process) has done since it started, written every few seconds.
counters = Table(
    "counters",
    metadata,
    Column("worker", String, primary_key=True),
    Column("started", BigInteger, nullable=False),
    Column("written", BigInteger, nullable=False),
    Column("polls", BigInteger, nullable=False),
    Column("remembered", BigInteger, nullable=False),
    Column("sent_away", BigInteger, nullable=False, server_default="0"),
    Column("reports", BigInteger, nullable=False),
    Column("bytes_sent", BigInteger, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", String, primary_key=True),
    Column("mac", String),
    Column("product", String),
    Column("channel", String),
    Column("hardware", String),
    Column("chip_id", Integer),
    Column("current_version", String),
    Column("current_build", String),
    Column("agent", String),
    Column("micropython", String),
    Column("labels", JSON, nullable=False),  # as the board says them
    Column("status", String),
    Column("status_version", String),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("address", String),
    Column("enrolment", String, nullable=False, server_default="accepted"),
    Column("token_hash", String),
    Column("pin", String),  # a version
    Column("staged", String),  # the build that waits in the other slot; NULL: its agent can't wait
    Column("flash", BigInteger),  # bytes
    Column("free", BigInteger),  # bytes of the file system
    Column("reset_cause", String),
    Index("devices_token_hash", "token_hash", unique=True),
)

# Effective labels, key=value. by: "device" or "operator"; the operator's word stands.
labels = Table(
    "labels",
    metadata,
    _device(primary_key=True),
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
    Column("by", String, nullable=False),
    Index("labels_key_value", "key", "value"),
)

# Searches for devices that people have given a name.
filters = Table(
    "filters",
    metadata,
    Column("name", String, primary_key=True),
    Column("query", JSON, nullable=False),
)

label_keys = Table(
    "label_keys",
    metadata,
    Column("key", String, primary_key=True),
    Column("description", String, nullable=False),
)

# What a board said, word for word; attempts are what the server makes of it.
reports = Table(
    "reports",
    metadata,
    Column("id", Integer, primary_key=True),
    _device(index=True),
    Column("attempt", String, nullable=False),
    Column("version", String),
    Column("build", String),
    Column("status", String, nullable=False),
    Column("error", _JSON),
    Column("bytes", BigInteger),
    Column("received", BigInteger, nullable=False),
    Column("log", String),  # what the board noted meanwhile
    UniqueConstraint("device_id", "attempt", "status"),
)

releases = Table(
    "releases",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("product", String, nullable=False),
    Column("version", String, nullable=False),
    Column("hardware", JSON, nullable=False),
    Column("channel", String, nullable=False),  # that it is meant for
    Column("channels", JSON, nullable=False, server_default="[]"),  # that have named it
    Column("chip_id", Integer, nullable=False),
    Column("build", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String, nullable=False),
    Column("md5", String),
    Column("security_version", Integer, nullable=False),
    Column("downgrade", Boolean, nullable=False),
    Column("expires", BigInteger),
    Column("notes", String, nullable=False),
    Column("path", String, nullable=False),  # of the JWS below the site
    Column("blobs", JSON, nullable=False),  # paths below the site
    Column("pilot_ready", Boolean, nullable=False),
    Column("stable", Boolean, nullable=False),
    Column("blocked", String),  # why, or NULL
    Column("created", BigInteger, nullable=False),
    UniqueConstraint("product", "version"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Integer, primary_key=True),
    _device(),
    Column("attempt", String),  # the board's own name for it, from its first report on
    Column("build", String, nullable=False),
    Column("version", String),
    Column("from_build", String),
    Column("from_version", String),
    Column("origin", String, nullable=False),  # pin, job, rollout, channel, board
    Column("rollout_id", Integer),
    Column("job_id", Integer, index=True),
    Column("state", String, nullable=False),
    Column("reason", String),
    Column("presumed", Boolean, nullable=False),  # concluded by the server, not said by the board
    Column("said_confirmed", Boolean, nullable=False),
    Column("polled_new", BigInteger),  # first poll of the new build
    Column("bytes", BigInteger),
    Column("offered", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
    Column("ended", BigInteger),
    Column("waits_until", BigInteger),  # its install window opens then
    Index("attempts_device", "device_id", "id"),
    Index("attempts_state", "state", "updated"),
    Index("attempts_rollout", "rollout_id", "state"),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("release_id", Integer, ForeignKey("releases.id"), nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("resume_state", String),  # what a paused one goes back to
    Column("stage", Integer, nullable=False),
    Column("stage_started", BigInteger),
    Column("passed_at", BigInteger),  # success threshold of the stage reached
    Column("gate_open", Boolean, nullable=False),
    Column("policy", JSON, nullable=False),
    Column("stages", JSON, nullable=False),
    Column("target", JSON, nullable=False),  # label selector, {} is everybody
    Column("seed", String, nullable=False),
    Column("starts_at", BigInteger),
    Column("why", String, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
)

members = Table(
    "rollout_members",
    metadata,
    Column("rollout_id", Integer, ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    _device(primary_key=True, index=True),
    Column("stage", Integer, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("release_id", Integer, ForeignKey("releases.id"), nullable=False),
    Column("target", JSON, nullable=False),
    Column("force_update", Boolean, nullable=False),
    Column("cancelled", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
)

job_nodes = Table(
    "job_nodes",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    _device(primary_key=True, index=True),
    Column("status", String, nullable=False),
    Column("current_part", Integer, nullable=False),
    Column("total_parts", Integer, nullable=False),
    Column("error_message", String),
    Column("updated", BigInteger, nullable=False),
)

downloads = Table(
    "downloads",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("path", String, nullable=False),
    Column("client", String),
    Column("first", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
)

windows = Table(
    "windows",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("label", String, nullable=False),  # key=value, or * for every board
    Column("kind", String, nullable=False),  # download or install
    Column("zone", String, nullable=False),
    Column("days", JSON, nullable=False),  # 0 is Monday
    Column("start", String, nullable=False),  # HH:MM
    Column("end", String, nullable=False),
)

schedules = Table(
    "schedules",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("cron", String, nullable=False),
    Column("zone", String, nullable=False),
    Column("action", JSON, nullable=False),
    Column("source", String, nullable=False),  # api or file
    Column("created", BigInteger, nullable=False, server_default="0"),
    Column("last_run", BigInteger),
    Column("last_result", String),
)

users = Table(
    "users",
    metadata,
    Column("name", String, primary_key=True),
    Column("role", String, nullable=False),
    Column("password", String),
    Column("token_hash", String, unique=True),
    Column("created", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id_hash", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("csrf", String, nullable=False),
    Column("expires", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("who", String, nullable=False),
    Column("role", String, nullable=False),
    Column("action", String, nullable=False),
    Column("target", String, nullable=False),
    Column("before", _JSON),
    Column("after", _JSON),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("url", String, nullable=False),
    Column("secret", String, nullable=False),
    Column("events", JSON, nullable=False),
    Column("created", BigInteger, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("webhook_id", Integer, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("body", String, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due", Float, nullable=False),
    Column("state", String, nullable=False, index=True),  # waiting, delivered, dead
    Column("error", String),
)
