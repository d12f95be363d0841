"""When cell operations are done: busy-until of each die, and the busy times of each channel.

Rules. A die serves one command at a time, in the order of arrival, and is busy until its last data
has left it (no cache reads). Planes of one die whose pages have the same page offset and follow
each other in that order share one command. The channel carries one thing at a time: command cycles
or one page's data. A read is [command cycles on the channel][tR on the die][data on the channel],
a program [command cycles and data on the channel][tPROG], an erase [command cycles][tBERS]. One
4 KiB read of an idle drive takes tCMD + tR + bytes / channel rate, to the nanosecond.

How. A call is one batch. Pages are sorted by die, stably; then each channel runs alone: again and
again, of what its dies could put on the channel next, whatever can start first goes (at a tie
command cycles before data, then the lower die), so commands slip in between transfers and no die
waits behind another one's queue. A channel remembers the gaps in its busy time, the newest
`GAPS_MAX` of them, so that a later batch may use what an earlier one left idle. All in integers:
the same calls give the same times.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.config import CellTiming, Geometry

I64 = npt.NDArray[np.int64]

GAPS_MAX = 64

# Columns of a die's row while its channel runs.
FIRST, LAST, NEXT = 0, 1, 2  # pages of the command: order[FIRST:LAST]; the next to move out
PHASE, READY, LENGTH, START = 3, 4, 5, 6  # what it wants from the channel, and when it can have it
COLUMNS = 7
COMMAND, DATA, DONE = 0, 1, 2  # phases


@njit(nogil=True, cache=True)
def _sort_by_die(ppns: Any, channels: Any, planes: Any, dies: Any) -> Any:
    """Page indices grouped by die (numbered channel by channel), each die in order of arrival.

    Returns the order [n] and where each die's part of it starts [channels * dies + 1].
    """
    count = ppns.shape[0]
    die_of = np.empty(count, np.int32)
    starts = np.zeros(channels * dies + 1, np.int64)
    for index in range(count):
        row = ppns[index] // channels
        die = (ppns[index] - row * channels) * dies + (row // planes) % dies
        die_of[index] = die
        starts[die + 1] += 1
    for die in range(channels * dies):
        starts[die + 1] += starts[die]
    order = np.empty(count, np.int64)
    fill = starts[:-1].copy()
    for index in range(count):
        order[fill[die_of[index]]] = index
        fill[die_of[index]] += 1
    return order, starts


@njit(nogil=True, cache=True)
def _group_end(ppns: Any, order: Any, first: Any, end: Any, shape: Any) -> Any:
    """One past the pages, from `first` on, that share a multi-plane command."""
    channels, planes, dies, pages = shape
    row = ppns[order[first]] // channels
    page = row // (planes * dies) % pages
    used = np.int64(1) << (row % planes)
    last = first + 1
    while last < end:
        row = ppns[order[last]] // channels
        plane = np.int64(1) << (row % planes)
        if row // (planes * dies) % pages != page or used & plane:
            break
        used |= plane
        last += 1
    return last


@njit(nogil=True, cache=True)
def _fit(gaps: Any, count: Any, tail: Any, ready: Any, length: Any) -> Any:
    """The earliest start at or after `ready` of `length` ns of channel; and its gap, -1: behind."""
    if count == 0 or gaps[count - 1, 1] < ready + length:
        return max(tail, ready), -1
    for index in range(count):
        start = max(gaps[index, 0], ready)
        if start + length <= gaps[index, 1]:
            return start, index
    return max(tail, ready), -1


@njit(nogil=True, cache=True)
def _add_gap(gaps: Any, count: Any, at: Any, start: Any, end: Any) -> Any:
    """Inserts a gap at index `at`; forgets the oldest when there are too many. The new count."""
    if end <= start:
        return count
    if count == GAPS_MAX:
        if at == 0:
            return count
        gaps[: at - 1] = gaps[1:at].copy()
        at, count = at - 1, count - 1
    for index in range(count, at, -1):
        gaps[index] = gaps[index - 1]
    gaps[at, 0], gaps[at, 1] = start, end
    return count + 1


@njit(nogil=True, cache=True)
def _occupy(gaps: Any, count: Any, tail: Any, ready: Any, length: Any) -> Any:
    """Takes the channel where `_fit` says; the start, the new count of gaps and the new tail."""
    start, gap = _fit(gaps, count, tail, ready, length)
    end = start + length
    if gap < 0:
        return start, _add_gap(gaps, count, count, tail, start), end
    gap_start, gap_end = gaps[gap, 0], gaps[gap, 1]
    for index in range(gap, count - 1):
        gaps[index] = gaps[index + 1]
    count = _add_gap(gaps, count - 1, gap, end, gap_end)
    return start, _add_gap(gaps, count, gap, gap_start, start), tail


@njit(nogil=True, cache=True)
def _forget_gaps(gaps: Any, count: Any, before: Any) -> Any:
    """Drops the gaps that end by `before`: nothing that arrives then can use them."""
    kept = 0
    for index in range(count):
        if gaps[index, 1] > before:
            gaps[kept] = gaps[index]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _next_command(
    lane: Any, ppns: Any, order: Any, end: Any, moves: Any, shape: Any, op: Any
) -> None:
    """Puts the die's next command up, or DONE; its pages end at `end` in the order."""
    command_ns, _, data_in, _ = op
    lane[FIRST] = lane[LAST]
    if lane[FIRST] == end:
        lane[PHASE] = DONE
        return
    lane[LAST] = _group_end(ppns, order, lane[FIRST], end, shape)
    lane[NEXT] = lane[FIRST]
    lane[PHASE] = COMMAND
    lane[LENGTH] = command_ns * (lane[LAST] - lane[FIRST])
    if data_in:
        for index in range(lane[FIRST], lane[LAST]):
            lane[LENGTH] += moves[order[index]]


@njit(nogil=True, cache=True)
def _choose(lanes: Any) -> Any:
    """The die that can start first; then commands, then who waits longest. -1: all done."""
    best = -1
    for die in range(lanes.shape[0]):
        if lanes[die, PHASE] == DONE:
            continue
        if best < 0 or _goes_before(lanes[die], lanes[best]):
            best = die
    return best


@njit(nogil=True, cache=True)
def _goes_before(one: Any, other: Any) -> Any:
    if one[START] != other[START]:
        return one[START] < other[START]
    if one[PHASE] != other[PHASE]:
        return one[PHASE] < other[PHASE]
    return one[READY] < other[READY]


@njit(nogil=True, cache=True)
def _finish_phase(lane: Any, order: Any, end: Any, moves: Any, done: Any, op: Any) -> Any:
    """What follows the channel time that ended at `end`. True when the command is complete."""
    _, array_ns, _, data_out = op
    if lane[PHASE] == DATA:
        done[order[lane[NEXT]]] = end
        lane[NEXT] += 1
        lane[READY] = end
    else:
        lane[READY] = end + array_ns
        if not data_out:
            for index in range(lane[FIRST], lane[LAST]):
                done[order[index]] = end + array_ns
            return True
    if lane[NEXT] == lane[LAST]:
        return True
    lane[PHASE] = DATA
    lane[LENGTH] = moves[order[lane[NEXT]]]
    return False


@njit(nogil=True, cache=True)
def _run_channel(
    ppns: Any, moves: Any, done: Any, order: Any, ends: Any, lanes: Any, shape: Any, op: Any,
    gaps: Any, count: Any, tail: Any,
) -> Any:  # fmt: skip
    """Serves all pages of one channel; the new count of gaps and the new tail."""
    for die in range(lanes.shape[0]):
        lane = lanes[die]
        _next_command(lane, ppns, order, ends[die], moves, shape, op)
        lane[START], _ = _fit(gaps, count, tail, lane[READY], lane[LENGTH])
    best = _choose(lanes)
    while best >= 0:
        lane = lanes[best]
        start, count, tail = _occupy(gaps, count, tail, lane[READY], lane[LENGTH])
        end = start + lane[LENGTH]
        if _finish_phase(lane, order, end, moves, done, op):
            _next_command(lane, ppns, order, ends[best], moves, shape, op)
        for die in range(lanes.shape[0]):
            row = lanes[die]
            if row[PHASE] != DONE and (die == best or row[START] < end):
                row[START], _ = _fit(gaps, count, tail, row[READY], row[LENGTH])
        best = _choose(lanes)
    return count, tail


@njit(nogil=True, cache=True)
def _schedule(
    arrival: Any, ppns: Any, moves: Any, shape: Any, op: Any,
    die_free: Any, gaps: Any, counts: Any, tails: Any,
) -> Any:  # fmt: skip
    """Done times [n] of one batch; updates the busy times."""
    channels, planes, dies, _ = shape
    order, starts = _sort_by_die(ppns, channels, planes, dies)
    done = np.empty(ppns.shape[0], np.int64)
    lanes = np.zeros((dies, COLUMNS), np.int64)
    for channel in range(channels):
        base = channel * dies
        ends = starts[base + 1 : base + dies + 1]
        if starts[base] == ends[dies - 1]:
            continue
        for die in range(dies):
            lanes[die, LAST] = starts[base + die]
            lanes[die, READY] = max(arrival, die_free[base + die])
        count = _forget_gaps(gaps[channel], counts[channel], arrival)
        counts[channel], tails[channel] = _run_channel(
            ppns, moves, done, order, ends, lanes, shape, op,
            gaps[channel], count, tails[channel],
        )  # fmt: skip
        for die in range(dies):
            if starts[base + die] != ends[die]:
                die_free[base + die] = lanes[die, READY]
    return done


class Timeline:
    """Busy times of one drive's dies and channels; at first all idle."""

    def __init__(self, geometry: Geometry, timing: CellTiming) -> None:
        self._timing = timing
        self._shape = (
            geometry.channels,
            geometry.planes_per_die,
            geometry.dies_per_channel,
            geometry.pages_per_block,
        )
        self._pages = geometry.pages
        self._die_free: I64 = np.zeros(geometry.dies, np.int64)
        self._gaps: I64 = np.zeros((geometry.channels, GAPS_MAX, 2), np.int64)
        self._counts: I64 = np.zeros(geometry.channels, np.int64)
        self._tails: I64 = np.zeros(geometry.channels, np.int64)

    def read_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64:
        """When each page's bytes have left the die [n]; transfer_bytes [n]: those that move."""
        op = (self._timing.command_ns, self._timing.read_ns, False, True)
        return self._run(arrival_ns, ppns, self._moves_ns(transfer_bytes), op)

    def program_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64:
        """When each page is programmed [n]."""
        op = (self._timing.command_ns, self._timing.program_ns, True, False)
        return self._run(arrival_ns, ppns, self._moves_ns(transfer_bytes), op)

    def erase_blocks(self, arrival_ns: int, ppns: I64) -> I64:
        """When the block of each page is erased [n]; name each block once."""
        op = (self._timing.command_ns, self._timing.erase_ns, False, False)
        return self._run(arrival_ns, ppns, np.zeros_like(ppns), op)

    def idle_ns(self) -> int:
        """When all that was asked for so far is done."""
        return int(self._die_free.max())

    def _moves_ns(self, transfer_bytes: I64) -> I64:
        """Channel time of each transfer, rounded up."""
        bits_per_us = self._timing.channel_mega_transfers_per_s * self._timing.channel_width_bits
        return -(-transfer_bytes * 8_000 // bits_per_us)

    def _run(self, arrival_ns: int, ppns: I64, moves: I64, op: tuple[int, int, bool, bool]) -> I64:
        assert ppns.shape == moves.shape
        if not ppns.size:
            return np.empty(0, np.int64)
        assert ppns.min() >= 0
        assert ppns.max() < self._pages
        done: I64 = _schedule(
            arrival_ns, ppns, moves, self._shape, op,
            self._die_free, self._gaps, self._counts, self._tails,
        )  # fmt: skip
        return done
