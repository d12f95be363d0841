"""Media read with direct I/O: past the page cache, at the disk's own rate.

What the file holds never counts as memory of the machine, so a drive of this kind and a program
that maps the same disk compete fairly. Reads are as large and as many at once as can be: pieces
that follow each other, page by page, become one read of up to READ_BYTES; reads go to other threads
in jobs of about that size, and while the later ones are under way the earlier ones are copied out,
in order. Nothing beneath the service starts threads, so who has them passes them in (`Begin`).

Direct reads want addresses, lengths and memory in multiples of a page of ALIGN_BYTES, which pieces
are not. So they land in an *arena*, page by page, and are copied from there: the one copy that
units take on their way to the window anyway, with their CRC32C.

Writes are those of `FileMedia`. The kernel writes dirty pages back before a direct read of the same
range; a sync lets go what they left in the page cache.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

from csd_device.checked_copy import Keep, copy_checked
from csd_device.config import SECTOR_BYTES
from csd_device.errors import DriveRefused, UnrecoveredRead
from csd_device.gather import gather
from csd_device.nand.media import U8, U32, FileMedia, Pieces, Retries
from csd_device.nand.passing import PassingMedia
from csd_protocol.crc32c import crc32c_units

I64 = npt.NDArray[np.int64]

Begin = Callable[[Callable[[], None]], Callable[[], None]]
"""Has work done, now or by another thread; what it returns waits for that and raises its errors."""

ALIGN_BYTES = 4096
READ_BYTES = 1 << 20  # of one read; the last one of a long run may be shorter
ARENA_BYTES = 16 << 20  # of all that is read at once
ROUND_BYTES = ARENA_BYTES // 2  # one half is copied out while the other fills
JOB_READS = 16  # small reads that one job does one after the other

_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.intp, types.intp, types.int64)
)


def at_once(work: Callable[[], None]) -> Callable[[], None]:
    """`Begin` of who has no other thread."""
    work()
    return _nothing


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Reads:
    """Direct reads of some pieces, in order, and where in the arena each piece is then."""

    at: I64  # [reads] address in the file
    lengths: I64  # [reads]
    places: I64  # [reads] offset in the arena
    pieces_at: I64  # [n] offset in the arena
    last_reads: I64  # [n] after which read a piece is there, ascending


@dataclass(frozen=True, slots=True)
class _Job:
    """Reads under way, and what is there behind them."""

    wait: Callable[[], None]
    pieces: slice
    places: I64  # of those pieces in the arena
    ends_round: bool


@njit(nogil=True, cache=True)
def _plan(starts: Any, lengths: Any, reads: Any, pieces: Any) -> Any:
    """Fills reads [:, 3] (address, length, place) and pieces [:, 2] (place, last read); how many.

    A piece that begins in the last page that is read already, or right behind it, goes on there.
    """
    count, place, end = 0, 0, np.int64(-1)  # `end`: address behind what is read
    for index in range(starts.shape[0]):
        first = starts[index] // ALIGN_BYTES * ALIGN_BYTES
        behind = (starts[index] + lengths[index] + ALIGN_BYTES - 1) // ALIGN_BYTES * ALIGN_BYTES
        if first != end and first != end - ALIGN_BYTES:
            end = first
        pieces[index, 0] = place - (end - starts[index])
        while end < behind:
            length = min(READ_BYTES, behind - end)
            is_longer = count and reads[count - 1, 0] + reads[count - 1, 1] == end
            if is_longer and reads[count - 1, 1] < READ_BYTES:
                length = min(length, READ_BYTES - reads[count - 1, 1])
                reads[count - 1, 1] += length
            else:
                reads[count, 0], reads[count, 1], reads[count, 2] = end, length, place
                count += 1
            end += length
            place += length
        pieces[index, 1] = count - 1
    return count


@njit(nogil=True, cache=True)
def _read_each(file: Any, at: Any, lengths: Any, addresses: Any) -> Any:
    """Fills memory by pread; the first read that fails or ends early, or how many there are."""
    for index in range(at.shape[0]):
        done = np.int64(0)
        while done < lengths[index]:
            count = _pread(file, addresses[index] + done, lengths[index] - done, at[index] + done)
            if count <= 0:
                return index
            done += count
    return at.shape[0]


class DirectMedia(PassingMedia):
    """`FileMedia` whose reads pass the page cache by."""

    def __init__(self, path: Path, size_bytes: int, begin: Begin = at_once) -> None:
        """Raises DriveRefused where the file cannot be opened so."""
        assert size_bytes % ALIGN_BYTES == 0
        super().__init__(FileMedia(path, size_bytes))
        self._path = path
        self._begin = begin
        self._arena: U8 = np.frombuffer(mmap.mmap(-1, ARENA_BYTES), np.uint8)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            self.inner.close()
            raise DriveRefused(
                f"media {path} cannot be read with direct I/O: {error}. Put it on a filesystem "
                "that can (ext4, xfs), or leave media.direct_io out"
            ) from error

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        parts = _split(pieces)
        for here, places in self._arrivals(parts.starts, parts.lengths):
            gather(self._arena, places, parts.lengths[here], parts.targets[here], out)
        return None

    def copy_units(self, starts: I64, out: U8, rows: I64, keep: Keep) -> U32:
        """`copy_checked` of what is read. Raises UnrecoveredRead."""
        unit_bytes = out.shape[1]
        lengths = np.full(starts.size, unit_bytes, np.int64)
        if unit_bytes > ROUND_BYTES // 2:
            return self._copy_in_parts(starts, lengths, out, rows, keep)
        checksums = np.empty(starts.size, np.uint32)
        for here, places in self._arrivals(starts, lengths):
            kept = Keep(keep.memory, keep.starts[here])
            checksums[here] = copy_checked(
                self._arena, places, out, rows[here], kept, of_bytes=starts.size * unit_bytes
            )
        return checksums

    def _copy_in_parts(self, starts: I64, lengths: I64, out: U8, rows: I64, keep: Keep) -> U32:
        """The same for units that the arena has no room for."""
        flat, targets = out.reshape(-1), rows * out.shape[1]
        self.gather(Pieces(starts, lengths, targets), flat)
        kept = keep.starts.size
        gather(flat, targets[:kept], lengths[:kept], keep.starts, keep.memory)
        return crc32c_units(out[rows])

    def sync(self) -> None:
        super().sync()
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._file)
        self._arena = np.empty(0, np.uint8)
        super().close()

    def _arrivals(self, starts: I64, lengths: I64) -> Iterator[tuple[slice, I64]]:
        """Reads pieces; as they come, some of them and where in the arena those are.

        They are good until the next are asked for. While one round of pieces comes out of its half
        of the arena, the next is being read into the other.
        """
        assert not starts.size or (starts.min() >= 0 and lengths.min() >= 0)
        assert not starts.size or (starts + lengths).max() <= self.size_bytes
        jobs: deque[_Job] = deque()
        rounds = enumerate(_rounds(lengths))
        try:
            for number, rows in islice(rounds, 2):
                jobs.extend(self._begin_round(number, rows, starts, lengths))
            while jobs:
                job = jobs.popleft()
                job.wait()
                if job.pieces.stop > job.pieces.start:
                    yield job.pieces, job.places
                if job.ends_round:
                    for number, rows in islice(rounds, 1):
                        jobs.extend(self._begin_round(number, rows, starts, lengths))
        finally:  # nothing may land in the arena when the next reads are asked for
            for job in jobs:
                with suppress(UnrecoveredRead):
                    job.wait()

    def _begin_round(self, number: int, rows: slice, starts: I64, lengths: I64) -> Iterator[_Job]:
        """Has the pieces in `rows` read into their half of the arena."""
        reads = _planned(starts[rows], lengths[rows], number % 2 * ROUND_BYTES)
        done = 0
        for part in _jobs(reads.lengths):
            wait = self._begin(self._work(reads, part))
            here = int(np.searchsorted(reads.last_reads, part.stop))
            pieces = slice(rows.start + done, rows.start + here)
            yield _Job(wait, pieces, reads.pieces_at[done:here], part.stop == reads.at.size)
            done = here

    def _work(self, reads: _Reads, part: slice) -> Callable[[], None]:
        at, lengths = reads.at[part], reads.lengths[part]
        addresses = self._arena.ctypes.data + reads.places[part]

        def work() -> None:
            done = _read_each(self._file, at, lengths, addresses)
            if done < at.size:
                raise self._fault(int(at[done]), int(lengths[done]))

        return work

    def _fault(self, at: int, length: int) -> UnrecoveredRead:
        first = at // SECTOR_BYTES
        psas = np.arange(first, first + length // SECTOR_BYTES, dtype=np.int64)
        return UnrecoveredRead(f"{self._path} cannot be read, {length} bytes at {at}", psas)


def _planned(starts: I64, lengths: I64, base: int) -> _Reads:
    """How to read pieces into the arena from `base` on."""
    pages_max = int((lengths // ALIGN_BYTES + 2).sum())
    reads_max = starts.size * 2 + pages_max * ALIGN_BYTES // READ_BYTES
    reads, pieces = np.empty((reads_max, 3), np.int64), np.empty((starts.size, 2), np.int64)
    count = _plan(starts, lengths, reads, pieces)
    at, sizes, places = np.ascontiguousarray(reads[:count].T)
    pieces_at, last_reads = np.ascontiguousarray(pieces.T)
    return _Reads(at, sizes, places + base, pieces_at + base, last_reads)


def _jobs(lengths: I64) -> Iterator[slice]:
    """Reads that go to one thread: a large one, or some small ones."""
    start, size = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > start and (size + length > READ_BYTES or index - start == JOB_READS):
            yield slice(start, index)
            start, size = index, 0
        size += length
    if start < lengths.size:
        yield slice(start, lengths.size)


def _rounds(lengths: I64) -> Iterator[slice]:
    """Pieces that have room in half of the arena together, at whatever addresses they lie."""
    ends = np.cumsum((lengths + 2 * ALIGN_BYTES - 2) // ALIGN_BYTES * ALIGN_BYTES)
    start = 0
    while start < ends.size:
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + ROUND_BYTES, side="right"))
        assert stop > start
        yield slice(start, stop)
        start = stop


def _split(pieces: Pieces) -> Pieces:
    """The same bytes in pieces of at most READ_BYTES."""
    counts = -(-pieces.lengths // READ_BYTES)
    piece = np.repeat(np.arange(counts.size), counts)
    inner = (np.arange(piece.size) - (np.cumsum(counts) - counts)[piece]) * READ_BYTES
    return Pieces(
        pieces.starts[piece] + inner,
        np.minimum(pieces.lengths[piece] - inner, READ_BYTES),
        pieces.targets[piece] + inner,
    )
