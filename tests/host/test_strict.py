"""Strict JSON: what it takes and refuses, and that every Python takes and refuses the same."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import twinslot
from twinslot import strict

MICROPYTHON = Path(sys.executable).with_name("micropython")
DRIVER = Path(__file__).with_name("strict_driver.py")
LIB = Path(twinslot.__path__[0]).parent

WHOLE = st.integers(-(10**15) + 1, 10**15 - 1)
NAMES = st.text(max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | WHOLE | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def depth(tree):
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(TREES, st.sampled_from([None, 0, 1, 3]))
def test_everything_a_tool_writes_is_read_as_it_was_meant(tree, indent):
    try:
        text = json.dumps(tree, indent=indent).encode()
    except UnicodeEncodeError:
        return
    if depth(tree) > 8:
        with pytest.raises(ValueError, match="deep"):
            strict.loads(text)
    elif any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(tree, ensure_ascii=False)):
        with pytest.raises(ValueError, match="surrogate"):
            strict.loads(text)
    else:
        assert strict.loads(text) == tree


BAD = {
    "nothing": b"",
    "white space": b" \n",
    "F89 no comma": b"[1 2]",
    "F89 no colon": b'{"a" 1}',
    "F89 name that is no text": b"{1:2}",
    "F89 comma at the end of a list": b"[1,]",
    "F89 comma at the end of an object": b'{"a":1,}',
    "comma alone": b"[,]",
    "F89 member twice": b'{"a":1,"a":1}',
    "F89 member twice, differently spelt": b'{"a":1,"\\u0061":2}',
    "member twice, deep": b'{"x":[{"a":1,"b":2,"a":3}]}',
    "F89 raw line break in text": b'"a\nb"',
    "raw tab in text": b'"\t"',
    "NUL": b'"\0"',
    "delete": b'"\x7f"',
    "F89 byte order mark": b"\xef\xbb\xbf{}",
    "UTF-8": '"ä"'.encode(),
    "F89 invalid UTF-8": b'"\xff"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "single quotes": b"{'a':1}",
    "comment": b"/**/1",
    "F89 NaN": b"NaN",
    "F89 infinity": b"-Infinity",
    "F89 1e400": b"1e400",
    "fraction": b"1.0",
    "exponent": b"1E2",
    "plus": b"+1",
    "minus": b"-",
    "minus zero": b"-0",
    "leading zero": b"00",
    "leading zero, negative": b"-01",
    "hexadecimal": b"0x10",
    "underscore": b"1_0",
    "F89 16 digits": b"1" * 16,
    "F89 16,000 digits": b"9" * 16000,
    "point at the start": b".5",
    "word": b"yes",
    "word in capitals": b"True",
    "word cut": b"nul",
    "two values": b"1 2",
    "value after an object": b"{}{}",
    "bracket of the other kind": b"[1}",
    "open list": b"[1",
    "open object": b'{"a":1',
    "open text": b'"abc',
    "open escape": b'"\\',
    "unknown escape": b'"\\x41"',
    "escape of a quote only": b'"\\"',
    "short code": b'"\\u12"',
    "code that is none": b'"\\u12g4"',
    "signed code": b'"\\u+123"',
    "lone high surrogate": b'"\\ud83d"',
    "high surrogate before text": b'"\\ud83dabcdef"',
    "high surrogate before an escape": b'"\\ud83d\\n"',
    "two high surrogates": b'"\\ud83d\\ud83d"',
    "low surrogate": b'"\\ude00"',
    "surrogates the wrong way round": b'"\\ude00\\ud83d"',
    "F89 nested 9 deep": b"[" * 9 + b"]" * 9,
    "F89 nested 10,000 deep": b"[" * 10000,
    "form feed between": b"[1,\x0c2]",
    "no-break space between": b"[1,\xa02]",
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_refused(raw):
    with pytest.raises(ValueError):
        strict.loads(raw)


GOOD = {
    b"0": 0,
    b"-1": -1,
    b" \t\r\n7 \n": 7,
    b"999999999999999": 10**15 - 1,
    b'""': "",
    b'"\\u0000\\u00e4\\uD83D\\uDE00\\"\\\\\\/\\b\\f\\n\\r\\t"': '\0ä😀"\\/\b\f\n\r\t',
    b"[" * 8 + b"]" * 8: [[[[[[[[]]]]]]]],
    b'{"":{}}': {"": {}},
    b'{"a":[true,false,null]}': {"a": [True, False, None]},
}


@pytest.mark.parametrize("raw", GOOD, ids=lambda raw: repr(raw)[:30])
def test_taken(raw):
    assert strict.loads(raw) == GOOD[raw]
    assert strict.loads(memoryview(raw)) == GOOD[raw]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"/", "value .* 0$"),
        (b":", "value .* 0$"),
        (b"[1/2]", "comma .* 2$"),
        (b"[1:2]", "comma .* 2$"),
        (b"[-a]", "number .* 2$"),
        (b'"abc', "early$"),
        (b'{"abc', "early$"),
        (b'["ab\nc"]', "character .* 4$"),
        *((b'"\\u000%c"' % c, "escape .* 3$") for c in b"/:@G`g"),
        (b'"\\"\\u12', "early$"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(raw, what):
    with pytest.raises(ValueError, match=what):
        strict.loads(raw)


def refused(raw):
    try:
        strict.loads(raw)
    except ValueError:
        return True
    return False


def test_each_byte_alone_at_each_kind_of_place():
    printable = set(range(32, 127))
    for c in range(256):
        byte = bytes([c])
        assert refused(b'"' + byte + b'"') == (c not in printable - {34, 92}), c
        assert refused(b'"\\n' + byte + b'"') == (c not in printable - {34, 92}), c
        assert refused(byte) == (byte not in b"0123456789" or c == 0 or byte == b""), c
        assert refused(b"1" + byte) == (byte not in b"0123456789 \t\r\n"), c
        assert refused(b"[1" + byte + b"2]") == (byte not in b"0123456789,"), c
        assert refused(b"-" + byte) == (byte not in b"123456789"), c
        assert refused(b'"\\' + byte + b'"') == (byte not in b'"\\/bfnrt'), c
        for at in range(4):
            digits = bytearray(b"0041")
            digits[at] = c
            hexadecimal = byte in b"0123456789abcdefABCDEF"
            assert refused(b'"\\u' + digits + b'"') == (not hexadecimal), (c, at)


def test_every_code_point_of_16_bits_is_itself_or_a_surrogate():
    for code in range(0x10000):
        text = b'"\\u%04x"' % code
        if 0xD800 <= code < 0xE000:
            assert refused(text)
        else:
            assert strict.loads(text) == chr(code)


def test_surrogates_pair_at_their_limits_and_nowhere_else():
    for high in (0xD7FF, 0xD800, 0xD801, 0xDBFF, 0xDC00, 0xDFFF, 0xE000):
        for low in (0xDBFF, 0xDC00, 0xDC01, 0xDFFF, 0xE000):
            text = b'"\\u%04x\\u%04x"' % (high, low)
            pair = 0xD800 <= high < 0xDC00 and 0xDC00 <= low < 0xE000
            if pair:
                assert strict.loads(text) == json.loads(text)
            else:
                alone = 0xD800 <= high < 0xE000 or 0xD800 <= low < 0xE000
                assert refused(text) == alone, text


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_taken_to_its_limit_and_no_further(opening, closing):
    for levels in range(1, 12):
        text = opening * levels + b"1" + closing * levels
        assert refused(text) == (levels > 8), levels
    mixed = b'[{"a":' * 4 + b"1" + b"}]" * 4
    assert not refused(mixed)
    assert refused(b"[" + mixed + b"]")


def test_what_ends_early_says_so():
    whole = b'{"a": ["b\\u00e4", -12, true]}'
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            strict.loads(whole[:end])


def mutants(count, seed):
    """Texts near JSON: pieces of it in any order, and JSON with bytes changed."""
    rng = random.Random(seed)
    pieces = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"00e4", b"d83d", b"de00"]
    pieces += [b"0", b"-", b"1", b"12", b".", b"e", b"true", b"null", b" ", b"\n", b"a", b'"a"']
    pieces += [b'"a":', b"\xff", b"\0", b"[]", b"{}", b"9" * 15, b"9" * 16]
    seeds = [json.dumps(t).encode() for t in ({"a": [1, {"b": "ä\n😀"}], "c": None}, [[], {}, -5])]
    for number in range(count):
        if number % 3 == 0:
            yield b"".join(rng.choices(pieces, k=rng.randrange(1, 9)))
            continue
        text = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            how = rng.randrange(3)
            if how == 0:
                text[at] = rng.randrange(256)
            elif how == 1:
                text[at:at] = rng.choice(pieces)
            else:
                del text[at : at + rng.randrange(1, 4)]
                text = text or bytearray(b"1")
        yield bytes(text)


def run(interpreter, path):
    done = subprocess.run(
        [interpreter, DRIVER, LIB, path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr + done.stdout[-500:]
    return done.stdout.splitlines()


def test_F89_F90_cpython_and_micropython_agree_on_every_text(tmp_path):
    cases = [*BAD.values(), *GOOD, *mutants(20_000, 7)]
    cases = [raw for raw in cases if raw]
    path = tmp_path / "cases"
    path.write_text("".join(raw.hex() + "\n" for raw in cases))
    theirs, ours = run(MICROPYTHON, path), run(sys.executable, path)
    assert len(ours) == len(cases)
    accepted = 0
    for raw, a, b in zip(cases, theirs, ours, strict=True):
        assert a.replace(" ", "") == b.replace(" ", ""), raw
        accepted += not a.startswith("!")
    assert 500 < accepted < len(cases) - 5000, "the mutants are neither all broken nor all whole"


def refuse_twice(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("twice")
    return dict(pairs)


def refuse_number(text):
    raise ValueError(text)


def test_what_is_taken_means_the_same_to_the_parser_of_cpython():
    """Never laxer than the standard library with its loopholes closed."""
    taken = 0
    for raw in mutants(20_000, 8):
        try:
            value = strict.loads(raw)
        except ValueError:
            continue
        taken += 1
        assert value == json.loads(
            raw.decode("ascii"),
            object_pairs_hook=refuse_twice,
            parse_float=refuse_number,
            parse_constant=refuse_number,
        )
    assert taken > 500


def test_what_is_refused_is_refused_for_a_reason():
    """Never stricter than the module's text says."""
    for raw in mutants(20_000, 9):
        try:
            text = raw.decode("ascii")
            value = json.loads(
                text,
                object_pairs_hook=refuse_twice,
                parse_float=refuse_number,
                parse_constant=refuse_number,
            )
            written = json.dumps(value, ensure_ascii=False)
            written.encode()
        except (ValueError, RecursionError):
            continue
        if depth(value) > 8 or "\x7f" in text or "-0" in text:
            continue
        if any(
            len(n.lstrip("-")) > 15
            for n in "".join(c if c in "-0123456789" else " " for c in text).split()
        ):
            continue
        assert strict.loads(raw) == value, raw
