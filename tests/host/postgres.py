"""A PostgreSQL server of Debian's, in a temporary folder, for as long as a test needs it."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def programs() -> Path:
    """Where initdb and postgres lie."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    path = shutil.which("postgres")
    if not path and not os.environ.get("CI"):
        pytest.skip("postgresql is missing: apt install postgresql (.ci/run does)")
    assert path, "postgresql is missing: .ci/run installs it"
    return Path(path).parent


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Yield the URL of an empty database; PostgreSQL refuses to be run by root."""
    user = "postgres" if os.geteuid() == 0 else None
    # Not in pytest's folders, which another user may not enter.
    data = Path(tempfile.mkdtemp(prefix="twinslot-pg-"))
    if user:
        shutil.chown(data, user)

    def run(*command: str) -> None:
        done = subprocess.run(
            command, user=user, capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stdout + done.stderr

    bin_ = programs()
    run(str(bin_ / "initdb"), "-D", str(data), "-A", "trust", "-U", "twinslot", "-N", "-E", "UTF8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    log = str(data / "log")
    run(str(bin_ / "pg_ctl"), "-D", str(data), "-w", "-l", log, "-o", options, "start")
    try:
        yield f"postgresql+psycopg://twinslot@127.0.0.1:{port}/postgres"
    finally:
        run(str(bin_ / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(data, ignore_errors=True)
