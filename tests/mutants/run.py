"""Break the trusted code, one small thing at a time, and see that a test notices.

    python tests/mutants/run.py [MODULE ...] [--one-in N] [--list] [--fresh]     (make mutants)

The modules below are the way from an offer to a boot, without what moves bytes, tells the time or
takes a cable (http, head, link, clock, push): their tests are cases against real sockets, too
slow to be run for each mutant. `making.py` breaks them; each mutant is run against the module's
quickest tests, under CPython (`hostjudge.py`) and on a virtual board (`boardjudge.py`), up to the
first test that fails. One that does not end is noticed too.

Verdicts are kept in build/mutants as they come, so a run that was interrupted goes on. One that
was noticed is not judged again while its function and the test that noticed are as they were; one
that lives, while its module and all its tests are. `--fresh` forgets all. A whole run takes half
an hour or more; `--one-in 20` judges every twentieth mutant.

Prints the score and the survivors. A survivor that changes nothing that matters is listed, with
the reason, in survivors.toml, by function, change and line. Exit code 1: one is not explained, or
the score is below 95 %.
"""

import argparse
import ast
import functools
import hashlib
import json
import sys
import time
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import boardjudge  # noqa: E402
import hostjudge  # noqa: E402
from making import ENDLESS, Kills, Mutant, mutants  # noqa: E402

TARGET = 0.95
BEFORE = 1000  # a test that has noticed a mutant before goes before all that notice its like
KEPT = ROOT / "build" / "mutants"


@dataclass(frozen=True)
class Tests:
    """Files of tests/host and of tests/device that have to notice: quick ones."""

    host: tuple[str, ...] = ()
    board: tuple[str, ...] = ()

    def paths(self) -> list[Path]:
        host = [hostjudge.HOST / name for name in self.host]
        return host + [boardjudge.DEVICE / name for name in self.board]


MODULES = {
    "strict": Tests(("test_strict.py",)),
    "jws": Tests(("test_jws.py", "test_vectors.py", "test_keyring.py")),
    "base64url": Tests(("test_jws.py", "test_vectors.py")),
    "keyset": Tests(("test_jws.py", "test_vectors.py", "test_keyring.py")),
    "keyring": Tests(("test_keyring.py",)),
    "release": Tests(("test_release.py", "test_incidents.py", "test_policy.py", "test_semver.py")),
    "semver": Tests(("test_semver.py", "test_release.py")),
    "espimage": Tests(("test_espimage.py", "test_slot_rules.py"), ("test_payload_stages.py",)),
    "walk": Tests(("test_espimage.py", "test_slot_rules.py"), ("test_payload_stages.py",)),
    "slot": Tests(("test_slot_rules.py",), ("test_slot.py", "test_health.py")),
    "journal": Tests((), ("test_journal.py",)),
    "payload": Tests(("test_release.py",), ("test_payload.py", "test_payload_stages.py")),
    "inflate": Tests((), ("test_payload.py", "test_payload_stages.py")),
    "patch": Tests((), ("test_payload.py", "test_payload_stages.py")),
    "native": Tests((), ("test_payload.py", "test_payload_stages.py")),
    "download": Tests((), ("test_download.py",)),
    "trust": Tests((), ("test_trust.py",)),
    "anybody": Tests((), ("test_trust.py",)),
    "lastgood": Tests((), ("test_config.py",)),
    "url": Tests(("test_incidents.py",), ("test_url.py",)),
    "certs": Tests((), ("test_certs.py",)),
    "context": Tests((), ("test_certs.py", "test_config.py")),
    "handshake": Tests((), ("test_certs.py", "test_trust.py")),
    "sources": Tests(("test_sources.py",)),
    "sources.server": Tests(("test_sources.py",)),
    "sources.static": Tests(("test_sources.py",)),
    "health": Tests((), ("test_health.py", "test_journal.py")),
    "trial": Tests((), ("test_health.py",)),
    "guard": Tests((), ("test_guard.py",)),
    "agent": Tests((), ("test_agent.py", "test_agent_run.py")),
    "plan": Tests((), ("test_agent.py", "test_agent_run.py")),
    "tries": Tests((), ("test_agent_run.py",)),
    "startup": Tests((), ("test_agent.py", "test_agent_run.py")),
    "digits": Tests((), ("test_url.py",)),
}


def made(module: str) -> list[Mutant]:
    return list(mutants(module, _source(module)))


def _source(module: str) -> str:
    path = ROOT.joinpath("lib", "twinslot", *module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def explained() -> dict[str, dict[str, str]]:
    return tomllib.loads((HERE / "survivors.toml").read_text())


# ---- verdicts


class Verdicts:
    """Verdicts on the mutants of one module: {key: test that noticed, or ""}, kept in a file."""

    def __init__(self, module: str, fresh: bool = False):
        self.all: dict[str, str] = {}
        self.before: dict[str, str] = {}  # verdicts that hold no longer, a hint
        self._tests = MODULES[module].paths()
        self._whole = _digest(_source(module), *[path.read_text() for path in self._tests])
        self._path = KEPT / f"{module}.jsonl"
        if fresh:
            self._path.unlink(missing_ok=True)

    def recall(self, judged: list[Mutant]) -> list[Mutant]:
        """Take what still holds from the file; return those that are left to judge."""
        known: dict[str, dict] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                known[entry["key"]] = entry
        left = []
        for mutant in judged:
            entry = known.get(mutant.key)
            if entry and entry["digest"] == self._digest(mutant, entry["by"]):
                self.all[mutant.key] = entry["by"]
            else:
                left.append(mutant)
                self.before[mutant.key] = entry["by"] if entry else ""
        return left

    def add(self, mutant: Mutant, by: str) -> None:
        self.all[mutant.key] = by
        entry = {"key": mutant.key, "by": by, "digest": self._digest(mutant, by)}
        KEPT.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as f:
            f.write(json.dumps(entry) + "\n")

    def _digest(self, mutant: Mutant, by: str) -> str:
        """Of what a verdict rests on."""
        if not by:
            return self._whole
        file, _, name = by.partition("::")
        name = name.split("[")[0].replace("::", ".").split(".")[-1]
        test = next((_functions(p).get(name, "") for p in self._tests if p.name == file), "")
        return _digest(mutant.body, test)


@functools.cache
def _functions(path: Path) -> dict[str, str]:
    """{name: source} of a module's functions."""
    source = path.read_text()
    lines = source.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# ---- running


def judge(module: str, judged: list[Mutant], fresh: bool = False) -> dict[str, str] | None:
    """Return {key: test that noticed, or ""}; None if the tests don't pass as they are."""
    tests = MODULES[module]
    verdicts = Verdicts(module, fresh)
    left = verdicts.recall(judged)
    kills: Kills = defaultdict(Counter)
    for mutant in judged:
        if by := verdicts.all.get(mutant.key):
            kills[mutant.function][by] += 1
            kills[""][by] += 1
    for key, by in verdicts.before.items():
        kills[key][by] += BEFORE
    for judges, names in ((hostjudge, tests.host), (boardjudge, tests.board)):  # quickest first
        if left and names:
            last = judges is boardjudge or not tests.board

            def say(mutant: Mutant, by: str, last: bool = last) -> None:
                if by or last:
                    verdicts.add(mutant, by)

            if not judges.judge(left, list(names), say, kills):
                return None
            left = [mutant for mutant in left if mutant.key not in verdicts.all]
    return verdicts.all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="a sample of them")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget all verdicts first")
    options = parser.parse_args()
    known = explained()
    start = time.monotonic()
    total = killed = endless = open_ = 0
    for module in options.modules or MODULES:
        judged = made(module)[:: options.one_in]
        if options.list:
            for mutant in judged:
                print(f"{module}:{mutant.line}: {mutant.key}")
            continue
        verdicts = judge(module, judged, options.fresh)
        if verdicts is None:
            print(f"mutants: the tests of {module} don't pass as they are", file=sys.stderr)
            return 2
        reasons = known.get(module, {})
        alive = [m for m in judged if not verdicts[m.key]]
        unexplained = [m for m in alive if m.key not in reasons]
        total += len(judged)
        killed += len(judged) - len(alive)
        endless += list(verdicts.values()).count(ENDLESS)
        open_ += len(unexplained)
        print(
            f"{module:<14} {len(judged):>4} mutants, {len(judged) - len(alive):>4} noticed,"
            f" {len(alive) - len(unexplained)} survive and are explained, {len(unexplained)} not"
        )
        for mutant in sorted(alive, key=lambda m: m.line):
            print(f"    {module}:{mutant.line}: {mutant.key}")
            print(f"        {reasons.get(mutant.key, 'NOT EXPLAINED')}")
        for key in reasons.keys() & verdicts.keys():
            if verdicts[key]:
                print(f"    explained, and {verdicts[key]} notices it: {key}")
        sys.stdout.flush()
    if options.list:
        return 0
    score = killed / total
    print(
        f"score {score:.1%}: {killed} of {total} mutants noticed, {endless} of them as they don't"
        f" end; {total - killed - open_} survivors explained, {open_} not;"
        f" {time.monotonic() - start:.0f} s"
    )
    return bool(open_) or score < TARGET


if __name__ == "__main__":
    sys.exit(main())
