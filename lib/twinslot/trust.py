"""From an offer to a release whose signature holds: the connection, the keyring, the release.

    trust = Trust(settings, journal, clock)
    version = await trust.renew(trust.client, offer.keyring, base)   # None: nothing newer
    manifest = await trust.release(trust.client, offer.release)

Every connection is verified. One exception, so that a certificate that ran out, or a clock that
is wrong, does not lock a board out for ever: when only the *dates* of certificates have stood in
the way of three polls in a row, the signed files of the tree are fetched over a connection that
proves nothing (`regardless`). Nothing is lost by it that the signatures don't protect: it carries
no token and no report, and sets no clock. Each poll still tries the verified one first.

What verifies is imported when there is something to verify, what parses after that has gone, and
it goes for a download.
"""

from asyncio import sleep_ms

from micropython import const

from . import errors, http, tidy
from .certs import Tls

_PATIENCE = 3  # polls that fail on dates alone before they are looked over
# As in sources, jws and release, which are not loaded for it.
_DEADLINE_MS = const(120000)
_TOKEN_LIMIT = const(12288)
_TYPE = "twinslot-release+jws"


async def _make_room():
    """Between two steps that hold the event loop: give back what the one has loaded, and let
    other tasks run."""
    tidy()
    await sleep_ms(0)


class Trust:
    """Connections and keys of one board.

    Args:
        settings: as in ``config``.
        journal: a ``Journal``; keeps the keyring's version and counts failures on dates.
        clock: a ``Clock``.

    Raises:
        ConfigError: the settings, or a file they name, can't be used.
    """

    def __init__(self, settings, journal, clock):
        from .keyring import read

        self._settings = s = settings
        self._journal = journal
        self._clock = clock
        self._known = [journal.get("keyring", int)]  # see Keyring
        self._regardless = None
        tls = None
        if s["url"].startswith("https:"):
            tls = Tls(
                ca=read(s["ca"]) if s["ca"] else None,
                fingerprint=s["fingerprint"],
                client_cert=read(s["client_cert"]) if s["client_cert"] else None,
                client_key=read(s["client_key"]) if s["client_key"] else None,
            )
        self.client = self._open(tls, s["token"], clock.observe)
        self._keyring()  # last: it takes and gives back most

    def _open(self, tls, token=None, on_date=None):
        s = self._settings
        return http.Client(
            tls=tls,
            token=token,
            origin=s["url"],
            read_timeout_ms=s["timeout"] * 1000,
            connect_timeout_ms=s["timeout"] * 1000,
            allow_http=s["allow_http"],
            allow_hosts=s["allow_hosts"],
            on_date=on_date,
        )

    def _keyring(self):
        from .keyring import Keyring

        s = self._settings
        return Keyring(s["keys"], self._journal, s["product"], s["demo"], self._known)

    def regardless(self, error, counts=True):
        """Return the client for the signed files after a TlsError, or raise that error again.

        Args:
            counts: False where this poll has been counted, and now a mirror was asked.
        """
        if not error.dates:
            raise error
        count = self._journal.get("dates", int)
        if counts and count < _PATIENCE:
            count += 1
            self._journal.update(dates=count)
        if count < _PATIENCE:
            raise error
        if self._regardless is None:
            from .anybody import Anybody

            self._regardless = self._open(Anybody())
        return self._regardless

    def verified(self):
        """A poll over the verified connection has worked: its dates are in order (again)."""
        if self._journal.get("dates", int):
            self._journal.update(dates=None)

    async def renew(self, client, version, base):
        """Take the keyring over the air, where one is said to be newer.

        Args:
            client: to fetch it with.
            version: of the keyring on the server, 0 for none.
            base: URL of the server, or of a mirror.

        Returns:
            the version taken, or None.

        Raises:
            NetworkError: it can't be fetched.
            KeyringError: it does not hold: perhaps damaged on the way, or an old one out of a
                cache. As after any other error the next poll asks for it again.
            SpaceError: it can't be written.
        """
        # Without its module first: mostly there is nothing to do.
        if version <= self._known[0] or not self._keyring().wants(version):
            return None
        url = base + self._settings["product"] + "/keyring.jws"
        token = await self._fetch(client, url)
        keyring = self._keyring()
        keyring.take(token)
        return keyring.version

    async def release(self, client, url):
        """Fetch a release and return its manifest, a verified ``release.Release``.

        Raises:
            NetworkError: it can't be fetched.
            SignatureError: not by a key that signs releases; KeyringError: there is none now.
            ReleaseError: it is no release.
        """
        # One after the other, the connection beside them: this is where the heap is fullest.
        await _make_room()
        token = await self._fetch(client, url)
        keys = self._keyring().keys(self._clock.earliest)
        await _make_room()
        from . import jws

        payload = jws.verify(token, keys, _TYPE, tidy)
        del token, keys, jws
        await _make_room()
        from . import release

        manifest = release.parse(payload)
        del payload, release
        await _make_room()
        self._clock.at_least(manifest.issued)
        return manifest

    async def _fetch(self, client, url):
        response = await client.get(url, deadline_ms=_DEADLINE_MS)
        try:
            if response.status != 200:
                from .url import parse, shown

                raise errors.HttpError(
                    shown(parse(url)),
                    response.status,
                    "200",
                    status=response.status,
                    retry_after=response.retry_after,
                )
            await _make_room()  # without what has asked, and read the head of the answer
            return await response.read(_TOKEN_LIMIT)
        finally:
            await response.close()
