"""The head of an HTTP answer: its status line and fields, and what they say about the body.

Loaded for each answer, and unloaded while its body comes.

Source: RFC 9110 (fields, Range, dates), RFC 9112 (message framing).
"""

from micropython import const

from . import errors
from .digits import decimal
from .http import ETAG_MAX, LENGTH_MAX
from .link import HEAD_MAX

_LINES_MAX = const(64)
_FIELD_MAX = const(512)
_INTERIM_MAX = const(8)  # 1xx answers before the real one
_RETRY_AFTER_MAX = const(21600)  # 6 h: no server may silence a device for longer

_WANTED = (
    b"age",
    b"connection",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"date",
    b"etag",
    b"location",
    b"retry-after",
    b"transfer-encoding",
)

_DAYS = b"MonTueWedThuFriSatSun"
_MONTHS = b"JanFebMarAprMayJunJulAugSepOctNovDec"


def http_date(text):
    """Return the Unix seconds of an HTTP date (bytes), or None where it is not one.

    Only IMF-fixdate, ``Sun, 06 Nov 1994 08:49:37 GMT``, the one form that may be sent
    (RFC 9110 section 5.6.7). Computed without the time module: its epoch differs by port.
    """
    if len(text) != 29 or text[3:5] != b", " or text[25:] != b" GMT":
        return None
    if text[7:8] + text[11:12] + text[16:17] + text[19:20] + text[22:23] != b"   ::":
        return None
    month = _MONTHS.find(text[8:11])
    weekday = _DAYS.find(text[:3])
    day = decimal(text[5:7], 31)
    year = decimal(text[12:16], 9999)
    hour = decimal(text[17:19], 23)
    minute = decimal(text[20:22], 59)
    second = decimal(text[23:25], 60)
    if month < 0 or month % 3 or weekday < 0 or weekday % 3 or not day:
        return None
    if year is None or year < 1970 or hour is None or minute is None or second is None:
        return None
    month = month // 3 + 1
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    longest = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]
    if day > longest:
        return None
    # Days since 1970-01-01 with years that begin in March (leap day last).
    y = year - (month <= 2)
    m = (month + 9) % 12
    days = 365 * y + y // 4 - y // 100 + y // 400 + (153 * m + 2) // 5 + day - 719469
    if (days + 3) % 7 != weekday // 3:
        return None
    return days * 86400 + hour * 3600 + minute * 60 + second


def is_visible(value):
    if len(value) > _FIELD_MAX:
        return False
    for c in value:
        if not 33 <= c <= 126:
            return False
    return True


def clip(value):
    # What a server sent, for a message: short and printable.
    return "".join(chr(c) if 32 <= c <= 126 else "?" for c in value[:40])


async def fields(link, since, limit_ms, doing, room, wanted=()):
    """Read header fields up to the empty line: ({wanted name: value}, room left).

    A wanted field that is repeated is refused, all others are only counted.
    """
    found = {}
    for _ in range(_LINES_MAX + 1):
        line = await link.line(since, limit_ms, doing)
        room -= len(line) + 2
        if room < 0:
            raise errors.HttpError("%s: too long" % doing, "more", "%d bytes" % HEAD_MAX)
        if not line:
            return found, room
        name, colon, value = line.partition(b":")
        if not colon or not name or b" " in name or b"\t" in name:
            raise errors.HttpError("%s: not a field" % doing)
        name = name.lower()
        if name in wanted:
            if name in found:
                raise errors.HttpError("%s: field twice" % doing, name.decode())
            found[name] = value.strip(b" \t")
    raise errors.HttpError("%s: too many fields" % doing, "more", _LINES_MAX)


async def read(link, since, limit_ms):
    """Return (status, minor version, fields) of the answer; 1xx are passed over."""
    room = HEAD_MAX
    for _ in range(_INTERIM_MAX + 1):
        line = await link.line(since, limit_ms, "header")
        room -= len(line) + 2
        status = decimal(line[9:12], 599)
        if line[:7] != b"HTTP/1." or line[7:9] not in (b"0 ", b"1 ") or line[12:13].strip():
            status = None
        if not status or status < 100 or status == 101:
            raise errors.HttpError("not an HTTP/1.1 answer")
        found, room = await fields(link, since, limit_ms, "header", room, _WANTED)
        if status >= 200:
            return status, line[7] - 48, found
    raise errors.HttpError("interim answers", "more", _INTERIM_MAX)


def tell(answer, found, minor, start, if_range):
    """Set what the fields say of a ``Response`` whose status is known.

    Args:
        found, minor: as ``read`` gave them.
        start, if_range: what was asked for.
    """
    answer._keep = minor == 1 and b"close" not in found.get(b"connection", b"").lower()
    _common(answer, found)
    _frame(answer, found, minor)
    if answer.status == 206:
        _check_range(answer, found, start, if_range)
    elif answer.status == 416:
        answer.total = decimal(found.get(b"content-range", b"").split(b"/")[-1], LENGTH_MAX)


def _common(answer, found):
    etag = found.get(b"etag")
    if not etag or not is_visible(etag) or len(etag) > ETAG_MAX:
        etag = None
    answer.etag = etag.decode() if etag else None
    location = found.get(b"location")
    answer.location = location.decode() if location and is_visible(location) else None
    answer.date = http_date(found.get(b"date", b""))
    wish = found.get(b"retry-after", b"")
    after = None
    if wish.isdigit():
        after = decimal(wish.lstrip(b"0")[:10] or b"0", 9999999999)
    elif answer.date is not None:
        until = http_date(wish)
        after = None if until is None else max(0, until - answer.date)
    answer.retry_after = None if after is None else min(after, _RETRY_AFTER_MAX)
    if answer.date is not None:
        answer.date += decimal(found.get(b"age", b""), LENGTH_MAX) or 0


def _frame(answer, found, minor):
    """Decide how long the body is (RFC 9112 section 6.3); what is ambiguous is refused."""
    length = found.get(b"content-length")
    coding = found.get(b"transfer-encoding")
    answer.length = 0
    if coding is not None and length is not None:
        raise answer._refuse("Content-Length and Transfer-Encoding together")
    if length is not None:
        answer.length = decimal(length, LENGTH_MAX)
        if answer.length is None:
            raise answer._refuse("Content-Length", clip(length), "0 to %d" % LENGTH_MAX)
    if answer.status in (204, 304):
        # No body, whatever the fields say; a server that sends one has spoiled the stream.
        answer._keep = answer._keep and not coding and (answer.status == 304 or not answer.length)
        answer.length = 0
        return
    if coding is not None:
        if coding.lower() != b"chunked" or minor == 0:
            raise answer._refuse("Transfer-Encoding", clip(coding), "chunked, of HTTP/1.1")
        answer._chunked = True
        answer.length = None
    elif length is None:
        if answer.status < 300:
            raise answer._refuse("no Content-Length: the end of the body would be a guess")
        answer._keep = False  # the status says enough; its body is not read
    coding = found.get(b"content-encoding", b"identity")
    if coding.lower() != b"identity" and answer.status < 300:
        raise answer._refuse("Content-Encoding", clip(coding), "identity")


def _check_range(answer, found, start, if_range):
    field = found.get(b"content-range")
    if not start or field is None:
        raise answer._refuse("206 without %s" % ("Content-Range" if start else "being asked"))
    unit, _, rest = field.partition(b" ")
    span, _, total = rest.partition(b"/")
    first, _, last = span.partition(b"-")
    first = decimal(first, LENGTH_MAX)
    last = decimal(last, LENGTH_MAX)
    if total != b"*":
        answer.total = decimal(total, LENGTH_MAX)
    if (
        unit.lower() != b"bytes"
        or first is None
        or last is None
        or last < first
        or (total != b"*" and (answer.total is None or last >= answer.total))
    ):
        raise answer._refuse("Content-Range", clip(field))
    if first != start:
        raise answer._refuse("Content-Range starts elsewhere", first, start)
    if answer.length is not None and answer.length != last - first + 1:
        raise answer._refuse("Content-Length of the range", answer.length, last - first + 1)
    if if_range and answer.etag and answer.etag != if_range:
        raise answer._refuse("206 of another version", answer.etag, if_range)
    answer.start = first
