"""Numbers as protocols write them: digits and nothing else, no sign, no blank, no underscore.

Pure. Of its own, so that what reads the head of an answer does without `twinslot.url`.
"""


def decimal(text, limit):
    """Return the value of ``text`` (bytes, digits only, at most ``limit``), or None."""
    if not text or len(text) > 10:
        return None
    for c in text:
        if not 48 <= c <= 57:
            return None
    value = int(text)
    return value if value <= limit else None


def hexadecimal(text, limit):
    """As ``decimal``, of hexadecimal digits in either case."""
    if not text or len(text) > 8:
        return None
    for c in text:
        if not (48 <= c <= 57 or 65 <= c <= 70 or 97 <= c <= 102):
            return None
    value = int(text, 16)
    return value if value <= limit else None
