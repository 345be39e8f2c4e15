"""The server's own certificate: ECDSA P-256, self-signed, made on first start and then kept.

A board trusts exactly this certificate (``server.crt``, given to it as its CA) and nothing else,
so it is not a CA: whoever steals its key can't issue others. mbedTLS takes a self-signed
end-entity certificate as its own trust anchor (``x509_crt_check_ee_locally_trusted`` in mbedTLS's
x509_crt.c), OpenSSL does too.

It is valid from 2000-01-01: a board without a battery and without NTP wakes up at that date (the
epoch of MicroPython on the ESP32) and must still reach the one server it trusts, whose Date header
then sets its clock. For a certificate that is trusted by itself the start of its validity
protects nothing.
"""

import datetime as dt
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .files import write_new

CERTIFICATE = "server.crt"
KEY = "server.key"
VALID_YEARS = 10
WARN_DAYS = 365
_VALID_FROM = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)


class CertificateError(Exception):
    """The stored certificate can't be used as asked."""


@dataclass(frozen=True)
class Certificate:
    """Where the certificate and its key lie, and what a user wants to know of it."""

    certificate: Path
    key: Path
    fingerprint: str  # SHA-256 of the DER, lower-case hex
    not_after: dt.datetime
    names: tuple[str, ...]


def ensure(data: Path, names: list[str]) -> Certificate:
    """Return the certificate kept in ``data``, making it first where there is none.

    Args:
        data: the server's private folder.
        names: host names and IP addresses boards will call the server by, besides localhost,
            127.0.0.1 and this machine's host name.

    Raises:
        CertificateError: only one of the two files is there, or the certificate that is there
            lacks one of ``names``.
    """
    certificate, key = data / CERTIFICATE, data / KEY
    if not certificate.exists() and not key.exists():
        _make(certificate, key, names)
    for path in (certificate, key):
        if not path.exists():
            raise CertificateError(f"{path} is missing while its other half is there")
    return _load(certificate, key, names)


def _load(certificate: Path, key: Path, names: list[str]) -> Certificate:
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        sans = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise CertificateError(f"{certificate}: not a usable certificate: {exc}") from exc
    known = sans.get_values_for_type(x509.DNSName)
    known += [str(address) for address in sans.get_values_for_type(x509.IPAddress)]
    for name in names:
        if name.lower() not in [k.lower() for k in known]:
            raise CertificateError(
                f"{certificate} does not name {name!r} (it names {', '.join(known)}): boards"
                " trust this very certificate, so it is not replaced by itself; delete it and"
                f" {key.name} to make a new one, and give boards the new one"
            )
    return Certificate(
        certificate,
        key,
        loaded.fingerprint(hashes.SHA256()).hex(),
        loaded.not_valid_after_utc,
        tuple(known),
    )


def _make(certificate: Path, key: Path, names: list[str]) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Twinslot server")])
    key_id = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(now + dt.timedelta(days=365 * VALID_YEARS + VALID_YEARS // 4))
        .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_digital_signature(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(key_id, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # The key first: a certificate without its key would look finished.
    write_new(key, pem, mode=0o600)
    write_new(certificate, built.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _general_names(names: list[str]) -> list[x509.GeneralName]:
    wanted = dict.fromkeys(["localhost", "127.0.0.1", socket.gethostname() or "localhost", *names])
    result: list[x509.GeneralName] = []
    for name in wanted:
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            result.append(x509.DNSName(name.lower()))
    return list(dict.fromkeys(result))


def _digital_signature() -> x509.KeyUsage:
    # ECDHE-ECDSA signs the handshake and does nothing else with the key (RFC 8422 section 5.3).
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def prepare_data_folder(data: Path, site: Path) -> None:
    """Make the private folder, unreadable to others.

    Raises:
        CertificateError: it lies in the published tree, or the tree in it.
    """
    here, public = data.resolve(), site.resolve()
    if here == public or here.is_relative_to(public):
        raise CertificateError(
            f"{data} lies inside {site}, which is published: keys and tokens need another folder"
        )
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and data.stat().st_mode & 0o077:
        data.chmod(0o700)


def read(certificate: Path, key: Path) -> Certificate:
    """Take a certificate made elsewhere; its names are its owner's business.

    Raises:
        CertificateError, OSError: it can't be read.
    """
    return _load(certificate, key, [])
