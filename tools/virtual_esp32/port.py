"""The host's end of the virtual board's UART: a TCP socket or a pseudo terminal.

    with open_port("tcp:0") as port:
        print(port.url)                     # socket://127.0.0.1:40123, or /dev/pts/7
        board.run(port=port)

One client at a time, as on a cable; the port outlives boots and clients. What the board prints
while nobody listens is lost. Towards the board there is no flow control but the protocol's own:
what does not fit into the chip's receive buffer is dropped, as by a real UART.

Source: MicroPython ports/esp32/mphalport.c (stdin_ringbuf), shared/runtime/pyexec.c.
"""

import fcntl
import os
import selectors
import socket
import struct
import termios
import tty
from typing import Self

RECEIVE_BUFFER = 260  # bytes of stdin_ringbuf
_KEPT = 65536  # bytes that wait for a client that does not read


class PortError(ValueError):
    """There is no such kind of port; the text says which there are."""


class Port:
    """See the module. ``url`` is what a client opens; ``lost`` counts bytes that did not fit."""

    url: str

    def __init__(self):
        self.stdin, self._to_chip = os.pipe()
        os.set_blocking(self.stdin, False)  # the chip polls
        self.lost = 0
        self._selector = selectors.DefaultSelector()
        self._waiting = bytearray()
        self._after_cr = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._selector.close()
        os.close(self.stdin)
        os.close(self._to_chip)

    # ---- for the board

    def fileno(self) -> int:
        """Readable when ``receive`` has something to do."""
        return self._selector.fileno()  # type: ignore[attr-defined]

    def receive(self) -> bytes:
        """Serve the client; return what it typed."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Show the client what the board printed, each LF with a CR before it."""
        cooked = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        if self._after_cr and cooked.startswith(b"\r\n"):
            cooked = cooked[1:]
        self._after_cr = data.endswith(b"\r")
        self._transmit(cooked)

    def _transmit(self, data: bytes) -> None:
        raise NotImplementedError

    def feed(self, data: bytes) -> None:
        """Put bytes into the chip's receive buffer, as many as it takes."""
        unread = struct.unpack("i", fcntl.ioctl(self.stdin, termios.FIONREAD, b"\0\0\0\0"))[0]
        room = max(0, RECEIVE_BUFFER - unread)
        self.lost += max(0, len(data) - room)
        if data[:room]:
            os.write(self._to_chip, data[:room])

    def drain(self) -> None:
        """Forget what the chip has not read: it was reset."""
        try:
            os.read(self.stdin, 65536)
        except BlockingIOError:
            pass


class TcpPort(Port):
    """Raw bytes on a socket of loopback: pyserial's ``socket://``."""

    def __init__(self, port: int):
        super().__init__()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.setblocking(False)
        self.url = f"socket://127.0.0.1:{self._listener.getsockname()[1]}"
        self._client: socket.socket | None = None
        self._selector.register(self._listener, selectors.EVENT_READ)

    def close(self) -> None:
        self._drop()
        self._listener.close()
        super().close()

    def receive(self) -> bytes:
        typed = b""
        for key, mask in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            elif mask & selectors.EVENT_WRITE:
                self._transmit(b"")
            elif mask & selectors.EVENT_READ:
                try:
                    typed = self._client.recv(4096)
                except OSError:
                    typed = b""
                if not typed:
                    self._drop()
        return typed

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client = client
        self._selector.unregister(self._listener)  # the next one waits until this one is gone
        self._selector.register(client, selectors.EVENT_READ)

    def _drop(self) -> None:
        if self._client:
            self._selector.unregister(self._client)
            self._client.close()
            self._client = None
            self._waiting.clear()
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _transmit(self, data: bytes) -> None:
        if self._client is None:
            return
        self._waiting += data
        try:
            sent = self._client.send(self._waiting)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # receive() will see that it is gone
        del self._waiting[:sent]
        del self._waiting[: max(0, len(self._waiting) - _KEPT)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._waiting else 0)
        self._selector.modify(self._client, wanted)


class PtyPort(Port):
    """A pseudo terminal: a path that any serial program opens."""

    def __init__(self):
        super().__init__()
        self._master, self._slave = os.openpty()  # kept open: a client that leaves is no hang-up
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.url = os.ttyname(self._slave)
        self._selector.register(self._master, selectors.EVENT_READ)

    def close(self) -> None:
        os.close(self._master)
        os.close(self._slave)
        super().close()

    def receive(self) -> bytes:
        typed = b""
        for _, mask in self._selector.select(0):
            if mask & selectors.EVENT_WRITE:
                self._transmit(b"")
            if mask & selectors.EVENT_READ:
                typed = os.read(self._master, 4096)
        return typed

    def _transmit(self, data: bytes) -> None:
        self._waiting += data
        try:
            sent = os.write(self._master, self._waiting) if self._waiting else 0
        except BlockingIOError:
            # Nobody reads, or not yet: the newest is worth most.
            sent = 0
        del self._waiting[:sent]
        del self._waiting[: max(0, len(self._waiting) - _KEPT)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._waiting else 0)
        self._selector.modify(self._master, wanted)


def open_port(kind: str) -> Port:
    """Open ``pty`` or ``tcp:PORT`` (0: any free one).

    Raises:
        PortError: another kind. OSError: the port is taken.
    """
    if kind == "pty":
        return PtyPort()
    name, _, number = kind.partition(":")
    if name != "tcp" or not number.isdecimal() or int(number) > 65535:
        raise PortError(f"port {kind!r}: expected pty or tcp:PORT, e.g. tcp:8765 or tcp:0")
    return TcpPort(int(number))
