"""The histogram of latencies against sorted ones."""

import numpy as np
import pytest

from csd_device.workload.latencies import Latencies


@pytest.mark.parametrize("high", [900, 70_000, 10**12])
def test_percentiles_are_never_low_and_at_most_a_thousandth_high(high: int) -> None:
    durations = np.random.default_rng(high).integers(0, high, 10_001)
    latencies = Latencies()
    latencies.add(durations[:5000])
    other = Latencies()
    other.add(durations[5000:])
    latencies.merge(other)
    assert latencies.count == durations.size
    assert latencies.mean_ns == pytest.approx(durations.mean())
    assert latencies.max_ns == durations.max() == latencies.percentile_ns(100)
    ordered = np.sort(durations)
    for percent in (0, 50, 99, 99.9):
        exact = ordered[max(0, int(np.ceil(durations.size * percent / 100)) - 1)]
        assert exact <= latencies.percentile_ns(percent) <= exact * 1.001 + 1


def test_without_any_all_is_zero() -> None:
    latencies = Latencies()
    latencies.add(np.empty(0, np.int64))
    assert (latencies.mean_ns, latencies.percentile_ns(99), latencies.max_ns) == (0.0, 0, 0)
