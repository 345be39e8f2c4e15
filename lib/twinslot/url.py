"""URLs: take one apart, resolve a reference against the document that names it.

Pure (runs on CPython too) and strict on purpose: a URL comes out of an unsigned offer or out of a
redirect, and what is unusual in one is refused rather than mended. Only http and https.

Source: RFC 3986 (section 5 for references), RFC 9110 section 4.2.
"""

from collections import namedtuple

from . import errors
from .digits import decimal

_URL_MAX = 512

Url = namedtuple("Url", ("scheme", "host", "port", "path"))


def _check_text(text):
    if not isinstance(text, str) or not text:
        raise errors.FormatError("URL", type(text).__name__ if text else "nothing", "text")
    if len(text) > _URL_MAX:
        raise errors.FormatError("URL too long", len(text), "at most %d characters" % _URL_MAX)
    for c in text:
        if not "!" <= c <= "~" or c in '\\"<>^`{|}#':
            raise errors.FormatError("URL with a forbidden character", "code %d" % ord(c))


def _check_path(path):
    # Percent-encoded dots and slashes are what the server will make of them.
    plain = path.split("?")[0].lower()
    plain = plain.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/")
    for segment in plain.split("/"):
        if segment in ("..", "."):
            raise errors.FormatError("URL with a dot segment", segment)


def parse(url):
    """Split an absolute http(s) URL into ``Url(scheme, host, port, path)``.

    Raises:
        FormatError: another scheme, a user name, dot segments, forbidden characters, too long.
    """
    _check_text(url)
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    if not mark or scheme not in ("http", "https"):
        # What stands before a stray "@" could be a password: not shown.
        raise errors.FormatError("URL scheme", scheme.split(":")[0][:16], "https")
    end = len(rest)
    for c in "/?":
        at = rest.find(c)
        if 0 <= at < end:
            end = at
    authority = rest[:end].lower()
    path = rest[end:]
    if not path.startswith("/"):
        path = "/" + path
    _check_path(path)
    if "@" in authority:
        raise errors.FormatError("URL with a user name or password")
    if authority.startswith("["):
        host, mark, port = authority[1:].partition("]")
        allowed = "0123456789abcdef:."
        if not mark or (port and not port.startswith(":")):
            raise errors.FormatError("URL with a malformed IPv6 address")
    else:
        host, mark, port = authority.partition(":")
        port = mark + port
        allowed = "abcdefghijklmnopqrstuvwxyz0123456789-._"
    if not host or len(host) > 253:
        raise errors.FormatError("URL with a host of %d characters" % len(host))
    for c in host:
        if c not in allowed:
            raise errors.FormatError("URL host", host[:64])
    if not port:
        number = 443 if scheme == "https" else 80
    else:
        number = decimal(port[1:].encode(), 65535)
        if not number:
            raise errors.FormatError("URL port", port[1:17], "1 to 65535")
    return Url(scheme, host, number, path)


def resolve(base, reference, allow_hosts=()):
    """Return the absolute URL (text) that ``reference`` means in the document at ``base``.

    Args:
        base: absolute URL, or a Url.
        reference: relative ("r/1.4.0.jws"), path-absolute ("/a/b") or absolute on an allowed host.
        allow_hosts: further hosts that may be named: "cdn.example" or "cdn.example:8443".

    Raises:
        FormatError: other scheme than the base's, foreign host, or anything parse() refuses.
    """
    if isinstance(base, str):
        base = parse(base)
    _check_text(reference)
    head = reference.split("?")[0].split("/")[0]
    if ":" in head:
        url = parse(reference)
    elif reference.startswith("//"):
        url = parse(base.scheme + ":" + reference)
    else:
        own = base.path.split("?")[0]
        if reference.startswith("/"):
            path = reference
        elif reference.startswith("?"):
            path = own + reference
        else:
            path = own[: own.rfind("/") + 1] + reference
        url = Url(base.scheme, base.host, base.port, path)
        parse(text_of(url))
        return text_of(url)
    if url.scheme != base.scheme:
        raise errors.FormatError("URL scheme", url.scheme, base.scheme)
    if url[:3] != base[:3] and not (
        url.host in allow_hosts or "%s:%d" % (url.host, url.port) in allow_hosts
    ):
        raise errors.FormatError("URL on a foreign host", host_of(url), host_of(base))
    return text_of(url)


def host_of(url):
    """Return ``host`` or ``host:port``, as in a Host field."""
    host = "[%s]" % url.host if ":" in url.host else url.host
    if url.port == (443 if url.scheme == "https" else 80):
        return host
    return "%s:%d" % (host, url.port)


def text_of(url):
    return "%s://%s%s" % (url.scheme, host_of(url), url.path)


def shown(url):
    """Return the URL for a message: without its query, which may carry a signature."""
    return text_of(url).split("?")[0][:120]
