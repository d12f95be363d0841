"""How long commands took, by kind: counts in buckets that double, kept in plain integers."""

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

_FIRST_BITS = 10  # the first bucket ends at 2**10 ns
BUCKET_BOUNDS_NS = tuple(1 << bits for bits in range(_FIRST_BITS, 34))  # 1.024 us to 8.6 s
_BOUNDS: I64 = np.array(BUCKET_BOUNDS_NS, np.int64)


class Histogram:
    """One kind of command. `counts[i]`: those above bound i - 1 and up to bound i; last: beyond."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKET_BOUNDS_NS) + 1)
        self.sum_ns = 0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, took_ns: int) -> None:
        self.sum_ns += took_ns
        bucket = (took_ns - 1).bit_length() - _FIRST_BITS if took_ns else 0
        self.counts[min(max(bucket, 0), len(BUCKET_BOUNDS_NS))] += 1

    def add_all(self, took_ns: I64) -> None:
        """The same for each of these [n]."""
        self.sum_ns += int(took_ns.sum())
        buckets = np.bincount(np.searchsorted(_BOUNDS, took_ns), minlength=len(self.counts))
        self.counts = [old + new for old, new in zip(self.counts, buckets.tolist(), strict=True)]


class Latencies:
    """Histograms by command's name; modelled time from submission to completion."""

    def __init__(self) -> None:
        self.by_kind: dict[str, Histogram] = {}

    def of(self, kind: str) -> Histogram:
        """The histogram of this kind, made when it is not there."""
        found = self.by_kind.get(kind)
        if found is None:
            found = self.by_kind[kind] = Histogram()
        return found
