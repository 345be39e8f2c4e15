"""The fleet server: enrolment, labels, releases, attempts, rollouts, jobs, audit."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("devices", sa.Column("address", sa.String))
    op.add_column(
        "devices", sa.Column("enrolment", sa.String, nullable=False, server_default="accepted")
    )
    op.add_column("devices", sa.Column("token_hash", sa.String))
    op.add_column("devices", sa.Column("pin", sa.String))
    op.create_index("devices_token_hash", "devices", ["token_hash"], unique=True)
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
    )
    op.create_table(
        "downloads",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("client", sa.String),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
    )
    op.create_table(
        "label_keys",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("description", sa.String, nullable=False),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.BigInteger),
    )
    op.create_table(
        "releases",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("product", sa.String, nullable=False),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("hardware", sa.JSON, nullable=False),
        sa.Column("channel", sa.String, nullable=False),
        sa.Column("chip_id", sa.Integer, nullable=False),
        sa.Column("build", sa.String, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("md5", sa.String),
        sa.Column("security_version", sa.Integer, nullable=False),
        sa.Column("downgrade", sa.Boolean, nullable=False),
        sa.Column("expires", sa.BigInteger),
        sa.Column("notes", sa.String, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("blobs", sa.JSON, nullable=False),
        sa.Column("pilot_ready", sa.Boolean, nullable=False),
        sa.Column("stable", sa.Boolean, nullable=False),
        sa.Column("blocked", sa.String),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("product", "version"),
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("cron", sa.String, nullable=False),
        sa.Column("zone", sa.String, nullable=False),
        sa.Column("action", sa.JSON, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("last_run", sa.BigInteger),
        sa.Column("last_result", sa.String),
    )
    op.create_table(
        "sessions",
        sa.Column("id_hash", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("csrf", sa.String, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("password", sa.String),
        sa.Column("token_hash", sa.String, unique=True),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("secret", sa.String, nullable=False),
        sa.Column("events", sa.JSON, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "windows",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("zone", sa.String, nullable=False),
        sa.Column("days", sa.JSON, nullable=False),
        sa.Column("start", sa.String, nullable=False),
        sa.Column("end", sa.String, nullable=False),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "device_id",
            sa.String,
            sa.ForeignKey("devices.device_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("attempt", sa.String),
        sa.Column("build", sa.String, nullable=False),
        sa.Column("version", sa.String),
        sa.Column("from_build", sa.String),
        sa.Column("from_version", sa.String),
        sa.Column("origin", sa.String, nullable=False),
        sa.Column("rollout_id", sa.Integer),
        sa.Column("job_id", sa.Integer),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("reason", sa.String),
        sa.Column("presumed", sa.Boolean, nullable=False),
        sa.Column("said_confirmed", sa.Boolean, nullable=False),
        sa.Column("polled_new", sa.BigInteger),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("offered", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
        sa.Column("ended", sa.BigInteger),
    )
    op.create_index("attempts_device", "attempts", ["device_id", "id"])
    op.create_index("attempts_state", "attempts", ["state", "updated"])
    op.create_index("ix_attempts_job_id", "attempts", ["job_id"])
    op.create_index("ix_attempts_rollout_id", "attempts", ["rollout_id"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "webhook_id",
            sa.Integer,
            sa.ForeignKey("webhooks.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("body", sa.String, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("error", sa.String),
    )
    op.create_index("ix_deliveries_state", "deliveries", ["state"])
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("release_id", sa.Integer, sa.ForeignKey("releases.id"), nullable=False),
        sa.Column("target", sa.JSON, nullable=False),
        sa.Column("force_update", sa.Boolean, nullable=False),
        sa.Column("cancelled", sa.Boolean, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "labels",
        sa.Column(
            "device_id",
            sa.String,
            sa.ForeignKey("devices.device_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
        sa.Column("by", sa.String, nullable=False),
    )
    op.create_index("labels_key_value", "labels", ["key", "value"])
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("release_id", sa.Integer, sa.ForeignKey("releases.id"), nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("resume_state", sa.String),
        sa.Column("stage", sa.Integer, nullable=False),
        sa.Column("stage_started", sa.BigInteger),
        sa.Column("passed_at", sa.BigInteger),
        sa.Column("gate_open", sa.Boolean, nullable=False),
        sa.Column("policy", sa.JSON, nullable=False),
        sa.Column("stages", sa.JSON, nullable=False),
        sa.Column("target", sa.JSON, nullable=False),
        sa.Column("seed", sa.String, nullable=False),
        sa.Column("starts_at", sa.BigInteger),
        sa.Column("why", sa.String, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_rollouts_state", "rollouts", ["state"])
    op.create_table(
        "job_nodes",
        sa.Column(
            "job_id", sa.Integer, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column(
            "device_id",
            sa.String,
            sa.ForeignKey("devices.device_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("current_part", sa.Integer, nullable=False),
        sa.Column("total_parts", sa.Integer, nullable=False),
        sa.Column("error_message", sa.String),
        sa.Column("updated", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_job_nodes_device_id", "job_nodes", ["device_id"])
    op.create_table(
        "rollout_members",
        sa.Column(
            "rollout_id",
            sa.Integer,
            sa.ForeignKey("rollouts.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column(
            "device_id",
            sa.String,
            sa.ForeignKey("devices.device_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("stage", sa.Integer, nullable=False),
    )
    op.create_index("ix_rollout_members_device_id", "rollout_members", ["device_id"])
    op.execute("INSERT INTO meta (key, value) VALUES ('generation', 0)")
    _make_append_only()


def _make_append_only() -> None:
    """Not even this server can change or remove a line of the audit log."""
    if op.get_bind().dialect.name == "sqlite":
        for what in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{what.lower()} BEFORE {what} ON audit"
                " BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit"
        " EXECUTE FUNCTION audit_append_only()"
    )
