"""Patterns: sectors that are made out of a table when they are read, and not stored.

A sector whose bytes are one of the table's *patterns* is kept as that pattern's number. So a drive
that is full of them takes two bytes a sector of disk and memory, and reading it is copying out of a
table that lies in the processor's cache. Which sectors those are is seen by their bytes, as they
are written: mapping, garbage collection, copies and faults know nothing of patterns, and whatever
moves or overwrites a sector does to it what it does to any other.

    patterns.img    the patterns, side by side; only ever longer
    patterns.map    for each physical sector the pattern's number + 1, uint16 little endian; 0: its
                    bytes lie in the media behind this one. Sparse

A pattern is on stable storage before its number is told, and the map is synced with the media; so
what the journal names is there. docs/FORMAT.md says what host software makes of it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.checked_copy import LINE_BYTES, Keep, copy_checked
from csd_device.config import SECTOR_BYTES
from csd_device.errors import CommandError, DriveRefused, WriteFault
from csd_device.gather import gather
from csd_device.lazy_memory import lazy_zeroes
from csd_device.nand.media import I64, U8, U32, CopyUnits, Media, Pieces, Retries, direct_copy
from csd_protocol.crc32c import crc32c_units
from csd_protocol.status import Status

U16 = npt.NDArray[np.uint16]

PATTERNS_MAX = 4096  # of a drive, 16 MiB
TABLE_NAME = "patterns.img"
MAP_NAME = "patterns.map"

_WORDS = SECTOR_BYTES // 8
_KEY_STEP = _WORDS // 8  # words between those that a sector is looked up by
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ENTRY_BYTES = 2


@njit(nogil=True, cache=True)
def _key(words: Any) -> Any:
    """What a sector uint64 [512] is looked up by: eight of its words, mixed."""
    key = np.uint64(0)
    for at in range(0, _WORDS, _KEY_STEP):
        key = (key ^ words[at]) * _MIX
        key ^= key >> np.uint64(29)
    return key


@njit(nogil=True, cache=True)
def _keys(sectors: Any, keys: Any) -> None:
    for sector in range(sectors.shape[0]):
        keys[sector] = _key(sectors[sector])


@njit(nogil=True, cache=True)
def _find(sectors: Any, keys: Any, order: Any, table: Any, found: Any) -> None:
    """Fills `found` [n] with 1 + the pattern that each sector uint64 [n, 512] is, 0: none."""
    for sector in range(sectors.shape[0]):
        key = _key(sectors[sector])
        place = np.searchsorted(keys, key)
        found[sector] = 0
        if place < keys.shape[0] and keys[place] == key:
            pattern = order[place]
            same = True
            for word in range(_WORDS):
                same &= sectors[sector, word] == table[pattern, word]
            if same:
                found[sector] = pattern + 1


@njit(nogil=True, cache=True)
def _count(numbers: Any, starts: Any, lengths: Any) -> Any:
    """Of the sectors that byte ranges touch, how many are patterns; and how many there are."""
    made, touched = 0, 0
    for index in range(starts.shape[0]):
        sector = starts[index] // SECTOR_BYTES
        end = (starts[index] + lengths[index] - 1) // SECTOR_BYTES + 1
        touched += end - sector
        while sector < end:
            made += numbers[sector] != 0
            sector += 1
    return made, touched


@njit(nogil=True, cache=True)
def _split(
    numbers: Any, starts: Any, lengths: Any, targets: Any, made: Any, stored: Any
) -> Any:  # fmt: skip
    """Byte ranges to those of the table (`made` [:, 3]) and those of the media behind (`stored`).

    Rows are start, length, target; how many of each. Stored ones that follow each other are one.
    """
    makes, stores = 0, 0
    for index in range(starts.shape[0]):
        at, end = starts[index], starts[index] + lengths[index]
        shift = targets[index] - starts[index]
        extends = False
        while at < end:
            sector = at // SECTOR_BYTES
            inner = at - sector * SECTOR_BYTES
            length = min(SECTOR_BYTES - inner, end - at)
            number = np.int64(numbers[sector])
            if number:
                made[makes, 0] = (number - 1) * SECTOR_BYTES + inner
                made[makes, 1], made[makes, 2] = length, at + shift
                makes += 1
            elif extends:
                stored[stores - 1, 1] += length
            else:
                stored[stores, 0], stored[stores, 1], stored[stores, 2] = at, length, at + shift
                stores += 1
            extends = number == 0
            at += length
    return makes, stores


class PatternTable:
    """The patterns of a drive, by number; kept in a file, or in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises DriveRefused when the file cannot be opened."""
        self._cells: U8 = lazy_zeroes(PATTERNS_MAX * SECTOR_BYTES, np.uint8)
        self._sectors: U8 = self._cells.reshape(PATTERNS_MAX, SECTOR_BYTES)
        self._file = -1
        self.count = 0
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._read()
            except OSError as error:
                raise DriveRefused(f"patterns {path} cannot be opened: {error}") from error
        try:
            self._look_up_by(self._sectors[: self.count])
        except CommandError as error:
            raise DriveRefused(f"patterns {path} are damaged: {error.detail}") from error

    @property
    def cells(self) -> U8:
        """All patterns, flat."""
        return self._cells

    def sectors(self, numbers: U16) -> U8:
        """The bytes of these patterns, uint8 [n, 4096]."""
        return self._sectors[numbers]

    def check(self, numbers: U16) -> None:
        """Raises CommandError (Invalid Field) for a pattern that there is not."""
        if numbers.size and int(numbers.max()) >= self.count:
            raise CommandError(
                Status.INVALID_FIELD,
                f"pattern {int(numbers.max())}; the drive has {self.count}, numbered from 0",
            )

    def find(self, cells: U8) -> U16:
        """1 + the pattern that each whole sector of flat `cells` is, 0: none of them [n]."""
        found = np.empty(cells.size // SECTOR_BYTES, np.uint16)
        table = self._sectors[: self.count].view(np.uint64)
        _find(cells.view(np.uint64).reshape(-1, _WORDS), self._keys, self._order, table, found)
        return found

    def define(self, sectors: U8) -> U16:
        """The numbers of these sectors uint8 [n, 4096]; those not known yet are added, durably.

        Raises CommandError: Capacity Exceeded for more than fit, Invalid Field for two that
        cannot be told apart when they are looked up, WriteFault for a file that takes no more.
        """
        missing = sectors[self.find(sectors.reshape(-1)) == 0]
        fresh = np.unique(missing, axis=0) if missing.size else missing
        end = self.count + len(fresh)
        if end > PATTERNS_MAX:
            raise CommandError(
                Status.CAPACITY_EXCEEDED,
                f"{len(fresh)} more patterns beside {self.count}; a drive has {PATTERNS_MAX}. "
                "Use those that it has, or another drive",
            )
        self._sectors[self.count : end] = fresh
        self._look_up_by(self._sectors[:end])
        self._append(fresh)
        self.count = end
        return self.find(sectors.reshape(-1)) - np.uint16(1)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _look_up_by(self, sectors: U8) -> None:
        """Raises CommandError (Invalid Field), the look-up as it was, where two have one key."""
        keys = np.empty(len(sectors), np.uint64)
        _keys(sectors.view(np.uint64), keys)
        order = np.argsort(keys)
        if (np.diff(keys[order]) == 0).any():
            raise CommandError(Status.INVALID_FIELD, "two patterns differ too little to be told")
        self._keys, self._order = keys[order], order

    def _read(self) -> None:
        self.count = min(os.fstat(self._file).st_size // SECTOR_BYTES, PATTERNS_MAX)
        whole = self._cells[: self.count * SECTOR_BYTES].data
        done = 0
        while done < whole.nbytes:
            done += os.preadv(self._file, [whole[done:]], done)

    def _append(self, fresh: U8) -> None:
        """Behind the patterns that are there: a torn tail is written over by the next."""
        if self._file < 0 or not fresh.size:
            return
        try:
            _write_all(self._file, fresh, self.count * SECTOR_BYTES)
            os.fsync(self._file)
        except OSError as error:
            self._look_up_by(self._sectors[: self.count])
            raise WriteFault(f"patterns cannot be kept: {error}") from error


class _SectorNumbers:
    """What each physical sector is, as `patterns.map` has it."""

    def __init__(self, path: Path, sectors: int) -> None:
        self.entries: U16 = lazy_zeroes(sectors, np.uint16)
        self.largest = 0  # entry, when it was opened
        self._is_dirty = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, sectors * _ENTRY_BYTES)
        self._read()

    def put(self, first: int, entries: U16) -> None:
        """Raises OSError."""
        place = self.entries[first : first + entries.size]
        if not (entries.any() or place.any()):
            return
        place[:] = entries
        _write_all(self._file, entries.astype("<u2"), first * _ENTRY_BYTES)
        self._is_dirty = True

    def sync(self) -> None:
        """Raises OSError."""
        if self._is_dirty:
            os.fdatasync(self._file)
            self._is_dirty = False

    def close(self) -> None:
        os.close(self._file)

    def _read(self) -> None:
        """The parts of the sparse file that were ever written."""
        view = self.entries.view(np.uint8).data
        at = 0
        while at < view.nbytes:
            try:
                at = os.lseek(self._file, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but holes from here on
                break
            first, end = at // _ENTRY_BYTES, os.lseek(self._file, at, os.SEEK_HOLE)
            while at < end:
                at += os.preadv(self._file, [view[at:end]], at)
            part = self.entries[first : -(-end // _ENTRY_BYTES)]
            self.largest = max(self.largest, int(part.max()))


class PatternMedia:
    """`Media` around others that keep what is no pattern."""

    def __init__(self, inner: Media, folder: Path) -> None:
        """Takes `inner` over. Raises DriveRefused for files that cannot be used."""
        self._inner = inner
        self.table = PatternTable(folder / TABLE_NAME)
        try:
            self._numbers = _SectorNumbers(folder / MAP_NAME, inner.size_bytes // SECTOR_BYTES)
        except OSError as error:
            self.table.close()
            raise DriveRefused(f"{folder / MAP_NAME} cannot be opened: {error}") from error
        if self._numbers.largest > self.table.count:
            raise DriveRefused(
                f"{folder / MAP_NAME} names pattern {self._numbers.largest - 1}, and "
                f"{TABLE_NAME} beside it has {self.table.count}. Remove the media folder and pack "
                "the models again"
            )
        self._inner_copy = direct_copy(inner)
        self.copy_units: CopyUnits | None = self._copy_units if self._inner_copy else None

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        if not self.table.count:
            return self._inner.gather(pieces, out)
        entries = self._numbers.entries
        count, touched = _count(entries, pieces.starts, pieces.lengths)
        if not count:
            return self._inner.gather(pieces, out)
        made, stored = np.empty((count, 3), np.int64), np.empty((touched - count, 3), np.int64)
        _, stores = _split(entries, pieces.starts, pieces.lengths, pieces.targets, made, stored)
        gather(self.table.cells, *_columns(made), out)
        return self._inner.gather(Pieces(*_columns(stored[:stores])), out) if stores else None

    def write(self, start: int, data: U8) -> None:
        if not self.table.count:
            self._inner.write(start, data)
            return
        first, torn = divmod(start, SECTOR_BYTES)
        if torn or data.size % SECTOR_BYTES:  # power went
            self._store(first, -(-(start + data.size) // SECTOR_BYTES))
            self._inner.write(start, data)
            return
        found = self.table.find(data)
        ends = np.flatnonzero(np.diff(found == 0, prepend=False, append=False))
        for begin, end in ends.reshape(-1, 2).tolist():
            part = data[begin * SECTOR_BYTES : end * SECTOR_BYTES]
            self._inner.write(start + begin * SECTOR_BYTES, part)
        self._put(first, found)

    def erase(self, start: int, length: int) -> None:
        self._inner.erase(start, length)
        if self.table.count:
            self._put(start // SECTOR_BYTES, np.zeros(length // SECTOR_BYTES, np.uint16))

    def sync(self) -> None:
        self._inner.sync()
        try:
            self._numbers.sync()
        except OSError as error:
            raise WriteFault(f"{MAP_NAME} cannot be synced: {error}") from error

    def close(self) -> None:
        self._inner.close()
        self._numbers.close()
        self.table.close()

    def _copy_units(self, starts: I64, out: U8, rows: I64, keep: Keep) -> U32:
        assert self._inner_copy is not None
        entries, unit_bytes = self._numbers.entries, out.shape[1]
        lengths = np.full(starts.size, unit_bytes, np.int64)
        count, touched = _count(entries, starts, lengths) if self.table.count else (0, 0)
        if not count:
            return self._inner_copy(starts, out, rows, keep)
        if count == touched and not (starts % LINE_BYTES).any():
            return copy_checked(self.table.cells, starts, out, rows, keep, entries)
        flat, targets = out.reshape(-1), rows * unit_bytes
        self.gather(Pieces(starts, lengths, targets), flat)
        kept = keep.starts.size
        gather(flat, targets[:kept], lengths[:kept], keep.starts, keep.memory)
        return crc32c_units(out[rows])

    def _store(self, first: int, end: int) -> None:
        """Of these sectors, patterns become bytes like any others."""
        for sector in (first + np.flatnonzero(self._numbers.entries[first:end])).tolist():
            (cells,) = self.table.sectors(self._numbers.entries[sector : sector + 1] - np.uint16(1))
            self._inner.write(sector * SECTOR_BYTES, cells)
        self._put(first, np.zeros(end - first, np.uint16))

    def _put(self, first: int, entries: U16) -> None:
        try:
            self._numbers.put(first, entries)
        except OSError as error:
            raise WriteFault(f"{MAP_NAME} cannot be written: {error}") from error


def _columns(pieces: I64) -> tuple[I64, I64, I64]:
    starts, lengths, targets = np.ascontiguousarray(pieces.T)
    return starts, lengths, targets


def _write_all(file: int, data: npt.NDArray[Any], offset: int) -> None:
    """pwrite(2) until all is written."""
    rest = np.ascontiguousarray(data).data.cast("B")
    while rest:
        written = os.pwrite(file, rest, offset)
        offset, rest = offset + written, rest[written:]
