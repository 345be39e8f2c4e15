"""Run the server as a program of its own: ``twinslot serve`` is ``python -m twinslot_server``.

Tools and server never import each other: one holds private keys, the other faces the network.
"""

import signal
import subprocess
import sys


def serve(arguments: list[str]) -> int:
    """Run the server until it ends; SIGTERM and SIGINT are passed on, its exit code returned."""
    process = subprocess.Popen([sys.executable, "-m", "twinslot_server", *arguments])

    def pass_on(number: int, _frame: object) -> None:
        process.send_signal(number)

    # A terminal sends Ctrl-C to both; the server treats the second one as the first.
    previous = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
