"""F34, F35 of the catalogue: an exception at any statement of the update path ends cleanly.

A copy of the package is run in which each statement can be made to raise (`statements.py`). All
statements that an update passes are taken in turn: OSError, MemoryError, an error of no kind that
anybody foresaw, or a heap that has nothing for what the statement allocates. What leaves the
agent is an OtaError, whatever it was, and the log says so. Afterwards the board would boot the
old image or the whole new one, and the next poll brings the update to its end, with no reboot in
between. Told to the agent's own loop, it never ends it. So it is where a download goes on, at a
mirror, where a newer keyring comes first, and from the guard's first statement to the end of a
trial: confirmed, or on the way back.

`make test` takes a sample, rolled by a seed; `make faults-long` all, at the first time the
statement runs and at a later one.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from network_cases import SEED
from scenes import OnTrial, mirrored, plain, renewed, resumed
from servers import signing_key
from statements import instrument
from station import LEISURE, LIB, Station

LONG = os.environ.get("FAULTS") == "long"
ROLLED = int(os.environ.get("SEED") or SEED)
PIECE, PIECES = (int(n) for n in (os.environ.get("PIECE") or "1/1").split("/"))
SAMPLE = 80
SAMPLE_OF_LOOP = 6
SAMPLE_OF_TRIAL = 18
SAMPLE_ON_THE_WAY = 14
SIZE = 70_000  # one checkpoint
NO_MEMORY = "None"  # whatever the statement allocates first can't be had
KINDS = (
    "OSError(5)",
    "MemoryError('stumbled')",
    "RuntimeError('stumbled')",
    "ValueError()",
    NO_MEMORY,
)
# The first statement of this is a `try`, around all others: what stands before it is the caller's.
OUTERMOST = "agent.py update_now"
# To the journal a ValueError is content that is no JSON: it knows nothing any more, no security
# floor either. What a damaged journal comes to is told in other tests.
FORGETS = ("journal.py _load", "ValueError()")
# What writes a failure down can't write its own.
NOTING = (OUTERMOST, "agent.py _once", "journal.py log", "journal.py add_to_log")
# The agent's loop, around its polls; and where a mark of being busy could be left behind.
LOOP = (
    "agent.py _begin",
    "startup.py begin",
    "startup.py first_delay_ms",
    "agent.py _turn",
    "agent.py _delay_ms",
    "agent.py _supervise",
)
ALWAYS = (OUTERMOST, "request.py _request")
CLEAR = (
    "import twinslot.stumble as s; s.counts[:] = [0] * len(s.counts); s.target = None; "
    "s.met = False; s.counting = True"
)

Point = tuple[int, int, str]  # statement, which time, exception


class Stumbler:
    """A station with the instrumented package."""

    def __init__(self, folder: Path):
        self.places = instrument(LIB, folder / "package")
        self.station = Station(folder / "s", size=SIZE, tree=folder / "package", heap="3M")
        self.station.__enter__()
        self.station.ask("evaluate", code=LEISURE)
        self.scene: Callable[[Station], None] = plain

    def place(self, number: int) -> str:
        """The statement's module and function."""
        module, function = self.places[number].replace(":", " ").split()[::2]
        return f"{module} {function}"

    def is_first_of(self, number: int, place: str) -> bool:
        """Whether it is the first statement of that function."""
        mine = [n for n in self.places if self.place(n) == place]
        return number == min(mine, key=lambda n: int(self.places[n].split(":")[1].split()[0]))

    def counts(self, **how: bool) -> dict[int, int]:
        """How often each statement runs in an update of this scene."""
        self.scene(self.station)
        self.station.ask("evaluate", code=CLEAR)
        assert self.station.update(**how)["code"] == "installed"
        code = "import twinslot.stumble as s; result = s.ran()"
        return dict(self.station.ask("evaluate", code=code))

    def _update(self, point: Point, **how: bool) -> tuple[dict, bool]:
        """What became of an update that fails there once, and whether it came there."""
        number, time, kind = point
        self.scene(self.station)
        self.station.ask("evaluate", code=f"{CLEAR}; s.target = ({number}, {time}, {kind})")
        said = self.station.update(**how)
        self.station.check(complete=said["code"] == "installed")
        code = "import twinslot.stumble as s; result = s.met"
        return said, self.station.ask("evaluate", code=code)

    def stumble(self, point: Point) -> str:
        """Fail there once; return what became of that poll."""
        station = self.station
        said, met = self._update(point)
        if not met and said["code"] == "timeout":
            return self.stumble(point)  # this machine is busy
        if not met:  # how often some run depends on how the bytes come
            assert said["code"] == "installed", (said, point)
            return "not met"
        if said["code"] == "outside":  # the event loop itself had no memory: a board starts anew
            return "outside"
        place = self.place(point[0])
        if said["code"] == "LEAKED":
            assert self.is_first_of(point[0], OUTERMOST), said["message"]
        if said["code"] == "internal" and place not in NOTING:
            log = station.ask("log")
            assert log and log[-1][2] == "failed", log
        if said["code"] != "installed":
            last = said
            for _ in range(2):  # one more where the first only put things in order
                last = station.update()
                station.check(complete=last["code"] == "installed")
                if last["code"] == "installed":
                    break
            assert last["code"] == "installed", f"then {last['code']}: {last.get('message')}"
        return said["code"]

    def stumble_in_the_loop(self, point: Point) -> str:
        """Fail there once; the agent's own loop must go on and install all the same."""
        said, met = self._update(point, run=True)
        if met and said["code"] == "outside":  # as above
            return "outside"
        assert said["code"] == "installed", said
        return "installed" if met else "not met"


@pytest.fixture(scope="module")
def stumblers(tmp_path_factory):
    signing_key()
    folder = tmp_path_factory.mktemp("statements")
    made = [Stumbler(folder / str(i)) for i in range(2)]
    yield made
    for one in made:
        one.station.__exit__()


def points(counts: dict[int, int]) -> list[Point]:
    """All that is to be tried."""
    dice = random.Random(ROLLED)
    found = []
    for number, n in sorted(counts.items()):
        found.append((number, 1, dice.choice(KINDS)))
        if LONG:
            found.append((number, 1, NO_MEMORY))
        if n > 1:
            found.append((number, dice.randrange(2, min(n, 200) + 1), dice.choice(KINDS)))
    return found


def some(every: list[Point], n: int) -> list[Point]:
    """All points, or this piece of them; ``n`` of them in the short form."""
    if LONG:
        return every[PIECE - 1 :: PIECES]
    return random.Random(ROLLED).sample(every, n)


def prove(stumblers: list[Stumbler], chosen: list[Point], attempt: Callable) -> Counter[str]:
    """Try all points; how the polls ended."""

    def one_after_the_other(share) -> list[tuple[str, str]]:
        one, mine = share
        ends = []
        for point in mine:
            where = f"{one.places[point[0]]} time {point[1]} {point[2]}"
            try:
                ends.append((where, attempt(one, point)))
            except AssertionError as exc:
                ends.append((where, f"BROKEN {exc}"))
            except OSError as exc:  # the board says nothing any more
                return [*ends, (where, f"BROKEN and dead: {exc}")]
        return ends

    shares = [(s, chosen[i :: len(stumblers)]) for i, s in enumerate(stumblers)]
    with ThreadPoolExecutor(len(shares)) as pool:
        ends = [end for share in pool.map(one_after_the_other, shares) for end in share]
    broken = [f"  {where}: {end[:300]}" for where, end in ends if end.startswith("BROKEN")]
    met = Counter(end for _, end in ends if not end.startswith("BROKEN"))
    statements = len({point[0] for point in chosen})
    print(f"{len(ends)} exceptions at {statements} statements, seed {ROLLED}: {dict(met)}")
    assert not broken, f"{len(broken)} of {len(ends)}, seed {ROLLED}:\n" + "\n".join(broken)
    return met


def test_F34_F35_exception_at_any_statement_of_an_update(stumblers, record_property):
    counts = stumblers[0].counts()
    assert len(counts) > 500, "the copy does not count"
    every = points(counts)
    always = [p for p in every if p[1] == 1 and stumblers[0].place(p[0]) in ALWAYS]
    chosen = ([] if LONG else always) + some(every, SAMPLE)
    met = prove(stumblers, chosen, Stumbler.stumble)
    record_property("ended", dict(met))
    assert met["internal"] > len(chosen) / 4 and met["not met"] < len(chosen) / 10


# ---- a trial


def stumble_on_trial(trial: OnTrial, point: Point | None) -> str:
    """Fail there once; then start anew until the trial is over. How it ended."""
    trial.begin()
    target = "None" if point is None else f"({point[0]}, {point[1]}, {point[2]})"
    trial.station.ask("evaluate", code=f"{CLEAR}; s.target = {target}")
    ended = trial.end_it()
    met = trial.station.ask("evaluate", code="import twinslot.stumble as s; result = s.met")
    return ended if met or point is None else "not met"


@pytest.mark.parametrize("well", [True, False], ids=["confirmed", "rolled-back"])
def test_F34_exception_at_any_statement_of_a_trial(stumblers, well, record_property):
    """The guard's and the agent's, from the start to the confirmation or the way back."""
    first = OnTrial(stumblers[0].station, well)
    assert stumble_on_trial(first, None) == ("confirmed" if well else "back")
    code = "import twinslot.stumble as s; result = s.ran()"
    counts = dict(stumblers[0].station.ask("evaluate", code=code))
    mine = ("health.py", "guard.py", "slot.py", "otadata.py", "journal.py")
    every = [p for p in points(counts) if stumblers[0].place(p[0]).split()[0] in mine]
    proof = [p for p in points(counts) if stumblers[0].place(p[0]) == "startup.py prove"]
    assert proof
    every += proof
    every = [p for p in every if (stumblers[0].place(p[0]), p[2]) != FORGETS]
    assert len(every) > 60, "the copy does not count"
    chosen = some(every, SAMPLE_OF_TRIAL)
    boards = {id(one): OnTrial(one.station, well) for one in stumblers}
    met = prove(stumblers, chosen, lambda one, point: stumble_on_trial(boards[id(one)], point))
    record_property("ended", dict(met))
    assert met["not met"] < len(chosen) / 10


@pytest.mark.parametrize("scene", [resumed, mirrored, renewed])
def test_F34_exception_at_any_statement_on_the_way_on(stumblers, scene, record_property):
    """Of those that run then and not in a plain update; `make faults-long`: all that run."""
    usual = stumblers[0].counts()
    try:
        for one in stumblers:
            one.scene = scene
        stumblers[0].counts()  # what runs once in a start is over then: an error's class is made
        counts = stumblers[0].counts()
        chosen = [p for p in points(counts) if LONG or p[0] not in usual]
        assert len(chosen) > 8, "the copy does not count"
        chosen = some(chosen, SAMPLE_ON_THE_WAY)
        met = prove(stumblers, chosen, Stumbler.stumble)
    finally:
        for one in stumblers:
            one.scene = plain
    record_property("ended", dict(met))
    # Which of them run hangs a little on how the bytes come.
    assert met["not met"] < len(chosen) / 3


def test_F34_exception_in_the_agents_own_loop_does_not_end_it(stumblers, record_property):
    one = stumblers[0]
    every = [p for p in points(one.counts(run=True)) if one.place(p[0]) in LOOP]
    assert len(every) > 10, "the copy does not count"
    chosen = some(every, SAMPLE_OF_LOOP)
    met = prove(stumblers, chosen, Stumbler.stumble_in_the_loop)
    record_property("ended", dict(met))
    assert met["installed"] > len(chosen) / 2
