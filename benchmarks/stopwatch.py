"""The one place where benchmarks read a clock."""

from collections.abc import Callable
from statistics import median
from time import perf_counter


def seconds_of(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = perf_counter()
    work()
    return perf_counter() - start


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median duration of `repeats` calls, after one that does not count."""
    work()
    return median(seconds_of(work) for _ in range(repeats))


def medians_of(
    ours: Callable[[], object], reference: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median seconds of both, in turns; a first round does not count."""
    pairs = [(seconds_of(ours), seconds_of(reference)) for _ in range(1 + rounds)][1:]
    ours_s, reference_s = (median(column) for column in zip(*pairs, strict=True))
    return ours_s, reference_s
