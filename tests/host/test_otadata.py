"""otadata: the arithmetic that decides which slot boots."""

from pathlib import Path

import pytest
from bench import run_on_cpython, run_on_micropython
from hypothesis import example, given
from hypothesis import strategies as st

from twinslot_tools.virtual_esp32.chip import otadata
from twinslot_tools.virtual_esp32.chip.otadata import (
    ABORTED,
    INVALID,
    NEW,
    PENDING_VERIFY,
    UNDEFINED,
    VALID,
    Entry,
    OtadataError,
    entry,
)

CASES = Path(__file__).with_name("chip_cases.py")
EMPTY = otadata.unpack(b"\xff" * 32)
LAST = 0xFFFFFFFE  # the highest seq that is not "empty"

seqs = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 40), st.integers(LAST - 40, LAST + 1))
states = st.sampled_from([NEW, PENDING_VERIFY, VALID, INVALID, ABORTED, 5, 0x00FF00FF, UNDEFINED])
slot_counts = st.integers(1, 16)
good_entries = st.builds(entry, seqs, states)
entries = st.one_of(
    good_entries,
    st.builds(
        Entry, seqs, st.binary(min_size=20, max_size=20), states, st.integers(0, 0xFFFFFFFF)
    ),
    st.just(EMPTY),
)


def broken(seq, state):
    e = entry(seq, state)
    return e._replace(crc=e.crc ^ 1)


# --- vectors ---


@pytest.mark.parametrize(
    ("seq", "crc"),
    [(1, "9a984347"), (2, "7437f655"), (3, "11504aed"), (4, "a8689d70")],
)
def test_entry_bytes_are_those_of_a_real_board(seq, crc):
    expected = bytes([seq, 0, 0, 0]) + b"\xff" * 20 + bytes([2, 0, 0, 0]) + bytes.fromhex(crc)
    assert otadata.pack(entry(seq, VALID)) == expected
    assert otadata.unpack(expected) == entry(seq, VALID)


@given(entries)
def test_packing_loses_nothing(e):
    assert otadata.unpack(otadata.pack(e)) == e


# --- predicates, section 2.2 ---


@pytest.mark.parametrize(
    ("e", "is_invalid", "is_valid"),
    [
        (EMPTY, True, False),
        (entry(1, NEW), False, True),
        (entry(1, PENDING_VERIFY), False, True),
        (entry(1, VALID), False, True),
        (entry(1, UNDEFINED), False, True),
        (entry(1, 0x12345678), False, True),  # the crc doesn't cover the state
        (entry(1, INVALID), True, False),
        (entry(1, ABORTED), True, False),
        (broken(1, VALID), False, False),
        (broken(1, ABORTED), True, False),
        (entry(0xFFFFFFFF, VALID), True, False),
        (entry(0, VALID), False, True),
    ],
)
def test_predicates(e, is_invalid, is_valid):
    assert (otadata.is_invalid(e), otadata.is_valid(e)) == (is_invalid, is_valid)


@pytest.mark.parametrize(
    ("first", "second", "active"),
    [
        (entry(1, VALID), entry(2, NEW), 1),
        (entry(3, NEW), entry(2, VALID), 0),
        (entry(2, VALID), entry(2, NEW), 0),  # a tie goes to entry 0
        (entry(2, NEW), entry(2, VALID), 0),
        (entry(1, VALID), entry(2, ABORTED), 0),
        (entry(1, VALID), broken(9, VALID), 0),
        (EMPTY, entry(1, VALID), 1),
        (EMPTY, EMPTY, -1),
        (broken(1, VALID), broken(2, VALID), -1),
        (entry(0x7FFFFFFF, VALID), entry(0x80000000, VALID), 1),  # unsigned
    ],
)
def test_active_entry(first, second, active):
    assert otadata.active([first, second]) == active


@given(seqs, slot_counts)
@example(0, 3)
def test_every_seq_names_a_slot(seq, n):
    """F10: seq near 2**32, and 0, lead to a defined slot."""
    assert otadata.slot(seq, n) == ((seq - 1) % 2**32) % n


def test_blank_sectors_have_no_right_crc():
    assert not otadata.crc_ok(EMPTY)


# --- set_boot, section 2.4 ---


def c_loop(seq, target, n):
    """esp_rewrite_ota_data() of IDF 5: `while (seq > (sub + 1) % n + i * n) i++`, started near
    the end, because nobody waits 2**32 rounds."""
    i = max(0, seq // n - 2)
    while seq > (target + 1) % n + i * n:
        i += 1
    return (target + 1) % n + i * n


@given(st.integers(1, LAST - 20), slot_counts, st.data())
def test_activating_a_slot_takes_the_seq_of_the_c_loop(seq, n, data):
    target = data.draw(st.integers(0, n - 1))
    index, e = otadata.next_entry([entry(seq, VALID), EMPTY], target, n)
    assert (index, e.seq, e.state) == (1, c_loop(seq, target, n), NEW)
    assert otadata.crc_ok(e)
    assert otadata.slot(e.seq, n) == target


@given(entries, entries, slot_counts, st.data())
def test_activating_any_slot_from_any_otadata_is_defined(first, second, n, data):
    """F10: no exception but the documented one, and never a slot out of range."""
    target = data.draw(st.integers(0, n - 1))
    before = [first, second]
    try:
        index, e = otadata.next_entry(before, target, n)
    except OtadataError:
        assert max(first.seq, second.seq) > 0xFFFFFFFF - 16
        return
    after = list(before)
    after[index] = e
    assert e.label == before[index].label
    assert otadata.is_valid(e) == (e.seq != 0xFFFFFFFF)
    active = otadata.active(before)
    if active >= 0:
        assert index == 1 - active
        assert otadata.is_invalid(e) or e.seq >= before[active].seq or e.seq < n
        if otadata.slot(before[active].seq, n) != target and e.seq > before[active].seq:
            if otadata.is_valid(e):
                assert otadata.boot_slot(after, n) == target


@pytest.mark.parametrize("target", range(4))
def test_first_activation_starts_counting_at_the_slot(target):
    assert otadata.next_entry([EMPTY, EMPTY], target, 4) == (0, entry(target + 1, NEW))


def test_activating_the_active_slot_destroys_the_fallback_record():
    """The quirk of IDF 5, and what IDF 6 does instead."""
    active_1 = [entry(1, VALID), entry(2, VALID)]
    assert otadata.next_entry(active_1, 1, 2) == (0, entry(2, NEW))
    assert otadata.next_entry(active_1, 1, 2, idf6=True) == (1, entry(2, NEW))
    active_0 = [entry(3, VALID), entry(2, VALID)]
    assert otadata.next_entry(active_0, 0, 2) == (1, entry(3, NEW))
    assert otadata.next_entry(active_0, 0, 2, idf6=True) == (0, entry(3, NEW))


def test_slot_out_of_range_is_refused():
    with pytest.raises(ValueError, match="slot 2 of 2"):
        otadata.next_entry([EMPTY, EMPTY], 2, 2)


def test_the_last_seq_leads_to_an_entry_that_is_empty():
    """At 0xFFFFFFFE the other of two slots would be 0xFFFFFFFF: activating has no effect."""
    pair = [entry(LAST, VALID), EMPTY]
    index, e = otadata.next_entry(pair, 0, 2)
    assert (index, e.seq) == (1, 0xFFFFFFFF)
    assert otadata.boot_slot([pair[0], e], 2) == 1


# --- who boots, and what is its state ---


@pytest.mark.parametrize(
    ("first", "second", "n", "expected"),
    [
        (EMPTY, EMPTY, 2, None),
        (entry(1, VALID), EMPTY, 2, 0),
        (entry(1, VALID), entry(2, PENDING_VERIFY), 2, 1),
        (entry(1, VALID), entry(2, ABORTED), 2, 0),
        (entry(1, INVALID), entry(2, ABORTED), 2, None),
        (broken(1, VALID), broken(2, VALID), 2, None),
        (entry(1, VALID), EMPTY, 0, None),
    ],
)
def test_boot_slot(first, second, n, expected):
    assert otadata.boot_slot([first, second], n) == expected


@pytest.mark.parametrize(
    ("first", "second", "slot", "state"),
    [
        (entry(1, VALID), entry(2, NEW), 0, VALID),
        (entry(1, VALID), entry(2, NEW), 1, NEW),
        (entry(1, VALID), EMPTY, 1, None),
        (entry(1, VALID), broken(2, NEW), 1, None),
        (entry(2, ABORTED), entry(2, VALID), 1, ABORTED),  # the first match wins
        (entry(1, VALID), entry(2, ABORTED), 1, ABORTED),
    ],
)
def test_state_of_a_slot(first, second, slot, state):
    assert otadata.slot_state([first, second], slot, 2) == state


@given(entries, entries, slot_counts)
def test_boot_slot_is_in_range_or_none(first, second, n):
    slot = otadata.boot_slot([first, second], n)
    assert slot is None or 0 <= slot < n


# --- confirm ---


@pytest.mark.parametrize("state", [NEW, PENDING_VERIFY, UNDEFINED, 7])
def test_confirm_makes_the_active_entry_valid(state):
    pair = [entry(1, VALID), entry(2, state)]
    assert otadata.confirm_entry(pair, 2) == (1, entry(2, VALID))


def test_confirm_of_a_confirmed_slot_writes_nothing():
    """F16: confirming twice is idempotent."""
    assert otadata.confirm_entry([entry(1, VALID), entry(2, VALID)], 2) is None


@pytest.mark.parametrize(
    ("first", "second", "n"),
    [(EMPTY, EMPTY, 2), (broken(1, VALID), EMPTY, 2), (entry(1, VALID), EMPTY, 0)],
)
def test_confirm_without_an_active_entry_fails(first, second, n):
    with pytest.raises(OtadataError, match="no active otadata entry"):
        otadata.confirm_entry([first, second], n)


def test_undocumented_states_are_named_by_their_number():
    assert otadata.state_name(PENDING_VERIFY) == "PENDING_VERIFY"
    assert otadata.state_name(0x10002) == "0x00010002"


def test_micropython_decides_as_cpython_does(tmp_path):
    output = run_on_cpython(CASES, "otadata", str(tmp_path))
    assert len(output.splitlines()) > 700
    assert run_on_micropython(CASES, "otadata", str(tmp_path)) == output
