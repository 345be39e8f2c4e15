"""A virtual board with a serial port, running in a thread, and mpremote's transport to it."""

import contextlib
import threading
import time

from mpremote.transport_serial import SerialTransport

from twinslot_tools.virtual_esp32.port import open_port


class Attended:
    """A board that runs, with somebody at its port. Use as a context manager.

    Attributes:
        url: of the port. console: lines printed so far. events: what the board told.
    """

    def __init__(self, board, kind="tcp:0", **options):
        self.board = board
        self.port = open_port(kind)
        self.url = self.port.url
        self.console = []
        self.events = []
        self.result = None
        self._options = options
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()
        self.port.close()

    def stop(self):
        """Switch it off and return the RunResult."""
        self.board.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.result

    def _run(self):
        try:
            self.result = self.board.run(
                timeout=120,
                port=self.port,
                on_console=lambda line: self._note(self.console, line),
                on_event=lambda event: self._note(self.events, event),
                **self._options,
            )
        finally:
            with self._changed:
                self._changed.notify_all()

    def _note(self, where, what):
        with self._changed:
            where.append(what)
            self._changed.notify_all()

    def wait(self, wanted, timeout=30):
        """Wait until ``wanted()`` is true; return what it gives."""
        end = time.monotonic() + timeout
        with self._changed:
            while not (found := wanted()):
                assert time.monotonic() < end, "\n".join(self.console[-30:])
                self._changed.wait(0.1)  # not all that is waited for is told
            return found

    def wait_for_line(self, text, start=0):
        return self.wait(lambda: next((x for x in self.console[start:] if text in x), None))

    @contextlib.contextmanager
    def transport(self, raw=True, soft_reset=False):
        """mpremote's own, in raw mode."""
        transport = SerialTransport(self.url, timeout=20)
        try:
            if raw:
                transport.enter_raw_repl(soft_reset=soft_reset)
            yield transport
        finally:
            transport.close()
