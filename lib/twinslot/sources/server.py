"""The Twinslot server: the same tree, plus an API that decides and listens."""

import json

from .. import errors
from ..journal import Journal
from ..url import parse, resolve, shown
from . import DEADLINE_MS, DOCUMENT_LIMIT, parse_offer


class Server:
    """``POST api/v1/check-update`` and ``POST api/v1/report-status`` of the server."""

    def __init__(self, config):
        self._check = config["url"] + "api/v1/check-update"
        self._report = config["url"] + "api/v1/report-status"

    async def _post(self, client, url, obj):
        response = await client.post_json(url, obj, DEADLINE_MS)
        try:
            if response.status != 200:
                raise errors.HttpError(
                    shown(parse(url)),
                    response.status,
                    "200",
                    status=response.status,
                    retry_after=response.retry_after,
                )
            body = await response.read(DOCUMENT_LIMIT)
        finally:
            await response.close()
        try:
            return json.loads(body)
        except ValueError:
            raise errors.FormatError("the answer of %s is not JSON" % shown(parse(url)))

    async def poll(self, client, facts):
        """Return the server's offer for this device."""
        answer = await self._post(client, self._check, facts)
        if not isinstance(answer, dict) or type(answer.get("update_available")) is not bool:
            raise errors.FormatError("the answer of the server has no update_available")
        if not answer["update_available"]:
            answer.pop("release", None)
        return parse_offer(answer, self._check, resolve)

    async def report(self, client, facts, report):
        """Deliver a report, one of a failure with what the board has noted of others; the server
        takes the same one twice without harm."""
        body = dict(report)
        if body.get("error"):
            notes = Journal.shared().log()
            body["log"] = "\n".join("%d %s %s %s" % tuple(note) for note in notes)
        body["device_id"] = facts["device_id"]
        body["current_version"] = facts["current_version"]
        await self._post(client, self._report, body)
