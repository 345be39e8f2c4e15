"""Strict JSON for signed documents: one text, one meaning, on every Python.

    obj = strict.loads(raw)              # ValueError names what is wrong, and where

MicroPython's own parser takes ``[1 2]``, ``{1: 2}``, commas at the end and raw line breaks, and
keeps the last of two members that go by one name. What a device must not read otherwise than the
signer's tools, a server or an auditor do is therefore read by this one, there as here.

Taken is RFC 8259 in printable ASCII (anything else as ``\\uXXXX``), no member twice, whole numbers
of at most 15 digits, nesting to a depth of 8. Everything else is refused: fractions, exponents,
NaN, a lone surrogate, a byte order mark.

Pure. Blocks for about 10 bytes per ms on an ESP32 in strings and twice as long between them;
allocates little beside the result. Callers bound the size.
"""

_DEPTH = 8
_DIGITS = 15
_WORDS = ((b"true", True), (b"false", False), (b"null", None))
_ESCAPES = {34: '"', 92: "\\", 47: "/", 98: "\b", 102: "\f", 110: "\n", 114: "\r", 116: "\t"}


def loads(raw):
    """Return the value of a JSON text.

    Args:
        raw: bytes.

    Raises:
        ValueError: anything but strict JSON.
    """
    return _Reader(bytes(raw)).document()


class _Reader:
    def __init__(self, raw):
        self._raw = raw
        self._at = 0

    def document(self):
        try:
            value = self._value(_DEPTH)
            self._space()
        except IndexError:
            raise ValueError("JSON ends early")
        if self._at < len(self._raw):
            raise self._error("goes on after its end")
        return value

    def _error(self, why):
        return ValueError("JSON %s, at byte %d" % (why, self._at))

    def _space(self):
        raw = self._raw
        while self._at < len(raw) and raw[self._at] in b" \t\r\n":
            self._at += 1

    def _next(self):
        """Return the first byte after white space, and step over neither."""
        self._space()
        return self._raw[self._at]

    def _is(self, mark):
        """Step over the byte ``mark`` if it comes next."""
        if self._next() != mark:
            return False
        self._at += 1
        return True

    def _value(self, depth):
        c = self._next()
        if c == 34:
            return self._string()
        if c in (123, 91):
            if not depth:
                raise self._error("is nested too deep")
            self._at += 1
            return self._object(depth - 1) if c == 123 else self._array(depth - 1)
        if c == 45 or 48 <= c <= 57:
            return self._number()
        for word, value in _WORDS:
            if self._raw[self._at : self._at + len(word)] == word:
                self._at += len(word)
                return value
        raise self._error("value expected")

    def _object(self, depth):
        found = {}
        if self._is(125):
            return found
        while True:
            if self._next() != 34:
                raise self._error("member name expected")
            name = self._string()
            if name in found:
                raise self._error("member %s twice" % name[:32])
            if not self._is(58):
                raise self._error("colon expected")
            found[name] = self._value(depth)
            if self._is(125):
                return found
            if not self._is(44):
                raise self._error("comma expected")

    def _array(self, depth):
        found = []
        if self._is(93):
            return found
        while True:
            found.append(self._value(depth))
            if self._is(93):
                return found
            if not self._is(44):
                raise self._error("comma expected")

    def _number(self):
        raw = self._raw
        start = self._at
        digits = self._at = start + (raw[start] == 45)
        while self._at < len(raw) and 48 <= raw[self._at] <= 57:
            self._at += 1
        count = self._at - digits
        # -0 would be another spelling of 0, and a leading zero of the rest.
        if not 0 < count <= _DIGITS or (raw[digits] == 48 and (count > 1 or start < digits)):
            raise self._error("number malformed or too long")
        return int(raw[start : self._at])

    def _string(self):
        raw = self._raw
        start = self._at + 1
        end = raw.find(b'"', start)
        if end < 0:
            raise ValueError("JSON ends early")
        for i in range(start, end):
            if not 32 <= raw[i] <= 126:
                self._at = i
                raise self._error("character that has to be escaped")
            if raw[i] == 92:
                return self._escaped(start)
        self._at = end + 1
        return raw[start:end].decode()

    def _escaped(self, start):
        raw = self._raw
        self._at = start
        parts = []
        while True:
            c = raw[self._at]
            if not 32 <= c <= 126:
                raise self._error("character that has to be escaped")
            self._at += 1
            if c == 34:
                return "".join(parts)
            if c != 92:
                parts.append(chr(c))
                continue
            c = raw[self._at]
            self._at += 1
            if c == 117:
                parts.append(chr(self._code_point()))
            elif c in _ESCAPES:
                parts.append(_ESCAPES[c])
            else:
                raise self._error("escape unknown")

    def _code_point(self):
        code = self._hex()
        if not 0xD800 <= code < 0xE000:
            return code
        low = 0
        if code < 0xDC00 and self._raw[self._at : self._at + 2] == b"\\u":
            self._at += 2
            low = self._hex()
        if not 0xDC00 <= low < 0xE000:
            raise self._error("surrogate alone")
        return 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF)

    def _hex(self):
        digits = self._raw[self._at : self._at + 4]
        for c in digits:
            if not (48 <= c <= 57 or 65 <= c <= 70 or 97 <= c <= 102):
                raise self._error("escape malformed")
        self._at += 4  # beyond the end, where there are fewer: found when the next is read
        return int(digits, 16)
