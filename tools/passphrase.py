"""Where a passphrase comes from: a file descriptor, or somebody at the terminal. Never argv.

twinslot keygen release.key                          asks, twice
twinslot publish ... --passphrase-fd 3 3<secret      reads the first line
"""

import getpass
import os
from pathlib import Path

from twinslot.errors import ConfigError

_LONGEST = 1024


def source(fd: int | None, path: Path, twice: bool = False):
    """Return a function that gets the passphrase of ``path`` when it is needed.

    Args:
        fd: file descriptor to read a line from; None: ask at the terminal.
        path: shown in the question.
        twice: ask a second time, for a new file.

    The function raises ConfigError: nobody to ask, or the two answers differ.
    """
    if fd is not None:
        return lambda: from_fd(fd)
    return lambda: _ask(path, twice)


def from_fd(fd: int) -> bytes:
    """Read one line from a file descriptor, without its end."""
    line = b""
    try:
        while len(line) < _LONGEST and not line.endswith(b"\n"):
            part = os.read(fd, 1)
            if not part:
                break
            line += part
    except OSError as exc:
        raise ConfigError(f"--passphrase-fd {fd}: {exc.strerror}") from exc
    line = line.rstrip(b"\r\n")
    if not line:
        raise ConfigError(f"--passphrase-fd {fd}: no passphrase there")
    return line


def _ask(path: Path, twice: bool) -> bytes:
    try:
        terminal = os.open("/dev/tty" if os.name == "posix" else "CON", os.O_RDWR)
    except OSError:
        raise ConfigError(
            f"passphrase of {path}: no terminal to ask at; use --passphrase-fd"
            + (", or --no-passphrase to leave the key unprotected" if twice else "")
        ) from None
    os.close(terminal)
    answer = getpass.getpass(f"Passphrase of {path}: ")
    if twice and getpass.getpass("Once more: ") != answer:
        raise ConfigError("the two passphrases differ; nothing was made")
    if not answer:
        raise ConfigError("an empty passphrase protects nothing")
    return answer.encode()
