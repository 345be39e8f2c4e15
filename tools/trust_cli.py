"""``twinslot keyring``, ``sign`` and ``verify``: whose signature counts, and who made one."""

import datetime as dt
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinslot import jws, keyring, keyset, release
from twinslot.errors import ConfigError, OtaError

from . import keyrings, keys, passphrase, signing
from .files import write_whole

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Fd = Annotated[
    int | None,
    typer.Option("--passphrase-fd", metavar="N", help="Read the passphrase from descriptor N."),
]
Command = Annotated[
    str | None,
    typer.Option("--sign-command", metavar="CMD", help="Program that signs what is on its stdin."),
]
Public = Annotated[
    Path | None, typer.Option("--public", help="Public key of the --sign-command (NAME.pub.json).")
]

_TYPES = {"release": release.TYPE, "keyring": keyring.TYPE}
talk = Console(stderr=True, highlight=False)


def when(text: str | None) -> dt.datetime | dt.timedelta | None:
    """Read ``365d``, ``2027-11-20``, ``2027-11-20T09:00:00Z`` or ``never``."""
    if text is None or text == "never":
        return None
    if days := re.fullmatch(r"([0-9]{1,5})d", text):
        return dt.timedelta(days=int(days[1]))
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: expected days as in 365d, or a date as in 2027-11-20",
            param_hint="--expires",
        ) from None
    return moment.replace(tzinfo=moment.tzinfo or dt.UTC)


def signer(
    key: Path | None, command: str | None, public: Path | None, fd: int | None
) -> signing.Signer:
    """Make the signer that the options name.

    Raises:
        BadParameter: neither a key nor a command, or both.
        OtaError, OSError: the key can't be used.
    """
    if (key is None) == (command is None):
        raise typer.BadParameter("give one of --key and --sign-command", param_hint="--key")
    if key is not None:
        return signing.signer_of(keys.load_private(key, passphrase.source(fd, key)))
    if public is None:
        raise typer.BadParameter("--sign-command needs the --public key", param_hint="--public")
    return signing.by_command(command or "", public)


def keyring_command(
    site: Annotated[Path, typer.Argument(help="Folder that releases are published into.")],
    product: Annotated[str, typer.Option(help="Whose releases.")],
    root: Annotated[
        Path | None, typer.Option(help="Private root key; without it the keyring is shown.")
    ] = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="Public key that may sign releases (repeatable).")
    ] = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="Key id, or public key, that no longer may.")
    ] = None,
    expires: Annotated[str, typer.Option(help="365d, a date, or never.")] = "365d",
    roots: Annotated[
        Path | None, typer.Option(help="Key file with the root that signed the last one.")
    ] = None,
    sign_command: Command = None,
    public: Public = None,
    passphrase_fd: Fd = None,
    as_json: Json = False,
) -> None:
    """Say who may sign releases: show, make, renew, extend or shorten a product's keyring.

    Each change is the next version. Boards take it with their next poll; from then on they refuse
    what a revoked key has signed, old releases too.
    """
    if root is None and sign_command is None:
        if add or revoke:
            raise typer.BadParameter("only a root can change a keyring", param_hint="--root")
        _show(site, product, as_json)
        return
    who = signer(root, sign_command, public, passphrase_fd)
    done = keyrings.update(
        site,
        product,
        who,
        add=[jwk for path in add or [] for jwk in keys.load_jwks(path)],
        revoke=[kid for item in revoke or [] for kid in _kids(item)],
        expires=when(expires),
        roots=keys.load_trusted(roots)[0] if roots else None,
    )
    if as_json:
        _print_json(_described(product, done.ring) | _changes(done))
        return
    print(f"{product} keyring {done.ring.version}  {done.path}")
    _list(done.ring, done.added)
    for kid in done.revoked:
        print(f"  revoked  {kid}")
    for channel, target in done.refused.items():
        talk.print(
            f"twinslot: channel {channel}: boards now refuse {target}, whose signer was revoked:"
            " publish it again under a new version",
            markup=False,
        )


def _kids(item: str) -> list[str]:
    """A key id as it is, or those of a public key file."""
    path = Path(item)
    if path.exists():
        return list(keyset.load({"keys": keys.load_jwks(path)}, demo=True))
    return [item]


def _show(site: Path, product: str, as_json: bool) -> None:
    ring = keyrings.read(site, product)
    if ring is None:
        raise ConfigError(f"{product} has no keyring in {site}: make one with --root and --add")
    if as_json:
        _print_json(_described(product, ring))
        return
    print(f"{product} keyring {ring.version}  signed by {ring.signed_by}")
    _list(ring, [])


def _list(ring: keyrings.Ring, added: list[str]) -> None:
    print(f"  expires  {ring.expires or 'never'}")
    for kid in ring.kids:
        print(f"  trusts   {kid}" + ("  (new)" if kid in added else ""))


def _described(product: str, ring: keyrings.Ring) -> dict:
    return {
        "product": product,
        "version": ring.version,
        "expires": ring.expires,
        "keys": ring.kids,
        "signed_by": ring.signed_by,
    }


def _changes(done: keyrings.Updated) -> dict:
    return {"added": done.added, "revoked": done.revoked, "refused": done.refused}


def sign(
    file: Annotated[Path, typer.Argument(help="Manifest or keyring as JSON.")],
    kind: Annotated[str, typer.Option("--type", help="release or keyring.")] = "release",
    key: Annotated[Path | None, typer.Option(help="Private key made by keygen.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (default: stdout).")
    ] = None,
    sign_command: Command = None,
    public: Public = None,
    passphrase_fd: Fd = None,
) -> None:
    """Sign a document made elsewhere, after a look at what boards would make of it."""
    if kind not in _TYPES:
        raise typer.BadParameter("release or keyring", param_hint="--type")
    payload = file.read_bytes()
    who = signer(key, sign_command, public, passphrase_fd)
    token = signing.document(payload, who, _TYPES[kind])
    if kind == "release":
        release.parse(payload)
    else:
        keyring.parse(token, who.trusted, json.loads(payload).get("product"), demo=True)
    if out:
        write_whole(out, token)
    else:
        sys.stdout.write(token.decode() + "\n")


def verify(
    file: Annotated[Path, typer.Argument(help="Release or keyring (.jws).")],
    key_file: Annotated[Path, typer.Option("--keys", help="Key file, as boards have it.")],
    ring: Annotated[
        Path | None, typer.Option("--keyring", help="Keyring that boards have taken.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge a release or keyring with the very code of a board (exit code 1: refused)."""
    roots, trusted = keys.load_trusted(key_file)
    token = file.read_bytes().strip()
    try:
        found = _judged(token, roots, trusted, ring)
    except OtaError as exc:
        raise type(exc)(f"{file}: {exc}") from exc
    if as_json:
        _print_json({"file": str(file), **found})
    else:
        print(f"{file}: holds: " + ", ".join(f"{k} {v}" for k, v in found.items()))


def _judged(
    token: bytes, roots: dict[str, bytes], trusted: dict[str, bytes], ring: Path | None
) -> dict:
    header, payload = _peek(token)
    product = payload.get("product")
    if header.get("typ") == keyring.TYPE:
        version, _, listed = keyring.parse(token, roots, product, demo=True)
        return {"type": "keyring", "product": product, "version": version, "keys": list(listed)}
    if ring is not None:
        trusted = keyring.parse(ring.read_bytes().strip(), roots, product, demo=True)[2]
    manifest = release.parse(jws.verify(token, trusted, release.TYPE))
    return {
        "type": "release",
        "product": manifest.product,
        "version": manifest.version,
        "kid": header.get("kid"),
    }


def _peek(token: bytes) -> tuple[dict, dict]:
    """What an unverified document says of itself; {} where it says nothing readable."""
    try:
        parts = [json.loads(jws.b64url_decode(part)) for part in token.split(b".")[:2]]
    except (ValueError, RecursionError):
        parts = []
    header, payload = [*parts, {}, {}][:2]
    return (header if isinstance(header, dict) else {}), (
        payload if isinstance(payload, dict) else {}
    )


def _print_json(value: dict) -> None:
    print(json.dumps(value, indent=2))
