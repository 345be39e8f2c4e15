"""``make load``: what the server carries on this machine, next to a bare FastAPI handler.

    python tools/load.py [--boards 10000] [--seconds 5] [--postgres]

Polls and reports are authenticated, reports durable before they are answered. Client and server
share the machine; the client takes about as much of it as the server, so that on two cores the
figures for several workers are the client's. The ratio to the bare handler, measured by the same
client in the same run, is what can be compared between machines.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from twinslot_tools.fleet_http import Api, Pool, percentile

_BARE = """
import sys, uvicorn
from fastapi import FastAPI, Request
app = FastAPI()
@app.post("/api/v1/check-update")
async def poll(request: Request):
    await request.json()
    return {"update_available": False, "poll": 300}
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", http="h11")
"""


@contextlib.contextmanager
def _process(command: list[str], port: int) -> Iterator[subprocess.Popen]:
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


def _body(number: int) -> dict[str, Any]:
    return {
        "device_id": f"load-{number:05}",
        "product": "sensor-node",
        "hardware": "ESP32_GENERIC",
        "current_version": "1.0.0",
        "labels": [],
    }


async def _hammer(
    url: str, seconds: float, work: Callable[[Pool, int], Awaitable[int]], connections: int = 32
) -> dict[str, Any]:
    """Run ``work`` on all connections for a while; figures of what was answered."""
    pool = Pool(url, connections)
    deadline = time.perf_counter() + seconds
    done = 0

    async def worker(number: int) -> None:
        nonlocal done
        while time.perf_counter() < deadline:
            number = await work(pool, number)
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(worker(n) for n in range(connections)))
    took = time.perf_counter() - started
    await pool.close()
    return _figures(pool, done / took)


def _figures(pool: Pool, rate: float) -> dict[str, Any]:
    return {
        "per_s": round(rate),
        "p50_ms": round(percentile(pool.seconds, 0.5) * 1000, 1),
        "p99_ms": round(percentile(pool.seconds, 0.99) * 1000, 1),
        "statuses": pool.statuses,
    }


def _poller(token: str, boards: int) -> Callable[[Pool, int], Awaitable[int]]:
    async def work(pool: Pool, number: int) -> int:
        await pool.request("POST", "/api/v1/check-update", token, _body(random.randrange(boards)))
        return number

    return work


def _reporter(token: str, boards: int) -> Callable[[Pool, int], Awaitable[int]]:
    async def work(pool: Pool, number: int) -> int:
        body = {
            "device_id": f"load-{random.randrange(boards):05}",
            "attempt": f"{random.getrandbits(48):x}",
            "status": "staging",
            "version": "1.1.0",
            "build": "1" * 64,
        }
        await pool.request("POST", "/api/v1/report-status", token, body)
        return number

    return work


async def _storm(url: str, token: str, boards: int, seconds: float) -> dict[str, Any]:
    """Every board asks once within ``seconds``, each over a connection of its own."""
    pool = Pool(url, 256, close_each=True)

    async def board(number: int) -> None:
        await asyncio.sleep(random.random() * seconds)
        await pool.request("POST", "/api/v1/check-update", token, _body(number))

    started = time.perf_counter()
    await asyncio.gather(*(board(n) for n in range(boards)))
    took = time.perf_counter() - started
    return {**_figures(pool, boards / took), "all_answered_s": round(took, 1)}


def _rss_mb(pid: int) -> float:
    """Memory of a process and its children, MiB."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line
            )
            if entry.parent.name == str(pid) or fields.get("PPid", "").strip() == str(pid):
                total += int(fields.get("VmRSS", "0").split()[0])
    return round(total / 1024, 1)


def measure(folder: Path, boards: int, seconds: float, database: str | None, workers: int) -> dict:
    """One server's figures."""
    (folder / "site").mkdir(parents=True)
    port = _port()
    command = [sys.executable, "-m", "twinslot_server", str(folder / "site"), "--http"]
    command += ["--port", str(port), "--data", str(folder / "data"), "--workers", str(workers)]
    if database:
        command += ["--database", database]
    with _process(command, port) as process:
        url = f"http://127.0.0.1:{port}"
        device, operator = (
            (folder / "data" / f"{role}-token").read_text().strip()
            for role in ("device", "operator")
        )
        lines = "\n".join(
            ["device_id,product", *(f"load-{n:05},sensor-node" for n in range(boards))]
        )
        started = time.perf_counter()
        Api(url, operator).call("POST", "devices/import", raw=lines.encode(), kind="text/csv")
        found: dict[str, Any] = {"import_s": round(time.perf_counter() - started, 1)}
        found["cold_storm"] = asyncio.run(_storm(url, device, boards, 10))
        found["polls"] = asyncio.run(_hammer(url, seconds, _poller(device, boards)))
        found["reports"] = asyncio.run(_hammer(url, seconds, _reporter(device, boards)))
        found["storm"] = asyncio.run(_storm(url, device, boards, 10))
        found["rss_mb"] = _rss_mb(process.pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument(
        "--postgres", help="URL of an empty PostgreSQL database for 1, 2, 4 workers"
    )
    options = parser.parse_args()
    port = _port()
    with _process([sys.executable, "-c", _BARE, str(port)], port):
        bare = asyncio.run(
            _hammer(f"http://127.0.0.1:{port}", options.seconds, _poller("x", options.boards))
        )
    results: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg(), "bare": bare}
    with tempfile.TemporaryDirectory() as folder:
        kinds = [("sqlite", None, 1)]
        if options.postgres:
            kinds += [(f"postgres x{n}", options.postgres, n) for n in (1, 2, 4)]
        for name, database, workers in kinds:
            found = measure(
                Path(folder) / name, options.boards, options.seconds, database, workers
            )
            for what in ("polls", "reports"):
                found[what]["ratio"] = round(found[what]["per_s"] / bare["per_s"], 2)
            results[name] = found
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
