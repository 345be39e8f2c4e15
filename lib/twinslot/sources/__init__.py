"""Where offers come from. A source has two coroutines and names the base of its URLs:

    offer = await source.poll(client, facts)      # Offer; its release is None for "nothing"
    await source.report(client, facts, report)

``facts`` is a dict of what the device tells about itself: ``device_id``, ``product``,
``channel``, ``hardware``, ``chip_id``, ``current_version``, ``current_build``, ``labels``,
``agent``, ``micropython``, ``staged`` (the build that waits in the other slot, or ""), ``flash``
and ``free`` (bytes of flash, and free on the file system; or None), ``reset_cause`` (the number
of it). A source that answers from memory has ``forget()`` as well: what it said led nowhere, and
may have been damaged on the way. An offer is not signed: it can make a device look at a release,
wait, or poll at another pace, never run anything.
"""

from collections import namedtuple

from .. import errors

DOCUMENT_LIMIT = 2048  # bytes of a pointer or an answer
DEADLINE_MS = 120000  # for one question and its whole answer
_POLL_MIN = 1
_POLL_MAX = 7 * 86400
_KEYRING_MAX = (1 << 30) - 1

Offer = namedtuple("Offer", ("release", "poll", "percent", "seed", "keyring", "install"))


def parse_offer(obj, base, resolve):
    """Check an offer of the channel pointer's shape and return an :class:`Offer`.

    Args:
        obj: ``{"release": URL, "poll": seconds, "rollout": {"percent", "seed"},
            "keyring": version, "install": seconds}``, each optional.
        base: URL of the document it came from.
        resolve: ``url.resolve``.

    Returns:
        Offer: ``release`` an absolute URL or None, ``poll`` in seconds (1 s to 7 days) or None,
        ``keyring`` the version of the product's keyring, 0 if there is none, ``install`` the
        seconds until the release may be installed (at most 7 days): it is only fetched before.

    Raises:
        FormatError: a member of the wrong type, or a URL that leads elsewhere.
    """
    if not isinstance(obj, dict):
        raise errors.FormatError("offer", type(obj).__name__, "an object")
    release = obj.get("release")
    if release is not None:
        if not isinstance(release, str) or not release:
            raise errors.FormatError(
                "member release of the offer", type(release).__name__, "a URL"
            )
        release = resolve(base, release)
    poll = obj.get("poll")
    if poll is not None:
        if type(poll) is not int:
            raise errors.FormatError("member poll of the offer", type(poll).__name__, "seconds")
        poll = min(max(poll, _POLL_MIN), _POLL_MAX)
    rollout = obj.get("rollout")
    percent, seed = 100, ""
    if rollout is not None:
        if not isinstance(rollout, dict):
            raise errors.FormatError(
                "member rollout of the offer", type(rollout).__name__, "an object"
            )
        percent, seed = rollout.get("percent", -1), rollout.get("seed")
        if type(percent) not in (int, float) or not 0 <= percent <= 100:
            raise errors.FormatError("percent of the rollout", percent, "0 to 100")
        if not isinstance(seed, str):
            raise errors.FormatError("seed of the rollout", type(seed).__name__, "text")
    keyring = obj.get("keyring", 0)
    if type(keyring) is not int or not 0 <= keyring <= _KEYRING_MAX:
        raise errors.FormatError("member keyring of the offer", str(keyring)[:32], "its version")
    install = obj.get("install", 0)
    if type(install) is not int or install < 0:
        raise errors.FormatError("member install of the offer", str(install)[:32], "seconds")
    return Offer(release, poll, percent, seed, keyring, min(install, _POLL_MAX))
