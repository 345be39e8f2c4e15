"""F1 to F9, F12, F18, F32 of the catalogue: the power fails at the flash operations of an update.

The reduced form of `make powercut`: all operations but most of the many alike that fill a slot,
cut before, after and in the middle, in most of the stories; see `sweep.py` for how, and
`powercut.py` for what must hold. Three thousand lives are run here; `make powercut` runs them all.
"""

import hashlib
import io
import json
import random
import shutil
import struct
from binascii import crc32
from collections import Counter
from pathlib import Path

import powercut
import pytest
from powercut import (
    CHIP,
    KINDS,
    NEW,
    PARTITIONS,
    SLOTS,
    STORIES,
    Broken,
    Cut,
    Point,
    Volume,
    blob_of,
    check_end,
    freed_by_half,
    make_board,
    nvs_number,
    prove,
    run_to_rest,
    switch_on,
)
from sweep import (
    FEW_SHAPES,
    SEED,
    Sweep,
    carried_out,
    few,
    interrupted,
    read_trace,
    replay,
    ways,
)

from twinslot_tools.virtual_esp32.chip import nvs
from twinslot_tools.virtual_esp32.chip.flash import PAGE, SECTOR, Fault, Flash, unsteady_cells
from twinslot_tools.virtual_esp32.firmware import make_firmware

ONE_SHAPE = {"bits": 1}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return a maker of sweeps, each made once and kept in its ``made``."""
    folder = tmp_path_factory.mktemp("lives")
    made = {}

    def make(name):
        if name not in made:
            made[name] = Sweep(folder, name)
        return made[name]

    make.made = made
    return make


@pytest.fixture(autouse=True)
def told(sweep, record_property):
    """What a test has swept, for docs/faults.md."""
    was = {id(found): _figures(found) for found in sweep.made.values()}
    yield
    figures = Counter()
    for found in sweep.made.values():
        figures.update(_figures(found))
        figures.subtract(was.get(id(found), {}))
    if figures["lives"]:
        record_property("ended", dict(figures))


def _figures(found):
    kinds = {kind: found.tally.broken[kind] for kind in KINDS}
    return {"points": found.tally.points, "lives": found.tally.runs, **kinds}


def hold(found, shapes=ONE_SHAPE, pages=6):
    """Cut at all telling operations. Fails with a command line for each that does not hold."""
    tally = found.once(shapes, few(found, pages))
    print(tally.line())
    assert not tally.replays, f"{len(tally.replays)} broken:\n" + "\n".join(tally.replays)
    assert tally.points > 100


UNCUT = {
    "good": ["ota_0", "ota_1"],
    "good-down": ["ota_1", "ota_0"],
    "crash": ["ota_0", "ota_1", "ota_0"],
    "crash-down": ["ota_1", "ota_0", "ota_1"],
    "unarmed": ["ota_1"],
    "unarmed-crash": ["ota_1", "ota_1", "ota_0"],
    "unarmed-crash-down": ["ota_0", "ota_0", "ota_1"],
    "factory": ["factory", "ota_0"],
    "factory-crash": ["factory", "ota_0", "factory"],
    "factory-unarmed-crash": ["ota_0", "ota_0", "factory"],
    "broken-slots": ["factory", "ota_0"],
    "broken-slots-crash": ["factory", "ota_0", "factory"],
    "unhealthy": ["ota_0", "ota_1", "ota_0"],
    "unhealthy-down": ["ota_1", "ota_0", "ota_1"],
    "unarmed-unhealthy": ["ota_1", "ota_0"],
    "factory-unhealthy": ["factory", "ota_0", "factory"],
    "refused": ["ota_0"],
    "mended": ["ota_0", "ota_1", "ota_0", "ota_1"],
    "superseded": ["ota_0", "ota_0", "ota_1", "ota_0"],
    "superseded-down": ["ota_1", "ota_1", "ota_0", "ota_1"],
    "resumed": ["ota_0", "ota_1"],
    "resumed-crash": ["ota_1", "ota_0", "ota_1"],
    "gzip": ["ota_0", "ota_1"],
    "delta": ["ota_1", "ota_0"],
}


@pytest.mark.parametrize("name", STORIES)
def test_an_uncut_life_is_the_update_it_claims_to_be(tmp_path, name):
    path = make_board(tmp_path / "board", STORIES[name])
    volume = Volume.read(path.read_bytes())
    result = run_to_rest(switch_on(path), STORIES[name])
    assert [b.partition for b in result.boots] == UNCUT[name]
    check_end(path.read_bytes(), result, STORIES[name], volume)


@pytest.mark.parametrize("name", ["good-down", "delta"])
def test_what_a_cut_leaves_is_what_the_sweep_says(sweep, tmp_path, name):
    found = sweep(name)
    dice = random.Random(f"{SEED} {name} real")
    path, trace = tmp_path / "flash.bin", tmp_path / "trace"
    total = len(found.uncut.operations)
    for number in dice.sample(range(1, total - 8), 12):
        chosen = list(ways(number, found.uncut.operations[number - 1], FEW_SHAPES, dice))
        cut = dice.choice(chosen)
        path.write_bytes(found.base)
        trace.unlink(missing_ok=True)
        result = switch_on(path).run(
            12,
            60,
            fault=Fault(*cut),
            trace=trace,
            until=lambda event: event.get("outcome") == "power-cut",
        )
        assert result.outcome == "power-cut"
        # Its own trace: files carry the time of their writing, which is never the same twice.
        now = bytearray(found.base)
        operations = read_trace(trace)
        for op in operations[: number - 1]:
            now = bytearray(interrupted(now, op, Cut(0, "after")))
        assert path.read_bytes() == interrupted(now, operations[number - 1], cut), f"cut {cut}"


def _damage_the_way_back(flash):
    flash[PARTITIONS["ota_1"].offset + 9_000] ^= 1


def _lose_the_volume(flash):
    at = PARTITIONS["vfs"].offset
    flash[at : at + 0x2000] = b"\xff" * 0x2000


def _lose_the_journal(flash):
    at, size = PARTITIONS["nvs"].offset, PARTITIONS["nvs"].size
    flash[at : at + size] = b"\xff" * size


def _run_a_stranger(flash):
    """Whole, and signed by nobody."""
    stranger = make_firmware(None, chip=CHIP, version="7.7.7", project="", size=14_000, seed=7)
    at = PARTITIONS["ota_0"].offset
    flash[at : at + 0x30000] = stranger.ljust(0x30000, b"\xff")


def _boast_a_checkpoint(flash):
    """One that stands for more than flash holds: the board has to begin before it."""
    with io.BytesIO(flash) as file:
        part = PARTITIONS["nvs"]
        store = nvs.Nvs(Flash(file, len(flash)), part.offset, part.size)
        image = STORIES["good-down"].image(NEW)
        name = hashlib.sha256(image).hexdigest()
        of = crc32(f"{image[-32:].hex()}blobs/{name[:2]}/{name}.bin".encode())
        body = json.dumps({"of": of, "at": 1 << 20, "offset": 1 << 20}).encode()
        blob = struct.pack("<BI", 1, crc32(body)) + body
        store.set_blob(store.open("twinslot"), "checkpoint", blob)
        flash[:] = file.getvalue()


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (_damage_the_way_back, "bricked"),
        (_run_a_stranger, "unverified"),
        (_lose_the_journal, "other"),
        (_lose_the_volume, "other"),
        (_boast_a_checkpoint, "lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_oracle_notices_what_must_not_be(tmp_path, plant, kind):
    """A sweep that could not fail would prove nothing; nor would a replay that always holds."""
    found = Sweep(tmp_path, "good-down")
    damaged = bytearray(found.base)
    plant(damaged)
    complaint = found.prove(bytes(damaged), (Cut(1),)).complaint
    assert isinstance(complaint, Broken) and complaint.kind == kind, complaint
    assert found.tally.broken == {kind: 1}
    path = tmp_path / "flash.bin"
    path.write_bytes(damaged)
    with pytest.raises(Broken) as replayed:
        prove(path, found.story, Point((Cut(1),)))
    assert replayed.value.kind == kind, replayed.value


def test_the_oracle_notices_a_board_that_rests_on_the_wrong_image(tmp_path):
    """A board of another story, in which NEW is well, held to one in which it must go back."""
    path = make_board(tmp_path / "board", STORIES["good"])
    with pytest.raises(Broken) as complaint:
        prove(path, STORIES["crash"], Point((Cut(1),)))
    assert complaint.value.kind == "wrong"


def test_a_board_that_keeps_no_checkpoints_is_noticed_by_the_sweep_and_by_its_replay(
    tmp_path, monkeypatch
):
    lib = Path(shutil.copytree(powercut.LIB, tmp_path / "lib"))
    download = lib / "twinslot" / "download.py"
    keeps = "self._journal.save_checkpoint(kept)"
    text = download.read_text()
    assert text.count(keeps) == 1
    download.write_text(text.replace(keeps, "pass"))
    monkeypatch.setattr(powercut, "LIB", lib)
    found = Sweep(tmp_path / "sweep", "resumed")
    last = {_page_of(found, 140_000 // PAGE * PAGE)}
    for flash, cuts in found.points(found.base, found.uncut.operations, {}, (), last):
        assert found.prove(flash, cuts).complaint is None, "all else holds"
    assert found.tally.broken["lost"] == len(found.tally.replays) == 2
    options = found.tally.replays[0].split("--cut ")[1].split()[0]
    with pytest.raises(Broken, match="fetched twice") as replayed:
        replay(tmp_path / "replay", "resumed", Point((Cut.parse(options),)))
    assert replayed.value.kind == "lost"


def test_a_board_that_throws_its_resumed_downloads_away_is_noticed(tmp_path, monkeypatch):
    """It resumes where it should, and then fetches the image in another form, all of it."""
    lib = Path(shutil.copytree(powercut.LIB, tmp_path / "lib"))
    download = lib / "twinslot" / "download.py"
    pumps = "            await payload.pump("
    text = download.read_text()
    assert text.count(pumps) == 1
    planted = "            if state:\n                raise errors.RefusedError('planted')\n"
    download.write_text(text.replace(pumps, planted + pumps))
    monkeypatch.setattr(powercut, "LIB", lib)
    found = Sweep(tmp_path / "sweep", "gzip")
    last = {_page_of(found, 140_000 // PAGE * PAGE)}
    for flash, cuts in found.points(found.base, found.uncut.operations, {}, (), last):
        assert found.prove(flash, cuts).complaint.kind == "lost"
    assert found.tally.replays


def test_F1_power_cut_before_and_after_every_operation(sweep):
    good = sweep("good")
    hold(good, {}, pages=1 << 20)


def test_F2_F3_F5_F6_F7_power_cut_in_the_middle_of_operations(sweep):
    hold(sweep("good"), FEW_SHAPES)


def test_F3_a_page_of_nvs_that_is_erased_by_half_costs_what_lay_in_it_and_no_more(sweep):
    """Excused in the sweep is an application's key that ESP-IDF itself loses, and nothing else."""
    found = sweep("crash-down")
    now, part, tried = bytearray(found.base), PARTITIONS["nvs"], 0
    for number, op in enumerate(found.uncut.operations, 1):
        assert not freed_by_half(now)
        torn = bytearray(now)
        now[op.at : op.at + op.size] = carried_out(now, op)
        if op.data is None and part.offset <= op.at < part.offset + part.size:
            torn[op.at + 64 : op.at + nvs.SECTOR] = b"\xff" * (nvs.SECTOR - 64)
            assert freed_by_half(torn)
            assert found.prove(bytes(torn), (Cut(number),)).complaint is None
            tried += 1
    assert tried


def test_F4_power_cut_while_ota_0_itself_is_replaced(sweep):
    hold(sweep("good-down"))


@pytest.mark.parametrize("name", ["crash", "mended"])
def test_F12_power_cut_on_the_way_into_a_crash_and_back(sweep, name):
    hold(sweep(name), {})


@pytest.mark.parametrize("name", ["unarmed", "unarmed-crash", "factory-unarmed-crash"])
def test_F8_power_cut_in_a_trial_that_the_bootloader_does_not_watch(sweep, name):
    hold(sweep(name), ONE_SHAPE if name == "unarmed" else {})


@pytest.mark.parametrize("name", ["factory", "factory-crash", "broken-slots-crash"])
def test_power_cut_in_the_first_update_of_a_board_with_a_factory_slot(sweep, name):
    hold(sweep(name), {})


@pytest.mark.parametrize("name", ["unhealthy", "unarmed-unhealthy"])
def test_F12_power_cut_on_the_way_back_from_an_image_that_fails_its_checks(sweep, name):
    hold(sweep(name), {})


def test_power_cut_while_a_slot_on_trial_gets_its_next_update(sweep):
    """Offered on trial, refused to what would overwrite the way back, installed afterwards."""
    hold(sweep("superseded"), {}, pages=2)


def test_power_cut_while_a_release_is_refused(sweep):
    hold(sweep("refused"))


@pytest.mark.parametrize("name", ["resumed", "gzip", "delta"])
def test_power_cut_in_a_download_goes_on_at_the_last_checkpoint(sweep, name):
    found = sweep(name)
    hold(found, {})
    assert len(found.checkpoints) >= 3
    assert 0 < found.tally.redone


def _live_on(path, story, fault=None):
    """From power-on until the power fails, or to the board's rest."""
    return switch_on(path).run(
        12,
        60,
        fault=fault,
        until=lambda event: event.get("outcome") == "power-cut" or event["event"] == "idle",
    )


def test_a_download_that_ends_thrice_by_a_power_cut_rests_for_six_hours(sweep, tmp_path):
    """Whatever ends it: else a board that resets in every download would fetch for ever."""
    found = sweep("good")
    half = _page_of(found, 0x2000)
    path = tmp_path / "flash.bin"
    path.write_bytes(found.base)
    for _ in range(3):
        result = _live_on(path, found.story, Fault(*Cut(half)))
        assert result.outcome == "power-cut" and "fetch: " in result.console
    result = _live_on(path, found.story)
    rests, fetches = result.console.index("rests"), result.console.index("fetch: ")
    assert rests < fetches, "it was fetched before the six hours were over"
    check_end(path.read_bytes(), result, found.story, found.volume)


def test_a_download_that_comes_on_with_each_power_cut_does_not_rest(sweep, tmp_path):
    found = sweep("resumed")
    path = tmp_path / "flash.bin"
    path.write_bytes(found.base)
    marks = sorted(found.checkpoints)[1:]
    for mark in marks:
        # Behind the next checkpoint; what was there before is not written again.
        done = max(m for m in found.checkpoints if m < mark)
        number = _page_of(found, mark + 0x2000) - (_page_of(found, done) if done else 0)
        result = _live_on(path, found.story, Fault(*Cut(number)))
        assert result.outcome == "power-cut"
        assert blob_of(path.read_bytes(), "checkpoint")["offset"] == mark
    result = _live_on(path, found.story)
    assert "rests" not in result.console
    assert "tried" not in blob_of(path.read_bytes(), "journal")
    check_end(path.read_bytes(), result, found.story, found.volume)


def _page_of(found, offset):
    """Number of the operation that writes this offset of the image."""
    at = PARTITIONS[found.story.other].offset + offset
    operations = enumerate(found.uncut.operations, 1)
    return next(n for n, op in operations if op.at == at and op.data is not None)


def _in_nvs(found):
    """Operations of the uncut life there."""
    part = PARTITIONS["nvs"]
    end = part.offset + part.size
    return [op for op in found.uncut.operations if part.offset <= op.at < end], end


def _notes(found):
    """How often each blob in NVS was written or deleted in the uncut life."""
    operations, end = _in_nvs(found)
    now, known, written = bytearray(found.base[:end]), {}, Counter()
    for op in operations:
        now[op.at : op.at + op.size] = carried_out(now, op)
        for key in ("journal", "checkpoint", "log"):
            holds = blob_of(bytes(now), key)
            written[key] += holds != known.get(key, {})
            known[key] = holds
        mark = nvs_number(bytes(now), "fetch")
        written["fetch"] += mark != known.get("fetch", 0)
        known["fetch"] = mark
    return written


@pytest.mark.parametrize("name", ["good", "crash", "resumed", "delta"])
def test_flash_wears_by_a_note_for_each_checkpoint_and_a_few_for_each_update(sweep, name):
    found = sweep(name)
    written = _notes(found)
    checkpoints = len(found.checkpoints) - 1  # without the beginning
    assert written["checkpoint"] == (checkpoints + 1 if checkpoints else 0)  # the last forgets it
    # Before the reset, at the first start, at its proof or the way back, and when it is reported.
    assert written["journal"] <= 6 and written["log"] == 1
    # That a download begins; that it has come to a checkpoint or ended.
    assert written["fetch"] == 2
    erased = Counter(op.at for op in _in_nvs(found)[0] if op.data is None)
    assert erased.total() <= 1, erased


def test_power_cut_in_the_header_costs_no_more_than_the_last_checkpoint(sweep):
    found = sweep("resumed")
    header = _header_of(found)
    points = found.points(found.base, found.uncut.operations, {"bits": 6}, (), {header})
    for flash, cuts in points:
        found.prove(flash, cuts)
    assert not found.tally.replays, "\n".join(found.tally.replays)


def test_F3_power_cut_in_the_erase_of_a_complete_image_that_failed(sweep):
    """The next download begins with it; its header may be the last thing that goes."""
    found = sweep("mended")
    start = PARTITIONS[found.story.other].offset
    erases = [
        number
        for number, op in enumerate(found.uncut.operations, 1)
        if op.at == start and op.data is None
    ]
    shapes = {"prefix": 3, "suffix": 3, "bits": 3}
    assert erases, "it was not replaced"
    for flash, cuts in found.points(found.base, found.uncut.operations, shapes, (), {erases[-1]}):
        found.prove(flash, cuts)
    assert not found.tally.replays, "\n".join(found.tally.replays)


@pytest.mark.parametrize(("name", "count"), [("good-down", 40), ("resumed", 20), ("delta", 20)])
def test_F3_cells_of_an_interrupted_operation_read_differently_each_time(
    sweep, tmp_path, name, count
):
    found = sweep(name)
    slots = [(p.offset, p.offset + p.size) for p in map(PARTITIONS.get, SLOTS)]
    operations = list(enumerate(found.uncut.operations, 1))
    mine = [n for n, op in operations if any(begin <= op.at < end for begin, end in slots)]
    chosen = {*random.Random(f"{SEED} {name} unsteady").sample(mine, count), mine[0], mine[-1]}
    now, path, cells = bytearray(found.base), tmp_path / "flash.bin", tmp_path / "cells"
    for number, op in operations:
        now[op.at : op.at + op.size] = carried_out(now, op)
        if number not in chosen:
            continue
        cut = Cut(number, "after")
        path.write_bytes(now)
        changed = found.changes[number].to_bytes(op.size, "little")
        cells.write_bytes(unsteady_cells(op.at, changed))
        volume = Volume.read(bytes(now))
        try:
            result = run_to_rest(switch_on(path, (cut,), cells), found.story)
            check_end(path.read_bytes(), result, found.story, volume)
        except Broken as broken:
            pytest.fail(f"{name}, unsteady behind {cut}: {broken}")


def test_F3_a_block_that_another_boot_has_left_must_be_written_again(tmp_path, monkeypatch):
    """Whatever it seems to hold; a board that believes it is noticed."""
    lib = Path(shutil.copytree(powercut.LIB, tmp_path / "lib"))
    slot = lib / "twinslot" / "slot.py"
    text = slot.read_text()
    assert text.count("self._firm and ") == 1
    slot.write_text(text.replace("self._firm and ", ""))
    monkeypatch.setattr(powercut, "LIB", lib)
    found = Sweep(tmp_path / "sweep", "good")
    last = {_page_of(found, 3 * SECTOR - PAGE)}
    ends = [
        found.prove(flash, cuts).complaint
        for flash, cuts in found.points(found.base, found.uncut.operations, {}, (), last)
    ]
    assert ends == [None, None] and len(found.tally.replays) == 1
    assert "weak at 0x2f00" in found.tally.replays[0]
    cut = Cut.parse(found.tally.replays[0].split("--cut ")[1].split()[0])
    with pytest.raises(Broken, match="weak at 0x2f00"):
        replay(tmp_path / "replay", "good", Point((cut,)))


@pytest.mark.parametrize("name", ["good", "good-down", "crash-down", "factory"])
def test_F9_F18_otadata_lost_at_a_power_cut(sweep, tmp_path, name):
    found = sweep(name)
    dice = random.Random(f"{SEED} {name} lost")
    ops = dice.sample(sorted(few(found, 6)), 14)
    wipes = ["both", "noise", "one"] * 5
    points = [Point((Cut(op),), wipe, op) for op, wipe in zip(ops, wipes, strict=False)]
    # Around the header the slot turns from unfinished to bootable.
    header = _header_of(found)
    points += [Point((Cut(op),), "both") for op in range(header - 1, header + 4)]
    base = tmp_path / "base.bin"
    base.write_bytes(found.base)
    for point in points:
        path = Path(shutil.copyfile(base, tmp_path / "flash.bin"))
        try:
            prove(path, found.story, point)
        except Broken as broken:
            pytest.fail(f"tests/host/sweep.py {name} {point.options()}\n{broken}")


def _header_of(found):
    """Number of the operation that completes the image."""
    now = bytearray(found.base)
    story = found.story
    wanted = story.image(story.complete[1])
    for number, op in enumerate(found.uncut.operations, 1):
        now[:] = interrupted(now, op, Cut(number, "after"))
        if wanted in now[0x10000:0x70000]:
            return number
    raise AssertionError("no image was completed")


@pytest.mark.parametrize("name", ["good-down", "crash"])
def test_F32_power_cut_once_more_during_the_recovery(sweep, name):
    tally = sweep(name).twice(sample=1, thrice=4)
    assert not tally.replays, "\n".join(tally.replays)


def test_F32_both_power_cuts_tear_what_they_fall_on(sweep):
    tally = sweep("crash").torn_twice(16)
    assert not tally.replays, "\n".join(tally.replays)


def test_three_thousand_lives_were_run(sweep, request):
    """Last: adds up what the tests of this file have done."""
    if request.config.option.keyword or any("::" in arg for arg in request.config.args):
        pytest.skip("only some of the tests were asked for")
    tallies = [found.tally for found in sweep.made.values()]
    print(f"{sum(t.points for t in tallies)} points in {len(tallies)} stories")
    assert sum(t.runs for t in tallies) >= 3000
