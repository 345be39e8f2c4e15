"""Kill the server at any moment, many times, while boards report and update and releases arrive.

    python tests/host/kills.py [ROUNDS] [--seed 1] [--postgres]             (make kills)

One database and one site see all kills. After each, every report and upload that was acknowledged
is there and every release that is known is whole. At the end a rollout goes through, and the
server believes of each board what it runs. With ``--postgres`` two workers serve, and die
together.
"""

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fleet as fleets
import httpx
import servers
from fleet import Board, Remote

from twinslot_tools import postgres

BOARDS = 6
_LIVES_S = 0.8
_END_S = 60


class Stubborn(Board):
    """Says again, after the server was gone, what it could not say: the agent's journal."""

    target: str | None = None

    def fetch(self) -> str | None:
        self.target = super().fetch()
        return self.target

    def go_on(self) -> None:
        if self.version == self.target:
            self.poll()
            self.report("confirmed", self.version)
        self.update()


class Story:
    """What has been acknowledged, and the boards; the rest is the server's."""

    def __init__(self, folder: Path, seed: int, database: str | None):
        self.folder = folder
        self.site = folder / "site"
        self.site.mkdir()
        self.chance = random.Random(seed)
        self.boards = [Stubborn(None, f"b{n}") for n in range(BOARDS)]
        self.reports: dict[str, set[str]] = {}
        self.uploads: set[str] = set()
        self.whole: set[str] = set()
        self.releases = 0
        self._options = ["--keys", str(servers.public_keys(folder))]
        if database:
            self._options += ["--database", database, "--workers", "2"]

    @contextlib.contextmanager
    def serving(self) -> Iterator[Remote]:
        with servers.serving(self.site, *self._options) as server:
            remote = Remote(server)
            for board in self.boards:
                board.fleet, board.token = remote, server.token("device")
            try:
                yield remote
            finally:
                remote.client.close()

    def live(self, number: int) -> None:
        """One life of the server, with all that can go on in it."""
        with self.serving() as remote:
            self.check(remote)
            rollout = self.roll_out(remote)
            names = [f"r{number}-{n}" for n in range(2)]
            work: list[Callable[[Remote], object]] = [
                *(lambda own, name=name: self._report(own, name) for name in names),
                self.upload,
                lambda own: [board.go_on() for board in self.boards],
                lambda own: own.api("GET", f"rollouts/{rollout}"),
            ]
            with ThreadPoolExecutor(len(work)) as threads:
                doing = [threads.submit(_until_dead, remote, one) for one in work]
                time.sleep(self.chance.random() * _LIVES_S)
                remote.server.process.kill()
            for one in doing:
                one.result()

    def _report(self, remote: Remote, name: str) -> None:
        said = self.reports.setdefault(name, set())
        board = Board(remote, name)
        board.token = remote.server.token("device")
        board.attempt = f"a{len(said)}"
        board.report("staging", "1.0.0")
        said.add(board.attempt)

    def upload(self, remote: Remote) -> str:
        """Sign a release elsewhere and upload it; return its version."""
        self.releases += 1
        version = f"2.{self.releases}.0"
        made = self.folder / f"made-{version}" / "site"
        made.mkdir(parents=True)
        form = fleets.upload_files(made, servers.publish_version(made, version))
        headers = {"Authorization": f"Bearer {remote.admin}"}
        answer = remote.client.post("/api/v1/firmware/upload", headers=headers, files=form)
        assert answer.status_code == 201, answer.text
        self.uploads.add(version)
        return version

    def roll_out(self, remote: Remote) -> int:
        """Begin a rollout to all boards of a release of its own."""
        version = self.upload(remote)
        known = remote.api("GET", "firmware")["firmware"]
        row = next(row for row in known if row["version"] == version)
        remote.api("PATCH", f"firmware/{row['id']}", {"pilot_ready": True})
        for board in self.boards:
            board.poll()
        plan = {
            "firmware_id": row["id"],
            "stages": [{"count": BOARDS // 2}, {"percent": 100}],
            "policy": {"bake_s": 0, "promote": False},
            "start": True,
        }
        return remote.api("POST", "rollouts", plan)["id"]

    def check(self, remote: Remote) -> None:
        """Hold what is there against what was acknowledged."""
        for name in list(self.reports):
            said = self.reports.pop(name)
            history = remote.api("GET", f"devices/{name}").get("history", [])
            lost = said - {line["attempt"] for line in history}
            assert not lost, f"{name}: {len(lost)} of {len(said)} reports are lost"
        known = {row["version"]: row for row in remote.api("GET", "firmware")["firmware"]}
        assert self.uploads <= set(known), self.uploads - set(known)
        for row in known.values():
            decided = row["pilot_ready"] or row["stable"]
            assert not decided or row["version"] in self.uploads, row
        for version in set(known) - self.whole:
            path = known[version]["payloads"][0]
            content = remote.client.get(path).content
            assert hashlib.sha256(content).hexdigest() in path, f"{version} is not whole"
            self.whole.add(version)

    def end(self) -> None:
        """A last life, in which all goes well."""
        with self.serving() as remote:
            self.check(remote)
            rollout = self.roll_out(remote)
            deadline = time.monotonic() + _END_S
            while (found := remote.api("GET", f"rollouts/{rollout}"))["state"] != "complete":
                assert time.monotonic() < deadline, found
                for board in self.boards:
                    board.go_on()
            rows = {row["device_id"]: row for row in remote.api("GET", "devices?q=b")["devices"]}
            for board in self.boards:
                assert rows[board.device_id]["current_version"] == board.version
                assert board.attempts()[0]["state"] == "confirmed"


def _until_dead(remote: Remote, work: Callable[[Remote], object]) -> None:
    own = Remote(remote.server)
    with contextlib.suppress(httpx.TransportError), own.client:
        while True:
            work(own)


def run(folder: Path, rounds: int, seed: int, database: str | None = None) -> dict[str, int]:
    """Kill it ``rounds`` times; return what was acknowledged meanwhile.

    Raises:
        AssertionError: something that was acknowledged is lost, or something is not whole.
    """
    story = Story(folder, seed, database)
    reports = 0
    for number in range(rounds):
        story.live(number)
        reports += sum(map(len, story.reports.values()))
    story.end()
    return {"kills": rounds, "reports": reports, "uploads": len(story.uploads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres.database()) if options.postgres else None
        print(json.dumps(run(Path(folder), options.rounds, options.seed, database)))


if __name__ == "__main__":
    sys.exit(main())
