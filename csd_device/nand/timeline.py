"""When cell operations are done: each die serves one at a time, each channel moves one thing.

A read is [command on the channel][tR on the die][status and data on the channel], a program
[command and data on the channel][tPROG][status], an erase [command][tBERS][status]. tR and tPROG
depend on the page's type (`CellTiming`). Planes of one die whose pages have the same page offset
and follow each other in that order share one command; its cycles are paid for each plane.

A die is busy until the last data of a read has left it. With cache reads it is free when the page
lies in the cache register: the array works while the bus moves the page before, and a page waits in
the array only for the page before to leave that register.

Data takes what is free of the bus; commands slip in between transfers (`csd_device.bookings`).
So no die waits behind another one's queue, and a later call may use what an earlier one left idle.
With read priority reads overtake programs and erases (`csd_device.nand.backlog`).

A call is one batch. Pages are sorted by die, stably; then each channel runs alone: again and again
the die that can start first does. docs/TIMING.md has the closed forms. All in integers: the same
calls give the same times.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.bookings import BUSY, Bookings, book, forget, make_bookings, slip
from csd_device.config import CellTiming, Geometry
from csd_device.nand.backlog import (
    BACKLOG_MAX,
    END,
    Backlog,
    backlog_end,
    make_backlog,
    overtake,
    promise,
    put_off,
    settle,
)

I64 = npt.NDArray[np.int64]

READ, PROGRAM, ERASE = 0, 1, 2  # kinds of operation
DIE, CHANNEL = 0, 1  # resources of an event
FREE, DRAINED, WORKED = 0, 1, 2  # columns of a die
EVENT_COLUMNS = 5  # resource, its index (dies count over channels), kind, start ns, end ns


class Rules(NamedTuple):
    """What does not change; nanoseconds."""

    channels: int
    planes: int
    dies: int  # of one channel
    pages: int  # of one block
    command_ns: int
    status_ns: int
    cache_read: bool
    cache_busy_ns: int
    priority: bool
    suspends: int
    resume_ns: int


class Operation(NamedTuple):
    """One kind of cell operation."""

    kind: int
    array_ns: I64  # [page types]
    suspend_ns: int
    slower_ns: I64  # [dies, page types] more of a slow die, or [0, page types]: none is


class State(NamedTuple):
    """Busy times; dies are numbered channel by channel."""

    bus: Bookings
    backlog: Backlog
    dies: I64  # [dies, 3] FREE: the next command can go out; DRAINED: registers empty; WORKED: ns
    events: I64  # [limit, EVENT_COLUMNS]; limit 0: nothing is recorded
    event_count: I64  # [1] recorded, and beyond the limit lost


class Batch(NamedTuple):
    """Pages of one call."""

    arrivals: I64  # [n]
    ppns: I64  # [n]
    moves: I64  # [n] ns on the bus
    extra: I64  # [n] ns more in the array, or [0]: none
    done: I64  # [n] result


@dataclass(frozen=True, slots=True)
class BusyTimes:
    """How long each resource worked since the drive was opened, in nanoseconds."""

    channel_ns: I64  # [channels] bus
    die_ns: I64  # [dies] command to free


@njit(nogil=True, cache=True)
def _note(state: Any, resource: Any, index: Any, kind: Any, start: Any, end: Any) -> None:
    at = state.event_count[0]
    if at < state.events.shape[0]:
        event = state.events[at]
        event[0], event[1], event[2], event[3], event[4] = resource, index, kind, start, end
        state.event_count[0] = at + 1


@njit(nogil=True, cache=True)
def _find(ppn: Any, rules: Any) -> Any:
    """Die (numbered channel by channel), plane and page offset in its block of a PPN."""
    row = ppn // rules.channels
    above = row // rules.planes
    turn = above // rules.dies
    die = (ppn - row * rules.channels) * rules.dies + above - turn * rules.dies
    return die, row - above * rules.planes, turn % rules.pages


@njit(nogil=True, cache=True)
def _sort_by_die(ppns: Any, rules: Any) -> Any:
    """Pages grouped by die, each die in order of arrival.

    Returns the order [n], where each die's part of it starts [dies of all channels + 1], and of
    each page its offset in the block and its plane as a bit [n, 2].
    """
    dies = rules.channels * rules.dies
    count = ppns.shape[0]
    die_of = np.empty(count, np.int32)
    places = np.empty((count, 2), np.int64)
    starts = np.zeros(dies + 1, np.int64)
    for index in range(count):
        die, plane, page = _find(ppns[index], rules)
        die_of[index] = die
        places[index, 0], places[index, 1] = page, np.int64(1) << plane
        starts[die + 1] += 1
    for die in range(dies):
        starts[die + 1] += starts[die]
    order = np.empty(count, np.int64)
    fill = starts[:-1].copy()
    for index in range(count):
        order[fill[die_of[index]]] = index
        fill[die_of[index]] += 1
    return order, starts, places


@njit(nogil=True, cache=True)
def _group_end(batch: Any, order: Any, places: Any, first: Any, end: Any, ready: Any) -> Any:
    """One past the pages, from `first` on, of a multi-plane command that starts at `ready`."""
    page, used = places[order[first], 0], places[order[first], 1]
    last = first + 1
    while last < end and batch.arrivals[order[last]] <= ready:
        plane = places[order[last], 1]
        if places[order[last], 0] != page or used & plane:
            break
        used |= plane
        last += 1
    return last


@njit(nogil=True, cache=True)
def _array_ns(batch: Any, order: Any, page: Any, operation: Any, die: Any) -> Any:
    """What the array takes for one group: its pages are of one type; the slowest counts."""
    page_type = page % operation.array_ns.shape[0]
    array_ns = operation.array_ns[page_type]
    if operation.slower_ns.shape[0]:
        array_ns += operation.slower_ns[die, page_type]
    if batch.extra.shape[0] == 0:
        return array_ns
    extra = np.int64(0)
    for index in order:
        extra = max(extra, batch.extra[index])
    return array_ns + extra


@njit(nogil=True, cache=True)
def _move(state: Any, kind: Any, channel: Any, ready: Any, length: Any) -> Any:
    """Data or status on the bus; when it has gone through."""
    end = book(state.bus, channel, ready, length, False)
    if length:
        _note(state, CHANNEL, channel, kind, end - length, end)
    return end


@njit(nogil=True, cache=True)
def _place_read(
    state: Any, rules: Any, operation: Any, die: Any, ready: Any, batch: Any, order: Any,
    page_offset: Any,
) -> None:  # fmt: skip
    """One read command for the pages of `order`, all of one die."""
    channel = die // rules.dies
    index, suspended_at = 0, np.int64(-1)
    has_backlog = state.backlog.counts[die] > 0
    if has_backlog:
        asked = ready
        ready, index, is_suspended = overtake(state.backlog, die, ready)
        if is_suspended:
            suspended_at = asked
    cycles_ns = rules.command_ns * order.shape[0]
    start = slip(state.bus, channel, ready, cycles_ns)
    loaded = start + cycles_ns + _array_ns(batch, order, page_offset, operation, die)
    if rules.cache_read and start < state.dies[die, DRAINED]:
        loaded = max(loaded, state.dies[die, DRAINED]) + rules.cache_busy_ns
    at = loaded
    status_ns = rules.status_ns
    for page in order:
        at = _move(state, operation.kind, channel, at, status_ns + batch.moves[page])
        batch.done[page] = at
        status_ns = 0
    free = loaded if rules.cache_read else at
    state.dies[die, FREE], state.dies[die, DRAINED] = free, at
    state.dies[die, WORKED] += free - start
    _note(state, DIE, die, operation.kind, start, free)
    if has_backlog:
        put_off(state.backlog, die, index, suspended_at, at, rules.resume_ns)


@njit(nogil=True, cache=True)
def _place_change(
    state: Any, rules: Any, operation: Any, die: Any, ready: Any, batch: Any, order: Any,
    page_offset: Any,
) -> None:  # fmt: skip
    """One program or erase command for the pages of `order`, all of one die."""
    channel = die // rules.dies
    ready = max(ready, state.dies[die, DRAINED], backlog_end(state.backlog, die))
    cycles_ns = rules.command_ns * order.shape[0]
    start = slip(state.bus, channel, ready, cycles_ns)
    at = start + cycles_ns
    for page in order:
        at = _move(state, operation.kind, channel, at, batch.moves[page])
    at += _array_ns(batch, order, page_offset, operation, die)
    at = _move(state, operation.kind, channel, at, rules.status_ns)
    for page in order:
        batch.done[page] = at
    state.dies[die, WORKED] += at - start
    _note(state, DIE, die, operation.kind, start, at)
    if rules.priority:
        final = settle(state.backlog, die, 0, BACKLOG_MAX - 1)
        state.dies[die, FREE] = max(state.dies[die, FREE], final)
        promise(state.backlog, die, start, at, rules.suspends, operation.suspend_ns)
    else:
        state.dies[die, FREE] = state.dies[die, DRAINED] = at


@njit(nogil=True, cache=True)
def _place(
    state: Any, rules: Any, operation: Any, die: Any, ready: Any, batch: Any, order: Any,
    page_offset: Any,
) -> None:  # fmt: skip
    if operation.kind == READ:
        _place_read(state, rules, operation, die, ready, batch, order, page_offset)
    else:
        _place_change(state, rules, operation, die, ready, batch, order, page_offset)


@njit(nogil=True, cache=True)
def _let_pass(state: Any, rules: Any, channel: Any, before: Any) -> None:
    """Forgets what was over by `before` on this channel and its dies."""
    forget(state.bus, channel, before)
    for die in range(channel * rules.dies, (channel + 1) * rules.dies):
        if state.backlog.counts[die]:
            final = settle(state.backlog, die, before, BACKLOG_MAX)
            state.dies[die, FREE] = max(state.dies[die, FREE], final)


@njit(nogil=True, cache=True)
def _run_channel(
    state: Any, rules: Any, operation: Any, channel: Any, batch: Any,
    order: Any, starts: Any, places: Any,
) -> None:  # fmt: skip
    """Serves all pages of one channel: whichever die can start first goes."""
    dies, base = rules.dies, channel * rules.dies
    nexts = starts[base : base + dies].copy()
    while True:
        best, best_ready = -1, np.int64(0)
        for die in range(dies):
            if nexts[die] < starts[base + die + 1]:
                ready = max(batch.arrivals[order[nexts[die]]], state.dies[base + die, FREE])
                if best < 0 or ready < best_ready:
                    best, best_ready = die, ready
        if best < 0:
            return
        first, end = nexts[best], starts[base + best + 1]
        last = _group_end(batch, order, places, first, end, best_ready)
        page_offset = places[order[first], 0]
        _place(
            state, rules, operation, base + best, best_ready, batch, order[first:last], page_offset
        )
        nexts[best] = last


@njit(nogil=True, cache=True)
def schedule(state: Any, rules: Any, operation: Any, batch: Any) -> None:
    """Fills batch.done [n]; updates the busy times. n is at least 1."""
    first = batch.arrivals.min()
    order, starts, places = _sort_by_die(batch.ppns, rules)
    for channel in range(rules.channels):
        base = channel * rules.dies
        if starts[base] < starts[base + rules.dies]:
            _let_pass(state, rules, channel, first)
            _run_channel(state, rules, operation, channel, batch, order, starts, places)


@njit(nogil=True, cache=True)
def schedule_one(state: Any, rules: Any, operation: Any, batch: Any) -> None:
    """`schedule` for a batch of one page, without its overhead."""
    die, _, page_offset = _find(batch.ppns[0], rules)
    _let_pass(state, rules, die // rules.dies, batch.arrivals[0])
    ready = max(batch.arrivals[0], state.dies[die, FREE])
    _place(state, rules, operation, die, ready, batch, _ONE_PAGE, page_offset)


_ONE_PAGE: I64 = np.zeros(1, np.int64)


class Timeline:
    """Busy times of one drive's dies and channels; at first all idle."""

    def __init__(self, geometry: Geometry, timing: CellTiming) -> None:
        self._timing = timing
        self._geometry = geometry
        self._pages = geometry.pages
        self.rules = _rules_of(geometry, timing)
        self.state = _idle(geometry)
        self.read = _operation(READ, timing.read_ns_by_type, 0)
        self._program = _operation(PROGRAM, timing.program_ns_by_type, timing.program_suspend_ns)
        self._erase = _operation(ERASE, (timing.erase_ns,), timing.erase_suspend_ns)

    def read_pages(
        self,
        arrival_ns: int | I64,
        ppns: I64,
        transfer_bytes: I64,
        extra_ns: I64 | None = None,
    ) -> I64:
        """When each page's bytes have left the die [n]; transfer_bytes [n]: those that move.

        `arrival_ns` is one time, or one of each page [n]; `extra_ns` [n] is array time beyond tR
        (read retry).
        """
        return self._run(arrival_ns, ppns, self.moves_ns(transfer_bytes), self.read, extra_ns)

    def program_pages(
        self,
        arrival_ns: int | I64,
        ppns: I64,
        transfer_bytes: I64,
        extra_ns: I64 | None = None,
    ) -> I64:
        """When each page is programmed [n], reads that come later aside."""
        return self._run(arrival_ns, ppns, self.moves_ns(transfer_bytes), self._program, extra_ns)

    def erase_blocks(self, arrival_ns: int | I64, ppns: I64) -> I64:
        """When the block of each page is erased [n]; name each block once."""
        return self._run(arrival_ns, ppns, np.zeros_like(ppns), self._erase, None)

    def slow_down_reads(self, dies: Iterable[tuple[int, int]], factor: float) -> None:
        """From now on tR of these dies (channel, die of it) is longer, of all others as stated."""
        slower = np.empty((0, self.read.array_ns.size), np.int64)
        places = [channel * self._geometry.dies_per_channel + die for channel, die in dies]
        if places:
            slower = np.zeros((self._geometry.dies, self.read.array_ns.size), np.int64)
            slower[places] = np.round(self.read.array_ns * (factor - 1))
        self.read = self.read._replace(slower_ns=slower)

    def idle_ns(self) -> int:
        """When all that was asked for so far is done."""
        backlog = self.state.backlog
        last = int(self.state.dies[:, :WORKED].max())
        for die in np.flatnonzero(backlog.counts):
            last = max(last, int(backlog.spans[die, backlog.counts[die] - 1, END]))
        return last

    def busy_times(self) -> BusyTimes:
        """Bus and die time used so far (channel and die utilisation over a run's length)."""
        return BusyTimes(self.state.bus.lanes[:, BUSY].copy(), self.state.dies[:, WORKED].copy())

    def record_events(self, limit: int) -> None:
        """Records the next `limit` uses of dies and channels; 0 ends it."""
        events = np.zeros((limit, EVENT_COLUMNS), np.int64)
        self.state = self.state._replace(events=events, event_count=np.zeros(1, np.int64))

    def take_events(self) -> I64:
        """What was recorded since the last call [n, EVENT_COLUMNS]."""
        count = int(self.state.event_count[0])
        self.state.event_count[0] = 0
        return self.state.events[:count].copy()

    def moves_ns(self, transfer_bytes: I64) -> I64:
        """Bus time of each transfer, rounded up."""
        bits_per_us = self._timing.channel_mega_transfers_per_s * self._timing.channel_width_bits
        return -(-transfer_bytes * 8_000 // bits_per_us)

    def _run(
        self,
        arrival_ns: int | I64,
        ppns: I64,
        moves: I64,
        operation: Operation,
        extra_ns: I64 | None,
    ) -> I64:
        assert ppns.shape == moves.shape
        done = np.empty(ppns.size, np.int64)
        if not ppns.size:
            return done
        assert ppns.min() >= 0
        assert ppns.max() < self._pages
        arrivals = np.empty(ppns.size, np.int64)
        arrivals[:] = arrival_ns
        extra = _NO_EXTRA if extra_ns is None else extra_ns
        assert extra.size in (0, ppns.size)
        schedule(self.state, self.rules, operation, Batch(arrivals, ppns, moves, extra, done))
        return done


_NO_EXTRA: I64 = np.empty(0, np.int64)


def _operation(kind: int, array_ns: tuple[int, ...], suspend_ns: int) -> Operation:
    none_slower = np.empty((0, len(array_ns)), np.int64)
    return Operation(kind, np.array(array_ns, np.int64), suspend_ns, none_slower)


def _idle(geometry: Geometry) -> State:
    dies = geometry.dies
    return State(
        bus=make_bookings(geometry.channels),
        backlog=make_backlog(dies),
        dies=np.zeros((dies, 3), np.int64),
        events=np.zeros((0, EVENT_COLUMNS), np.int64),
        event_count=np.zeros(1, np.int64),
    )


def _rules_of(geometry: Geometry, timing: CellTiming) -> Rules:
    return Rules(
        channels=geometry.channels,
        planes=geometry.planes_per_die,
        dies=geometry.dies_per_channel,
        pages=geometry.pages_per_block,
        command_ns=timing.command_ns,
        status_ns=timing.status_ns,
        cache_read=timing.cache_read,
        cache_busy_ns=timing.cache_busy_ns,
        priority=timing.read_priority,
        suspends=timing.suspends_max,
        resume_ns=timing.resume_ns,
    )
