"""A short soak: one board, twenty updates in a row, faults and power cuts rolled by a seed.

`make soak N=1000 SEED=1` is the long one.
"""

from __future__ import annotations

import os
import random

from twinslot_tools import soak

SEED = int(os.environ.get("SEED", "5"))
N = 20


def test_twenty_updates_with_faults_and_power_cuts_all_end_as_they_may(tmp_path):
    tally = soak.run(N, SEED, tmp_path / "soak")
    print(soak.report(tally))
    assert tally.updates == N == sum(tally.outcomes.values())
    assert tally.cuts >= 5 and len(tally.faults) >= 4
    assert tally.outcomes["confirmed"] >= N // 2
    assert max(tally.journal) < 2048
    # What is in use at rest differs by some 2 KB, by what the last boot had to do.
    assert soak.growth(tally.heap) < 4096, tally.heap
    # Each update costs otadata a few erases; nothing is worn more than that.
    label, erases = tally.worn()
    assert erases <= 5 * N, (label, erases)


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
