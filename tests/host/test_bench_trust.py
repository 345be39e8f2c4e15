"""What a verification costs. How long it takes is measured, not tested: make bench."""

import pytest

from twinslot_tools import bench_trust

FOUND = {"pow_us": 1000, "verify_us": 1000, "heap": 1, "token_bytes": 1}


def test_a_verification_fits_a_small_heap():
    found = bench_trust.measure()
    assert found["heap_in_place"] <= bench_trust.HEAP_TARGET, found
    assert found["heap_in_place"] < found["heap"] <= 1.4 * bench_trust.HEAP_TARGET, found
    assert found["token_bytes"] > 1500


@pytest.mark.parametrize(
    ("ratio", "heap", "code"),
    [
        (bench_trust.RATIO_TARGET, bench_trust.HEAP_TARGET, 0),
        (bench_trust.RATIO_TARGET + 0.001, bench_trust.HEAP_TARGET, 1),
        (bench_trust.RATIO_TARGET, bench_trust.HEAP_TARGET + 1, 1),
    ],
)
def test_the_bench_names_its_targets_and_fails_beyond_them(monkeypatch, capsys, ratio, heap, code):
    found = {**FOUND, "ratio": ratio, "heap_in_place": heap}
    monkeypatch.setattr(bench_trust, "measure", lambda: found)
    assert bench_trust.main([]) == code
    said = capsys.readouterr().out
    for target in (bench_trust.RATIO_TARGET, bench_trust.HEAP_TARGET):
        assert f"target {target}" in said
