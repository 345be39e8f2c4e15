"""Simulated boards at protocol level: thousands in one process, each truthful about what it runs.

A board polls, fetches the signed release it is offered, reports its steps, "reboots" into it,
polls from it, and confirms it or falls back. What becomes of a board is decided by a hash of its
name, so that a run can be repeated. Not simulated: flash, signatures, the use of payload bytes
(``download`` fetches them and throws them away); for these there are the virtual boards of
``real_boards``.
"""

import asyncio
import base64
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .fleet_http import Pool, percentile

_RETRY_S = 2.0


@dataclass(frozen=True)
class Behaviour:
    """What may happen to a board; shares are of all boards, 0 to 1; times are seconds."""

    bad: float = 0.0  # the new build does not come up on it
    silent: float = 0.5  # of these: it comes back old and says nothing
    asleep: float = 0.0  # called once, then not seen again
    slow: float = 0.0  # takes ten times as long for a download
    cut: float = 0.0  # loses power once, somewhere in an update
    poll_s: float = 10.0
    download_s: float = 0.2
    download: bool = False


_CUTS = 6  # places where power may be lost


class _PowerCut(Exception):
    """The board starts anew; it remembers what it runs and what it has not told yet."""


@dataclass
class FakeDevice:
    """One board."""

    device_id: str
    product: str
    hardware: str
    version: str
    build: str
    behaviour: Behaviour
    pool: Pool
    token: str
    state: str = "idle"
    met: set[str] = field(default_factory=set)  # versions it has booted
    failed: set[str] = field(default_factory=set)  # builds that failed here
    running: bool = True
    untold: list[tuple[dict, str, dict | None]] = field(default_factory=list)  # reports

    def __post_init__(self) -> None:
        cut = self.chance("cut") < self.behaviour.cut
        self._steps_left = int(self.chance("cut where") * _CUTS) if cut else -1

    def chance(self, what: str) -> float:
        """A number from 0 to 1 that is always the same for this board."""
        digest = hashlib.sha256(f"{what}/{self.device_id}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)

    async def run(self) -> None:
        """Poll until told to stop."""
        await asyncio.sleep(self.chance("phase") * self.behaviour.poll_s)
        while self.running or self.untold:
            answer = await self.poll()
            await self._tell()
            if answer.get("update_available"):
                try:
                    await self.update(answer["release"])
                except _PowerCut:
                    continue
            if self.chance("asleep") < self.behaviour.asleep:
                return
            await asyncio.sleep(self.behaviour.poll_s * random.uniform(0.9, 1.1))

    async def poll(self) -> dict[str, Any]:
        body = {
            "device_id": self.device_id,
            "product": self.product,
            "channel": "stable",
            "hardware": self.hardware,
            "current_version": self.version,
            "current_build": self.build,
            "labels": [f"site=s{int(self.chance('site') * 10)}"],
            "agent": "fake",
            "micropython": "1.29.0",
        }
        answer = json.loads(await self._call("POST", "/api/v1/check-update", body))
        if answer.get("reason") == "overload":
            await asyncio.sleep(answer["poll"])
            return await self.poll()
        return answer

    async def update(self, url: str) -> None:
        """Take an offer as the agent does."""
        manifest = _manifest(await self._call("GET", url))
        image = manifest["images"][0]
        build, version = image["build"], manifest["version"]
        if build in self.failed or build == self.build:
            return
        attempt = hashlib.sha256(f"{self.device_id}{time.time_ns()}".encode()).hexdigest()[:12]
        report = {"attempt": attempt, "version": version, "build": build}
        await self.report(report, "staging")
        self._step()
        slow = 10 if self.chance("slow") < self.behaviour.slow else 1
        await asyncio.sleep(self.behaviour.download_s * slow)
        if self.behaviour.download:
            payload = url.rpartition("/r/")[0] + "/" + image["payloads"][0]["url"]
            await self._call("GET", payload)
        self._step()
        await self.report(report, "staged")
        self._step()
        await self._try(report)

    async def _try(self, report: dict[str, Any]) -> None:
        """Boot what is new, and stay or go back. A trial that loses power goes back."""
        before = self.version, self.build
        self.version, self.build, self.state = report["version"], report["build"], "trial"
        self.met.add(self.version)
        try:
            self._step()
            await self.poll()  # the trial's health check
            self._step()
            good = self.chance("bad" + self.version) >= self.behaviour.bad
        except _PowerCut:
            good = False
        if good:
            self.state = "confirmed"
            self.untold.append((report, "confirmed", None))
            self._step()
        else:
            (self.version, self.build), self.state = before, "rolledback"
            self.failed.add(report["build"])
            if self.chance("silent") >= self.behaviour.silent:
                error = {"code": "health", "message": "simulated"}
                self.untold.append((report, "rolledback", error))
        await self.poll()
        await self._tell()

    def _step(self) -> None:
        """Go one step on, unless that is where this board loses power."""
        self._steps_left -= 1
        if self._steps_left == -1:
            raise _PowerCut

    async def _tell(self) -> None:
        while self.untold:
            await self.report(*self.untold[0])
            del self.untold[0]

    async def report(self, report: dict, status: str, error: dict | None = None) -> None:
        body = {**report, "device_id": self.device_id, "status": status, "error": error}
        body["current_version"] = self.version
        await self._call("POST", "/api/v1/report-status", body)

    async def _call(self, method: str, path: str, body: Any = None) -> bytes:
        """Try until the server takes it: nothing that a board has to say is lost."""
        while True:
            try:
                status, headers, content = await self.pool.request(method, path, self.token, body)
            except OSError:
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))
                continue
            if status in (429, 503):
                wait = float(headers.get("retry-after", _RETRY_S))
                await asyncio.sleep(min(wait, _RETRY_S * 5) * random.uniform(0.5, 1.0))
                continue
            if status != 200:
                raise RuntimeError(f"{method} {path}: {status} {content[:200]!r}")
            return content


def _manifest(token: bytes) -> dict[str, Any]:
    part = token.split(b".")[1]
    return json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)))


@dataclass
class Fleet:
    """Simulated boards together.

    Args:
        pool: connections to the server.
        token: the fleet's.
        count: boards.
        version, build: what they run at first.
    """

    pool: Pool
    token: str
    product: str
    hardware: str
    count: int
    version: str
    build: str
    behaviour: Behaviour
    prefix: str = "fake"
    boards: list[FakeDevice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boards = [
            FakeDevice(
                f"{self.prefix}-{number:05}",
                self.product,
                self.hardware,
                self.version,
                self.build,
                self.behaviour,
                self.pool,
                self.token,
            )
            for number in range(self.count)
        ]

    async def until(self, done: asyncio.Event) -> None:
        """Run all boards until ``done`` is set, then let each finish what it is doing."""
        tasks = [asyncio.create_task(board.run()) for board in self.boards]
        waiting = asyncio.create_task(done.wait())
        left = {waiting, *tasks}
        while waiting in left:
            ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            broken = next((task for task in ended if task.exception()), None)
            if broken:  # a board that broke ends the run
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                broken.result()
        for board in self.boards:
            board.running = False
        await asyncio.wait_for(asyncio.gather(*tasks), 60 + 3 * self.behaviour.poll_s)

    def met(self, version: str) -> int:
        """Boards that have started a version."""
        return sum(version in board.met for board in self.boards)

    def summary(self, seconds: float) -> dict[str, Any]:
        """What the boards have been through."""
        times = self.pool.seconds
        return {
            "boards": self.count,
            "seconds": round(seconds, 1),
            "requests": len(times),
            "requests_per_s": round(len(times) / seconds, 1) if seconds else 0,
            "p50_ms": round(percentile(times, 0.5) * 1000, 1),
            "p99_ms": round(percentile(times, 0.99) * 1000, 1),
            "statuses": dict(sorted(self.pool.statuses.items())),
            "versions": dict(Counter(board.version for board in self.boards)),
            "states": dict(Counter(board.state for board in self.boards)),
            "met": dict(Counter(v for board in self.boards for v in board.met)),
        }


class Known(Protocol):
    """What is so of a board, simulated or not."""

    device_id: str
    version: str
    build: str
    state: str  # what its newest attempt came to; idle: it has made none


def differences(
    boards: Iterable[Known], devices: list[dict[str, Any]], attempts: list[dict[str, Any]]
) -> list[str]:
    """Where the server believes something else of ``boards`` than what is so."""
    rows = {row["device_id"]: row for row in devices}
    newest: dict[str, str] = {}
    for attempt in attempts:
        if attempt["attempt"] is not None or attempt["reason"] == "came_back_old":
            newest[attempt["device_id"]] = attempt["state"]
    found = []
    for board in boards:
        name, row = board.device_id, rows.get(board.device_id)
        if row is None:
            found.append(f"{name}: not known")
        elif (row["current_version"], row["current_build"]) != (board.version, board.build):
            found.append(f"{name}: runs {board.version}, not {row['current_version']}")
        elif board.state != "idle" and newest.get(name) != board.state:
            found.append(f"{name}: {board.state}, not {newest.get(name)}")
    return found
