"""The benchmarks' short form: figures that no clock decides stay within their limits."""

import json
import subprocess
import sys

from twinslot_tools import payloads, sample


def test_the_figures_of_the_short_bench_are_within_their_limits(tmp_path):
    old, new = sample.code(200_000), sample.code(200_000, changes=30)
    pair = tmp_path / "v1.24.bin", tmp_path / "v1.25.bin"
    for path, image in zip(pair, (old, new), strict=True):
        path.write_bytes(image)
    done = subprocess.run(
        [sys.executable, "-m", "twinslot_tools.bench", "--short", "--json", "--pair", *pair],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    judged = [f for f in figures if f["limit"] is not None]
    assert len(judged) >= 15
    assert all(f["ok"] for f in figures)
    of_pair = {f["name"]: f["value"] for f in figures if "v1.24.bin to v1.25.bin" in f["group"]}
    assert of_pair == {
        "gzip": len(payloads.gzip_payload(new)) / len(new),
        "delta": len(payloads.patch_payload(old, new)) / len(new),
    }
    timed = [f["name"] for f in figures if f["group"] == "time"]
    assert "making the delta, v1.24.bin to v1.25.bin" in timed
