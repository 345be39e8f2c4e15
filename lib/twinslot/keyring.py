"""Whose signature a release needs: the keys of the key file, or of the newest keyring.

    ring = Keyring("/ota/keys.json", Journal.shared(), "sensor-node")
    if ring.wants(offer.keyring):
        ring.take(token)
    payload = jws.verify(token, ring.keys(now), release.TYPE)

The key file comes onto the board by cable. ``{"keys": [JWK...]}`` holds the keys that sign
releases, for good. With ``"root": [JWK...]`` as well, or instead, a root replaces them over the
air by a keyring: a JWS of type ``twinslot-keyring+jws`` around

    {"schema": 1, "product": "sensor-node", "version": 7,
     "expires": "2027-11-20T09:00:00Z", "keys": [JWK...], "security_floor": 3}

- Signed by any one of the roots. A root signs nothing else: no release, and it can't be among
  the keys it lists. Roots themselves change by cable only.
- Only a higher version is taken; a key is revoked by leaving it out. ``expires`` and ``product``
  may be absent; an expired one is taken (what it revokes stays revoked) and then trusts nobody.
- ``security_floor``, mostly absent, sets the board's floor once, when the keyring is taken: a
  stolen release key can raise it beyond what its owner could ever sign.
- It lies beside the key file, written under another name and renamed, and is verified whenever it
  is read. The journal keeps its version: where the file is lost or damaged, no key is trusted,
  least of all those of the key file, until a keyring of that version or a higher one has come.

Allocates what ``jws.verify`` does; keeps nothing of the keyring in memory. Imports where it needs
a module, so that those can be unloaded meanwhile.
"""

import os

from . import errors
from .errors import OtaError

TYPE = "twinslot-keyring+jws"
_VERSION_MAX = (1 << 30) - 1
_KEYS_MAX = 8
_ROOTS_MAX = 4
_FILE_MAX = 16384  # bytes of the key file


class Keyring:
    """The keys that may sign releases, and how they change.

    Args:
        path: the key file.
        journal: keeps the version of the keyring.
        product: that of the board; a keyring of another one is refused.
        demo: take keys that are marked as samples.
        known: ``[version]`` on the board, 0 for none or one that has to come again, where that
            outlives this object. By default that of the journal.

    Raises:
        ConfigError: the key file is missing, malformed, or trusts nobody.
    """

    def __init__(self, path, journal, product, demo=False, known=None):
        self._journal = journal
        self._product = product
        self._demo = demo
        self._path = path[: path.rfind("/") + 1] + "keyring.jws"
        self._roots, self._fixed = load(read(path), demo)
        self._known = known or [journal.get("keyring", int)]

    @property
    def version(self):
        return self._known[0]

    def wants(self, version):
        """True if a keyring that is said to have this version is worth fetching."""
        return bool(self._roots) and version > self._known[0]

    def keys(self, now=None):
        """Return ``{kid: modulus}`` of the keys that may sign a release now.

        Args:
            now: seconds since 1970, or what is known to have passed of them; None for unknown.

        Raises:
            KeyringError: the keyring is lost or has expired, or has yet to come.
        """
        if not self._roots:
            return self._fixed
        floor = self._journal.get("keyring", int)
        version, expires, keys, reset = self._stored()
        if version < floor or not keys:
            self._known[0] = 0  # wanted again
            raise errors.KeyringError("keyring", "none on the board", "version %d" % max(floor, 1))
        if version > floor:  # the power failed between file and journal
            self._adopt(version, reset)
        if expires is not None and now is not None and now >= expires:
            raise errors.KeyringError(
                "keyring %d expired %d s ago: publish its successor" % (version, now - expires)
            )
        return keys

    def take(self, token):
        """Verify a keyring and put it in the place of the one before.

        Args:
            token: compact JWS, bytes.

        Raises:
            KeyringError: not by a root, malformed, of another product, or not newer.
            SpaceError: it can't be written; the one before stays.
        """
        version, _, _, reset = self._parse(token)
        # The file knows, too: a lost journal must not open the door to a revoked key.
        known = max(self._journal.get("keyring", int), self._stored()[0])
        if version <= self.version or version < known:
            raise errors.KeyringError("keyring version", version, "higher than %d" % known)
        try:
            with open(self._path + ".new", "wb") as f:
                f.write(token)
            os.rename(self._path + ".new", self._path)
        except OSError as exc:
            raise errors.SpaceError("the keyring can't be written: %s" % exc)
        self._adopt(version, reset)

    def _adopt(self, version, reset):
        if reset is None:
            self._journal.update(keyring=version)
        else:  # what a thief has signed is forgotten with it
            self._journal.update(keyring=version, floor=reset, issued=None)
        self._known[0] = version

    def _stored(self):
        """The newest keyring on the board; the keys of the key file where there is none."""
        best = (0, None, self._fixed, None)
        # The second one is there after a cut, on FAT in the place of the first.
        for path in (self._path, self._path + ".new"):
            try:
                found = self._parse(read(path))
            except OtaError:
                continue
            if found[0] > best[0]:
                best = found
        return best

    def _parse(self, token):
        try:
            return parse(token, self._roots, self._product, self._demo)
        except errors.KeyringError:
            raise
        except (errors.ConfigError, errors.SignatureError) as exc:
            raise errors.KeyringError("keyring: %s" % exc.message)


def read(path):
    """Return the bytes of a file on the board.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as exc:
        raise errors.ConfigError("file %s can't be read: %s" % (path, exc))


def load(text, demo=False):
    """Read a key file and return ``(roots, keys)``, each ``{kid: modulus}``.

    Raises:
        ConfigError: malformed, nobody trusted, or a root among the keys.
    """
    from . import keyset, strict

    if len(text) > _FILE_MAX:
        raise errors.ConfigError("key file", "%d bytes" % len(text), "at most %d" % _FILE_MAX)
    try:
        obj = strict.loads(text)
    except ValueError as exc:
        raise errors.ConfigError("key file: %s" % exc)
    if not isinstance(obj, dict) or "root" not in obj:
        return {}, keyset.load(obj, demo)
    roots = keyset.load({"keys": obj["root"]}, demo)
    if len(roots) > _ROOTS_MAX:
        raise errors.ConfigError("roots", len(roots), "1 to %d" % _ROOTS_MAX)
    keys = keyset.load(obj, demo) if "keys" in obj else {}
    _keep_apart(roots, keys)
    return roots, keys


def _keep_apart(roots, keys):
    for kid in keys:
        if kid in roots:
            raise errors.ConfigError("key %s is a root, and a root signs keyrings only" % kid)


def parse(token, roots, product, demo=False):
    """Verify a keyring and return ``(version, expires, keys, security_floor)``.

    Args:
        token: compact JWS, bytes.
        roots: ``{kid: modulus}`` of the keys that may sign it.
        product: that of the board.

    Returns:
        version: 1 or higher; expires: seconds since 1970 or None; keys: ``{kid: modulus}``;
        security_floor: 0 or higher, or None.

    Raises:
        SignatureError: not by a root.
        KeyringError, ConfigError: malformed, or of another product.
    """
    from . import jws, keyset, strict
    from .release import parse_time

    payload = jws.verify(token, roots, TYPE)
    try:
        obj = strict.loads(payload)
    except ValueError as exc:
        raise errors.KeyringError("keyring: %s" % exc)
    if not isinstance(obj, dict):
        raise errors.KeyringError("keyring", type(obj).__name__, "an object")
    schema = obj.get("schema")
    if type(schema) is not int or schema != 1:
        raise errors.KeyringError("keyring schema", schema, "1; update the agent first")
    if obj.get("product", product) != product:
        raise errors.KeyringError("keyring of product", str(obj["product"])[:64], product)
    version = obj.get("version")
    if type(version) is not int or not 0 < version <= _VERSION_MAX:
        raise errors.KeyringError("keyring version", version, "1 to %d" % _VERSION_MAX)
    expires = obj.get("expires")
    if expires is not None:
        try:
            expires = parse_time(expires)
        except OtaError as exc:
            raise errors.KeyringError("keyring: expires: %s" % exc.message)
    reset = obj.get("security_floor")
    if reset is not None and (type(reset) is not int or not 0 <= reset <= _VERSION_MAX):
        raise errors.KeyringError("keyring security_floor", reset, "0 to %d" % _VERSION_MAX)
    keys = keyset.load(obj, demo)
    if len(keys) > _KEYS_MAX:
        raise errors.KeyringError("keys of the keyring", len(keys), "1 to %d" % _KEYS_MAX)
    _keep_apart(roots, keys)
    return version, expires, keys, reset
