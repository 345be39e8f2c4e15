"""Compare versions by SemVer 2.0. Pure: no I/O, the same on the device and on the host.

    semver.compare("1.4.0-rc.1", "1.4.0")      # -1

Build metadata (``+...``) is accepted and ignored in the order.
Source: https://semver.org/spec/v2.0.0.html, items 2, 9, 10 and 11.
"""

from . import errors

# Nine digits stay below 2**30, the largest small integer of a 32-bit MicroPython.
_MAX_DIGITS = 9
_MAX_LEN = 64


def _number(text, version):
    if not _is_digits(text) or (len(text) > 1 and text[0] == "0"):
        raise errors.ReleaseError("version", version, "SemVer, as in 1.4.0 or 1.4.0-rc.1")
    if len(text) > _MAX_DIGITS:
        raise errors.ReleaseError("version", version, "numbers of at most %d digits" % _MAX_DIGITS)
    return int(text)


def _is_digits(text):
    for c in text:
        if not "0" <= c <= "9":
            return False
    return bool(text)


def _identifiers(text, version):
    """Check dot separated identifiers of [0-9A-Za-z-]; none may be empty."""
    parts = text.split(".")
    for part in parts:
        if not part:
            raise errors.ReleaseError("version", version, "no empty identifier")
        for c in part:
            if not ("0" <= c <= "9" or "a" <= c <= "z" or "A" <= c <= "Z" or c == "-"):
                raise errors.ReleaseError(
                    "version", version, "identifiers of letters, digits and -"
                )
    return parts


def parse(version):
    """Split a version into ``(major, minor, patch, prerelease)``.

    ``prerelease`` is a tuple of ``(0, number)`` and ``(1, text)`` pairs, empty for a release.

    Raises:
        ReleaseError: not a SemVer 2.0 version, longer than 64 characters, or a number of
            more than nine digits.
    """
    if not isinstance(version, str) or len(version) > _MAX_LEN:
        raise errors.ReleaseError(
            "version", str(version)[:_MAX_LEN], "SemVer of at most 64 characters"
        )
    core, plus, metadata = version.partition("+")
    if plus:
        _identifiers(metadata, version)
    core, dash, pre = core.partition("-")
    numbers = core.split(".")
    if len(numbers) != 3:
        raise errors.ReleaseError("version", version, "three numbers: major.minor.patch")
    prerelease = ()
    if dash:
        prerelease = tuple(
            (0, _number(part, version)) if _is_digits(part) else (1, part)
            for part in _identifiers(pre, version)
        )
    major, minor, patch = [_number(part, version) for part in numbers]
    return major, minor, patch, prerelease


def compare(a, b):
    """Return -1, 0 or 1 as version ``a`` is older than, equal to or newer than ``b``.

    Raises:
        ReleaseError: one of them is not a version.
    """
    a, b = _rank(parse(a)), _rank(parse(b))
    return (a > b) - (a < b)


def _rank(version):
    # Item 11.3: a version with a pre-release is older than the one without.
    return version[:3] + (not version[3], version[3])
