"""Programs and erases that reads may overtake: spans of time promised to each die.

With read priority a program or erase does not make its die busy for reads; it stands in the die's
backlog as a span. A read goes before what has not started, waits for what is running or, where the
part can, suspends it; then everything behind moves back by as long as the read took, the suspended
operation by its resume time as well. Times that were told before stay as they are. When a backlog
is full the oldest span is made final: reads wait for it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

I64 = npt.NDArray[np.int64]

BACKLOG_MAX = 128
START, END, SUSPENDS_LEFT, SUSPEND_NS = 0, 1, 2, 3
_COLUMNS = 4


class Backlog(NamedTuple):
    """Spans of each die, ascending and disjoint; row `die` has counts[die] of them."""

    spans: I64  # [dies, BACKLOG_MAX, 4]
    counts: I64  # [dies]


def make_backlog(dies: int) -> Backlog:
    """Nothing promised."""
    return Backlog(np.zeros((dies, BACKLOG_MAX, _COLUMNS), np.int64), np.zeros(dies, np.int64))


@njit(nogil=True, cache=True)
def backlog_end(backlog: Any, die: Any) -> Any:
    """When the last of it is done; 0 when there is none."""
    count = backlog.counts[die]
    return backlog.spans[die, count - 1, END] if count else 0


@njit(nogil=True, cache=True)
def settle(backlog: Any, die: Any, before: Any, keep: Any) -> Any:
    """Drops what ends by `before`, and more until at most `keep` are left; the end of the last."""
    spans = backlog.spans[die]
    count = backlog.counts[die]
    gone = 0
    while gone < count and (spans[gone, END] <= before or count - gone > keep):
        gone += 1
    if gone == 0:
        return 0
    final = spans[gone - 1, END]
    for index in range(gone, count):
        for column in range(_COLUMNS):  # a row as a slice takes 3 s to compile
            spans[index - gone, column] = spans[index, column]
    backlog.counts[die] = count - gone
    return final


@njit(nogil=True, cache=True)
def promise(backlog: Any, die: Any, start: Any, end: Any, suspends: Any, suspend_ns: Any) -> None:
    """Adds a span behind all others; there must be room (`settle`)."""
    count = backlog.counts[die]
    span = backlog.spans[die, count]
    span[START], span[END] = start, end
    span[SUSPENDS_LEFT], span[SUSPEND_NS] = suspends, suspend_ns
    backlog.counts[die] = count + 1


@njit(nogil=True, cache=True)
def overtake(backlog: Any, die: Any, ready: Any) -> Any:
    """When a read that is ready now can start; the span behind it; whether that is suspended."""
    spans = backlog.spans[die]
    for index in range(backlog.counts[die]):
        span = spans[index]
        if span[END] <= ready:
            continue
        if span[START] >= ready:
            return ready, index, False
        if span[SUSPENDS_LEFT] > 0:
            return ready + span[SUSPEND_NS], index, True
        ready = span[END]
    return ready, backlog.counts[die], False


@njit(nogil=True, cache=True)
def put_off(
    backlog: Any, die: Any, index: Any, suspended_at: Any, until: Any, resume_ns: Any
) -> None:
    """Moves the spans from `index` on behind `until`; suspended_at < 0: none was suspended."""
    spans = backlog.spans[die]
    free = until
    if suspended_at >= 0:
        span = spans[index]
        span[END] += until + resume_ns - suspended_at
        span[START] = until
        span[SUSPENDS_LEFT] -= 1
        free = span[END]
        index += 1
    while index < backlog.counts[die] and spans[index, START] < free:
        shift = free - spans[index, START]
        spans[index, START] += shift
        spans[index, END] += shift
        free = spans[index, END]
        index += 1
