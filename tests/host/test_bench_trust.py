"""What a verification costs, held to bounds that a busy machine keeps too. Exact: make bench."""

from twinslot_tools import bench_trust


def test_a_verification_costs_little_more_than_its_one_power_and_fits_a_small_heap():
    found = bench_trust.measure()
    assert found["ratio"] < 1.8, found
    assert found["heap_in_place"] <= bench_trust.HEAP_TARGET, found
    assert found["heap_in_place"] < found["heap"] <= 1.4 * bench_trust.HEAP_TARGET, found
    assert found["token_bytes"] > 1500
