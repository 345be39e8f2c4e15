"""Write a file whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path


def write_over(path: Path, content: bytes, mode: int) -> None:
    """As ``write_new``, in the place of what is there."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.whole")
    write_new(made, content, mode)
    os.replace(made, path)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write ``path`` with ``mode`` from its first byte on; it appears complete or not at all.

    Raises:
        FileExistsError: another process made it meanwhile; theirs stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, never replaces what is there
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if path.exists():
                raise FileExistsError(path) from None
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
