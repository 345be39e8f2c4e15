"""``make load``: what the server carries on one core, next to a bare FastAPI handler.

    python tools/load.py [--boards 10000] [--seconds 5] [--cores 1] [--only sqlite] [--json]

The server has one core (or the first few), with its database and however many workers; the
client, a process of its own, has the last, and the table says how busy it was. Polls and reports
are authenticated, reports are durable before they are answered. In the storms every board makes
a connection of its own at its own moment, and who is told to ask again does so when told; the
first is of boards that the server has never seen, and in the second and under ``polls`` there is
nothing new. PostgreSQL is Debian's, started here.

What can be compared between machines is the ratio to the bare handler; where others share the
cores, what was answered per second of processor time that the server itself took.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinslot_tools import keys, postgres, publish
from twinslot_tools.fleet_http import percentile, run
from twinslot_tools.virtual_esp32.firmware import make_firmware

_PRODUCT, _HARDWARE = "sensor-node", "ESP32_GENERIC"
_CONNECTIONS = 32
_TICKS = os.sysconf("SC_CLK_TCK")
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_AGAIN = re.compile(rb'retry-after: (\d+)|"poll":(\d+),"reason":"overload"', re.IGNORECASE)
_BARE = """
import sys, uvicorn
from fastapi import FastAPI, Request
app = FastAPI()
@app.post("/api/v1/check-update")
async def poll(request: Request):
    await request.json()
    return {"update_available": False, "poll": 300}
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""

Ask = Callable[[], bytes | None]
"""The next request of a connection, or None at its end."""


# ---- the client


@dataclass
class Tally:
    """What was answered, and how soon."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def figures(self, took: float) -> dict[str, Any]:
        return {
            "per_s": round(len(self.seconds) / took),
            "p50_ms": round(percentile(self.seconds, 0.5) * 1000, 1),
            "p99_ms": round(percentile(self.seconds, 0.99) * 1000, 1),
            "statuses": dict(self.statuses),
        }


class Connection(asyncio.Protocol):
    """Asks, and once answered asks again; as little Python as can be for each request."""

    def __init__(self, ask: Ask, tally: Tally, started: float | None = None):
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask = ask
        self._tally = tally
        self._started = started
        self._got = b""
        self.again_s: int | None = None
        """When to ask again, where that is what the last answer said."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._next()

    def _next(self) -> None:
        message = self._ask()
        if message is None:
            self._waits = False
            self._transport.close()
            return
        self._waits = True
        self._started = self._started or time.perf_counter()
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0 or not (length := _LENGTH.search(self._got, 0, head)):
            return
        if len(self._got) < head + 4 + int(length[1]):
            return
        assert self._started is not None
        self._tally.seconds.append(time.perf_counter() - self._started)
        again = _AGAIN.search(self._got)
        self.again_s = int(again[1] or again[2]) if again else None
        status = self._got[9:12].decode()
        self._tally.statuses["later" if again and status == "200" else status] += 1
        self._got, self._started = b"", None
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waits:
            self._tally.statuses["lost"] += 1
        self.done.set_result(None)


def _request(path: str, token: str, body: str) -> bytes:
    return (
        f"POST /api/v1/{path} HTTP/1.1\r\nHost: fleet\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def _poll(token: str, number: int) -> bytes:
    body = {
        "device_id": f"load-{number:05}",
        "product": _PRODUCT,
        "hardware": _HARDWARE,
        "current_version": "1.0.0",
        "labels": ["site=a"],
        "agent": "load",
        "micropython": "1.29.0",
        "staged": "",
    }
    return _request("check-update", token, json.dumps(body))


def _report(token: str, number: int) -> bytes:
    body = (
        f'{{"device_id": "load-{number:05}", "attempt": "{random.getrandbits(48):x}",'
        f' "status": "staging", "version": "1.1.0", "build": "{"1" * 64}", "error": null}}'
    )
    return _request("report-status", token, body)


async def _hammer(port: int, seconds: float, message: Callable[[], bytes]) -> dict[str, Any]:
    """Ask on all connections for a while, each as soon as it is answered."""
    tally = Tally()
    started = time.perf_counter()
    deadline = started + seconds

    def ask() -> bytes | None:
        return message() if time.perf_counter() < deadline else None

    await asyncio.gather(*(_connect(port, ask, tally) for _ in range(_CONNECTIONS)))
    return tally.figures(time.perf_counter() - started)


async def _each_once(port: int, messages: list[bytes]) -> None:
    left = iter(messages)
    connections = (_connect(port, lambda: next(left, None), Tally()) for _ in range(_CONNECTIONS))
    await asyncio.gather(*connections)


async def _storm(port: int, seconds: float, messages: list[bytes]) -> dict[str, Any]:
    """Each message within ``seconds``, over a connection of its own, and again when told."""
    tally = Tally()
    due = sorted(random.random() * seconds for _ in messages)
    started = time.perf_counter()
    boards = []
    for when, message in zip(due, messages, strict=True):
        if (early := started + when - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        boards.append(asyncio.create_task(_boot(port, message, tally)))
    await asyncio.gather(*boards)
    took = time.perf_counter() - started
    return {**tally.figures(took), "all_known_s": round(took, 1)}


async def _boot(port: int, message: bytes, tally: Tally) -> None:
    while True:
        once = iter([message])
        again_s = await _connect(
            port, lambda once=once: next(once, None), tally, time.perf_counter()
        )
        if again_s is None:
            return
        await asyncio.sleep(again_s)


async def _connect(port: int, ask: Ask, tally: Tally, started: float | None = None) -> int | None:
    """Ask over a connection; return when to come again, where that is the last answer."""
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(
            lambda: Connection(ask, tally, started), "127.0.0.1", port
        )
    except OSError:
        tally.statuses["lost"] += 1
        return None
    await connection.done
    return connection.again_s


def _busy(process: subprocess.Popen, work: Any) -> dict[str, Any]:
    """Run ``work``; its figures, and the shares of a core that server and client took for it."""
    server, client, began = _cpu_s(process.pid), time.process_time(), time.perf_counter()
    found = run(work)
    took = time.perf_counter() - began
    spent = _cpu_s(process.pid) - server
    found["per_core_s"] = round(sum(found["statuses"].values()) / max(spent, 1 / _TICKS))
    found["server_core"] = round(spent / took, 2)
    found["client_core"] = round((time.process_time() - client) / took, 2)
    return found


# ---- the server


def _family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _cpu_s(pid: int) -> float:
    """Seconds of a core that a process and its children have taken."""
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _rss_mb(pid: int) -> float:
    """Resident memory of the largest of a process and its children, MiB."""
    sizes = []
    for one in _family(pid):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text())
        sizes.append(int(found[1]) if found else 0)
    return round(max(sizes) / 1024, 1)


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """What is started within runs on ``cores`` alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _process(command: list[str], port: int, cores: set[int]) -> Iterator[subprocess.Popen]:
    with _on(cores):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait()


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _bare(seconds: float, cores: set[int]) -> dict[str, Any]:
    port = _port()
    message = _poll("x", 0)
    with _process([sys.executable, "-c", _BARE, str(port)], port, cores) as process:
        return _busy(process, _hammer(port, seconds, lambda: message))


def _site(folder: Path) -> Path:
    """Publish the release that all boards run; return the file with its key."""
    (folder / "site").mkdir(parents=True)
    image, key = folder / "firmware.bin", folder / "release.key"
    image.write_bytes(make_firmware(None, chip="esp32", version="1.0.0", project=_PRODUCT))
    keys.generate(key)
    spec = publish.Spec(version="1.0.0", product=_PRODUCT, hardware=(_HARDWARE,))
    publish.publish(image, spec, keys.load_private(key), folder / "site")
    return keys.public_path(key)


def measure(
    folder: Path, options: argparse.Namespace, cores: set[int], database: str | None, workers: int
) -> dict[str, Any]:
    """One server's figures."""
    boards, seconds, storm_s = options.boards, options.seconds, options.storm
    keys_file = _site(folder)
    port = _port()
    command = [sys.executable, "-m", "twinslot_server", str(folder / "site"), "--http"]
    command += ["--keys", str(keys_file)]
    command += ["--port", str(port), "--data", str(folder / "data"), "--workers", str(workers)]
    if database:
        command += ["--database", database]
    with _process(command, port, cores) as process:
        token = (folder / "data" / "device-token").read_text().strip()
        polls = [_poll(token, n) for n in range(boards)]
        first = _busy(process, _storm(port, storm_s, polls))
        run(_each_once(port, polls))
        return {
            "first_storm": first,
            "polls": _busy(process, _hammer(port, seconds, lambda: random.choice(polls))),
            "reports": _busy(
                process,
                _hammer(port, seconds, lambda: _report(token, random.randrange(boards))),
            ),
            "storm": _busy(process, _storm(port, storm_s, polls)),
            "rss_mb": _rss_mb(process.pid),
        }


def _all(options: argparse.Namespace, cores: set[int]) -> dict[str, Any]:
    results: dict[str, Any] = {"bare": {"polls": _bare(options.seconds, cores)}}
    bare = results["bare"]["polls"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, workers in (("sqlite", 1), *((f"postgres x{n}", n) for n in (1, 2, 4))):
            if options.only not in name:
                continue
            database = None
            if name != "sqlite":
                with _on(cores):
                    database = stack.enter_context(postgres.database())
            where = Path(folder) / name.replace(" ", "-")
            found = measure(where, options, cores, database, workers)
            for what in ("polls", "reports"):
                found[what]["ratio"] = round(found[what]["per_core_s"] / bare["per_core_s"], 2)
            results[name] = found
            stack.close()
    return results


# ---- the table

_COLUMNS = {
    "polls": "polls",
    "reports": "reports",
    "first_storm": "storm of first polls",
    "storm": "storm of polls",
}


def _table(results: dict[str, Any]) -> str:
    """Markdown of the figures."""
    lines = [
        "| server | asked | answered/s | per s of its processor time | × bare | p50, p99 ms"
        " | told to come back | 5xx, lost | all known after s | its core, the client's | MiB |",
        "| --- " * 11 + "|",
    ]
    for name, found in results.items():
        for what, title in _COLUMNS.items():
            if what not in found:
                continue
            row = found[what]
            statuses = row["statuses"]
            later = statuses.get("later", 0)
            bad = sum(statuses.values()) - statuses.get("200", 0) - later
            cells = [name, title, row["per_s"], row["per_core_s"], row.get("ratio", "")]
            cells += [f"{row['p50_ms']}, {row['p99_ms']}", later, bad]
            cells += [row.get("all_known_s", "")]
            cells += [f"{row['server_core']:.0%}, {row['client_core']:.0%}"]
            cells += [found.get("rss_mb", "")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--storm", type=float, default=10, help="seconds in which all boards boot")
    parser.add_argument("--cores", type=int, default=1, help="of the server and its database")
    parser.add_argument("--only", default="", help="sqlite, postgres, or one of its rows")
    parser.add_argument("--json", action="store_true", help="all figures")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.sched_setaffinity(0, {cores[-1]})
    servers = set(cores[: options.cores])
    results = _all(options, servers)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    shared = ", which it shares with them" if cores[-1] in servers else ""
    print(f"server and database on core {sorted(servers)}, client on core {cores[-1]}{shared}\n")
    print(_table(results))


if __name__ == "__main__":
    main()
