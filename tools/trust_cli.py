"""``twinslot keyring``, ``sign`` and ``verify``: whose signature counts, and who made one."""

import datetime as dt
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinslot import base64url, jws, keyring, keyset, release
from twinslot.errors import ConfigError, OtaError

from . import keyring_record, keyrings, keys, passphrase, signing, tree
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

_DOCUMENT_LIMIT = 65536  # bytes, before it is signed; afterwards the device's own holds
_TYPES = ("release", "keyring")
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
    recorded: Annotated[
        bool,
        typer.Option("--recorded", help="Go on from what this root signed last."),
    ] = False,
    version: Annotated[
        int | None, typer.Option(min=1, help="Of the new one (default: the next).")
    ] = None,
    reset_security_floor: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=keyrings.FLOOR_MAX,
            help="Boards that take it set their security floor to this, once.",
        ),
    ] = None,
    sign_command: Command = None,
    public: Public = None,
    passphrase_fd: Fd = None,
    as_json: Json = False,
) -> None:
    """Say who may sign releases: show, make, renew, extend or shorten a product's keyring.

    Each change is the next version. Boards take it with their next poll; from then on they refuse
    what a revoked key has signed, old releases too. What a root signed last is kept beside it, in
    NAME.keyrings.json; a site that has anything else is not gone on from.
    """
    known = keys.load_trusted(roots)[0] if roots else None
    if root is None and sign_command is None:
        if add or revoke or recorded or version or reset_security_floor is not None:
            raise typer.BadParameter("only a root can change a keyring", param_hint="--root")
        _show(site, product, known, as_json)
        return
    record = _record(root, public)
    who = signer(root, sign_command, public, passphrase_fd)
    done = keyrings.update(
        site,
        product,
        who,
        add=[jwk for path in add or [] for jwk in keys.load_jwks(path)],
        revoke=[kid for item in revoke or [] for kid in _kids(item)],
        expires=when(expires),
        roots=known,
        record=record,
        recorded=recorded,
        version=version,
        security_floor=reset_security_floor,
    )
    if done.believed:
        talk.print(
            f"twinslot: {record} is new: keyring {done.believed.version} of the site was believed"
            " to be the last one. If boards report a higher one, sign once more with --version",
            soft_wrap=True,
            markup=False,
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
            soft_wrap=True,
            markup=False,
        )


def _kids(item: str) -> list[str]:
    """A key id as it is, or those of a public key file."""
    path = Path(item)
    if path.exists():
        return list(keyset.load({"keys": keys.load_jwks(path)}, demo=True))
    return [item]


def _record(root: Path | None, public: Path | None) -> Path | None:
    """Where it is kept what the root has signed: beside its private file, or its public one."""
    beside = root or public
    return keyring_record.path_beside(beside) if beside else None


def _show(site: Path, product: str, roots: dict[str, bytes] | None, as_json: bool) -> None:
    ring = keyrings.read(site, product, roots)
    if ring is None:
        raise ConfigError(f"{product} has no keyring in {site}: make one with --root and --add")
    if as_json:
        _print_json(_described(product, ring))
        return
    doubt = "" if roots else "  (as it says itself: --roots judges it)"
    print(f"{product} keyring {ring.version}  signed by {ring.signed_by}{doubt}")
    _list(ring, [])


def _list(ring: keyrings.Ring, added: list[str]) -> None:
    print(f"  expires  {ring.expires or 'never'}")
    if ring.security_floor is not None:
        print(f"  resets   the security floor to {ring.security_floor}")
    for kid in ring.kids:
        print(f"  trusts   {kid}" + ("  (new)" if kid in added else ""))


def _described(product: str, ring: keyrings.Ring) -> dict:
    return {
        "product": product,
        "version": ring.version,
        "expires": ring.expires,
        "keys": ring.kids,
        "signed_by": ring.signed_by,
        "security_floor": ring.security_floor,
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
    payload = tree.read(file, _DOCUMENT_LIMIT)
    who = signer(key, sign_command, public, passphrase_fd)
    if kind == "release":
        release.parse(payload)
        token = signing.document(payload, who, release.TYPE)
    else:
        product = _product(payload)
        kept = keyring_record.Record.load(_record(key, public), product)
        token = keyrings.sign(payload, who, product, kept, who.trusted)
    if out:
        write_whole(out, token)
    else:
        sys.stdout.write(token.decode() + "\n")


def _product(payload: bytes) -> str:
    """Whose keyring it is; one that is everybody's could not be told from an older one."""
    try:
        product = json.loads(payload)["product"]
        tree.check_name("product", product)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise ConfigError(f"keyring: it needs the product that it is for: {exc!r}") from exc
    return product


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
    token = tree.token(file).strip()
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
        version, _, listed, _ = keyring.parse(token, roots, product, demo=True)
        return {"type": "keyring", "product": product, "version": version, "keys": list(listed)}
    if ring is not None:
        trusted = keyring.parse(tree.token(ring).strip(), roots, product, demo=True)[2]
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
        parts = [json.loads(base64url.b64url_decode(part)) for part in token.split(b".")[:2]]
    except (ValueError, RecursionError):
        parts = []
    header, payload = [*parts, {}, {}][:2]
    return (header if isinstance(header, dict) else {}), (
        payload if isinstance(payload, dict) else {}
    )


def _print_json(value: dict) -> None:
    print(json.dumps(value, indent=2))
