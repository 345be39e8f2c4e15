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
    private = new_key()
    here = ["localhost", "127.0.0.1", socket.gethostname() or "localhost"]
    made = issue(private.public_key(), [*here, *names], private)
    # The key first: a certificate without its key would look finished.
    write_new(key, key_pem(private), mode=0o600)
    write_new(certificate, certificate_pem(made), mode=0o644)


def issue(
    public: ec.EllipticCurvePublicKey,
    names: list[str],
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None = None,
) -> x509.Certificate:
    """Make a server's certificate, signed by ``issuer``'s key, or by its own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Twinslot server")])
    signers_id = x509.SubjectKeyIdentifier.from_public_key(signer.public_key())
    return (
        builder(subject, issuer.subject if issuer else subject, public, VALID_YEARS)
        .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # ECDHE-ECDSA signs the handshake and does nothing else with the key (RFC 8422, 5.3).
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signers_id),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )


def builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, years: int
) -> x509.CertificateBuilder:
    """Begin a certificate of this server: what all of them have in common."""
    until = dt.datetime.now(dt.UTC) + dt.timedelta(days=365 * years + years // 4)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def key_usage(**allowed: bool) -> x509.KeyUsage:
    """A KeyUsage that allows these and nothing else."""
    members = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    ).split()
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in members})


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _general_names(names: list[str]) -> list[x509.GeneralName]:
    result: list[x509.GeneralName] = []
    for name in names:
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            result.append(x509.DNSName(name.lower()))
    return list(dict.fromkeys(result))


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
