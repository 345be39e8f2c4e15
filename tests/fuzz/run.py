"""Fuzz every target for a time, over the cores:  python tests/fuzz/run.py [SECONDS]  (make fuzz).

Prints cases per target, and how many a minute: 10,000 are the least. An input that got through
(another exception than an OtaError, out of heap, too slow) is written to tests/fuzz/found/, to be
moved to tests/fuzz/regressions/ once it is mended, where every test run replays it. Exit code 1:
there was one, or the cases were too few.
"""

import gzip
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from joserfc import jws as jose
from joserfc.jwk import RSAKey

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIB = ROOT / "lib"
CHIP = ROOT / "tools" / "virtual_esp32" / "chip"
MICROPYTHON = Path(sys.executable).with_name("micropython")
HEAP = "320K"
HEAPS = {"nvs": "2M"}  # of the virtual chip, where C code on a board has no Python heap
MANY = 1 << 30
RATE = 10_000  # cases a minute, the least

HTTP = [
    b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "e"\r\n\r\nhello',
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n0\r\nT: 1\r\n\r\n",
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-9/10\r\n"
    b"Content-Length: 5\r\n\r\nworld",
    b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 120\r\n"
    b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b'HTTP/1.0 304 Not Modified\r\nETag: "e"\r\n\r\n',
]


def seeds() -> dict[str, list[str]]:
    """A few well-formed inputs of each kind, in hex."""
    sys.path.insert(0, str(LIB))
    from twinslot_tools.virtual_esp32 import layout
    from twinslot_tools.virtual_esp32.chip import otadata, table
    from twinslot_tools.virtual_esp32.firmware import make_firmware

    manifest = {
        "schema": 1,
        "product": "sensor-node",
        "version": "1.4.0-rc.1+x",
        "hardware": ["ESP32_GENERIC", "B"],
        "security_version": 3,
        "downgrade": False,
        "issued": "2026-11-20T09:00:00Z",
        "expires": "2027-11-20T09:00:00Z",
        "notes": "n\u00e4\n",
        "images": [
            {
                "slot": "firmware",
                "chip_id": 0,
                "size": 70001,
                "sha256": "a" * 64,
                "build": "b" * 64,
                "payloads": [
                    {"url": "blobs/aa/a.bin", "encoding": "identity", "size": 70001},
                    {
                        "url": "blobs/cc/c.gz",
                        "encoding": "gzip",
                        "window": 12,
                        "size": 400,
                        "patch": "detools",
                        "base": "c" * 64,
                    },
                ],
            }
        ],
    }
    key = RSAKey.generate_key(2048)
    jwk = {**key.as_dict(private=False), "kid": key.thumbprint()}
    ring = {"schema": 1, "product": "sensor-node", "version": 7, "expires": None, "keys": [jwk]}
    header = {"alg": "PS256", "kid": key.thumbprint(), "typ": "twinslot-release+jws"}
    small = {**manifest, "notes": ""}
    token = jose.serialize_compact(header, json.dumps(small).encode(), key, algorithms=["PS256"])
    offer = {"release": "r/1.4.0.jws", "poll": 60, "keyring": 2}
    offer["rollout"] = {"percent": 12.5, "seed": "x"}
    entries = b"".join(otadata.pack(otadata.entry(seq, state)) for seq, state in ((5, 2), (6, 0)))
    partitions = [p for p in layout.load_layout("4MiB") if p.label != "vfs"]
    image = make_firmware(None, chip="esp32", version="1.0.0", project="p", size=6_000)
    found: dict[str, list[bytes]] = {
        "http": HTTP,
        "jws": [json.dumps({"keys": [jwk]}).encode(), token.encode()],
        "keys": [json.dumps(o).encode() for o in ({"keys": [jwk]}, {"root": [jwk], "keys": []})],
        "keyring": [json.dumps(ring).encode()],
        "release": [json.dumps(m).encode() for m in (manifest, small)],
        "offer": [json.dumps(offer).encode(), b"https://a.example:8443/x?y"],
        "image": [image, image[:300]],
        "otadata": [entries, entries[:32] + b"\xff" * 32],
        "table": [table.build(partitions)],
        "journal": _journals(),
        "checkpoint": _checkpoints(),
        "nvs": [_nvs(), b""],
        **_payloads(),
    }
    for name in ("keys", "keyring", "release", "offer"):
        found[name] += [b"{}", b"[]", b"null", b"1", b'""']
    return {name: [raw.hex() for raw in group] for name, group in found.items()}


def _payloads() -> dict[str, list[bytes]]:
    """Payloads of images as large as targets.py says, for the base that it has."""
    from twinslot_tools import payloads

    base = bytes(range(256)) * 32
    image = base[:3000] + b"new" * 1000 + base[2500:5500]
    delta = payloads.patch_payload(base, base[:300] + b"new" * 300 + base[300:600])
    members = b"".join(payloads.member(part) for part in (image[:1], image[1:5000], image[5000:]))
    return {
        "gzip": [payloads.gzip_payload(image), members, gzip.compress(bytes(1 << 20), mtime=0)],
        "patch": [gzip.decompress(delta)],
        "gzpatch": [delta],
    }


def _framed(text: bytes) -> bytes:
    return struct.pack("<BI", 1, zlib.crc32(text)) + text


def _checkpoints() -> list[bytes]:
    """Those of a download amid a patch, and of a plain one that named no etag."""
    head = {"offset": 65536, "crc": 7, "header": "e9" * 32, "of": 9}
    rest = [
        {"at": 9000, "position": 60000, "etag": "e"},
        {"at": 65536, "position": 0, "etag": None},
    ]
    return [_framed(json.dumps({**head, **more}).encode()) for more in rest]


def _journals() -> list[bytes]:
    """A journal while an image is on trial, one with all else in it, and a log."""
    report = {"attempt": "a", "version": "1.0.0", "build": "c", "status": "failed", "error": None}
    bodies: list[dict[str, Any]] = [
        {"trial": {"build": "b", "version": "2.0.0", "security": 4, "back": "c", "boots": 1}},
        {
            "confirmed": "b",
            "floor": 3,
            "versions": {"b": "2.0.0"},
            "failed": [["c", "1.0.0", "crash", 3]],
            "reports": [report],
            "waiting": ["d", "a", 7],
            "tried": [7, 2, 100, 3],
        },
        {"log": [[0, "1.0.0", "failed", "crash"]]},
    ]
    texts = [json.dumps(body).encode() for body in bodies]
    return [_framed(text) for text in texts]


def _nvs() -> bytes:
    """An NVS partition with a few items, one of them rewritten."""
    import io

    from twinslot_tools.virtual_esp32.chip import nvs
    from twinslot_tools.virtual_esp32.chip.flash import Flash

    file = io.BytesIO(b"\xff" * 0x4000)
    store = nvs.open_or_erase(Flash(file, 0x4000), 0, 0x4000)
    space = store.open("twinslot")
    for n in range(3):
        store.set_blob(space, "journal", bytes([n]) * 200)
    store.set_i32(space, "floor", 3)
    return file.getvalue()


def run(target: str, path: Path, seed: int, count: int, seconds: int) -> dict[str, Any]:
    """Fuzz one target in one process.

    Returns:
        dict with ``cases``, ``outcomes``, ``slowest_us``, and ``crash`` and ``error`` if an input
        got through.
    """
    command = [
        MICROPYTHON,
        "-X",
        f"heapsize={HEAPS.get(target, HEAP)}",
        HERE / "targets.py",
        LIB,
        CHIP,
        path,
    ]
    command += [target, str(seed), str(count), str(seconds)]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"target": target, "cases": 0, "outcomes": {}, "slowest_us": 0, "crash": ""}
        found["error"] = f"the process ended with {done.returncode}: {done.stderr[-300:]}"
    found["trace"] = done.stdout + done.stderr if "crash" in found else ""
    return found


def write_seeds(folder: Path) -> Path:
    path = folder / "seeds.json"
    path.write_text(json.dumps(seeds()))
    return path


def keep(found: dict[str, Any]) -> Path:
    """Write an input that got through to a file of its own."""
    raw = bytes.fromhex(found["crash"])
    folder = HERE / "found"
    folder.mkdir(exist_ok=True)
    path = folder / f"{found['target']}-{hashlib.sha256(raw).hexdigest()[:12]}.bin"
    path.write_bytes(raw)
    return path


def main(arguments: list[str]) -> int:
    seconds = int(arguments[0]) if arguments else 60
    base = random.SystemRandom().randrange(1 << 30)
    workers = max(1, min(os.cpu_count() or 1, 8))
    bad = total = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = write_seeds(Path(folder))
        names = list(seeds())
        share = max(1, round(seconds * workers / len(names)))
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(run, n, path, base + i, MANY, share) for i, n in enumerate(names)]
            for job in jobs:
                found = job.result()
                total += found["cases"]
                top = sorted(found["outcomes"].items(), key=lambda item: -item[1])[:5]
                told = "  ".join(f"{code} {count}" for code, count in top)
                slowest = found["slowest_us"] / 1000
                print(f"{found['target']:<9}{found['cases']:>8} cases {slowest:7.1f} ms  {told}")
                if "crash" in found:
                    bad += 1
                    print(f"fuzz: {found['target']}: {found['error']}", file=sys.stderr)
                    print(f"fuzz: kept as {keep(found)}", file=sys.stderr)
                    print(found["trace"][-1500:], file=sys.stderr)
    took = time.monotonic() - start
    rate = total / took * 60
    print(
        f"{total} cases in {took:.0f} s, {rate:.0f} per minute, target {RATE}; {bad} got through."
    )
    return bool(bad) or rate < RATE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
