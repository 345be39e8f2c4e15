"""``python -m twinslot_server.authority FOLDER --name HOST``: an authority of one's own.

Boards that trust the server's own certificate need a new one from hand to hand when it runs out,
or when the server gets another name. Boards that trust an authority (``ca.crt`` as their ``ca``)
don't: each run makes a new certificate for the server, signed by the same authority. Only
``server.crt`` and ``server.key`` go to the server; ``ca.key`` stays away from it.

A board verifies chain, name and dates; the authority can sign for servers and for nothing else.
"""

import argparse
import datetime as dt
import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from . import tls
from .files import write_new

CA_CERTIFICATE = "ca.crt"
CA_KEY = "ca.key"
CA_VALID_YEARS = 30


@dataclass(frozen=True)
class Authority:
    """Who signs, and where a board's copy of its certificate lies."""

    path: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ensure(folder: Path) -> Authority:
    """Return the authority kept in ``folder``, making it first where there is none.

    Raises:
        CertificateError: only one of its two files is there, or one can't be read.
    """
    certificate, key = folder / CA_CERTIFICATE, folder / CA_KEY
    if not certificate.exists() and not key.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = tls.new_key()
        write_new(key, tls.key_pem(private), mode=0o600)
        write_new(certificate, tls.certificate_pem(_make(private)), mode=0o644)
    try:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (ValueError, TypeError) as exc:
        raise tls.CertificateError(f"{folder}: not a usable authority: {exc}") from exc
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise tls.CertificateError(f"{key}: expected a key on P-256")
    if found.public_key() != loaded.public_key():
        raise tls.CertificateError(f"{key} is not the key of {certificate}")
    return Authority(certificate, found, loaded)


def _make(private: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Twinslot authority")])
    return (
        tls.builder(subject, subject, private.public_key(), CA_VALID_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(tls.key_usage(key_cert_sign=True), critical=True)
        .sign(private, hashes.SHA256())
    )


def renew(folder: Path, names: list[str]) -> tls.Certificate:
    """Make a new key and certificate for the server, in place of those of the run before.

    Args:
        folder: of the authority.
        names: host names and addresses boards call the server by; none: as the last time.

    Raises:
        CertificateError: no names, or the authority can't be used.
        OSError: it can't be written.
    """
    authority = ensure(folder)
    certificate, key = folder / tls.CERTIFICATE, folder / tls.KEY
    if not names:
        if not certificate.exists():
            raise tls.CertificateError("expected a --name by which boards call the server")
        names = list(tls.read(certificate, key).names)
    private = tls.new_key()
    made = tls.issue(private.public_key(), names, authority.key, authority.certificate)
    _replace(key, tls.key_pem(private), 0o600)
    _replace(certificate, tls.certificate_pem(made), 0o644)
    return tls.read(certificate, key)


def _replace(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_new(temporary, content, mode)
    os.replace(temporary, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "twinslot_server.authority", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", action="append", default=[], help="host name or address")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        made = renew(arguments.folder, arguments.name)
    except (tls.CertificateError, OSError) as exc:
        print(f"twinslot_server: certificate: {exc}", file=sys.stderr)
        return 1
    found = {
        "ca": str(arguments.folder / CA_CERTIFICATE),
        "certificate": str(made.certificate),
        "key": str(made.key),
        "fingerprint": made.fingerprint,
        "names": list(made.names),
        "expires": f"{made.not_after.astimezone(dt.UTC):%Y-%m-%d}",
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:12} {', '.join(value) if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
