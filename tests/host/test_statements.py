"""F34, F35 of the catalogue: an exception at any statement of the update path ends cleanly.

A copy of the package is run in which each statement can be made to raise (`statements.py`). All
statements that an update passes are taken in turn: OSError, MemoryError, or an error of no kind
that anybody foresaw. What leaves the agent is an OtaError, whatever it was, and the log says so.
Afterwards the board would boot the old image or the whole new one, and the next poll brings the
update to its end, with no reboot in between.

`make test` takes a sample, rolled by a seed; `make faults-long` all, at the first time the
statement runs and at a later one.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from network_cases import SEED
from servers import signing_key
from statements import instrument
from station import LIB, Station

LONG = os.environ.get("FAULTS") == "long"
ROLLED = int(os.environ.get("SEED") or SEED)
SAMPLE = 120
SIZE = 70_000  # one checkpoint
KINDS = ("OSError(5)", "MemoryError('stumbled')", "RuntimeError('stumbled')", "ValueError()")
# Nothing stands around the statements of these: an exception there is the caller's.
OUTERMOST = ("agent.py update_now", "agent.py foreseen")
# What follows the failure, and what writes it down.
CLEANING = ("agent.py _once", "slot.py abandon", "slot.py _free", "http.py close", "link.py close")
CLEAR = "import twinslot.stumble as s; s.counts.clear(); s.target = None; s.met = False"


class Stumbler:
    """A station with the instrumented package."""

    def __init__(self, folder: Path):
        self.places = instrument(LIB, folder / "package")
        self.station = Station(folder / "s", size=SIZE, tree=folder / "package", heap="3M")
        self.station.__enter__()
        self.settings = self.station.settings("http")
        self.station.proxy.plan({})

    def counts(self) -> dict[int, int]:
        """How often each statement runs in an update."""
        self.station.fresh(self.settings)
        self.station.ask("evaluate", code=CLEAR)
        assert self.station.update()["code"] == "installed"
        code = "import twinslot.stumble as s; result = list(s.counts.items())"
        return dict(self.station.ask("evaluate", code=code))

    def stumble(self, number: int, time: int, kind: str) -> str:
        """Fail there once; return what became of that poll."""
        station = self.station
        station.fresh(self.settings)
        station.ask("evaluate", code=f"{CLEAR}; s.target = ({number}, {time}, {kind})")
        said = station.update()
        station.check(complete=said["code"] == "installed")
        met = station.ask("evaluate", code="import twinslot.stumble as s; result = s.met")
        if not met and said["code"] == "timeout":
            return self.stumble(number, time, kind)  # this machine is busy
        if not met:  # how often some run depends on how the bytes come
            assert time > 1 and said["code"] == "installed", (said, time)
            return "not met"
        module, function = self.places[number].replace(":", " ").split()[::2]
        if said["code"] == "LEAKED":
            assert f"{module} {function}" in OUTERMOST, said["message"]
        if said["code"] == "internal" and f"{module} {function}" not in CLEANING:
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


@pytest.fixture(scope="module")
def stumblers(tmp_path_factory):
    signing_key()
    folder = tmp_path_factory.mktemp("statements")
    made = [Stumbler(folder / str(i)) for i in range(2)]
    yield made
    for one in made:
        one.station.__exit__()


def points(counts: dict[int, int]) -> list[tuple[int, int, str]]:
    """(statement, which time, exception) of all that is to be tried."""
    dice = random.Random(ROLLED)
    found = []
    for number, n in sorted(counts.items()):
        found.append((number, 1, dice.choice(KINDS)))
        if n > 1:
            found.append((number, dice.randrange(2, min(n, 200) + 1), dice.choice(KINDS)))
    return found if LONG else dice.sample(found, SAMPLE)


def test_F34_F35_exception_at_any_statement_of_an_update(stumblers):
    counts = stumblers[0].counts()
    assert len(counts) > 500, "the copy does not count"
    chosen = points(counts)

    def prove(share) -> list[tuple[str, str]]:
        one, mine = share
        ends = []
        for number, time, kind in mine:
            where = f"{one.places[number]} time {time} {kind}"
            try:
                ends.append((where, one.stumble(number, time, kind)))
            except AssertionError as exc:
                ends.append((where, f"BROKEN {exc}"))
        return ends

    shares = [(s, chosen[i :: len(stumblers)]) for i, s in enumerate(stumblers)]
    with ThreadPoolExecutor(len(shares)) as pool:
        ends = [end for share in pool.map(prove, shares) for end in share]
    broken = [f"  {where}: {end[:300]}" for where, end in ends if end.startswith("BROKEN")]
    met = Counter(end for _, end in ends if not end.startswith("BROKEN"))
    print(f"{len(ends)} exceptions at {len(counts)} statements, seed {ROLLED}: {dict(met)}")
    assert not broken, f"{len(broken)} of {len(ends)}, seed {ROLLED}:\n" + "\n".join(broken)
