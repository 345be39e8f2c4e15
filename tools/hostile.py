"""A web server in an attacker's hands: it serves a folder, shows what it was asked, and lies.

Whoever has the server has its certificate and key too; only the signing keys are out of reach.
For the attacks of the demo and for tests.
"""

import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path


class SiteServer(threading.Thread):
    """Serves a folder over TLS (or plain HTTP without a context), keep-alive, with ETags.

    requests: the head of every request, as it came.
    lie: called with (path, content or None); what it returns is sent instead. A callable is
        called with the connection and answers by itself.
    """

    def __init__(self, root: Path, context: ssl.SSLContext | None, port: int = 0):
        super().__init__(daemon=True)
        self.root = root
        self.requests: list[bytes] = []
        self.lie: Callable = lambda path, content: content
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or accept() keeps the port
        self._listener.close()

    @property
    def paths(self) -> list[str]:
        return [head.split()[1].decode() for head in self.requests]

    def _serve(self, raw: socket.socket) -> None:
        try:
            with raw if self._context is None else self._context.wrap_socket(raw, True) as sock:
                data = b""
                while True:
                    while b"\r\n\r\n" not in data:
                        part = sock.recv(4096)
                        if not part:
                            return
                        data += part
                    head, _, data = data.partition(b"\r\n\r\n")
                    self.requests.append(head)
                    length = next(
                        (
                            int(f.split(b":")[1])
                            for f in head.lower().split(b"\r\n")[1:]
                            if f.startswith(b"content-length:")
                        ),
                        0,
                    )
                    while len(data) < length:
                        data += sock.recv(4096)
                    data = data[length:]
                    self._answer(sock, head)
        except OSError:
            pass

    def _answer(self, sock: socket.socket, head: bytes) -> None:
        path = head.split()[1].decode()
        file = self.root / path.lstrip("/")
        content = file.read_bytes() if file.is_file() else None
        content = self.lie(path, content)
        if callable(content):
            content(sock)
        elif content is None:
            sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            etag = b'"%s"' % hashlib.sha256(content).hexdigest().encode()
            if b"if-none-match: " + etag in head.replace(b"If-None-Match", b"if-none-match"):
                sock.sendall(b"HTTP/1.1 304 Not Modified\r\nETag: %s\r\n\r\n" % etag)
                return
            form = b"HTTP/1.1 200 OK\r\nETag: %s\r\nContent-Length: %d\r\n\r\n"
            sock.sendall(form % (etag, len(content)) + content)
