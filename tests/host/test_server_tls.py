"""The server's certificate: made once, and trusted by every TLS stack a board or tool has."""

import datetime as dt
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from servers import serving

from twinslot_server import authority, tls

MICROPYTHON = Path(sys.executable).parent / "micropython"

# What a board does: the pinned certificate as the only CA, verification on, a host name.
CONNECT = """
import socket, ssl, sys
address, port, name, ca = sys.argv[1:5]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.verify_mode = ssl.CERT_REQUIRED
context.load_verify_locations(cadata=open(ca, 'rb').read())
plain = socket.socket()
plain.connect(socket.getaddrinfo(address, int(port))[0][-1])
secure = context.wrap_socket(plain, server_hostname=name)
secure.write(b'HEAD / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n')
print(secure.read(12).decode())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    (folder / "site").mkdir()
    with serving(folder / "site", "--name", "updates.example.org", "--name", "192.0.2.7") as s:
        yield s


def certificate(server) -> x509.Certificate:
    return x509.load_pem_x509_certificate((server.data / "server.crt").read_bytes())


def der(server, folder: Path) -> Path:
    path = folder / "server.der"
    path.write_bytes(certificate(server).public_bytes(serialization.Encoding.DER))
    return path


def micropython(server, name: str, ca: Path) -> subprocess.CompletedProcess:
    port = server.url.rsplit(":", 1)[1]
    return subprocess.run(
        [str(MICROPYTHON), "-c", CONNECT, "127.0.0.1", port, name, str(ca)],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "updates.example.org", "192.0.2.7", socket.gethostname()]
)
def test_a_board_trusts_the_pinned_certificate_under_each_of_its_names(server, tmp_path, name):
    """mbedTLS, as on the ESP32, takes the self-signed certificate as its own trust anchor."""
    run = micropython(server, name, der(server, tmp_path))
    assert run.stdout.strip() == "HTTP/1.1 404", run.stderr


def test_a_board_refuses_another_name(server, tmp_path):
    run = micropython(server, "evil.example.org", der(server, tmp_path))
    assert run.returncode == 1
    assert "does not match" in run.stdout + run.stderr


def test_a_board_refuses_another_server_of_the_same_kind(server, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tls.ensure(other, [])
    (tmp_path / "other.der").write_bytes(
        ssl.PEM_cert_to_DER_cert((other / "server.crt").read_text())
    )
    run = micropython(server, "localhost", tmp_path / "other.der")
    assert run.returncode == 1
    assert "not correctly signed" in run.stdout + run.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_openssl_trusts_it_in_its_strictest_mode(server, strict):
    context = ssl.create_default_context(cafile=server.data / "server.crt")
    if strict:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    host, port = server.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="updates.example.org") as secure,
    ):
        assert secure.version() in ("TLSv1.2", "TLSv1.3")


def test_openssl_refuses_another_name(server):
    context = ssl.create_default_context(cafile=server.data / "server.crt")
    host, port = server.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname="evil.example.org")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_openssl_tool_verifies_it(server):
    path = str(server.data / "server.crt")
    command = ["openssl", "verify", "-x509_strict", "-CAfile", path, "-purpose", "sslserver", path]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_it_is_what_it_is_documented_to_be(server):
    made = certificate(server)
    assert isinstance(made.public_key(), ec.EllipticCurvePublicKey)
    assert made.public_key().curve.name == "secp256r1"
    years = (made.not_valid_after_utc - dt.datetime.now(dt.UTC)).days / 365.25
    assert 9.9 < years < 10.1
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.ca is False
    assert made.serial_number > 0


def test_it_is_valid_for_a_board_whose_clock_was_never_set(server):
    """MicroPython's epoch on the ESP32: 2000-01-01 00:00:00."""
    assert certificate(server).not_valid_before_utc <= dt.datetime(2000, 1, 1, tzinfo=dt.UTC)


def test_the_log_tells_its_fingerprint_for_pinning(server):
    start = next(line for line in server.log() if line["event"] == "start")
    assert start["fingerprint"] == certificate(server).fingerprint(hashes.SHA256()).hex()
    assert "updates.example.org" in start["names"]


def test_the_key_never_leaves_its_file(server):
    key = (server.data / "server.key").read_text().splitlines()[1]
    assert key not in server.errors.read_text()


def test_an_existing_certificate_is_never_replaced_by_itself(tmp_path):
    before = tls.ensure(tmp_path, ["one.example.org"])
    assert tls.ensure(tmp_path, []).fingerprint == before.fingerprint
    assert tls.ensure(tmp_path, ["ONE.example.org"]).fingerprint == before.fingerprint
    with pytest.raises(tls.CertificateError, match=r"does not name 'two\.example\.org'"):
        tls.ensure(tmp_path, ["two.example.org"])
    assert tls.ensure(tmp_path, []).fingerprint == before.fingerprint


@pytest.mark.parametrize("missing", ["server.crt", "server.key"])
def test_half_a_certificate_is_an_error(tmp_path, missing):
    tls.ensure(tmp_path, [])
    (tmp_path / missing).unlink()
    with pytest.raises(tls.CertificateError, match=missing):
        tls.ensure(tmp_path, [])


def test_a_damaged_certificate_is_an_error(tmp_path):
    tls.ensure(tmp_path, [])
    (tmp_path / "server.crt").write_text("-----BEGIN CERTIFICATE-----\nxx\n")
    with pytest.raises(tls.CertificateError, match="not a usable certificate"):
        tls.ensure(tmp_path, [])


# ---- an authority of one's own


def make(folder, *names, code=0):
    """Run the command; return what it says."""
    done = subprocess.run(
        [Path(sys.executable).with_name("twinslot"), "fleet", "certificate", str(folder), "--json"]
        + [f"--name={name}" for name in names],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def test_boards_that_trust_the_authority_notice_no_new_certificate(tmp_path):
    """A name more, and what is renewed is trusted; what another authority has signed is not."""
    (tmp_path / "site").mkdir()
    (tmp_path / "server.yml").write_text("certificate: pki/server.crt\nkey: pki/server.key\n")
    config = ["--config", str(tmp_path / "server.yml")]
    first = make(tmp_path / "pki", "updates.example.org", "192.0.2.7")
    ca = tmp_path / "ca.der"
    ca.write_bytes(ssl.PEM_cert_to_DER_cert(Path(first["ca"]).read_text()))
    with serving(tmp_path / "site", *config) as server:
        for name in ("updates.example.org", "192.0.2.7"):
            run = micropython(server, name, ca)
            assert run.stdout.strip() == "HTTP/1.1 404", run.stdout + run.stderr
        run = micropython(server, "new.example.org", ca)
        assert "does not match" in run.stdout + run.stderr
        start = next(line for line in server.log() if line["event"] == "start")
        assert start["fingerprint"] == first["fingerprint"]
    second = make(tmp_path / "pki", "new.example.org")
    assert second["names"] == ["new.example.org"]
    assert second["fingerprint"] != first["fingerprint"]
    with serving(tmp_path / "site", *config) as server:
        assert micropython(server, "new.example.org", ca).stdout.strip() == "HTTP/1.1 404"
        other = make(tmp_path / "other", "new.example.org")
        ca.write_bytes(ssl.PEM_cert_to_DER_cert(Path(other["ca"]).read_text()))
        run = micropython(server, "new.example.org", ca)
        assert "not correctly signed" in run.stdout + run.stderr


def test_a_renewed_certificate_is_taken_up_without_a_restart(tmp_path):
    """By SIGHUP; one that can't be used changes nothing."""
    (tmp_path / "site").mkdir()
    (tmp_path / "server.yml").write_text("certificate: pki/server.crt\nkey: pki/server.key\n")
    made = authority.renew(tmp_path / "pki", ["old.example.org"])
    ca = tmp_path / "ca.der"
    ca.write_bytes(ssl.PEM_cert_to_DER_cert((tmp_path / "pki/ca.crt").read_text()))
    with serving(tmp_path / "site", "--config", str(tmp_path / "server.yml")) as server:

        def told():
            before = len(server.log())
            server.process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                for line in server.log()[before:]:
                    if line["event"] == "certificate":
                        return line
                time.sleep(0.05)
            raise AssertionError(server.log()[before:])

        assert micropython(server, "old.example.org", ca).stdout.strip() == "HTTP/1.1 404"
        new = authority.renew(tmp_path / "pki", ["new.example.org"])
        assert told()["fingerprint"] == new.fingerprint
        assert micropython(server, "new.example.org", ca).stdout.strip() == "HTTP/1.1 404"
        stranger = authority.renew(tmp_path / "other", ["new.example.org"])
        shutil.copy(stranger.key, new.key)
        assert told()["level"] == "error"
        made.certificate.write_text("no certificate")
        assert told()["level"] == "error"
        assert micropython(server, "new.example.org", ca).stdout.strip() == "HTTP/1.1 404"
        assert server.stop() == 0


def test_a_certificate_is_renewed_for_the_names_it_had(tmp_path):
    made = authority.renew(tmp_path, ["updates.example.org"])
    again = authority.renew(tmp_path, [])
    assert again.names == made.names == ("updates.example.org",)
    assert again.fingerprint != made.fingerprint
    for private in (made.key, tmp_path / "ca.key"):
        assert private.stat().st_mode & 0o777 == 0o600


def test_what_is_missing_for_a_certificate_is_said(tmp_path):
    assert "expected a --name" in make(tmp_path, code=1)
    make(tmp_path, "a.example")
    (tmp_path / "ca.key").unlink()
    assert "ca.key" in make(tmp_path, "a.example", code=1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_openssl_tool_verifies_what_the_authority_signs_and_no_authority_below_it(tmp_path):
    made = authority.renew(tmp_path, ["updates.example.org"])
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "ca.crt")]
    verify += ["-purpose", "sslserver", "-verify_hostname", "updates.example.org"]
    run = subprocess.run([*verify, str(made.certificate)], check=False, capture_output=True)
    assert run.returncode == 0, run.stderr
    inner = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes()).extensions
    assert inner.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
