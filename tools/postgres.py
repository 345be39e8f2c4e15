"""A PostgreSQL server of Debian's, in a temporary folder, for as long as a run needs it."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def programs() -> Path | None:
    """Where initdb and postgres lie, if they are installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    path = found[-1] if found else shutil.which("postgres")
    return Path(path).parent if path else None


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Yield the URL of an empty database; PostgreSQL refuses to be run by root.

    Raises:
        OSError: it is not installed, or does not start.
    """
    bin_ = programs()
    if bin_ is None:
        raise FileNotFoundError("postgresql is missing: apt install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    # Not in the caller's folders, which another user may not enter.
    data = Path(tempfile.mkdtemp(prefix="twinslot-pg-"))
    if user:
        shutil.chown(data, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(bin_ / program), "-D", str(data), *arguments]
        done = subprocess.run(
            command, user=user, capture_output=True, text=True, check=False, cwd="/"
        )
        if done.returncode:
            raise OSError(f"{program}: {done.stdout}{done.stderr}")

    run("initdb", "-A", "trust", "-U", "twinslot", "-N", "-E", "UTF8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    run("pg_ctl", "-w", "-l", str(data / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://twinslot@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(data, ignore_errors=True)
