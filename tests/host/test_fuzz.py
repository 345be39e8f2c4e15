"""Fuzzing, a fixed number of cases of each target, the same in every run. More: make fuzz."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
COUNT = 2000

_spec = importlib.util.spec_from_file_location("fuzz_run", FUZZ / "run.py")
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_run"] = fuzz
_spec.loader.exec_module(fuzz)

TARGETS = ["http", "jws", "keys", "keyring", "release", "offer", "image", "otadata", "table"]
TARGETS += ["journal", "checkpoint", "nvs", "gzip", "patch", "gzpatch"]

REGRESSIONS = sorted((FUZZ / "regressions").glob("*.bin"))
AGAIN = 50  # times that one input is replayed: some targets draw by lot how they take it


def target_of(path):
    return path.stem.split("-")[0]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return fuzz.write_seeds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_F56_F85_F89_F92_nothing_but_an_OtaError_comes_out(target, seeds):
    found = fuzz.run(target, seeds, 1, COUNT, 120)
    assert "crash" not in found, found["error"] + "\n" + found["trace"]
    assert found["cases"] >= COUNT
    # Cases that were all refused at the door, or all let in, would have looked at nothing.
    assert found["outcomes"].get("taken", 0) >= 1


def test_a_run_that_tries_too_few_says_so_and_fails(monkeypatch, capsys):
    seeds = {"offer": fuzz.seeds()["offer"]}
    monkeypatch.setattr(fuzz, "seeds", lambda: seeds)
    monkeypatch.setattr(fuzz, "RATE", 1 << 40)
    assert fuzz.main(["1"]) == 1
    assert f"target {1 << 40}; 0 got through" in capsys.readouterr().out


def test_every_target_has_seeds():
    assert set(fuzz.seeds()) == set(TARGETS)


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_inputs_that_once_got_through_no_longer_do(path, seeds):
    found = fuzz.run(f"{target_of(path)}:{path}", seeds, 1, AGAIN, 60)
    assert "crash" not in found, (found["error"], found["trace"])


# What is planted: (module, what is there, what a slip would leave).
SLIPS = {
    "release": (
        "release.py",
        "    ok = isinstance(text, str) and len(text) == 64\n",
        "    ok = len(text) == 64\n",
    ),
    "http": (
        "digits.py",
        "    if not text or len(text) > 10:\n        return None\n",
        "    if not text:\n        return None\n    return int(text)\n",
    ),
    "keyring": (
        "keyring.py",
        "    if not isinstance(obj, dict):\n",
        "    if False:\n",
    ),
    "journal": (
        "journal.py",
        " if fits(key, found[key])}",
        "}",
    ),
    "checkpoint": (
        "journal.py",
        "            if type(number) is not int or not 0 <= number <= 0xFFFFFFFF:\n",
        "            if number is None:\n",
    ),
    "patch": (
        "patch.py",
        "        if self._next == _DIFF and self._position + n > self._base_size:\n",
        "        if False:\n",
    ),
    "gzip": (
        "inflate.py",
        "        except EOFError:\n",
        "        except KeyError:\n",
    ),
}


@pytest.fixture
def slipped(tmp_path, monkeypatch):
    """Plant the slip of a target in a copy of the library, which is fuzzed from then on."""

    def plant(target):
        lib = tmp_path / "lib"
        shutil.copytree(fuzz.LIB, lib, ignore=shutil.ignore_patterns("__pycache__"))
        name, right, wrong = SLIPS[target]
        path = lib / "twinslot" / name
        source = path.read_text()
        assert right in source
        path.write_text(source.replace(right, wrong))
        monkeypatch.setattr(fuzz, "LIB", lib)

    return plant


@pytest.mark.parametrize("target", SLIPS)
def test_a_slip_planted_in_the_code_is_found(target, seeds, slipped):
    """A fuzzer that finds nothing might be looking at nothing."""
    slipped(target)
    found = fuzz.run(target, seeds, 1, 20_000, 60)
    assert "crash" in found, found


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_an_input_that_is_kept_still_finds_its_slip(path, seeds, slipped):
    slipped(target_of(path))
    found = fuzz.run(f"{target_of(path)}:{path}", seeds, 1, AGAIN, 60)
    assert found.get("crash") == path.read_bytes().hex()


def test_every_slip_has_an_input_that_is_kept():
    assert {target_of(path) for path in REGRESSIONS} == set(SLIPS)
