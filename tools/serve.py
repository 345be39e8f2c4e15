"""``twinslot serve``: become ``python -m twinslot_server``, a program of its own.

Tools and server never import each other: one holds private keys, the other faces the network.
"""

import os
import subprocess
import sys


def serve(arguments: list[str]) -> int:
    """Become the server, so that signals reach it and nothing is left behind when it is killed.

    Returns:
        its exit code, where a process can't be replaced (Windows); else this doesn't return.
    """
    command = [sys.executable, "-m", "twinslot_server", *arguments]
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(sys.executable, command)
    return subprocess.call(command)
