"""Latencies as a histogram of bounded size: exact count, mean and maximum, and near percentiles.

Buckets are 1/1024 of a power of two wide, so a percentile is at most 0.1 % too high, and never too
low. Below 1024 ns each nanosecond is a bucket.
"""

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

_STEPS = 1024  # of one power of two
_SHIFT = 10
_POWERS = 64 - _SHIFT


class Latencies:
    """Durations of requests, nanoseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0
        self._buckets: I64 = np.zeros(_POWERS * _STEPS, np.int64)

    def add(self, durations_ns: I64) -> None:
        """Adds all of these [n]; none is negative."""
        if not durations_ns.size:
            return
        assert durations_ns.min() >= 0
        self.count += int(durations_ns.size)
        self.total_ns += int(durations_ns.sum())
        self.max_ns = max(self.max_ns, int(durations_ns.max()))
        np.add.at(self._buckets, _bucket_of(durations_ns), 1)

    @property
    def mean_ns(self) -> float:
        """0.0 when there is none."""
        return self.total_ns / self.count if self.count else 0.0

    def percentile_ns(self, percent: float) -> int:
        """The least duration that at least this share of requests stayed within; 0: no requests."""
        if not self.count:
            return 0
        rank = max(1, int(np.ceil(self.count * percent / 100)))
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank))
        return min(_last_of(bucket), self.max_ns)

    def merge(self, other: "Latencies") -> None:
        """Adds all of the other's."""
        self.count += other.count
        self.total_ns += other.total_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self._buckets += other._buckets


def _bucket_of(durations_ns: I64) -> I64:
    _, exponents = np.frexp(durations_ns.astype(np.float64))
    shifts = np.maximum(exponents.astype(np.int64) - _SHIFT - 1, 0)
    buckets: I64 = shifts * _STEPS + (durations_ns >> shifts)
    return buckets


def _last_of(bucket: int) -> int:
    """The longest duration that falls into a bucket."""
    shift = max(bucket // _STEPS - 1, 0)
    return ((bucket - shift * _STEPS + 1) << shift) - 1
