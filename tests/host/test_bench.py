"""The benchmarks' short form: figures that no clock decides stay within their limits."""

import json
import subprocess
import sys


def test_the_figures_of_the_short_bench_are_within_their_limits():
    done = subprocess.run(
        [sys.executable, "-m", "twinslot_tools.bench", "--short", "--json"],
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
