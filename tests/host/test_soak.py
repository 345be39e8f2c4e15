"""A short soak: one board, twenty updates in a row, faults and power cuts rolled by a seed.

`make soak N=1000 SEED=1` is the long one.
"""

from __future__ import annotations

import os
import random

import pytest

from twinslot_tools import soak

SEED = int(os.environ.get("SEED", "5"))
N = 20


def test_twenty_updates_with_faults_and_power_cuts_all_end_as_they_may(tmp_path, record_property):
    tally = soak.run(N, SEED, tmp_path / "soak")
    print(soak.report(tally))
    record_property("ended", dict(tally.outcomes + tally.faults))
    assert tally.updates == N == sum(tally.outcomes.values())
    assert tally.cuts >= 5 and len(+tally.faults) >= 4
    assert tally.outcomes["confirmed"] >= N // 2


def test_what_goes_wrong_is_told_with_what_had_happened(tmp_path, monkeypatch):
    """A board that no power-on brings to rest: nothing is published for it."""
    monkeypatch.setattr(soak.Soak, "_publish", lambda self, new, number, trouble: None)
    with pytest.raises(soak.Unexplained) as exc:
        soak.run(1, SEED, tmp_path / "soak")
    assert exc.value.tally.unexplained == 1
    assert "unexplained    1" in soak.report(exc.value.tally)


def test_wear_beyond_its_limit_ends_a_soak():
    tally = soak.Tally(updates=10, journal=[100] * 10, heap=[100] * 10)
    tally.outcomes["confirmed"] = 10
    tally.erases[13] = soak.ERASES * 10
    soak.hold(tally)
    tally.erases[13] += 1
    with pytest.raises(soak.Unexplained, match="otadata"):
        soak.hold(tally)


def test_the_same_seed_rolls_the_same_troubles():
    one, two = random.Random(SEED), random.Random(SEED)
    assert [soak.roll(one, 600) for _ in range(50)] == [soak.roll(two, 600) for _ in range(50)]


def test_all_kinds_of_trouble_are_rolled():
    dice = random.Random(SEED)
    names = {name for _ in range(300) for name in soak.roll(dice, 600).names()}
    wanted = {"power cut before", "power cut torn", "power cut after", "application crashes"}
    assert wanted | {"network cut", "network damage", "network error"} == names


def test_growth_is_seen_and_noise_is_not():
    assert soak.growth([100, 100, 100, 100, 100, 100, 100, 100, 100, 900]) > 300
    assert soak.growth([100, 101] * 50) == 0
