"""Cut the power at every flash operation of every story, in every way, and twice, and thrice.

    .venv/bin/python tests/host/sweep.py                    all of it: `make powercut`
    .venv/bin/python tests/host/sweep.py good delta --few   two stories, fewer shapes
    .venv/bin/python tests/host/sweep.py good --cut 137:torn:bits:5 --cut 12:before
                                                            one point, with the board's console

What a board knows after a power cut is what its flash holds, and nothing else. So a life is run
once, uncut, and every flash operation of it is written down; what flash holds when the power
fails at operation N, in whatever shape, follows from that (`test_power_cut.py` holds it against
boards whose power is really cut). From there on a board is run, to its rest, in a fresh
interpreter, and held to the oracle in `powercut.py`. Points that leave the very same bytes in all
of flash are one life, run once: "runs" counts the lives that were run, "points" the different
cuts, or rows of cuts, that they prove.

A second cut falls on the operations of such a recovery, a third on those of the next. A replay
cuts the power of a board as it runs, and holds it to the same.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from powercut import (
    KINDS,
    NEW,
    PARTITIONS,
    READ_ONLY,
    SLOTS,
    STORIES,
    WIPES,
    Broken,
    Cut,
    Fetch,
    Point,
    Story,
    Volume,
    blob_of,
    check_after_cut,
    check_checkpoint,
    check_end,
    fetches,
    is_strict,
    make_board,
    prove,
    run_to_rest,
    slot_bytes,
    switch_on,
    version_in,
)

from twinslot_tools.virtual_esp32.board import memory
from twinslot_tools.virtual_esp32.chip.flash import PAGE, TRACED_ERASE, torn

SEED = 20261121
WORKERS = 2
BLOCK = 65536  # of a checkpoint
REQUEST = 4096  # what is asked for at a time
WHOLE = 1 << 30  # more than any payload
_BATCH = 64
# Seeds of a torn operation: with "prefix" and "suffix" they are how many bytes were finished.
ALL_SHAPES = {"prefix": 2, "suffix": 2, "bits": 3}
FEW_SHAPES = {"prefix": 1, "suffix": 1, "bits": 1}


class Operation(NamedTuple):
    """One command to the flash chip; `data` is None for an erase."""

    at: int
    size: int
    data: bytes | None


def read_trace(path: Path) -> list[Operation]:
    """Operations of a trace, programs split at pages as the chip does it."""
    raw = path.read_bytes()
    found, i = [], 0
    while i < len(raw):
        at, size = struct.unpack_from("<II", raw, i)
        i += 8
        if size & TRACED_ERASE:
            found.append(Operation(at, size ^ TRACED_ERASE, None))
            continue
        data = raw[i : i + size]
        i += size
        while data:
            n = min(PAGE - at % PAGE, len(data))
            found.append(Operation(at, n, data[:n]))
            at, data = at + n, data[n:]
    return found


def carried_out(flash: bytes | bytearray, op: Operation) -> bytes:
    """What the operation leaves in its place."""
    if op.data is None:
        return b"\xff" * op.size
    old = _number(flash[op.at : op.at + op.size])
    return (old & _number(op.data)).to_bytes(op.size, "little")


def _number(content: bytes | bytearray) -> int:
    """Its bits."""
    return int.from_bytes(content, "little")


def _made_firm(left: int, op: Operation, later: Operation) -> int:
    """Of the bits that an interrupted operation was to change, those still weak after a later
    one: not erased, and not programmed to 0."""
    begin, end = max(op.at, later.at), min(op.at + op.size, later.at + later.size)
    if begin >= end:
        return left
    ones = b"" if later.data is None else later.data[begin - later.at : end - later.at]
    firm = ((1 << 8 * (end - begin)) - 1) ^ _number(ones)
    return left & ~(firm << 8 * (begin - op.at))


def interrupted(flash: bytes | bytearray, op: Operation, cut: Cut) -> bytes:
    """All of flash when the power fails in this operation."""
    new = carried_out(flash, op)
    if cut.mode == "before":
        return bytes(flash)
    if cut.mode == "torn":
        new = torn(bytes(flash[op.at : op.at + op.size]), new, cut.shape, cut.seed)
    return bytes(flash[: op.at]) + new + bytes(flash[op.at + op.size :])


def ways(number: int, op: Operation, shapes: dict[str, int], dice: random.Random) -> Iterator[Cut]:
    """Cuts of one operation: before it, after it, and torn in each shape so many times."""
    yield Cut(number)
    yield Cut(number, "after")
    for shape, times in shapes.items():
        for _ in range(times):
            yield Cut(number, "torn", shape, dice.randrange(1 << 16))


def _key(flash: bytes, cuts: tuple[Cut, ...]) -> bytes:
    """The same for two boards that are the same: of the partitions that nothing can write, all
    boards of a story have the same."""
    whole = memoryview(flash)
    digest = hashlib.blake2b(digest_size=16, salt=bytes([is_strict(cuts)]))
    for label in sorted(PARTITIONS.keys() - READ_ONLY):
        part = PARTITIONS[label]
        digest.update(whole[part.offset : part.offset + part.size])
    return digest.digest()


@dataclass
class Life:
    """What became of a board from one content of its flash on."""

    complaint: Broken | None = None
    operations: list[Operation] = field(default_factory=list)
    fetched: list[Fetch] = field(default_factory=list)  # until the image was there
    complete: set[str] = field(default_factory=set)  # slots that hold an image in the end


@dataclass
class Tally:
    """Figures of one story."""

    story: str
    points: int = 0
    runs: int = 0
    redone: int = 0  # largest number of bytes fetched a second time
    broken: Counter = field(default_factory=Counter)
    replays: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        held = "  ".join(f"{kind} {self.broken[kind]}" for kind in KINDS)
        return (
            f"{self.story:<22} points {self.points:>6}  runs {self.runs:>6}  {held}"
            f"  re-download {self.redone:>6}  {self.seconds:6.1f} s"
        )


class Sweep:
    """One story: its board, its uncut life, and what was proven from each content of flash."""

    def __init__(self, folder: Path, name: str, workers: int = WORKERS):
        self.name = name
        self.story: Story = STORIES[name]
        self.folder = folder / name
        self.base = make_board(self.folder, self.story).read_bytes()
        self.volume = Volume.read(self.base)
        self.pool = ThreadPoolExecutor(workers)
        self.tally = Tally(name)
        self._known: dict[bytes, Future[Life]] = {}
        self._proven: set[tuple[Cut, ...]] = set()
        self._lock = threading.Lock()
        self.uncut = self._run(self.base, (), 0)
        if self.uncut.complaint:
            raise self.uncut.complaint
        self.end = bytearray(self.base)
        self._progress: list[int] = []  # bytes of payload asked for at most, by operation
        self._starts: list[int] = []  # that the application had counted, by operation
        self.changes: dict[int, int] = {}  # bits that it changes, by number of the operation
        self._walk()

    def _walk(self) -> None:
        """Find the checkpoints of the uncut life, and so what a cut may cost."""
        slot = PARTITIONS[self.story.other]
        nvs, volume = PARTITIONS["nvs"], PARTITIONS["vfs"]
        starts = self.volume.starts
        done, marks = [], {0: 0}  # image bytes written by then; {in the image: in the payload}
        high = 0
        for number, op in enumerate(self.uncut.operations, 1):
            new = carried_out(self.end, op)
            self.changes[number] = _number(self.end[op.at : op.at + op.size]) ^ _number(new)
            self.end[op.at : op.at + op.size] = new
            if slot.offset <= op.at < slot.offset + slot.size and op.data is not None:
                high = max(high, op.at + op.size - slot.offset)
            if nvs.offset <= op.at < nvs.offset + nvs.size and self.story.payload != "small":
                kept = blob_of(bytes(self.end), "checkpoint")
                if kept:
                    marks[kept["offset"]] = kept["at"]
            done.append(high)
            self._starts.append(starts)  # when it is cut
            if volume.offset <= op.at < volume.offset + volume.size:
                starts = Volume.read(bytes(self.end)).starts
        self.checkpoints = marks
        self._progress += [self._asked(high) for high in done]
        if version_in(bytes(self.end), self.story.other, self.story) is None:
            assert self.story.refused, "nothing was updated"

    # ---- one life

    def _run(self, flash: bytes, cuts: tuple[Cut, ...], starts: int) -> Life:
        """Run a board from here, where so many starts are counted at least, to its rest."""
        life = Life()
        with tempfile.TemporaryDirectory(dir=memory()) as scratch:
            path, trace = Path(scratch) / "flash.bin", Path(scratch) / "trace"
            path.write_bytes(flash)

            try:
                if cuts:
                    check_after_cut(flash, self.story)
                result = run_to_rest(switch_on(path, cuts), self.story, trace=trace)
                volume = self.volume._replace(starts=starts)
                end = path.read_bytes()
                check_end(end, result, self.story, volume)
                check_checkpoint(flash, fetches(result.console, self.story), self.story)
            except Broken as broken:
                life.complaint = broken
                return life
            except Exception as exc:  # an oracle that stumbles has found something as well
                life.complaint = Broken(repr(exc))
                return life
            life.operations = read_trace(trace)
            life.fetched = fetches(result.console, self.story)
            life.complete = self.complete(end)
        return life

    def complete(self, flash: bytes) -> set[str]:
        """Slots that hold an image, every byte of it."""
        return {label for label in SLOTS if version_in(flash, label, self.story)}

    def _live(self, flash: bytes, cuts: tuple[Cut, ...]) -> Life:
        """As `_run`, but only once for the same flash."""
        key = _key(flash, cuts)
        with self._lock:
            found, mine = self._known.get(key), Future()
            if found is None:
                self._known[key] = mine
        if found is not None:
            return found.result()  # perhaps another thread is at it
        try:
            life = self._run(flash, cuts, self._starts[cuts[0].op - 1])
        except BaseException as exc:
            mine.set_exception(exc)
            raise
        with self._lock:
            self.tally.runs += 1
        mine.set_result(life)
        return life

    def prove(self, flash: bytes, cuts: tuple[Cut, ...]) -> Life:
        """Hold one point to the oracle, and book it."""
        life = self._live(flash, cuts)
        complaint = life.complaint
        redone = 0
        if complaint is None:
            redone = self.redone(flash, life.fetched, cuts)
            complaint = _too_much(redone) or (self.weak(cuts[0], life) if not cuts[1:] else None)
        with self._lock:
            self.tally.points += cuts not in self._proven
            self._proven.add(cuts)
            self.tally.redone = max(self.tally.redone, redone)
            if complaint:
                self.tally.broken[complaint.kind] += 1
                self.tally.replays.append(
                    f"  .venv/bin/python tests/host/sweep.py {self.name}"
                    f" {Point(cuts).options()}\n    {complaint}"
                )
        return life

    def weak(self, cut: Cut, life: Life) -> Broken | None:
        """Complain of an image that rests on cells of an interrupted operation.

        Whatever such cells seem to hold, they may hold something else at the next read: only
        another erase makes them 1 for sure, and only another program 0.
        """
        op = self.uncut.operations[cut.op - 1]
        for label in life.complete if cut.mode != "before" else ():
            slot = PARTITIONS[label]
            if not slot.offset <= op.at < slot.offset + slot.size:
                continue
            left = self.changes[cut.op]
            for later in life.operations:
                left = _made_firm(left, op, later)
            if left:
                where = ((left & -left).bit_length() - 1) // 8 + op.at - slot.offset
                return Broken(f"{label} is complete, and weak at 0x{where:x}")
        return None

    def redone(self, flash: bytes, fetched: list[Fetch], cuts: tuple[Cut, ...]) -> int:
        """Bytes that were fetched before the last cut and are fetched again, at most.

        Args:
            flash: as it was when the power failed last.
            fetched: what was asked for then, if anything; another payload counts from its start.
        """
        if not fetched:
            return 0
        if len(cuts) == 1:
            before = self._progress[cuts[0].op - 1]
        else:
            before = self._asked(self._held(flash))
        if before == WHOLE:  # behind the last checkpoint: to the end of the payload
            begun = max(self.checkpoints.values())
            before = max(begun, self._size_of_last_part() + begun)
        return sum(max(0, before - fetch.start) for fetch in fetched)

    def _asked(self, high: int) -> int:
        """Bytes of payload that were asked for, at most, to write so many of the image."""
        above = [at for offset, at in self.checkpoints.items() if offset >= high]
        return min(above, default=WHOLE) if high else 0

    def _held(self, flash: bytes) -> int:
        """How much of the image flash holds, but for its header, in whole pages."""
        content, image = slot_bytes(flash, self.story.other), self.story.image(NEW)
        high = PAGE
        while high < len(image) and content[high : high + PAGE].startswith(
            image[high : high + PAGE]
        ):
            high += PAGE
        return high if content[32:PAGE] == image[32:PAGE] else 0

    def _size_of_last_part(self) -> int:
        """Bytes of image behind the last checkpoint: no payload of ours is longer there."""
        return len(self.story.image(NEW)) - max(self.checkpoints)

    # ---- many

    def _all(self, points: Iterable[tuple[bytes, tuple[Cut, ...]]]) -> Iterator[Life]:
        """Prove points, a batch at a time: each holds a whole flash."""
        points = iter(points)
        while batch := list(islice(points, _BATCH)):
            yield from self.pool.map(lambda point: self.prove(*point), batch)

    def points(
        self,
        flash: bytes,
        operations: list[Operation],
        shapes: dict[str, int],
        so_far: tuple[Cut, ...] = (),
        chosen: set[int] | None = None,
    ) -> Iterator[tuple[bytes, tuple[Cut, ...]]]:
        """Flash and cuts of every way to cut a life, or its chosen operations (from 1)."""
        dice = random.Random(f"{SEED} {self.name} {so_far}")
        now = bytearray(flash)
        for number, op in enumerate(operations, 1):
            if chosen is None or number in chosen:
                alike = len(shapes) > 1 and fills_a_slot(op) and self.name not in THOROUGH
                these = {dice.choice(list(shapes)): 1} if alike else shapes
                for cut in ways(number, op, these, dice):
                    yield interrupted(now, op, cut), (*so_far, cut)
            now[op.at : op.at + op.size] = carried_out(now, op)

    def once(self, shapes: dict[str, int], chosen: set[int] | None = None) -> Tally:
        """Every operation, cut in every way."""
        began = time.monotonic()
        for _ in self._all(self.points(self.base, self.uncut.operations, shapes, (), chosen)):
            pass
        self.tally.seconds += time.monotonic() - began
        return self.tally

    def twice(self, sample: int | None = None, thrice: int = 0) -> Tally:
        """Pairs: cut before each operation, and once more before each of the recovery.

        Args:
            sample: so many operations of the first life, instead of all.
            thrice: cut so many of the pairs, drawn at random, once more.
        """
        began = time.monotonic()
        dice = random.Random(f"{SEED} {self.name} pairs")
        count = len(self.uncut.operations)
        chosen = set(dice.sample(range(1, count + 1), min(sample or count, count)))
        third = []
        for flash, cuts in self.points(self.base, self.uncut.operations, {}, (), chosen):
            if cuts[0].mode != "before":
                continue
            life = self._live(flash, cuts)
            pairs = [
                p
                for p in self.points(flash, life.operations, {}, cuts)
                if p[1][1].mode == "before"
            ]
            for pair, found in zip(pairs, self._all(pairs), strict=True):
                if found.operations and dice.random() < 0.02 and len(third) < thrice:
                    third.append((pair, found.operations))
        self._all_of(self._thirds(third, dice))
        self.tally.seconds += time.monotonic() - began
        return self.tally

    def torn_twice(self, pairs: int) -> Tally:
        """So many pairs, drawn at random, of which both cuts tear what they fall on."""
        began = time.monotonic()
        dice = random.Random(f"{SEED} {self.name} torn pairs")
        for _ in range(pairs // SECONDS):
            first = self._torn(self.base, self.uncut.operations, dice, ())
            life = self._live(*first)
            seconds = [
                self._torn(first[0], life.operations, dice, first[1])
                for _ in range(SECONDS if life.operations else 0)
            ]
            self._all_of(seconds)
        self.tally.seconds += time.monotonic() - began
        return self.tally

    def _torn(self, flash, operations, dice, so_far) -> tuple[bytes, tuple[Cut, ...]]:
        """Tear one operation of a life."""
        number = dice.randrange(1, len(operations) + 1)
        shape = {dice.choice(list(ALL_SHAPES)): 1}
        found = list(self.points(flash, operations, shape, so_far, {number}))
        cut = found[-1][1][-1]._replace(seed=dice.randrange(1 << 16))
        now = found[0][0]  # as it was before
        return interrupted(now, operations[number - 1], cut), (*so_far, cut)

    def _thirds(self, found, dice) -> Iterator[tuple[bytes, tuple[Cut, ...]]]:
        for (flash, cuts), operations in found:
            number = dice.randrange(1, len(operations) + 1)
            points = list(self.points(flash, operations, {"bits": 1}, cuts, {number}))
            yield points[-1]

    def _all_of(self, points) -> None:
        for _ in self._all(points):
            pass


def _too_much(redone: int) -> Broken | None:
    if redone > BLOCK + REQUEST:
        return Broken(f"{redone} bytes were fetched twice", "lost")
    return None


def replay(folder: Path, name: str, point: Point, on_console=None) -> None:
    """Cut the power of a board there, and hold it to all that a sweep does. Raises Broken."""
    found = Sweep(folder, name)
    path, trace = found.folder / "flash.bin", found.folder / "trace"
    left, cuts, result = prove(path, found.story, point, on_console, trace=trace)
    if left and not point.wipe:
        complaint = _too_much(found.redone(left, fetches(result.console, found.story), cuts))
        if not cuts[1:] and not complaint:
            end = path.read_bytes()
            complaint = found.weak(
                cuts[0], Life(operations=read_trace(trace), complete=found.complete(end))
            )
        if complaint:
            raise complaint


def fills_a_slot(op: Operation) -> bool:
    """Whether it is one of the many alike that program a slot, page by page."""
    slots = [PARTITIONS[label] for label in SLOTS]
    return op.size == PAGE and any(p.offset + PAGE <= op.at < p.offset + p.size for p in slots)


def few(sweep: Sweep, pages: int) -> set[int]:
    """Operations of a life but the many alike that fill a slot: of those, so many."""
    dull = [n for n, op in enumerate(sweep.uncut.operations, 1) if fills_a_slot(op)]
    dice = random.Random(f"{SEED} {sweep.name} few")
    everything = set(range(1, len(sweep.uncut.operations) + 1))
    return everything - set(dull) | set(dice.sample(dull, min(pages, len(dull))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stories", nargs="*", metavar="STORY", help=", ".join(STORIES))
    parser.add_argument("--few", action="store_true", help="fewer shapes, no pairs")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--cut", action="append", type=Cut.parse, metavar="OP[:MODE[:SHAPE:SEED]]",
                        help="replay this point of one story; twice for a second cut")  # fmt: skip
    parser.add_argument("--wipe", choices=WIPES, default="", help="otadata, after the first cut")
    parser.add_argument("--seed", type=int, default=0, help="of --wipe")
    args = parser.parse_args()
    unknown = set(args.stories) - set(STORIES)
    if unknown:
        parser.error(f"no story {', '.join(sorted(unknown))}; there are {', '.join(STORIES)}")
    if args.cut:
        if len(args.stories) != 1:
            parser.error("a cut is replayed in one story")
        with tempfile.TemporaryDirectory() as folder:
            point = Point(tuple(args.cut), args.wipe, args.seed)
            replay(Path(folder), args.stories[0], point, print)
        print("holds")
        return
    print(f"seed {SEED}")
    tallies = []
    for name in args.stories or STORIES:
        with tempfile.TemporaryDirectory() as folder:
            sweep = Sweep(Path(folder), name, args.workers)
            thorough = name in THOROUGH and not args.few
            tally = sweep.once(ALL_SHAPES if thorough else FEW_SHAPES)
            if name in PAIRS and not args.few:
                sweep.twice(PAIRS[name], thrice=TRIPLES)
                sweep.torn_twice(TORN_PAIRS)
            tallies.append(tally)
            print(f"{tally.line()}  operations {len(sweep.uncut.operations)}", flush=True)
            print("\n".join(tally.replays[:20]), end="\n" if tally.replays else "", flush=True)
    points, runs = sum(t.points for t in tallies), sum(t.runs for t in tallies)
    broken = sum(sum(t.broken.values()) for t in tallies)
    seconds = sum(t.seconds for t in tallies)
    print(f"{points} distinct points, {runs} lives run, {broken} broken, {seconds:.0f} s")
    whole = not (args.few or args.stories)
    if whole and (points < POINTS or runs < RUNS):
        print(f"too few: at least {POINTS} points and {RUNS} lives", file=sys.stderr)
        sys.exit(1)
    sys.exit(1 if broken else 0)


# Stories of which each operation is torn in all shapes. In the others those that fill a slot, page
# by page, are torn in one, drawn by the seed.
THOROUGH = ("good", "crash-down")
# Stories of which pairs are cut: all of them, or those of so many operations of the first life.
PAIRS = {
    "good": None,
    "crash-down": 6,
    "unhealthy": 4,
    "refused": 40,
    "mended": 1,
    "resumed": 1,
    "gzip": 1,
    "delta": 1,
}
TRIPLES = 100  # of each of these
TORN_PAIRS = 300  # of each of these
SECONDS = 8  # cuts of a life that was cut once
# What all stories must come to, so that none can fall silent.
POINTS, RUNS = 10_000, 50_000

if __name__ == "__main__":
    main()
