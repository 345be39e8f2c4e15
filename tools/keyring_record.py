"""What a root has signed last, kept beside it: no site makes it go on from an older keyring.

    root.key  or  root.pub.json   ->   root.keyrings.json

    {"sensor-node": {"keyring": "eyJ...", "revoked": ["kid", ...]}}

The site is where everybody fetches from, and may be in other hands for a while. A keyring that is
put back there would otherwise have successors that list only what its attacker stole, under
versions that boards have seen already. The record is written before what it tells of goes
anywhere, so it is never behind.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from twinslot import base64url
from twinslot.errors import KeyringError, OtaError

from . import tree
from .files import write_whole

_LIMIT = 1 << 22  # bytes: some three hundred products


def path_beside(root: Path) -> Path:
    """Where the record of a root is, by its private or its public file."""
    stem = root.name.removesuffix(".key").removesuffix(".pub.json")
    return root.with_name(stem + ".keyrings.json")


@dataclass
class Record:
    """The last keyring of one product that a root has signed, and what it has ever revoked.

    Attributes:
        path: the record's file; None remembers nothing, for roots that are thrown away.
        token: the keyring; b"" for none.
        revoked: key ids.
    """

    path: Path | None
    product: str
    token: bytes = b""
    revoked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, path: Path | None, product: str) -> "Record":
        """Read what is there, if anything.

        Raises:
            KeyringError: a file that is no record.
        """
        entry = _read(path).get(product) if path else None
        if entry is None:
            return cls(path, product)
        return cls(path, product, entry["keyring"].encode(), set(entry["revoked"]))

    def keep(self, token: bytes, revoked: set[str]) -> None:
        """Replace it by a keyring that has just been signed, on the medium before this returns."""
        self.token, self.revoked = token, self.revoked | revoked
        if self.path is None:
            return
        entry = {"keyring": token.decode(), "revoked": sorted(self.revoked)}
        content = json.dumps({**_read(self.path), self.product: entry}, indent=1) + "\n"
        write_whole(self.path, content.encode())


def _read(path: Path) -> dict[str, dict]:
    try:
        found = json.loads(tree.read(path, _LIMIT))
        for entry in found.values():
            base64url.b64url_decode(entry["keyring"].encode().split(b".")[1])
            if not all(isinstance(kid, str) for kid in entry["revoked"]):
                raise ValueError("a key id is no text")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OtaError) as exc:
        raise KeyringError(
            f"{path} is not the record that it should be ({exc!r}): put its last copy back"
        ) from exc
    return found
