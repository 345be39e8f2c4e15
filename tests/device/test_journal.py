"""The journal: what survives, what is never an exception, what it costs."""

import binascii
import json
import struct

import workbench as bench
from esp32 import NVS
from harness import raises

import twinslot.journal
from twinslot import health
from twinslot.errors import SpaceError
from twinslot.journal import LIMIT, Journal

HEAP = "512K"
BUILD = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


class Flaky:
    """The board's NVS; fails to order, and counts."""

    def __init__(self, nvs):
        self._nvs = nvs
        self.full = False
        self.sets = 0
        self.commits = 0

    def set_blob(self, key, value):
        self._count()
        self._nvs.set_blob(key, value)

    def _count(self):
        if self.full:
            raise OSError(-4357, "ESP_ERR_NVS_NOT_ENOUGH_SPACE")
        self.sets += 1

    def commit(self):
        self.commits += 1
        self._nvs.commit()

    def set_i32(self, key, value):
        self._count()
        self._nvs.set_i32(key, value)

    def get_i32(self, key):
        return self._nvs.get_i32(key)

    def get_blob(self, key, buf):
        return self._nvs.get_blob(key, buf)

    def erase_key(self, key):
        self._nvs.erase_key(key)


class Told:
    """The board's NVS; notes what is asked of it, and keeps no spare blob if ``full``."""

    def __init__(self, full=False):
        self._nvs = NVS("twinslot")
        self._full = full
        self.log = []

    def __getattr__(self, name):
        return getattr(self._nvs, name)

    def blobs(self, key):
        return [entry[2] for entry in self.log if entry[:2] == ("blob", key)]

    def set_blob(self, key, value):
        self.log.append(("blob", key, len(value)))
        if self._full and key == "spare":
            raise OSError(-4357, "ESP_ERR_NVS_NOT_ENOUGH_SPACE")
        self._nvs.set_blob(key, value)

    def get_blob(self, key, buf):
        self.log.append(("look", key))
        return self._nvs.get_blob(key, buf)

    def set_i32(self, key, value):
        self.log.append(("number", key, value))
        self._nvs.set_i32(key, value)

    def commit(self):
        self.log.append(("commit",))
        self._nvs.commit()


def store(blob, key="journal"):
    nvs = NVS("twinslot")
    nvs.set_blob(key, blob)
    return nvs


def framed(body, version=1):
    return struct.pack("<BI", version, binascii.crc32(body) & 0xFFFFFFFF) + body


def read_back():
    """What another boot would find."""
    return Journal(NVS("twinslot"))


def test_what_is_written_is_there_after_a_boot():
    bench.new_journal(floor=7, confirmed=BUILD, reports=[report(1, "crash")])
    found = read_back()
    assert found.get("floor", int) == 7
    assert found.get("confirmed", str) == BUILD
    assert found.get("reports", list) == [report(1, "crash")]


def test_none_deletes_a_key_and_leaves_the_others():
    journal = bench.new_journal(floor=7, trial={"build": BUILD})
    journal.update(trial=None)
    assert read_back().get("trial") == {}
    assert read_back().get("floor", int) == 7


def test_F28_an_empty_nvs_is_nothing_known():
    bench.new_journal()
    found = read_back()
    assert found.get("trial") == {} and found.get("failed", list) == []
    assert found.get("floor", int) == 0 and found.get("confirmed", str) == ""


def test_a_value_of_another_type_is_none():
    store(framed(b'{"trial": 5, "floor": "3", "failed": {}, "confirmed": null, "reports": 1}'))
    found = read_back()
    assert found.get("trial") == {} and found.get("failed", list) == []
    assert found.get("floor", int) == 0 and found.get("confirmed", str) == ""
    assert found.get("reports", list) == []


def test_true_is_no_number():
    store(framed(b'{"floor": true}'))
    assert read_back().get("floor", int) == 0


def test_F29_every_truncation_is_nothing_known_and_no_exception():
    whole = framed(b'{"floor": 7, "trial": {"build": "abc"}}')
    for n in range(1, len(whole)):
        store(whole[:n])
        assert read_back().get("floor", int) == 0, n
    store(whole)
    assert read_back().get("floor", int) == 7


def test_F29_any_changed_byte_is_nothing_known():
    whole = framed(b'{"floor": 7, "trial": {"build": "abc"}}')
    for i in range(len(whole)):
        changed = bytearray(whole)
        changed[i] ^= 0x20
        store(changed)
        assert read_back().get("floor", int) == 0, i


def test_F29_a_newer_format_is_nothing_known():
    store(framed(b'{"floor": 7}', version=2))
    assert read_back().get("floor", int) == 0


def test_garbage_with_a_right_crc_is_nothing_known():
    for body in (b"", b"[]", b"5", b"null", b'"text"', b"{", b"\xff\xfe", b"[" * 300, b"{}" * 9):
        store(framed(body))
        assert read_back().get("floor", int) == 0, body[:9]


def test_a_blob_larger_than_ever_written_is_nothing_known():
    store(framed(b'{"floor": 7, "x": "' + b"y" * LIMIT + b'"}'))
    assert read_back().get("floor", int) == 0
    assert bench.new_journal(floor=8).get("floor", int) == 8


def test_a_key_of_another_type_is_nothing_known_and_is_replaced():
    bench.new_journal(floor=1)
    nvs = NVS("twinslot")
    nvs.erase_key("journal")
    nvs.set_i32("journal", 5)
    journal = read_back()
    assert journal.get("floor", int) == 0
    journal.update(floor=2)
    assert read_back().get("floor", int) == 2


def test_what_has_another_shape_inside_is_nothing_known_and_the_rest_is_kept():
    whole = {
        "trial": {"build": BUILD, "version": "2.0.0", "security": 4, "boots": 1},
        "versions": {BUILD: "2.0.0"},
        "failed": [[OTHER, "1.0.0", "crash", 3]],
        "reports": [report(1, "crash")],
        "waiting": [OTHER, "a1", 7],
        "spent": [20000, 5],
        "tried": [7, 2, 100, 3],
    }
    misshapen = {
        "trial": ([], {"build": 1}, {"version": 3}, {"back": None}, {"boots": "1"}, {"hang": []}),
        "versions": ([], {BUILD: 2}, {BUILD: None}),
        "failed": ({}, [[1]], [[]], [BUILD], [[OTHER, "1.0.0", "crash", "3"]], [None]),
        "reports": ({}, [1], [{}], [{"status": "failed"}], [[]]),
        "waiting": ({}, [OTHER], [OTHER, "a1", "7"], [1, 2, 3, 4]),
        "spent": ({}, [1], [1, "2"], [1, 2, 3]),
        "tried": ({}, [1, 2, 3], [1, 2, 3, None]),
    }
    store(framed(json.dumps(whole).encode()))
    journal = read_back()
    for key, value in whole.items():
        assert journal.get(key, type(value)) == value, key
    for key, values in misshapen.items():
        for wrong in values:
            store(framed(json.dumps(dict(whole, **{key: wrong})).encode()))
            journal = read_back()
            for other, value in whole.items():
                expected = type(value)() if other == key else value
                assert journal.get(other, type(value)) == expected, (wrong, other)
            assert health.failed_builds(journal) == ([] if key == "failed" else [OTHER])


def test_a_line_of_the_log_with_another_shape_is_left_out():
    journal = bench.new_journal()
    journal.add_to_log("1.0.0", "failed", "why")
    line = journal.log()[0]
    store(framed(json.dumps({"log": [[], 1, line, line[:3], [None] * 4]}).encode()), "log")
    assert read_back().log() == [line]


def test_an_update_is_one_blob_and_nothing_when_nothing_changes():
    bench.new_journal(floor=7)
    nvs = Flaky(NVS("twinslot"))
    journal = Journal(nvs)
    journal.update(floor=7)
    assert nvs.sets == 0
    journal.update(floor=8, confirmed=BUILD, trial={"a": 1})
    again = nvs.sets, nvs.commits  # and once in each boot, the number that may be lost
    journal.update(floor=9)
    assert (nvs.sets - again[0], nvs.commits - again[1]) == (1, 1)


def test_F28_a_full_nvs_leaves_flash_and_memory_as_they_were():
    bench.new_journal(floor=7)
    nvs = Flaky(NVS("twinslot"))
    journal = Journal(nvs)
    nvs.full = True
    raises(SpaceError, journal.update, floor=8)
    assert journal.get("floor", int) == 7 and read_back().get("floor", int) == 7
    nvs.full = False
    journal.update(floor=8)
    assert read_back().get("floor", int) == 8


def test_F28_an_nvs_that_the_application_filled():
    journal = bench.new_journal(floor=7)
    NVS("twinslot").erase_key("spare")
    mine, keys = fill()
    exc = raises(SpaceError, journal.update, trial={"build": BUILD, "version": "1.2.3"})
    assert "written" in str(exc)
    assert read_back().get("floor", int) == 7
    assert read_back().get("trial") == {}
    for key in keys:
        mine.erase_key(key)
    journal.update(trial={"build": BUILD})
    assert read_back().get("trial") == {"build": BUILD}


def fill(filled=()):
    """Leave no room in NVS; return what fills it: (NVS, keys)."""
    mine, keys = filled or (NVS("application"), [])
    size = 1500
    while size >= 32:
        try:
            key = "k%d" % len(keys)
            mine.set_blob(key, bytes([len(keys)]) * size)
            keys.append(key)
        except OSError:
            size //= 2
    return mine, keys


def test_F28_the_journal_has_room_in_an_nvs_that_is_filled_again_and_again():
    """By whatever each image does on trial; and nothing of it is lost."""
    journal = bench.new_journal(floor=7)
    mine, keys = filled = fill()
    for n in range(8):
        build = chr(97 + n) * 64
        journal.update(trial={"build": build, "version": "1.2.3", "back": OTHER, "boots": n})
        assert read_back().get("trial")["build"] == build
        fill(filled)
        failed = [[build, "1.2.3", "check 'lamp' failed", 3]]
        journal.update(trial=None, failed=failed)
        assert read_back().get("failed", list) == failed
        fill(filled)
    assert read_back().get("floor", int) == 7
    for key in keys:
        mine.erase_key(key)


def test_F7_the_first_write_of_each_boot_is_one_that_may_be_lost():
    """What is written behind a torn entry is lost, and nothing shows that there is one."""
    bench.new_journal()
    for n, number in enumerate((1, 0, 1)):
        nvs = Told()
        journal = Journal(nvs)
        journal.update(floor=n + 1)
        journal.update(floor=n + 5)
        journal.set_starts(n + 1)
        written = [entry for entry in nvs.log if entry[0] in ("blob", "number")]
        assert written[0] == ("number", "probe", number), "another one, or nothing is written"
        assert [entry[1] for entry in written].count("probe") == 1
    nvs = Told()
    Journal(nvs).set_starts(9)
    assert nvs.log[-3:] == [("number", "probe", 0), ("number", "starts", 9), ("commit",)]


def test_F28_the_room_that_is_kept_is_what_the_journal_may_still_need():
    for length in range(32):
        bench.new_journal()
        nvs = Told()
        Journal(nvs).update(x="y" * length)
        rest = LIMIT - nvs.blobs("journal")[0]
        assert nvs.blobs("spare") == [rest // 32 * 32], "whole entries of NVS"
        assert nvs.log[-1] == ("commit",)


def test_room_is_looked_for_once_in_each_boot_and_kept_as_it_is():
    bench.new_journal()
    for spares in (1, 0, 0):
        nvs = Told()
        journal = Journal(nvs)
        for n in range(3):
            journal.update(x=[spares, n])
        assert nvs.log.count(("look", "spare")) == 1
        assert len(nvs.blobs("spare")) == spares


def test_F28_less_room_is_kept_where_that_much_is_not_to_be_had():
    for rest, tried in (
        (128, []),
        (129, [128]),
        (146, [128]),
        (300, [288, 256, 224, 192, 160, 128, 128]),
    ):
        bench.new_journal()
        nvs = Told(full=True)
        Journal(nvs).update(x="y" * (LIMIT - rest - len(framed(b'{"x": ""}'))))
        assert nvs.blobs("journal") == [LIMIT - rest]
        assert nvs.blobs("spare") == tried, rest


def test_a_full_nvs_may_have_room_later_and_a_full_journal_never():
    bench.new_journal()
    nvs = Flaky(NVS("twinslot"))
    nvs.full = True
    assert raises(SpaceError, Journal(nvs).update, floor=8).retry is True
    journal = bench.new_journal()
    assert not raises(SpaceError, journal.update, trial={"x": "y" * LIMIT}).retry


def test_a_journal_may_fill_its_blob_to_the_last_byte():
    room = LIMIT - len(framed(b'{"confirmed": ""}'))
    journal = bench.new_journal()
    journal.update(confirmed="x" * room)
    assert read_back().get("confirmed", str) == "x" * room
    raises(SpaceError, journal.update, confirmed="x" * (room + 1))


def test_the_version_of_a_build_is_that_of_the_trial_or_else_that_of_old():
    journal = bench.new_journal(
        trial={"build": BUILD, "version": "2.0.0"}, versions={BUILD: "1.0.0", OTHER: "1.5.0"}
    )
    assert journal.version(BUILD) == "2.0.0"
    assert journal.version(OTHER) == "1.5.0"
    assert journal.version("ab" * 32) == ""
    journal.update(trial={"build": BUILD})
    assert journal.version(BUILD) == "1.0.0"


def test_lists_keep_the_newest():
    journal = bench.new_journal()
    journal.update(reports=[{"n": i} for i in range(9)])
    assert [r["n"] for r in journal.get("reports", list)] == [5, 6, 7, 8]


def report(n, message):
    """As large as a report can get, by what OtaError.report() lets through."""
    error = {"code": "security_version", "number": "OTA_014", "message": message}
    return {
        "attempt": "a1b2c3d4e5f6",
        "version": "1." * 31 + str(n),
        "build": BUILD,
        "status": "rolledback",
        "error": error,
    }


def test_old_news_makes_room_for_what_is_on_trial():
    journal = bench.new_journal()
    worst = "x" * 160
    journal.update(
        reports=[report(n, worst) for n in range(4)],
        failed=[[BUILD[:-1] + str(n), "1." * 31 + str(n), worst, 3] for n in range(4)],
    )
    trial = {
        "build": BUILD,
        "version": "9." * 31 + "9",
        "attempt": "a1b2c3d4e5f6",
        "security": 1 << 29,
        "back": BUILD,
        "hang": 100000,
        "boots": 1,
        "confirming": True,
    }
    versions = {BUILD: "9." * 31 + "9", OTHER: "8." * 31 + "8"}
    journal.update(trial=trial, confirmed=BUILD, versions=versions, floor=1 << 29, time=1 << 31)
    found = read_back()
    assert found.get("trial") == trial
    assert found.get("versions") == versions
    assert found.get("reports", list)[-1] == report(3, worst)
    assert found.get("failed", list)[-1][0] == BUILD[:-1] + "3"


def test_what_can_never_fit_is_refused_and_nothing_is_lost():
    journal = bench.new_journal(floor=7)
    exc = raises(SpaceError, journal.update, trial={"x": "y" * LIMIT})
    assert str(LIMIT) in str(exc)
    assert journal.get("trial") == {} and read_back().get("floor", int) == 7


def test_the_board_has_one_journal():
    bench.new_journal(floor=7)
    assert Journal.shared() is Journal.shared()
    Journal.shared().update(floor=9)
    assert Journal.shared().get("floor", int) == 9


# -- the checkpoint, the log, the starts: blobs of their own


CHECKPOINT = {
    "offset": 65536,
    "crc": 0xFFFFFFFF,
    "header": "e9" * 32,
    "of": 0xFFFFFFFF,
    "at": 0,
    "position": 0,
    "etag": None,
}


def test_a_checkpoint_of_another_shape_is_none():
    journal = bench.new_journal()
    for name in ("offset", "crc", "at", "position"):
        for value in (None, "7", -1, True, 1.5, [7], {}, 1 << 32, 9000909000909000909000900):
            store(framed(json.dumps(dict(CHECKPOINT, **{name: value})).encode()), "checkpoint")
            assert journal.checkpoint() == {}
        for value in (0, (1 << 32) - 1):
            store(framed(json.dumps(dict(CHECKPOINT, **{name: value})).encode()), "checkpoint")
            assert journal.checkpoint()[name] == value
    for etag in (7, [], {}, False):
        store(framed(json.dumps(dict(CHECKPOINT, etag=etag)).encode()), "checkpoint")
        assert journal.checkpoint() == {}
    for etag in (None, "", "x", '"' * 128):
        store(framed(json.dumps(dict(CHECKPOINT, etag=etag)).encode()), "checkpoint")
        assert journal.checkpoint() == dict(CHECKPOINT, etag=etag)


def test_want_of_memory_costs_a_line_of_the_log_and_nothing_else():
    journal = bench.new_journal()
    journal.add_to_log("1.0.0", "confirmed")
    log = journal.log

    def short():
        raise MemoryError("no room")

    journal.log = short
    journal.add_to_log("1.1.0", "confirmed")
    journal.log = log
    assert [entry[1] for entry in journal.log()] == ["1.0.0"]


def test_a_checkpoint_comes_and_goes_without_the_journal():
    journal = bench.new_journal(floor=7)
    assert journal.checkpoint() == {}
    journal.save_checkpoint(CHECKPOINT)
    assert read_back().checkpoint() == CHECKPOINT
    assert read_back().get("floor", int) == 7
    for etag in ('"' * 128, "x" * 256):
        journal.save_checkpoint(dict(CHECKPOINT, etag=etag, at=0xFFFFFFFF, position=0xFFFFFFFF))
        assert read_back().checkpoint()["etag"] == etag
    raises(SpaceError, journal.save_checkpoint, dict(CHECKPOINT, etag="x" * 512))
    assert read_back().checkpoint()["etag"] == etag
    journal.save_checkpoint()
    journal.save_checkpoint()
    assert read_back().checkpoint() == {}


def test_what_is_kept_apart_from_the_journal_is_committed_too():
    class Counting(Flaky):
        def set_i32(self, key, value):
            self._nvs.set_i32(key, value)

    nvs = Counting(NVS("twinslot"))
    journal = Journal(nvs)
    for change in (
        lambda: journal.save_checkpoint({"offset": 4096}),
        journal.save_checkpoint,
        lambda: journal.set_starts(journal.starts() + 1),
    ):
        nvs.commits = 0
        change()
        assert nvs.commits == 1


def test_a_damaged_checkpoint_is_none():
    journal = bench.new_journal()
    whole = framed(json.dumps(CHECKPOINT).encode())
    store(whole, "checkpoint")
    assert journal.checkpoint() == CHECKPOINT
    for n in range(1, len(whole)):
        store(whole[:n], "checkpoint")
        assert journal.checkpoint() == {}


def test_the_log_keeps_the_newest_however_long_they_are():
    journal = bench.new_journal()
    for n in range(40):
        journal.add_to_log("1." * 31 + str(n % 10), "rolledback", "\x1b\u20ac" * 250)
    entries = read_back().log()
    assert entries, "an overlong log was lost"
    assert entries[-1][1].endswith("9") and entries[-1][2] == "rolledback"
    for n in range(40):
        journal.add_to_log("1.0.%d" % n, "confirmed")
    assert [e[1] for e in read_back().log()][-3:] == ["1.0.37", "1.0.38", "1.0.39"]
    assert len(read_back().log()) == 16


def test_F103_a_log_holds_nothing_that_moves_the_cursor_of_a_terminal():
    """A reason may quote the header of a release that nobody has signed."""
    journal = bench.new_journal()
    journal.add_to_log("", "failed", "kid \x1b[2J\r\n1 9.9.9 confirmed \u2028\x07~")
    assert read_back().log()[0][3] == "kid ?[2J??1 9.9.9 confirmed ??~"


def test_an_overlong_log_loses_its_oldest_entry_and_no_more_than_it_must():
    rest = len(framed(b'{"log": [[0, "a", "failed", ""], [0, "", "failed", ""]]}'))
    for more in (0, 1):
        journal = bench.new_journal()
        version = "x" * (LIMIT - rest + more)
        journal.add_to_log("a", "failed")
        journal.add_to_log(version, "failed")
        assert [e[1] for e in read_back().log()] == ["a", version][more:]


def test_a_reason_in_the_log_is_cut():
    journal = bench.new_journal()
    journal.add_to_log("1.0.0", "failed", "x" * 79 + "yz")
    assert journal.log()[0][3] == "x" * 79 + "y"


def test_the_log_tells_unix_time_by_any_epoch_and_none_of_an_unset_clock():
    class Time:
        """The module, on a port whose time starts then."""

        def __init__(self, epoch, year):
            self.epoch, self.year = epoch, year

        def time(self):
            return 1000

        def gmtime(self, seconds=None):
            return (self.year if seconds is None else self.epoch, 6, 7)

    kept = twinslot.journal.time
    try:
        for epoch, year, said in (
            (1970, 2025, 1000),
            (2000, 2025, 946684800 + 1000),
            (2000, 2024, 0),
            (1970, 2000, 0),
        ):
            journal = bench.new_journal()
            twinslot.journal.time = Time(epoch, year)
            journal.add_to_log("1.0.0", "failed")
            assert journal.log()[0][0] == said
    finally:
        twinslot.journal.time = kept


def test_a_log_that_can_not_be_written_is_no_error():
    nvs = Flaky(NVS("twinslot"))
    journal = Journal(nvs)
    nvs.full = True
    journal.add_to_log("1.0.0", "failed", "why")
    journal.set_starts(3)


def test_starts_are_counted_in_flash():
    journal = bench.new_journal()
    assert journal.starts() == 0
    journal.set_starts(4)
    assert read_back().starts() == 4
    journal.set_starts(0)
    assert read_back().starts() == 0


def test_the_mark_of_a_download_is_kept_beside_the_starts():
    journal = bench.new_journal()
    journal.set_starts(4)
    assert journal.fetching() == 0
    journal.set_fetching(0x7FFFFFFF)
    assert read_back().fetching() == 0x7FFFFFFF and read_back().starts() == 4
    journal.set_fetching(0)
    assert read_back().fetching() == 0
