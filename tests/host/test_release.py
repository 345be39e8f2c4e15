"""The release manifest: one type and one range per field, and the policy's refusals."""

import calendar
import hashlib
import itertools
import json
import math
import string
from datetime import UTC, datetime

import pytest

from twinslot import errors, payload, release

BUILD = "b" * 64
GOOD = {
    "schema": 1,
    "product": "sensor-node",
    "version": "1.4.0",
    "hardware": ["ESP32_GENERIC", "OTHER"],
    "security_version": 3,
    "downgrade": False,
    "issued": "2026-11-20T09:00:00Z",
    "expires": "2027-11-20T09:00:00Z",
    "notes": "n",
    "images": [
        {
            "slot": "firmware",
            "chip_id": 5,
            "size": 70001,
            "sha256": "a" * 64,
            "build": BUILD,
            "payloads": [
                {"url": "blobs/aa/a.bin", "encoding": "identity", "size": 70001},
                {"url": "blobs/bb/b.gz", "encoding": "gzip", "window": 12, "size": 5000},
                {
                    "url": "blobs/cc/c.gz",
                    "encoding": "gzip",
                    "window": 12,
                    "size": 400,
                    "patch": "detools",
                    "base": "c" * 64,
                },
            ],
        }
    ],
}
NOW = release.parse_time("2026-12-01T00:00:00Z")
BOARD = release.Board("sensor-node", "OTHER", 5, "1.3.9", "c" * 64, 2, NOW, (), 70001)


def parse(**changes):
    return release.parse(json.dumps({**GOOD, **changes}).encode())


def with_image(**changes):
    return [{**GOOD["images"][0], **changes}]


def with_payload(**changes):
    return with_image(payloads=[{**GOOD["images"][0]["payloads"][0], **changes}])


def test_a_good_manifest_is_read_as_it_was_written():
    manifest = parse()
    assert manifest.product == "sensor-node"
    assert manifest.security_version == 3
    assert manifest.issued == datetime(2026, 11, 20, 9, tzinfo=UTC).timestamp()
    assert manifest.expires == datetime(2027, 11, 20, 9, tzinfo=UTC).timestamp()
    assert manifest.firmware.build == BUILD
    assert [p.size for p in manifest.firmware.payloads] == [70001, 5000, 400]
    assert [p.window for p in manifest.firmware.payloads] == [0, 12, 12]
    release.judge(manifest, BOARD)


def test_members_of_a_later_tool_are_ignored():
    assert parse(advisory="CVE").product == "sensor-node"


DIGESTS = [
    None,
    "",
    " ",
    "A" * 64,
    "a" * 63,
    "a" * 65,
    " " + "a" * 63,
    "g" * 64,
    "a" * 62 + "==",
    0,
    [],
]
BAD = [
    *({"schema": s} for s in (0, 2, -1, "1", 1.0, True, None, 2**31)),
    *({"product": p} for p in (None, "", 1, "a/b", "..", ".a", "-a", "a b", "ä", "a" * 65, "a\n")),
    *({"version": v} for v in (None, "1.4", 140, ["1.4.0"], "1.4.0\n", "99999999999.0.0")),
    *({"hardware": h} for h in (None, [], "ESP32", [1], [""], ["a"] * 33, {"a": 1})),
    *({"security_version": s} for s in (-1, 2**30, 1e3, 1.5, "3", True, [])),
    *({"downgrade": d} for d in (0, 1, "true", [])),
    *(
        {key: t}
        for key in ("issued", "expires")
        for t in (
            0,
            "",
            "2026-11-20",
            "2026-11-20T09:00:00",
            "2026-11-20T09:00:00+00:00",
            "2026-13-20T09:00:00Z",
            "2026-00-20T09:00:00Z",
            "2026-11-20T24:00:00Z",
            "1999-11-20T09:00:00Z",
            "2026-11-20t09:00:00Z",
            "2026-11-2 T09:00:00Z",
        )
    ),
    {"issued": None},
    *({"notes": n} for n in (1, ["n"], "n" * 2049)),
    *({"images": i} for i in (None, {}, [], [1], with_image() * 2, with_image() * 3)),
    {"images": with_image(slot="app")},
    *({"images": with_image(chip_id=c)} for c in (-1, 0x10000, "0", None, True)),
    *(
        {"images": with_image(size=s)}
        for s in (0, -1, 2**31, 2**32, 2**64, "70001", 70001.0, None, True)
    ),
    *({"images": with_image(sha256=d)} for d in DIGESTS),
    *({"images": with_image(build=d)} for d in DIGESTS),
    *({"images": with_image(payloads=p)} for p in (None, [], {}, [None], with_payload() * 17)),
    *({"images": with_payload(url=u)} for u in (None, "", 1, "u" * 513)),
    *({"images": with_payload(size=s)} for s in (0, -1, 70000, 70002, "70001", 2**40)),
    *({"images": with_payload(encoding=e)} for e in (None, 1, [])),
    *({"images": with_payload(encoding="gzip", window=w)} for w in (None, 7, 16, -1, "12", 12.0)),
    *({"images": with_payload(patch="detools", base=b)} for b in DIGESTS),
    *({"images": with_payload(patch=p, base="ab" * 32)} for p in (5, True, ["detools"], {})),
    *({"issued": f"2026-{day}T09:00:00Z"} for day in ("02-29", "04-31", "00-01", "13-01")),
]


@pytest.mark.parametrize("changes", BAD, ids=lambda c: json.dumps(c)[:60])
def test_a_member_of_the_wrong_type_or_range_is_refused(changes):
    with pytest.raises(errors.ReleaseError):
        parse(**changes)


@pytest.mark.parametrize("name", ["schema", "product", "version", "hardware", "issued", "images"])
def test_a_missing_member_is_refused(name):
    manifest = dict(GOOD)
    del manifest[name]
    with pytest.raises(errors.ReleaseError):
        release.parse(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"{",
        b"\xff\xfe",
        b"[" * 8000,
        b"{" * 100,
        b'{"schema": 1' + b" " * 9000 + b"}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_manifest_is_refused(raw):
    with pytest.raises(errors.ReleaseError):
        release.parse(raw)


@pytest.mark.parametrize(
    ("board", "error"),
    [
        ({"product": "other"}, errors.ProductError),
        ({"hardware": "other"}, errors.HardwareError),  # F80, I15
        ({"hardware": "ESP32_GENERI"}, errors.HardwareError),
        ({"chip_id": 0}, errors.HardwareError),
        ({"slot_size": 70000}, errors.SpaceError),  # F23
        ({"floor": 4}, errors.SecurityVersionError),  # F82
        ({"version": "1.4.1"}, errors.VersionError),  # F76
        ({"version": "1.4.0"}, errors.VersionError),  # F77: same version, other content
        ({"now": release.parse_time("2027-11-20T09:00:00Z")}, errors.ExpiredError),  # F84
        ({"now": release.parse_time("2026-11-19T08:59:59Z")}, errors.NotYetError),  # F84
        ({"failed": (BUILD,)}, errors.KnownBadError),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v.__name__,
)
def test_F77_F80_a_release_that_does_not_suit_the_board_is_refused(board, error):
    with pytest.raises(error):
        release.judge(parse(), BOARD._replace(**board))


def test_a_signed_downgrade_is_taken_but_never_below_the_floor():
    manifest = parse(downgrade=True)
    release.judge(manifest, BOARD._replace(version="2.0.0"))
    with pytest.raises(errors.SecurityVersionError):
        release.judge(manifest, BOARD._replace(version="2.0.0", floor=4))


def test_F84_a_signers_clock_may_be_a_day_ahead():
    release.judge(parse(), BOARD._replace(now=release.parse_time("2026-11-19T09:00:00Z")))
    release.judge(parse(issued="2099-01-01T00:00:00Z"), BOARD._replace(now=None))


def test_an_unknown_clock_never_judges_expiry():
    release.judge(parse(expires="2026-11-21T00:00:00Z"), BOARD._replace(now=None))


def test_the_running_build_itself_is_no_conflict():
    release.judge(parse(), BOARD._replace(version="1.4.0", build=BUILD))


def test_dates_agree_with_the_calendar_of_cpython():
    """The first and the last second of each month that a date may name."""
    for year, month in itertools.product(range(2000, 2200), range(1, 13)):
        day = calendar.monthrange(year, month)[1]
        for moment in (datetime(year, month, 1), datetime(year, month, day, 23, 59, 59)):
            text = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
            assert release.parse_time(text) == moment.replace(tzinfo=UTC).timestamp()


def taken(**changes):
    try:
        parse(**changes)
    except errors.ReleaseError:
        return False
    return True


def test_each_part_of_a_date_has_its_range_and_each_character_its_place():
    good = "2026-11-20T09:00:00Z"
    ranges = {5: (1, 12), 8: (1, 30), 11: (0, 23), 14: (0, 59), 17: (0, 59)}
    for at, (low, high) in ranges.items():
        for n in range(100):
            text = good[:at] + f"{n:02}" + good[at + 2 :]
            assert taken(issued=text) == (low <= n <= high), text
    for month, days in enumerate((31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), 1):
        for day in (days, days + 1):
            assert taken(issued=f"2026-{month:02}-{day:02}{good[10:]}") == (day == days)
    assert [taken(issued=f"{year}-02-29{good[10:]}") for year in (2028, 2100)] == [True, False]
    for year in (1999, 2000, 2199, 2200):
        assert taken(issued=f"{year}{good[4:]}") == (2000 <= year < 2200)
    for at, c in itertools.product(range(20), map(chr, range(32, 127))):
        if c not in string.digits:
            assert taken(issued=good[:at] + c + good[at + 1 :]) == (c == good[at])


def test_each_character_of_names_and_digests_is_of_those_allowed():
    for c in map(chr, range(128)):
        assert taken(product="a" + c) == (c in string.ascii_letters + string.digits + "._-"), c
        assert taken(product=c) == (c in string.ascii_letters + string.digits + "_"), c
        digest = "0" * 63 + c
        assert taken(images=with_image(build=digest)) == (c in "0123456789abcdef"), c


MIB = 1 << 20
GZIP = {"encoding": "gzip", "window": 12}
EDGES = [
    ({"product": "a" * 64}, True),
    ({"hardware": ["a"] * 32}, True),
    ({"security_version": 0}, True),
    ({"security_version": 2**30 - 1}, True),
    ({"notes": ""}, True),
    ({"notes": "n" * 2048}, True),
    ({"images": with_image(chip_id=0)}, True),
    ({"images": with_image(chip_id=0xFFFF)}, True),
    ({"images": with_image(size=16 * MIB, payloads=[{"url": "a", "size": 1, **GZIP}])}, True),
    ({"images": with_image(size=16 * MIB + 1, payloads=[{"url": "a", "size": 1, **GZIP}])}, False),
    ({"images": with_image(size=1, payloads=[{"url": "a", "size": 1, **GZIP}])}, True),
    ({"images": with_image(size=0, payloads=[{"url": "a", "size": 1, **GZIP}])}, False),
    ({"images": with_payload(size=1, **GZIP)}, True),
    ({"images": with_payload(size=0, **GZIP)}, False),
    ({"images": with_payload(size=1, encoding="of a later tool")}, True),
    ({"images": with_payload(size=16 * MIB, **GZIP)}, True),
    ({"images": with_payload(size=16 * MIB + 1, **GZIP)}, False),
    ({"images": with_payload(url="u" * 512)}, True),
    ({"images": with_payload(**{**GZIP, "window": 8})}, True),
    ({"images": with_payload(**{**GZIP, "window": 15})}, True),
    ({"images": with_image(payloads=GOOD["images"][0]["payloads"][:1] * 16)}, True),
    ({"images": with_image(payloads=GOOD["images"][0]["payloads"][:1] * 17)}, False),
    ({"images": with_image() + with_image(slot="app")}, True),
    ({"images": with_image() + with_image(slot="app") * 2}, False),
]


@pytest.mark.parametrize(("changes", "good"), EDGES, ids=lambda v: json.dumps(v)[:60])
def test_what_is_just_within_a_limit_is_taken_and_what_is_beyond_is_not(changes, good):
    assert taken(**changes) == good


def test_a_manifest_has_8192_bytes_and_no_more():
    raw = json.dumps(GOOD).encode()
    assert release.parse(raw.ljust(8192))
    with pytest.raises(errors.ReleaseError, match="8193 bytes"):
        release.parse(raw.ljust(8193))


def test_what_may_be_left_out_has_its_default():
    less = {k: v for k, v in GOOD.items() if k not in ("security_version", "downgrade", "notes")}
    manifest = release.parse(json.dumps({**less, "expires": None}).encode())
    assert (manifest.security_version, manifest.downgrade, manifest.notes) == (0, False, "")
    assert manifest.expires is None
    release.judge(manifest, BOARD._replace(floor=0))


def test_what_is_missing_is_told_from_what_is_of_another_type():
    with pytest.raises(errors.ReleaseError, match=r"version.*nothing"):
        parse(version=None)
    with pytest.raises(errors.ReleaseError, match=r"version.*int"):
        parse(version=14)


def test_a_release_at_the_limits_of_its_board_suits_it():
    release.judge(parse(), BOARD._replace(floor=3))
    release.judge(parse(), BOARD._replace(now=release.parse_time(GOOD["expires"]) - 1))


def test_the_smallest_payload_that_applies_comes_first():
    image = parse().firmware
    both = ("identity", "gzip")
    assert [p.size for p in payload.usable(image, "c" * 64, both)] == [400, 5000, 70001]
    assert [p.size for p in payload.usable(image, "d" * 64, both)] == [5000, 70001]
    assert [p.size for p in payload.usable(image, "c" * 64)] == [70001]


def test_raising_the_percentage_only_adds_devices():
    names = [f"dev{i}" for i in range(4000)]
    before = set()
    for percent in (0, 0.5, 1, 10, 25, 50, 99.99, 100):
        chosen = {n for n in names if release.in_rollout(percent, "seed", n, hashlib.sha256)}
        assert before <= chosen
        # Binomial: within five standard deviations of the mean.
        p = percent / 100
        assert abs(len(chosen) - 4000 * p) <= 5 * math.sqrt(4000 * p * (1 - p)) + 1
        before = chosen
    assert len(before) == len(names)


# Of sha256sum: printf %s SEED DEVICE | sha256sum | head -c 8, modulo 10000.
@pytest.mark.parametrize(
    ("seed", "device", "bucket"),
    [
        ("s", "240ac4000001", 8765),
        ("spring", "240ac4123456", 1639),
        ("7f3a", "dev17", 8433),
        ("", "x", 5986),
    ],
)
def test_a_board_is_in_from_its_hundredth_of_a_percent_on(seed, device, bucket):
    assert not release.in_rollout(bucket / 100, seed, device, hashlib.sha256)
    assert release.in_rollout((bucket + 1) / 100, seed, device, hashlib.sha256)
