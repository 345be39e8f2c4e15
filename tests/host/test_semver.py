"""SemVer order: the examples of the specification and the properties of an order."""

import functools
import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinslot import semver
from twinslot.errors import ReleaseError

# https://semver.org/spec/v2.0.0.html item 11, in rising order.
RISING = [
    "0.0.1",
    "0.9.12",
    "1.0.0-0",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-alpha.beta",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "1.0.0",
    "1.0.1",
    "1.2.0",
    "1.10.0",
    "2.0.0",
]


def test_versions_of_the_specification_stand_in_its_order():
    for (i, a), (j, b) in itertools.product(enumerate(RISING), repeat=2):
        assert semver.compare(a, b) == (i > j) - (i < j), (a, b)


def test_build_metadata_does_not_count():
    assert semver.compare("1.0.0+one", "1.0.0+two.2") == 0


SHAPELESS = """1 1.2 1.2.3.4 01.2.3 1.02.3 1.2.03 v1.2.3 1.2.3- 1.2.3-a..b 1.2.3-01 1.2.3+
1.2.3+a_b -1.2.3 1.-2.3 1.2.x 1.2.3-ä ١.2.3 1e3.0.0 0x1.0.0""".split()
TOO_LARGE = ["1.2.2147483648", "1.2.9999999999", "1.0.0-" + "a" * 60]


@pytest.mark.parametrize(
    "text", [*SHAPELESS, *TOO_LARGE, "", "1.2.3\n", " 1.2.3", "1.2.3 ", None, 1, b"1.2.3"]
)
def test_what_is_not_a_version_is_refused(text):
    with pytest.raises(ReleaseError):
        semver.parse(text)


def taken(text):
    try:
        semver.parse(text)
    except ReleaseError:
        return False
    return True


def test_each_character_is_taken_where_it_belongs_and_nowhere_else():
    for c in map(chr, range(160)):
        word = c in string.ascii_letters + string.digits + "-"
        assert taken(f"1.2.{c}") == (c in string.digits), c
        assert taken(f"1.2.1{c}4") == (c in string.digits + "-+"), c
        assert taken(f"1.2.3-a{c}") == word, c
        assert taken(f"1.2.3+a{c}") == word, c


def test_the_longest_version_and_the_highest_number():
    assert taken("1.2.3-" + "a" * 58) and not taken("1.2.3-" + "a" * 59)
    for shape in ("%s.0.0", "0.%s.0", "0.0.%s", "0.0.0-%s"):
        assert taken(shape % "999999999") and not taken(shape % "1000000000")
        assert taken(shape % "0") and not taken(shape % "00")


NUMBER = st.integers(0, 999_999_999)
VERSION = st.builds(
    lambda a, b, c, pre: f"{a}.{b}.{c}" + ("-" + ".".join(pre) if pre else ""),
    NUMBER,
    NUMBER,
    NUMBER,
    st.lists(
        st.from_regex(r"(0|[1-9][0-9]{0,5}|[a-z-][a-z0-9-]{0,4})", fullmatch=True), max_size=3
    ),
)


@given(VERSION, VERSION, VERSION)
def test_the_order_is_total_and_transitive(a, b, c):
    assert semver.compare(a, b) == -semver.compare(b, a)
    low, mid, high = sorted((a, b, c), key=functools.cmp_to_key(semver.compare))
    assert semver.compare(low, high) <= 0
    assert semver.compare(low, mid) <= 0
