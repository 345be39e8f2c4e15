"""``python -m twinslot_server.backup DATA FILE``: one file of a running server's private folder.

A tar of the database (taken with SQLite's own online backup, so that it is whole), the
certificate with its key, and the hashes of the tokens: keep it as private as the folder. A
PostgreSQL database is backed up by ``pg_dump``; this then holds the rest.
"""

import contextlib
import io
import os
import sqlite3
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from . import tokens

DATABASE = "server.sqlite3"
_FILES = ("server.crt", "server.key")
_TOKENS = (tokens.DEVICE_FILE, tokens.OPERATOR_FILE)


def make(data: Path, target: Path) -> Path:
    """Write a backup; it appears whole or not at all.

    Raises:
        OSError, sqlite3.Error: it can't be read or written.
        tokens.TokenError: one is unusable.
    """
    if not data.is_dir():
        raise FileNotFoundError(2, "no such folder", str(data))
    with tempfile.TemporaryDirectory(dir=data) as folder:
        temporary = Path(folder) / "backup.tar.gz"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            if (data / DATABASE).exists():
                copy = Path(folder) / DATABASE
                _copy(data / DATABASE, copy)
                tar.add(copy, DATABASE)
            for name in _FILES:
                if (data / name).exists():
                    tar.add(data / name, name)
            for name in _TOKENS:
                if token := tokens.stored(data / name):
                    _add(tar, name + tokens.HASH, token.hashed.encode() + b"\n")
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("rb") as source:
            beside = target.with_name(f".{target.name}.part")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
    return target


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
    tar.addfile(member, io.BytesIO(content))


def _copy(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as here,
        contextlib.closing(sqlite3.connect(target)) as there,
    ):
        here.backup(there, pages=1000)
        there.execute("PRAGMA journal_mode = DELETE")
        (result,) = there.execute("PRAGMA integrity_check").fetchone()
        if result != "ok":
            raise sqlite3.DatabaseError(f"{source} is damaged: {result}")


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m twinslot_server.backup DATA FILE", file=sys.stderr)
        return 2
    try:
        print(make(Path(argv[0]), Path(argv[1])))
    except (OSError, sqlite3.Error, tokens.TokenError) as exc:
        print(f"twinslot_server: backup: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
