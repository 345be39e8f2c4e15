"""A channel on any web server: ``{url}{product}/{channel}.json``, fetched with its ETag."""

import json

from .. import errors
from ..url import resolve
from . import DEADLINE_MS, DOCUMENT_LIMIT, parse_offer


class Static:
    """A plain directory tree as ``twinslot publish`` writes it; nobody listens to reports."""

    def __init__(self, config):
        self._url = "%s%s/%s.json" % (config["url"], config["product"], config["channel"])
        self._etag = None
        self._offer = None

    async def poll(self, client, facts):
        """Return the channel's offer; an unchanged one costs a 304."""
        response = await client.get(self._url, etag=self._etag, deadline_ms=DEADLINE_MS)
        try:
            if response.status == 304 and self._offer:
                return self._offer
            if response.status != 200:
                raise errors.HttpError(
                    "channel " + self._url,
                    response.status,
                    "200",
                    status=response.status,
                    retry_after=response.retry_after,
                )
            body = await response.read(DOCUMENT_LIMIT)
            etag = response.etag
        finally:
            await response.close()
        try:
            found = json.loads(body)
        except ValueError:
            raise errors.FormatError("channel %s is not JSON" % self._url)
        self._offer = parse_offer(found, self._url, resolve)
        if not any(name in found for name in ("release", "poll", "rollout", "keyring")):
            raise errors.FormatError("channel %s holds no offer" % self._url)  # a portal's JSON
        self._etag = etag
        return self._offer

    def forget(self):
        """Ask for the whole channel next time."""
        self._etag = None

    async def report(self, client, facts, report):
        """Nobody to tell: a report counts as delivered."""
