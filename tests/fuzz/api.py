"""Fuzz the server's API by its own OpenAPI document:  python tests/fuzz/api.py [SECONDS]

    make fuzz-api SECONDS=60

Schemathesis sends a real server, over TLS, what the document allows and what it doesn't: as an
operator, as a board, and as nobody. No answer may be a 5xx, or another status, content type or
shape than the document says, and none may come without the token it says is needed.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "host"))

import servers  # noqa: E402

PROGRAM = Path(sys.executable).with_name("schemathesis")
# Not asked of it: that whatever has the right shape is taken (no cron expression of random
# letters is), and that of two paths like firmware/upload and firmware/{id} one has no methods.
EXCLUDED = "positive_data_acceptance,unsupported_method,allow_header_conformance"
BOARD = "attic"  # the example of the document
BOARDS = "check-update|report-status"


@dataclass(frozen=True)
class Run:
    """One run of schemathesis: as whom, with which operations, and what of it is done quickly."""

    role: str | None
    operations: tuple[str, ...]
    quick: tuple[str, ...] = ("--phases", "coverage")


RUNS = (
    Run("device", ("--include-path-regex", BOARDS)),
    Run("operator", ("--exclude-path-regex", BOARDS)),  # who removes what the first needs
    Run(None, (), ("--phases", "fuzzing", "--max-examples", "2")),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a run; ``output`` is schemathesis's own report."""

    name: str
    passed: bool
    cases: int
    output: str


def run(folder: Path, seed: int, seconds: int | None = None) -> list[Outcome]:
    """Start a server in ``folder`` and make all runs against it, each as long as that, or quick.

    A quick one is the same for the same seed.
    """
    site = folder / "site"
    site.mkdir()
    servers.publish_version(site, "1.1.0")
    keys = str(servers.public_keys(folder))
    with servers.serving(site, "--keys", keys) as server:
        _furnish(server)
        return [_one(server, folder, each, seed, seconds) for each in RUNS]


def _furnish(server: servers.Running) -> None:
    board = {"device_id": BOARD, "product": servers.PRODUCT, "hardware": servers.HARDWARE}
    with server.client(server.token("device")) as client:
        for path, body in (
            ("check-update", {**board, "current_version": "1.0.0", "labels": ["a=b"]}),
            ("report-status", {"device_id": BOARD, "attempt": "1", "status": "staging"}),
        ):
            assert client.post(f"/api/v1/{path}", json=body).status_code == 200
    with server.client(server.token("operator")) as client:
        for path, body in (
            ("rollouts", {"firmware_id": 1}),
            ("ota/updates", {"firmware_id": 1}),
            ("windows", {"start": "00:00", "end": "00:00"}),
            ("schedules", {"name": "x", "cron": "0 0 1 1 *", "action": {"do": "gc"}}),
            ("webhooks", {"url": "https://localhost/"}),
        ):
            assert client.post(f"/api/v1/{path}", json=body).status_code == 201, path


def _one(
    server: servers.Running, folder: Path, each: Run, seed: int, seconds: int | None
) -> Outcome:
    command = [PROGRAM, "run", f"{server.url}/api/v1/openapi.json"]
    command += ["--tls-verify", server.data / "server.crt", "--exclude-checks", EXCLUDED]
    command += ["--seed", str(seed), "--continue-on-failure", *each.operations]
    command += each.quick if seconds is None else ["--max-time", str(seconds)]
    if each.role:
        command += ["-H", f"Authorization: Bearer {server.token(each.role)}"]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
    )
    output = done.stdout + done.stderr
    found = re.search(r"(\d+) generated", output)
    return Outcome(
        each.role or "nobody", done.returncode == 0, int(found[1]) if found else 0, output
    )


def main(arguments: list[str]) -> int:
    share = max(1, (int(arguments[0]) if arguments else 60) // len(RUNS))
    seed = random.SystemRandom().randrange(1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), seed, share)
    for one in found:
        print(f"{one.name:<9}{one.cases:>7} cases  {'held' if one.passed else 'FAILED'}")
        if not one.passed:
            print(one.output, file=sys.stderr)
    bad = sum(not one.passed for one in found)
    print(
        f"{sum(one.cases for one in found)} cases, seed {seed}; {bad} of {len(found)} runs failed."
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
