"""The release manifest: parse it, apply the policy. Pure: no I/O.

    manifest = release.parse(jws.verify(token, keys, release.TYPE))
    release.judge(manifest, board)               # raises the refusal

``parse`` is only ever given bytes whose signature holds, and is strict all the same: every field
has one type and one range, so that a slip of the signer stops here and not in a slot.
Unknown members are ignored: a later tool may say more, never something that must be obeyed.
"""

from collections import namedtuple

from . import errors

SCHEMA = 1
TYPE = "twinslot-release+jws"  # of the JWS around it
MANIFEST_LIMIT = 8192  # bytes of JSON
SIZE_LIMIT = 16 << 20  # bytes of an image: esp_image_format.c verifies no larger one
_INT_LIMIT = (1 << 30) - 1  # small integers of a 32-bit MicroPython
_NAME_LIMIT = 64
_NOTES_LIMIT = 2048
_AHEAD_S = 86400  # that a signer's clock may be ahead of a board's

Release = namedtuple(
    "Release",
    (
        "product",
        "version",
        "hardware",  # list of board names, matched exactly
        "security_version",
        "downgrade",
        "issued",  # seconds since 1970
        "expires",  # seconds since 1970 or None
        "notes",
        "firmware",  # Image or None
    ),
)
Image = namedtuple("Image", ("slot", "chip_id", "size", "sha256", "build", "payloads"))
Payload = namedtuple("Payload", ("url", "encoding", "size", "window", "patch", "base"))

# What a board knows of itself when it judges a release. ``now`` is None while the clock can't be
# trusted; ``failed`` holds the builds that were rolled back here; ``floor`` is the highest
# security version ever confirmed here; ``slot_size`` is that of the smaller slot, in bytes.
Board = namedtuple(
    "Board",
    ("product", "hardware", "chip_id", "version", "build", "floor", "now", "failed", "slot_size"),
)


def unix_time(year, month, day, hour=0, minute=0, second=0):
    """Seconds since 1970 of a UTC date, whatever the epoch of the port.

    Source: days_from_civil, https://howardhinnant.github.io/date_algorithms.html
    """
    year -= month <= 2
    doy = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    days = year * 365 + year // 4 - year // 100 + year // 400 + doy - 719468
    return ((days * 24 + hour) * 60 + minute) * 60 + second


def parse_time(text):
    """Seconds since 1970 of an RFC 3339 date in the one form ``2026-11-20T09:00:00Z``.

    Raises:
        ReleaseError: any other form, or a date outside 2000 to 2199.
    """
    ok = isinstance(text, str) and len(text) == 20
    if ok:
        for i in range(20):
            c = text[i]
            want = "dddd-dd-ddTdd:dd:ddZ"[i]
            ok = ok and ("0" <= c <= "9" if want == "d" else c == want)
    if ok:
        year, month, day = int(text[:4]), int(text[5:7]), int(text[8:10])
        hour, minute, second = int(text[11:13]), int(text[14:16]), int(text[17:19])
        ok = 2000 <= year < 2200 and 1 <= month <= 12 and 1 <= day <= 31
        ok = ok and hour < 24 and minute < 60 and second < 60
        # The 31st of a month that has 30 would be the 1st of the next.
        ok = ok and unix_time(year + month // 12, month % 12 + 1, 1) > unix_time(year, month, day)
    if not ok:
        raise errors.ReleaseError("date", str(text)[:32], "as in 2026-11-20T09:00:00Z")
    return unix_time(year, month, day, hour, minute, second)


def _field(obj, name, kind, default=None):
    """Return ``obj[name]``, which must be exactly of type ``kind`` (bool is no int)."""
    value = obj.get(name, default)
    if type(value) is not kind:
        seen = "nothing" if value is None else type(value).__name__
        raise errors.ReleaseError("member " + name, seen, kind.__name__)
    return value


def _integer(obj, name, low, high, default=None):
    value = _field(obj, name, int, default)
    if not low <= value <= high:
        raise errors.ReleaseError("member " + name, value, "%d to %d" % (low, high))
    return value


def _name(text, what):
    """Check a product, channel or board name: 1 to 64 characters of [A-Za-z0-9._-]."""
    ok = isinstance(text, str) and 0 < len(text) <= _NAME_LIMIT and text[0] not in ".-"
    if ok:
        for c in text:
            if not ("0" <= c <= "9" or "a" <= c <= "z" or "A" <= c <= "Z" or c in "._-"):
                ok = False
    if not ok:
        raise errors.ReleaseError(what, str(text)[:_NAME_LIMIT], "1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def hexdigest(text, name):
    """Check a SHA-256 as 64 lower-case hex digits and return it.

    One spelling only: a digest that is empty or blank must never mean "do not check"
    (CVE-2020-7982).
    """
    ok = isinstance(text, str) and len(text) == 64
    if ok:
        for c in text:
            if not ("0" <= c <= "9" or "a" <= c <= "f"):
                ok = False
    if not ok:
        raise errors.ReleaseError("member " + name, str(text)[:70], "64 lower-case hex digits")
    return text


def _payload(obj, size):
    if type(obj) is not dict:
        raise errors.ReleaseError("payload", type(obj).__name__, "an object")
    url = _field(obj, "url", str)
    if not 0 < len(url) <= 512:
        raise errors.ReleaseError("payload url", "%d characters" % len(url), "1 to 512")
    encoding = _field(obj, "encoding", str)
    length = _integer(obj, "size", 1, SIZE_LIMIT)
    window = 0
    if encoding == "gzip":
        window = _integer(obj, "window", 8, 15)
    elif encoding == "identity" and length != size:
        raise errors.ReleaseError("payload size", length, "%d, as the image" % size)
    patch = base = obj.get("patch")
    if patch is not None:
        _field(obj, "patch", str)
        base = hexdigest(obj.get("base"), "base")
    return Payload(url, encoding, length, window, patch, base)


def _image(obj):
    if type(obj) is not dict:
        raise errors.ReleaseError("image", type(obj).__name__, "an object")
    size = _integer(obj, "size", 1, SIZE_LIMIT)
    payloads = _field(obj, "payloads", list)
    if not 0 < len(payloads) <= 16:
        raise errors.ReleaseError("payloads", len(payloads), "1 to 16")
    return Image(
        _field(obj, "slot", str),
        _integer(obj, "chip_id", 0, 0xFFFF),
        size,
        hexdigest(obj.get("sha256"), "sha256"),
        hexdigest(obj.get("build"), "build"),
        [_payload(p, size) for p in payloads],
    )


def parse(payload):
    """Turn the verified bytes of a manifest into a :class:`Release`.

    Args:
        payload: UTF-8 JSON, bytes.

    Raises:
        ReleaseError: too large, not JSON, a schema not known here, a member of the wrong type or
            range, or no firmware image in it.
    """
    from . import semver, strict

    if len(payload) > MANIFEST_LIMIT:
        raise errors.ReleaseError(
            "manifest", "%d bytes" % len(payload), "at most %d" % MANIFEST_LIMIT
        )
    try:
        obj = strict.loads(payload)
    except ValueError as exc:
        raise errors.ReleaseError("manifest: %s" % exc)
    if type(obj) is not dict:
        raise errors.ReleaseError("manifest", type(obj).__name__, "an object")
    schema = _field(obj, "schema", int)
    if schema != SCHEMA:
        raise errors.ReleaseError("manifest schema", schema, "%d; update the agent first" % SCHEMA)
    version = _field(obj, "version", str)
    semver.parse(version)
    hardware = _field(obj, "hardware", list)
    if not 0 < len(hardware) <= 32:
        raise errors.ReleaseError("hardware", "%d names" % len(hardware), "1 to 32")
    notes = _field(obj, "notes", str, "")
    if len(notes) > _NOTES_LIMIT:
        raise errors.ReleaseError(
            "notes", "%d characters" % len(notes), "at most %d" % _NOTES_LIMIT
        )
    images = [_image(image) for image in _field(obj, "images", list)]
    firmware = [image for image in images if image.slot == "firmware"]
    if len(firmware) != 1 or len(images) > 2:
        raise errors.ReleaseError("firmware images", len(firmware), "1")
    expires = obj.get("expires")
    return Release(
        _name(obj.get("product"), "product"),
        version,
        [_name(name, "hardware") for name in hardware],
        _integer(obj, "security_version", 0, _INT_LIMIT, 0),
        _field(obj, "downgrade", bool, False),
        parse_time(obj.get("issued")),
        None if expires is None else parse_time(expires),
        notes,
        firmware[0],
    )


def judge(release, board, earliest=0):
    """Apply the policy of design section 1: raise unless ``release`` suits ``board``.

    The checks that no time or place can change come first, so that a report names the gravest.

    Args:
        earliest: Unix seconds that have passed for certain, where ``board.now`` is None.

    Raises:
        ProductError, HardwareError, SpaceError, SecurityVersionError, VersionError,
        NotYetError, ExpiredError, KnownBadError: each for its cause.
    """
    from . import semver

    image = release.firmware
    if release.product != board.product:
        raise errors.ProductError("product", release.product, board.product)
    if board.hardware not in release.hardware:
        raise errors.HardwareError("hardware", ", ".join(release.hardware), board.hardware)
    if image.chip_id != board.chip_id:
        raise errors.HardwareError("chip id", image.chip_id, board.chip_id)
    if image.size > board.slot_size:
        raise errors.SpaceError("image size", image.size, "at most %d, the slot" % board.slot_size)
    if release.security_version < board.floor:
        raise errors.SecurityVersionError(
            "security version", release.security_version, "%d or higher" % board.floor
        )
    order = semver.compare(release.version, board.version)
    if order < 0 and not release.downgrade:
        raise errors.VersionError("version", release.version, "newer than " + board.version)
    if order == 0 and image.build != board.build:
        # One version, two contents: one of them is not what its signer believes.
        raise errors.VersionError(
            "version", release.version + " of another build", "a new version"
        )
    now = board.now
    if now is not None:
        if release.issued - now > _AHEAD_S:
            raise errors.NotYetError(
                "release issued %d s ahead of the clock" % (release.issued - now)
            )
        earliest = now
    if release.expires is not None and earliest >= release.expires:
        raise errors.ExpiredError("release expired %d s ago" % (earliest - release.expires))
    if image.build in board.failed:
        raise errors.KnownBadError("release %s failed on this board before" % release.version)


def in_rollout(percent, seed, device_id, sha256):
    """True if a device is in the first ``percent`` of a staged rollout.

    The bucket is the first 32 bits of SHA-256(seed ‖ device id) modulo 10000, so that raising the
    percentage only adds devices and no server has to remember who is in.

    Args:
        percent: 0 to 100, a fraction is allowed.
        seed, device_id: str.
        sha256: ``hashlib.sha256``.
    """
    digest = sha256((seed + device_id).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10000 < percent * 100
