"""TLS on the board: its clock judges certificates, and a peer's certificate can be seen."""

import datetime as dt
import hashlib
import socket
import ssl
import threading

import pytest
from boards import new_board
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from twinslot_tools.virtual_esp32 import vfs

BODY = bytes(range(256)) * 400


def make_certificate(start, end):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    return cert, key


@pytest.fixture(scope="module")
def certificate():
    now = dt.datetime.now(dt.UTC)
    return make_certificate(now - dt.timedelta(days=1), now + dt.timedelta(days=30))


@pytest.fixture
def server(certificate, tmp_path):
    """A TLS server that sends BODY to whoever says something; yields its port."""
    cert, key = certificate
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        cert.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(100)
                    secure.sendall(BODY)
            except OSError:
                pass
            finally:
                plain.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


FETCH = """
import asyncio, hashlib, ssl, time, binascii
import machine
{setup}
async def main():
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ctx.verify_mode = ssl.{mode}
    if ctx.verify_mode:
        ctx.load_verify_locations(cadata=open("/ca", "rb").read())
    r, w = await asyncio.open_connection(
        "127.0.0.1", {port}, ssl=ctx, server_hostname="{name}")
    w.write(b"hello")
    await w.drain()
    sha, n, buf = hashlib.sha256(), 0, bytearray(4096)
    while True:
        got = await r.readinto(buf)
        if got is None:
            continue
        if not got:
            break
        n += got
        sha.update(memoryview(buf)[:got])
    print(n, binascii.hexlify(sha.digest()).decode())
    if not ctx.verify_mode:
        print(binascii.hexlify(r.s.getpeercert(True)).decode())
    w.close()
    await w.wait_closed()
try:
    asyncio.run(main())
except Exception as e:
    print(type(e).__name__, e.args[-1].strip())
"""


def fetch(folder, port, ca, *, setup="", mode="CERT_REQUIRED", name="localhost", clock="host"):
    main = FETCH.format(port=port, setup=setup, mode=mode, name=name)
    board = new_board(folder, main, clock=clock)
    vfs.write_files(board.path, {"/ca": ca})
    return board.run(timeout=20).console.splitlines()


def answer():
    return f"{len(BODY)} {hashlib.sha256(BODY).hexdigest()}"


def der(certificate):
    return certificate[0].public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("encoding", ["DER", "PEM"])
def test_verified_connection_with_a_set_clock(tmp_path, server, certificate, encoding):
    ca = certificate[0].public_bytes(getattr(serialization.Encoding, encoding))
    assert fetch(tmp_path, server, ca) == [answer()]


def test_unset_clock_sees_every_certificate_in_the_future(tmp_path, server, certificate):
    assert fetch(tmp_path, server, der(certificate), clock=None) == [
        "ValueError The certificate validity starts in the future"
    ]


def test_clock_far_ahead_sees_it_expired(tmp_path, server, certificate):
    setup = "machine.RTC().datetime((2044, 1, 1, 0, 0, 0, 0, 0))"
    assert fetch(tmp_path, server, der(certificate), setup=setup) == [
        "ValueError The certificate validity has expired"
    ]


def test_clock_set_by_the_program_is_enough(tmp_path, server, certificate):
    now = dt.datetime.now(dt.UTC)
    setup = f"machine.RTC().datetime(({now.year},{now.month},{now.day},0,{now.hour},0,0,0))"
    assert fetch(tmp_path, server, der(certificate), setup=setup, clock=None) == [answer()]


def test_another_ca_or_name_is_refused(tmp_path, server, certificate):
    now = dt.datetime.now(dt.UTC)
    other = make_certificate(now - dt.timedelta(days=1), now + dt.timedelta(days=1))
    (line,) = fetch(tmp_path, server, der(other))
    assert line.startswith("ValueError The certificate is not correctly signed")
    (line,) = fetch(tmp_path, server, der(certificate), name="elsewhere")
    assert line.startswith("ValueError") and "does not match" in line


def test_unverified_connection_shows_the_peers_certificate(tmp_path, server, certificate):
    lines = fetch(tmp_path, server, b"", mode="CERT_NONE", clock=None)
    assert lines == [answer(), der(certificate).hex()]


def test_blocking_sockets(tmp_path, server, certificate):
    main = f"""
import socket, tls, binascii
for mode in (tls.CERT_REQUIRED, tls.CERT_NONE):
    ctx = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    ctx.verify_mode = mode
    if mode:
        ctx.load_verify_locations(open("/ca", "rb").read())
    s = socket.socket()
    s.connect(socket.getaddrinfo("127.0.0.1", {server})[0][-1])
    t = ctx.wrap_socket(s, server_hostname="localhost")
    t.write(b"hello")
    print(len(t.read()))
    if not mode:
        print(binascii.hexlify(t.getpeercert(True)).decode())
    t.close()
"""
    board = new_board(tmp_path, main, clock="host")
    vfs.write_files(board.path, {"/ca": der(certificate)})
    lines = board.run(timeout=20).console.splitlines()
    assert lines == [str(len(BODY)), str(len(BODY)), der(certificate).hex()]


def test_refusal_by_date_is_sticky_and_also_without_asyncio(tmp_path, server, certificate):
    main = f"""
import socket, tls
ctx = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
ctx.load_verify_locations(open("/ca", "rb").read())
for now in (True, False):
    s = socket.socket()
    s.connect(socket.getaddrinfo("127.0.0.1", {server})[0][-1])
    try:
        t = ctx.wrap_socket(s, server_hostname="localhost", do_handshake_on_connect=now)
        print("wrapped")
        for i in range(2):
            try:
                t.read(1)
            except ValueError as e:
                print(repr(e.args[0]))
    except ValueError as e:
        print(repr(e.args[0]))
"""
    board = new_board(tmp_path, main)
    vfs.write_files(board.path, {"/ca": der(certificate)})
    text = repr("\nThe certificate validity starts in the future\n")  # as mbedTLS spells it
    assert board.run(timeout=20).console.splitlines() == [text, "wrapped", text, text]
