"""Write a file whole or not at all, at any moment the power may fail."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 18

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


def quiet(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


def write_whole(path: Path, content: bytes, *, mode: int = 0o666, replace: bool = True) -> None:
    """Write ``path`` so that a reader sees the old file or the whole new one.

    Raises:
        FileExistsError: it exists and ``replace`` is False.
    """
    with whole_file(path, mode=mode, replace=replace) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, *, mode: int = 0o666, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary neighbour for writing; it takes the name ``path`` at the end.

    Its name starts with a dot, which no part of a published tree does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _link_new(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _link_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, never replaces what is there
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
