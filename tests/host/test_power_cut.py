"""F1 to F9, F12, F18, F32 of the catalogue: the power fails at the flash operations of an update.

Every operation of a life is numbered: image, header, journal, set_boot, the bootloader's own
marking, the confirmation. The power is cut before it, in the middle of it in several ways, or
after it; the board is switched on again and held to the oracle in `powercut.py`.
"""

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from powercut import (
    STORIES,
    Broken,
    Point,
    check_end,
    live,
    make_board,
    prove,
    slot_operations,
)

SEED = 20261120
SHAPES = ("prefix", "suffix", "bits")


class Life:
    """A story, its board, and the numbers of its operations."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.story = STORIES[name]
        self.folder = folder / name
        self.base = make_board(self.folder, self.story)
        scratch = self.folder / "uncut.bin"
        shutil.copyfile(self.base, scratch)
        self.flash, self.result = live(scratch, None)
        self.ops = self.result.flash["ops"]
        self.slot = range(0)
        if not self.story.unarmed:
            self.slot = slot_operations(self.base, scratch, self.story, self.ops)
        self.dice = random.Random(f"{SEED} {name}")

    def all(self) -> list[int]:
        return list(range(1, self.ops + 1))

    def telling(self, pages: int) -> list[int]:
        """All operations but the many alike that fill the slot: of those, so many."""
        dull = self.slot[2:-2]
        chosen = self.dice.sample(dull, min(pages, len(dull)))
        return sorted(set(self.all()) - set(dull) | set(chosen))

    def torn(self, ops: list[int]) -> list[Point]:
        """Each operation torn, in one of the shapes, at a place of the dice."""
        roll = self.dice
        return [Point(op, "torn", roll.choice(SHAPES), roll.randrange(1000)) for op in ops]

    def hold(self, points: list[Point]) -> None:
        """Prove every point. Fails with a command line for each that does not hold."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            complaints = [c for c in pool.map(self._complaint, points) if c]
        assert not complaints, f"{len(complaints)} of {len(points)}:\n" + "\n".join(complaints)

    def _complaint(self, point: Point) -> str | None:
        path = self.folder / f"{abs(hash(point)):x}.bin"
        shutil.copyfile(self.base, path)
        try:
            prove(path, self.story, point)
        except Broken as broken:
            return (
                f"  .venv/bin/python tests/host/powercut.py {self.name} {point.options()}\n"
                f"    {broken}"
            )
        finally:
            path.unlink()
        return None


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Return a maker of lives, each made once."""
    folder = tmp_path_factory.mktemp("lives")
    made = {}

    def make(name):
        if name not in made:
            made[name] = Life(folder, name)
        return made[name]

    return make


UNCUT = {
    "good": (["ota_0", "ota_1"], 120),
    "good-down": (["ota_1", "ota_0"], 120),
    "crash": (["ota_0", "ota_1", "ota_0"], 120),
    "crash-down": (["ota_1", "ota_0", "ota_1"], 120),
    "unarmed": (["ota_1"], 20),
    "unarmed-crash": (["ota_1", "ota_1", "ota_0"], 20),
    "unarmed-crash-down": (["ota_0", "ota_0", "ota_1"], 20),
    "factory": (["factory", "ota_0"], 120),
    "factory-crash": (["factory", "ota_0", "factory"], 120),
    "factory-unarmed-crash": (["ota_0", "ota_0", "factory"], 20),
}


@pytest.mark.parametrize("name", STORIES)
def test_an_uncut_life_is_the_update_it_claims_to_be(life, name):
    uncut = life(name)
    boots, least = UNCUT[name]
    assert [b.partition for b in uncut.result.boots] == boots
    assert uncut.ops > least
    check_end(uncut.flash, uncut.result, uncut.story)
    if not uncut.story.unarmed:
        # The erases of 5 blocks, the last one of them short, their pages, and the header; where
        # the slot was blank, the first erase can't be seen.
        assert len(uncut.slot) == 5 * (1 + 16) + (uncut.story.runs == "ota_1")


def test_F1_power_cut_before_every_operation(life):
    good = life("good")
    good.hold([Point(op) for op in good.all()])


def test_F2_F3_F5_F6_F7_power_cut_in_the_middle_of_operations(life):
    good = life("good")
    good.hold(good.torn(good.telling(10)))


def test_power_cut_right_after_operations(life):
    # What "before" the next one leaves, but for the operations that end a boot.
    good = life("good")
    good.hold([Point(op, "after") for op in good.dice.sample(good.all(), 16)])


def test_F5_F6_F7_every_shape_of_a_tear_from_set_boot_to_the_confirmation(life):
    good = life("good")
    ops = good.dice.sample(range(good.slot[-1], good.ops + 1), 10)
    good.hold([Point(op, "torn", shape, 17 * op) for op in ops for shape in SHAPES])


def test_F4_power_cut_while_ota_0_itself_is_replaced(life):
    down = life("good-down")
    down.hold(down.torn(down.dice.sample(down.telling(8), 56)))


def test_F12_power_cut_on_the_way_into_a_crash_and_back(life):
    down = life("crash-down")
    down.hold(down.torn(down.dice.sample(down.telling(6), 44)))
    up = life("crash")
    up.hold([Point(op) for op in up.dice.sample(up.telling(4), 12)])


@pytest.mark.parametrize(
    "name", ["unarmed", "unarmed-crash", "unarmed-crash-down", "factory-unarmed-crash"]
)
def test_F8_power_cut_in_a_trial_that_the_bootloader_does_not_watch(life, name):
    unarmed = life(name)
    unarmed.hold(unarmed.torn(unarmed.dice.sample(unarmed.all(), 32)))


@pytest.mark.parametrize("name", ["factory", "factory-crash"])
def test_power_cut_in_the_first_update_of_a_board_with_a_factory_slot(life, name):
    factory = life(name)
    factory.hold(factory.torn(factory.dice.sample(factory.telling(4), 24)))


@pytest.mark.parametrize("name", ["good", "good-down", "crash-down", "factory"])
def test_F9_F18_otadata_lost_at_a_power_cut(life, name):
    lost = life(name)
    ops = lost.dice.sample(lost.telling(6), 14)
    wipes = ["both", "noise", "one"] * 5
    points = [Point(op, seed=op, wipe=wipe) for op, wipe in zip(ops, wipes, strict=False)]
    # Around the header the slot turns from unfinished to bootable.
    header = lost.slot[-1]
    points += [Point(op, wipe="both") for op in range(header - 1, header + 4)]
    lost.hold(points)


@pytest.mark.parametrize("name", ["good-down", "crash"])
def test_F32_power_cut_once_more_during_the_recovery(life, name):
    twice = life(name)
    ops = twice.dice.sample(twice.telling(4), 16)
    twice.hold(
        [Point(op, "torn", None, 31 * op, again=1 + twice.dice.randrange(60)) for op in ops]
    )
