"""One request of the HTTP client: connect where it must, ask, read the head of the answer.

Not for applications; `twinslot.http` is. Loaded when something is asked for, unloaded while the
answer's body comes: what a download does not need.

Source: RFC 9110 (requests, redirects), RFC 9112 section 3.
"""

from asyncio import current_task, sleep_ms
from time import ticks_ms

from . import errors, unload
from .http import ETAG_MAX, Response
from .link import longer

_REDIRECTS = (301, 302, 303, 307, 308)


async def get(client, url, etag, start, if_range, deadline, redirects):
    """See ``Client.get``; ``deadline`` is a tick, or None."""
    extra = []
    if etag:
        extra.append("If-None-Match: " + _field(etag))
    if if_range and if_range.startswith("W/"):
        start = None
    if start:
        extra.append("Range: bytes=%d-" % start)
        if if_range:
            extra.append("If-Range: " + _field(if_range))
    url = _parsed(url)
    answer = await _request(client, "GET", url, extra, b"", deadline, start, if_range)
    if not redirects or answer.status not in _REDIRECTS:
        return answer
    url = _redirect(client, url, answer)
    await answer.close()
    answer = await _request(client, "GET", url, extra, b"", deadline, start, if_range)
    if answer.status in _REDIRECTS:
        await answer.close()
        raise errors.HttpError("redirected twice", status=answer.status)
    return answer


async def post(client, url, body, deadline):
    """See ``Client.post_json``; ``body`` is JSON, bytes."""
    extra = ["Content-Type: application/json", "Content-Length: %d" % len(body)]
    return await _request(client, "POST", _parsed(url), extra, body, deadline)


def _parsed(url):
    from .url import parse

    return parse(url) if isinstance(url, str) else url


def _field(value):
    # A header injected through a stored ETag would be a request of somebody else's making.
    from . import head

    raw = value.encode()
    if not head.is_visible(raw) or len(value) > ETAG_MAX:
        raise errors.FormatError("ETag", head.clip(raw), "visible characters, %d" % ETAG_MAX)
    return value


def _redirect(client, url, answer):
    from .url import parse, resolve

    if not answer.location:
        raise errors.HttpError("redirect without a usable Location", status=answer.status)
    try:
        return parse(resolve(url, answer.location, client._allow_hosts))
    except errors.FormatError as e:
        raise errors.HttpError("redirect refused: %s" % e.message, status=answer.status)


def _head(client, method, url, extra):
    from .url import host_of

    lines = [
        "%s %s HTTP/1.1" % (method, url.path),
        "Host: " + host_of(url),
        "User-Agent: twinslot",
        "Accept-Encoding: identity",
    ]
    if client._token and url[:3] == client._token_for:
        lines.append("Authorization: Bearer " + client._token)
    return ("\r\n".join(lines + extra) + "\r\n\r\n").encode()


async def _request(client, method, url, extra, body, deadline, start=None, if_range=None):
    if url.scheme != "https" and not client._allow_http:
        from .url import shown

        raise errors.ConfigError("plain http is not allowed here", shown(url), "https")
    if url.scheme == "https" and client._tls is None:
        raise errors.ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
    task = current_task()
    # The task and not a mark: a mark could be left behind, and close the client for ever.
    if client._asker not in (None, task) and not client._asker.done():
        raise errors.BusyError("the client waits for another answer")
    data = _head(client, method, url, extra) + body
    try:
        client._asker = task
        status, minor, found = await _exchange(client, url, data, deadline)
        answer = Response(client._link, client, status, minor, found, start, if_range)
    except BaseException:  # cancelled, too: the stream is in an unknown state
        client._drop()
        raise
    finally:
        client._asker = None
    if client._on_date and answer.secure and answer.date is not None:
        client._on_date(answer.date)
    return answer


async def _exchange(client, url, data, deadline):
    """Send a request and return the head of its answer, over the kept connection or anew."""
    link = client._link
    kept = link is not None and link.origin == url[:3] and link.owner is None and link.is_quiet()
    while True:
        since = ticks_ms()
        limit_ms = client.read_timeout_ms
        if not kept:
            limit_ms = client._connect_timeout_ms
            client._drop()
            from . import dial

            await dial.connect(client, url, deadline, since)
            del dial
        link = client._link
        link.deadline = deadline
        link.heard = False
        try:
            await _send(link, data, since, limit_ms)
            unload()  # what has taken URLs apart, and connected
            from . import head

            return await head.read(link, ticks_ms(), client.read_timeout_ms)
        except errors.NetworkError as e:
            # A kept connection that the server closed meanwhile: once more on a new one.
            if not kept or link.heard or isinstance(e, errors.TimeoutError_):
                raise
            kept = False


async def _send(link, data, since, limit_ms):
    left = memoryview(data)
    pause = 1
    while len(left) > 0:
        doing = "request" if link.greeted or not link._tls else "TLS handshake"
        try:
            n = link._open().write(left)
        except (OSError, ValueError) as e:
            raise link._error(e, doing)
        if n:
            link.greeted = True
            left = left[n:]
            pause = 1
        else:
            link.check(since, limit_ms, doing)
            await sleep_ms(pause)
            pause = longer(pause)
