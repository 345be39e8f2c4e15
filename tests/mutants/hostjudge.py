"""Judge mutants by tests of tests/host: pure code, under CPython.

The tests are collected once; each mutant then gets a process forked from that one, in which its
functions take the place of the module's own.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

from making import ENDLESS, Kills, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = ROOT / "tests" / "host"
# Slow tests, that start processes or try thousands of cases: mutants of pure code don't need them.
DESELECT = (
    "not micropython and not power_cut and not command and not openssl and not thousands"
    " and not another_library and not is_not_published and not no_sequence and not decade"
    " and not storm"
)
WALL_S = 120  # and for those who wait

Verdict = Callable[[Mutant, str], None]  # the test that noticed, "" if none did


def judge(made: list[Mutant], tests: list[str], verdict: Verdict, kills: Kills) -> bool:
    """Judge all; False if the tests don't pass as they are. Counts on in ``kills``."""
    import pytest

    _warm_up()
    plugin = _Judge(made, verdict, kills)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--assert=plain", "--no-header"]
    options += ["-p", "no:xdist", "-k", DESELECT]
    pytest.main([*options, *[str(HOST / test) for test in tests]], plugins=[plugin])
    return plugin.sound


def _warm_up() -> None:
    """Make the keys and import the heavy things before the first fork."""
    if str(HOST) not in sys.path:
        sys.path.insert(0, str(HOST))
    os.chdir(ROOT)
    import hypothesis
    import trust

    hypothesis.settings.register_profile(
        "mutants", database=None, deadline=None, max_examples=60, derandomize=True
    )
    for name in ("root", "release", "first", "second", "third", "stranger", "other"):
        trust.key(name)


class _Judge:
    """A pytest plugin: has collected, and runs the tests in a forked child for each mutant."""

    def __init__(self, made: list[Mutant], verdict: Verdict, kills: Kills):
        self.made = made
        self.verdict = verdict
        self.sound = False
        self.kills = kills

    def pytest_runtestloop(self, session):
        items = [item for item in session.items if item.get_closest_marker("skip") is None]
        took = _timed(items)
        if took is None:
            return True
        self.sound = True
        waiting = list(self.made)
        running: dict[int, tuple[Mutant, int, float]] = {}
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                mutant = waiting.pop(0)
                pid, answer = _fork(mutant, self._order(items, took, mutant), took)
                running[pid] = (mutant, answer, time.monotonic())
            for pid, (mutant, answer, since) in list(running.items()):
                done, _ = os.waitpid(pid, os.WNOHANG)
                if not done and time.monotonic() - since > WALL_S:
                    os.kill(pid, signal.SIGKILL)
                    done, _ = os.waitpid(pid, 0)
                if done:
                    del running[pid]
                    self._tell(mutant, answer)
            time.sleep(0.002)
        return True

    def _order(self, items, took, mutant):
        """Those first that have noticed this mutant before, then others of that function, then
        any, then the quickest."""

        def rank(item):
            label = _label(item.nodeid)
            before = -self.kills[mutant.key][label]
            here, anywhere = -self.kills[mutant.function][label], -self.kills[""][label]
            return before, here, anywhere, took[item.nodeid]

        return sorted(items, key=rank)

    def _tell(self, mutant, answer):
        with os.fdopen(answer) as pipe:
            said = pipe.read()
        if said == "alive":
            self.verdict(mutant, "")
            return
        by = _label(said) or ENDLESS
        self.kills[mutant.function][by] += 1
        self.kills[""][by] += 1
        self.verdict(mutant, by)


def _label(nodeid: str) -> str:
    return nodeid.replace("tests/host/", "")


def _timed(items) -> dict[str, float] | None:
    """Run the tests unchanged, in a child, quickest first and quickest last; return the seconds of
    each, None if one fails."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        took = {}
        for _ in range(3):
            for number, item in enumerate(items):
                start = time.process_time()
                if not _passes(items, number):
                    os.write(2, f"mutants: {item.nodeid} fails without a mutation\n".encode())
                    os._exit(1)
                took[item.nodeid] = time.process_time() - start
            quickest = sorted(items, key=lambda item: took[item.nodeid])
            items = quickest[::-1] if items == quickest else quickest
        with os.fdopen(there, "w") as pipe:
            json.dump(took, pipe)
        os._exit(0)
    os.close(there)
    with os.fdopen(here) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(said) if said else None


def _passes(items, number: int) -> bool:
    from _pytest.runner import runtestprotocol

    following = items[number + 1] if number + 1 < len(items) else None
    reports = runtestprotocol(items[number], log=False, nextitem=following)
    return not any(report.failed for report in reports)


def _fork(mutant: Mutant, items: list, took: dict[str, float]) -> tuple[int, int]:
    """Judge a mutant in a child; it writes the test that noticed, or "alive". It is ended, and
    writes nothing, when a test takes more than ten times its usual share of the processor."""
    here, there = os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        return pid, here
    try:
        sys.setrecursionlimit(800)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _install(mutant)
        for number, item in enumerate(items):
            limit_s = int(time.process_time() + 10 * took[item.nodeid]) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
            if not _passes(items, number):
                os.write(there, item.nodeid.encode())
                os._exit(1)
        os.write(there, b"alive")
    finally:
        os._exit(0)


def _install(mutant: Mutant) -> None:
    """Put the mutant's functions in the place of the module's own, for all who imported it."""
    module = importlib.import_module(f"twinslot.{mutant.module}")
    classes = {n: v for n, v in vars(module).items() if isinstance(v, type)}
    functions = {n: v for n, v in vars(module).items() if isinstance(v, types.FunctionType)}
    code = compile(mutant.tree(), module.__file__ or "", "exec")
    exec(code, vars(module))
    for name, old in functions.items():
        if old.__module__ == module.__name__:  # those who hold the function, too
            old.__code__ = vars(module)[name].__code__
            setattr(module, name, old)
    for name, old in classes.items():
        new = vars(module)[name]
        if new is old or old.__module__ != module.__name__ or issubclass(old, tuple):
            continue
        for attribute, value in vars(new).items():  # those who hold the class get its methods
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                setattr(old, attribute, value)
        setattr(module, name, old)
