"""What serves one thing at a time - a bus, a link - as spans of time that are taken, over arrays.

Each lane (one channel, one link) keeps its bookings, ascending and disjoint. Work that is ready at
some time takes what is free of the lane from then on, so what is asked later but ready earlier does
not wait behind. A booking may be split by earlier ones: work for a busy die is booked ahead, and a
bus that really moves what is ready would have moved that work a little later instead; split or
moved, the bus is done with both at the same time, and none of its time is lost in gaps too short.

A command cycle *slips*: it goes at the next boundary between two bookings, although the bus may be
promised beyond it, and the bus pays for it behind that boundary. So times that were told stay as
they are, at most a few command cycles early, and no time of the bus is given out twice. A lane
remembers its newest BOOKINGS_MAX bookings; nothing goes before those that it forgot. All in
integers: the same calls give the same times.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I64 = npt.NDArray[np.int64]

BOOKINGS_MAX = 1024
_START, _END = 0, 1
_ROW_BYTES = 16
_NEARBY = 8  # newest spans looked at one by one: most work belongs there


HEAD, LAST, FLOOR, BUSY = 0, 1, 2, 3  # columns of a lane


class Bookings(NamedTuple):
    """State of some lanes. Few arrays: compiled functions pass each by its dozen words."""

    spans: I64  # [lanes, 2 * BOOKINGS_MAX, 2] start and end, ns; [HEAD : LAST] of a lane is in use
    lanes: I64  # [lanes, 4] FLOOR: nothing starts before this time; BUSY: ns booked so far, in all


def make_bookings(lanes: int) -> Bookings:
    """All idle."""
    spans = np.zeros((lanes, 2 * BOOKINGS_MAX, 2), np.int64)
    return Bookings(spans, np.zeros((lanes, 4), np.int64))


@njit(nogil=True, cache=True)
def _first_after(spans: Any, head: Any, end: Any, ready: Any) -> Any:
    """Index of the first span that ends after `ready`."""
    nearby = max(head, end - _NEARBY)
    while end > nearby:
        if spans[end - 1, _END] <= ready:
            return end
        end -= 1
    while head < end:
        middle = (head + end) >> 1
        if spans[middle, _END] <= ready:
            head = middle + 1
        else:
            end = middle
    return head


@intrinsic
def _memmove(typing_context: Any, target: Any, source: Any, length: Any) -> Any:
    """memmove between two addresses: a loop over rows is not compiled to one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = cgutils.voidptr_t
        to, at = (builder.inttoptr(argument, pointer) for argument in arguments[:2])
        cgutils.raw_memmove(builder, to, at, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def _move_rows(spans: Any, source: Any, target: Any, count: Any) -> None:
    """Rows [source : source + count] to `target`; they may overlap."""
    base = np.int64(spans.ctypes.data)
    _memmove(base + target * _ROW_BYTES, base + source * _ROW_BYTES, count * _ROW_BYTES)


@njit(nogil=True, cache=True)
def _insert(bookings: Any, lane: Any, index: Any, start: Any, end: Any) -> Any:
    """Makes it span `index`; where that is then: a full array is moved to its front."""
    spans = bookings.spans[lane]
    first, last = bookings.lanes[lane, HEAD], bookings.lanes[lane, LAST]
    if last == spans.shape[0]:
        _move_rows(spans, first, 0, last - first)
        index, last, first = index - first, last - first, 0
    _move_rows(spans, index, index + 1, last - index)
    spans[index, _START], spans[index, _END] = start, end
    last += 1
    if last - first > BOOKINGS_MAX:
        bookings.lanes[lane, FLOOR] = max(bookings.lanes[lane, FLOOR], spans[first, _END])
        first += 1
    bookings.lanes[lane, HEAD], bookings.lanes[lane, LAST] = first, last
    return index


@njit(nogil=True, cache=True)
def forget(bookings: Any, lane: Any, before: Any) -> None:
    """Drops what ends by `before`; nothing goes ahead of it from here on."""
    spans = bookings.spans[lane]
    head, end = bookings.lanes[lane, HEAD], bookings.lanes[lane, LAST]
    while head < end and spans[head, _END] <= before:
        bookings.lanes[lane, FLOOR] = max(bookings.lanes[lane, FLOOR], spans[head, _END])
        head += 1
    bookings.lanes[lane, HEAD] = head


def booked_spans(bookings: Bookings, lane: int) -> I64:
    """What is booked and not forgotten [n, 2]: start and end, ascending."""
    head, last = bookings.lanes[lane, HEAD], bookings.lanes[lane, LAST]
    spans: I64 = bookings.spans[lane, head:last].copy()
    return spans


def newly_booked(bookings: Bookings, lane: int, before: I64) -> I64:
    """The spans [n, 2] booked since `before` was taken, less what was forgotten meanwhile.

    A boundary that both have is none of the difference.
    """
    floor = bookings.lanes[lane, FLOOR]
    points = np.concatenate([before.reshape(-1), booked_spans(bookings, lane).reshape(-1)])
    edges, counts = np.unique(np.maximum(points, floor), return_counts=True)
    spans: I64 = edges[counts % 2 == 1].reshape(-1, 2)
    return spans


@njit(nogil=True, cache=True)
def _take(bookings: Any, lane: Any, index: Any, at: Any, length: Any, merge: Any) -> Any:
    """Books what is free from `at` on; `index` is the first span that ends after it. The end."""
    spans = bookings.spans[lane]
    bookings.lanes[lane, BUSY] += length
    while True:
        piece = length
        if index < bookings.lanes[lane, LAST]:
            piece = min(length, max(spans[index, _START] - at, 0))
        if piece:
            length -= piece
            if merge and index > bookings.lanes[lane, HEAD] and spans[index - 1, _END] == at:
                spans[index - 1, _END] = at + piece
            else:
                index = _insert(bookings, lane, index, at, at + piece) + 1
            if length == 0:
                return at + piece
        at = spans[index, _END]
        index += 1


@njit(nogil=True, cache=True)
def book(bookings: Any, lane: Any, ready: Any, length: Any, merge: Any) -> Any:
    """Takes `length` ns of what is free from `ready` on; when the last of it is over.

    With `merge` it becomes one with a booking that it follows at once: then there is no boundary
    for commands to slip in.
    """
    start = max(ready, bookings.lanes[lane, FLOOR])
    if length == 0:
        return start
    first, last = bookings.lanes[lane, HEAD], bookings.lanes[lane, LAST]
    index = _first_after(bookings.spans[lane], first, last, start)
    return _take(bookings, lane, index, start, length, merge)


@njit(nogil=True, cache=True)
def slip(bookings: Any, lane: Any, ready: Any, length: Any) -> Any:
    """When a command of `length` ns starts: at the next boundary before something longer."""
    start = max(ready, bookings.lanes[lane, FLOOR])
    spans, last = bookings.spans[lane], bookings.lanes[lane, LAST]
    index = _first_after(spans, bookings.lanes[lane, HEAD], last, start)
    if index < last and spans[index, _START] < start:
        start = spans[index, _END]
        index += 1
    while index < last and spans[index, _START] == start and spans[index, _END] - start <= length:
        start = spans[index, _END]
        index += 1
    if length:
        _take(bookings, lane, index, start, length, False)
    return start


@njit(nogil=True, cache=True)
def stream(bookings: Any, lane: Any, times: Any, total_ns: Any) -> None:
    """Equal parts of a transfer of `total_ns`, ready at `times` (ascending), go through the lane.

    `times` then says when each part has gone through.
    """
    parts = times.shape[0]
    gone = np.int64(0)
    for part in range(parts):
        length = total_ns * (part + 1) // parts - gone
        gone += length
        times[part] = book(bookings, lane, times[part], length, True)
    if parts > 1:
        times.sort()
