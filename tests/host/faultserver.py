"""A scripted HTTP(S) server for tests: it misbehaves exactly as told.

Every path is bound to a script, ``script(peer, request) -> bool``: it writes what it likes to the
peer and returns True to keep the connection for the next request. Nothing is added to what a
script sends. Each request is recorded with its header fields, so that a test can ask what the
device sent and to whom. Sockets are real, TLS is Python's ssl with certificates made here.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# ---- Certificates ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_identity(
    name: str = "localhost",
    *,
    issuer: Identity | None = None,
    is_ca: bool = False,
    names: tuple[str, ...] | None = None,
    begins_days: float = -1,
    ends_days: float = 365,
    rsa_bits: int = 0,
    usage: x509.ObjectIdentifier | None = None,
) -> Identity:
    """Make a key and a certificate for it, self-signed where no issuer is given."""
    key = rsa.generate_private_key(65537, rsa_bits) if rsa_bits else _ec_key()
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=begins_days))
        .not_valid_after(now + datetime.timedelta(days=ends_days))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    )
    if not is_ca:
        general = [_general_name(n) for n in (names or (name, "127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    signer = issuer.key if issuer else key
    return Identity(builder.sign(signer, hashes.SHA256()), key)


def _ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


CLIENT_ONLY = ExtendedKeyUsageOID.CLIENT_AUTH


def server_context(identity: Identity, client_ca: Identity | None = None) -> ssl.SSLContext:
    """Return a TLS 1.2 server context; with ``client_ca`` it demands a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # weak keys are for the device to refuse
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "c.pem", Path(folder) / "k.pem"
        certificate.write_bytes(identity.pem)
        key.write_bytes(identity.key_pem)
        context.load_cert_chain(certificate, key)
    if client_ca:
        context.load_verify_locations(cadata=client_ca.der)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# ---- The server ------------------------------------------------------------------------------


@dataclass
class Request:
    """What one request brought; field names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int  # counts the server's connections from 1


class Peer:
    """One accepted connection, for scripts."""

    def __init__(self, sock: socket.socket, server: FaultServer, number: int) -> None:
        self.sock = sock
        self.server = server
        self.number = number

    def send(self, *parts: bytes | str) -> None:
        for part in parts:
            self.sock.sendall(part.encode() if isinstance(part, str) else part)

    def reset(self) -> None:
        reset(self.sock)

    def goodbye(self, *parts: bytes | str) -> bool:
        """Send the parts and end TLS in good order (close_notify)."""
        self.send(*parts)
        self.sock.settimeout(1)
        self.sock.unwrap()
        return False

    def stall(self) -> bool:
        """Send nothing more until the device gives up (or the server stops)."""
        self.sock.settimeout(0.05)
        while not self.server.stopping:
            try:
                if not self.sock.recv(4096):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        return False

    def drip(self, data: bytes, every_s: float) -> None:
        for i in range(len(data)):
            if self.server.stopping:
                return
            self.send(data[i : i + 1])
            time.sleep(every_s)


Script = Callable[[Peer, Request], bool | None]


@dataclass
class FaultServer:
    """Serves scripts by path until ``stop()``. ``url`` has no trailing slash."""

    context: ssl.SSLContext | None = None
    on_accept: Callable[[Peer], None] | None = None  # instead of HTTP, on the bare TCP socket
    scripts: dict[str, Script] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    stopping: bool = False

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://localhost:{self.port}"

    def stop(self) -> None:
        self.stopping = True
        _stop_listening(self._listener)

    def seen(self, path: str) -> list[Request]:
        """Return the requests for ``path``, the query left out."""
        with self._lock:
            return [r for r in self.requests if r.path.split("?")[0] == path]

    def _accept(self) -> None:
        while not self.stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                number = self.connections
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        stream = None
        sock.settimeout(30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.on_accept:
                self.on_accept(Peer(sock, self, number))
                return
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            peer = Peer(sock, self, number)
            stream = sock.makefile("rb")
            while request := self._read(stream, number):
                with self._lock:
                    self.requests.append(request)
                if not self._script(request)(peer, request):
                    return
        except (OSError, ValueError):
            pass  # the device went away, which is its right
        finally:
            if stream:
                stream.close()
            sock.close()

    def _script(self, request: Request) -> Script:
        path = request.path.split("?")[0]
        if path in self.scripts:
            return self.scripts[path]
        family = path.rsplit("/", 1)[0] + "/*"  # "/cut/17" may be served by "/cut/*"
        return self.scripts.get(family, _not_found)

    @staticmethod
    def _read(stream, number: int) -> Request | None:
        first = stream.readline().decode("ascii").split()
        if len(first) != 3:
            return None
        headers = {}
        while line := stream.readline().decode("ascii").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        return Request(first[0], first[1], headers, body, number)


def _stop_listening(listener: socket.socket) -> None:
    listener.shutdown(socket.SHUT_RDWR)  # close() alone leaves it open while accept() waits
    listener.close()


def _not_found(peer: Peer, request: Request) -> bool:
    peer.send("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    return True


# ---- A relay that cuts -----------------------------------------------------------------------


class Relay:
    """A TCP relay in front of ``port`` that lets through so many bytes of the server's, then cuts.

    ``cuts[n]`` is for the n-th connection: (bytes to let through, "fin", "rst", "stall" or "flip":
    damage the next byte and go on). Connections beyond the list pass untouched.
    """

    def __init__(self, port: int, cuts: list[tuple[int, str]]) -> None:
        self.cuts = list(cuts)
        self.target = port
        self.stopping = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self.stopping = True
        _stop_listening(self._listener)

    def passed(self, count: int) -> None:
        """Called with each count of the server's bytes let through."""

    def _accept(self) -> None:
        while not self.stopping:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            cut = self.cuts.pop(0) if self.cuts else (1 << 40, "fin")
            threading.Thread(target=self._relay, args=(device, *cut), daemon=True).start()

    def _relay(self, device: socket.socket, room: int, end: str) -> None:
        # One thread with select: a socket that another thread reads can't be reset by closing it.
        server = socket.create_connection(("127.0.0.1", self.target))
        damage = False
        try:
            while room > 0 and not self.stopping:
                for source in select.select([device, server], [], [], 0.05)[0]:
                    data = source.recv(min(room, 16384) if source is server else 16384)
                    if not data:
                        return
                    if damage and source is server:
                        data = bytes([data[0] ^ 1]) + data[1:]
                        damage = False
                    (device if source is server else server).sendall(data)
                    if source is server:
                        room -= len(data)
                        self.passed(len(data))
                        if room <= 0 and end == "flip":
                            room, damage, end = 1 << 40, True, "fin"
            while end == "stall" and not self.stopping:
                if select.select([device], [], [], 0.05)[0] and not device.recv(16384):
                    return
            if end == "rst":
                reset(device)
        except OSError:
            pass
        finally:
            device.close()
            server.close()


def reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN, whoever else holds a file of this socket."""
    time.sleep(0.002)  # what was sent before shall arrive before
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())
