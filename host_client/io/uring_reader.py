"""A reader over io_uring: a few large reads under way, completions in any order."""

import errno
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host_client.io.errors import EndOfFile, ReadFailed
from host_client.io.reader import (
    CHUNK_BYTES,
    DEPTH,
    Extent,
    Reader,
    Ticket,
    check_extents,
    chunks_of,
)
from host_client.io.ring import Arrival, Ring

_AGAIN = {errno.EAGAIN, errno.EINTR}
_RETRIES_MAX = 100


@dataclass(slots=True)
class _Progress:
    """What is still to come of one ticket, and the first thing that went wrong."""

    chunks_left: int
    error: ReadFailed | EndOfFile | None = None


@dataclass(slots=True)
class _Chunk:
    """One read of at most a chunk: `done` bytes of it have arrived."""

    ticket: int
    extent: Extent
    done: int = 0
    retries: int = 0


class UringReader(Reader):
    """Implements `Reader` with `depth` chunks under way. Owns the descriptor that it is given.

    Raises ReaderUnavailable, and leaves the descriptor open, where io_uring cannot be used.
    """

    name = "io_uring"
    fallback_reason = ""

    def __init__(
        self, path: Path, descriptor: int, *, depth: int = DEPTH, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.path = path
        self._ring = Ring(1 << (depth - 1).bit_length())
        self._descriptor = descriptor
        self._depth = depth
        self._chunk_bytes = chunk_bytes
        self._waiting: deque[_Chunk] = deque()
        self._under_way: dict[int, _Chunk] = {}
        self._tickets: dict[int, _Progress] = {}
        self._next_ticket = 0
        self._next_tag = 0
        self._closed = False

    def submit(self, extents: Sequence[Extent]) -> Ticket:
        check_extents(extents)
        number = self._next_ticket
        self._next_ticket += 1
        chunks = [_Chunk(number, chunk) for chunk in chunks_of(extents, self._chunk_bytes)]
        self._tickets[number] = _Progress(len(chunks))
        self._waiting.extend(chunks)
        self._fill()
        return Ticket(number)

    def wait(self, ticket: Ticket) -> None:
        progress = self._tickets.get(ticket.number)
        if progress is None:
            raise ValueError(f"ticket {ticket.number} is not under way")
        while progress.chunks_left:
            self._advance()
        del self._tickets[ticket.number]
        if progress.error is not None:
            raise progress.error

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        while self._under_way:
            self._advance()
        self._ring.close()
        os.close(self._descriptor)

    def _advance(self) -> None:
        """Take in what has arrived, at least one completion, and start what waits."""
        for arrival in self._ring.wait():
            self._take_in(self._under_way.pop(arrival.tag), arrival)
        self._fill()

    def _fill(self) -> None:
        started = 0
        while self._waiting and len(self._under_way) < self._depth:
            self._start(self._waiting.popleft())
            started += 1
        if started:
            self._ring.submit()

    def _start(self, chunk: _Chunk) -> None:
        extent, tag = chunk.extent, self._next_tag
        self._next_tag += 1
        self._under_way[tag] = chunk
        self._ring.prepare_read(
            self._descriptor,
            extent.offset + chunk.done,
            extent.buffer.address + extent.buffer_offset + chunk.done,
            extent.length - chunk.done,
            tag,
        )

    def _take_in(self, chunk: _Chunk, arrival: Arrival) -> None:
        chunk.done += arrival.count
        progress = self._tickets[chunk.ticket]
        error = self._error_of(chunk, arrival)
        if error is None and chunk.done < chunk.extent.length and not self._closed:
            self._waiting.appendleft(chunk)
            return
        progress.chunks_left -= 1
        progress.error = progress.error or error

    def _error_of(self, chunk: _Chunk, arrival: Arrival) -> ReadFailed | EndOfFile | None:
        """None when the chunk is whole or should be asked for again."""
        offset = chunk.extent.offset + chunk.done
        left = chunk.extent.length - chunk.done
        if arrival.errno in _AGAIN and chunk.retries < _RETRIES_MAX:
            chunk.retries += 1
            return None
        if arrival.errno:
            return ReadFailed(self.path, offset, left, arrival.errno)
        if arrival.count == 0 and left:
            return EndOfFile(self.path, offset, left, os.fstat(self._descriptor).st_size)
        return None
