"""L2P and P2L: which physical sector holds a logical one, and the other way round.

Both tables have 32-bit entries, one more than the number they stand for, and 0 for none: `table` by
LPN, `reverse` by PSA. Each is the other's inverse at all times, and `valid` counts the entries of
`reverse` in each superblock. Pages of the tables take memory when they are first written, so an
empty drive of any size takes none; what was touched is known by chunks of CHUNK_SECTORS, and
nothing else is ever scanned.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.lazy_memory import lazy_zeroes

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

CHUNK_SECTORS = 1 << 16
RUN_MARK = 0xFFFFFFFF  # no LPN: see `csd_device.ftl.journal`


@njit(nogil=True, cache=True)
def _forget(table: Any, reverse: Any, valid: Any, size: Any, lpn: Any) -> None:
    psa = np.int64(table[lpn]) - 1
    if psa >= 0:
        reverse[psa] = 0
        valid[psa // size] -= 1


@njit(nogil=True, cache=True)
def _map(
    table: Any, reverse: Any, valid: Any, touched: Any, size: Any, lpn: Any, psa: Any, count: Any
) -> None:
    """Maps `count` sectors from `lpn` on to those from `psa` on."""
    for index in range(count):
        _forget(table, reverse, valid, size, lpn + index)
        table[lpn + index] = psa + index + 1
        reverse[psa + index] = lpn + index + 1
        valid[(psa + index) // size] += 1
        touched[(lpn + index) // CHUNK_SECTORS] = True


@njit(nogil=True, cache=True)
def _unmap(
    table: Any, reverse: Any, valid: Any, touched: Any, size: Any, lpn: Any, count: Any
) -> None:
    at, end = lpn, lpn + count
    while at < end:
        chunk_end = min(end, (at // CHUNK_SECTORS + 1) * CHUNK_SECTORS)
        if touched[at // CHUNK_SECTORS]:
            for each in range(at, chunk_end):
                if table[each]:
                    _forget(table, reverse, valid, size, each)
                    table[each] = 0
        at = chunk_end


@njit(nogil=True, cache=True)
def _move(
    table: Any, reverse: Any, valid: Any, size: Any, lpns: Any, psa: Any, rows: Any
) -> Any:  # fmt: skip
    """Maps `lpns` to the sectors from `psa` on; the journal's rows of that; how many rows."""
    count = 0
    run: Any = np.int64(0)  # sectors in the run that the last row stands for
    for index in range(lpns.shape[0]):
        lpn = lpns[index]
        _forget(table, reverse, valid, size, lpn)
        table[lpn] = psa + index + 1
        reverse[psa + index] = lpn + 1
        valid[(psa + index) // size] += 1
        if run and lpns[index - 1] + 1 == lpn:
            run += 1
            if run == 2:
                rows[count, 0], rows[count, 1] = rows[count - 1, 0], rows[count - 1, 1]
                rows[count - 1, 0] = RUN_MARK
                count += 1
            rows[count - 2, 1] = run
        else:
            rows[count, 0], rows[count, 1] = lpn, psa + index + 1
            count += 1
            run = 1
    return count


@njit(nogil=True, cache=True)
def _replay(table: Any, reverse: Any, valid: Any, touched: Any, size: Any, rows: Any) -> Any:
    """Does what journal rows say; False: one of them names a sector that there is not."""
    index = 0
    while index < rows.shape[0]:
        count = np.int64(1)
        if rows[index, 0] == RUN_MARK:
            count = np.int64(rows[index, 1])
            index += 1
            if index == rows.shape[0]:
                return False
        lpn, entry = np.int64(rows[index, 0]), np.int64(rows[index, 1])
        index += 1
        if lpn + count > table.shape[0] or entry + count - 1 > reverse.shape[0]:
            return False
        if entry:
            _map(table, reverse, valid, touched, size, lpn, entry - 1, count)
        else:
            _unmap(table, reverse, valid, touched, size, lpn, count)
    return True


@njit(nogil=True, cache=True)
def _load(
    table: Any, reverse: Any, valid: Any, touched: Any, size: Any, lpn: Any, entries: Any
) -> Any:
    """Fills a chunk of the empty table; False: an entry names a sector that there is not."""
    for index in range(entries.shape[0]):
        entry = np.int64(entries[index])
        if entry == 0:
            continue
        if lpn + index >= table.shape[0] or entry > reverse.shape[0]:
            return False
        table[lpn + index] = entry
        reverse[entry - 1] = lpn + index + 1
        valid[(entry - 1) // size] += 1
        touched[(lpn + index) // CHUNK_SECTORS] = True
    return True


@njit(nogil=True, cache=True)
def _list_valid(reverse: Any, start: Any, end: Any, psas: Any) -> Any:
    """Fills `psas` with the next sectors that hold data; how many, and where the search ended."""
    count = 0
    while start < end and count < psas.shape[0]:
        if reverse[start]:
            psas[count] = start
            count += 1
        start += 1
    return count, start


class TwoWayMap:
    """`valid` [superblocks] is kept up to date in place."""

    def __init__(self, logical: int, physical: int, superblock_sectors: int, valid: I64) -> None:
        """Nothing is mapped. `logical`, `physical`: sectors."""
        self.table: U32 = lazy_zeroes(logical, np.uint32)
        self.reverse: U32 = lazy_zeroes(physical, np.uint32)
        self._size = superblock_sectors
        self._valid = valid
        self._touched = np.zeros(-(-logical // CHUNK_SECTORS), np.bool_)

    def map_run(self, lpn: int, psa: int, count: int) -> None:
        table, reverse = self.table, self.reverse
        _map(table, reverse, self._valid, self._touched, self._size, lpn, psa, count)

    def unmap(self, lpn: int, count: int) -> None:
        _unmap(self.table, self.reverse, self._valid, self._touched, self._size, lpn, count)

    def move(self, lpns: I64, psa: int) -> U32:
        """Maps these (mapped) sectors to those from `psa` on; the journal's rows [n, 2] of that."""
        rows = np.empty((lpns.size + 1, 2), np.uint32)
        return rows[: _move(self.table, self.reverse, self._valid, self._size, lpns, psa, rows)]

    def replay(self, rows: U32) -> bool:
        """Does what the journal's rows [n, 2] say; False when they name what is not there."""
        table, reverse = self.table, self.reverse
        return bool(_replay(table, reverse, self._valid, self._touched, self._size, rows))

    def load(self, lpn: int, entries: U32) -> bool:
        """Fills in table entries from `lpn` on; False when they name what is not there."""
        table, reverse = self.table, self.reverse
        return bool(_load(table, reverse, self._valid, self._touched, self._size, lpn, entries))

    def list_valid(self, start: int, end: int, limit: int) -> tuple[I64, int]:
        """The next sectors, at most `limit`, that hold data; and where the search ended."""
        psas = np.empty(limit, np.int64)
        count, start = _list_valid(self.reverse, start, end, psas)
        return psas[:count], start

    @property
    def chunk_count(self) -> int:
        """Chunks of the table that anything was ever mapped in."""
        return int(np.count_nonzero(self._touched))

    def chunks(self) -> Iterator[tuple[int, U32]]:
        """First LPN and entries of each of them."""
        for chunk in np.flatnonzero(self._touched).tolist():
            first = chunk * CHUNK_SECTORS
            yield first, self.table[first : first + CHUNK_SECTORS]

    def check(self) -> None:
        """Asserts that both tables and `valid` agree, as far as anything was ever touched."""
        mapped = 0
        for first, entries in self.chunks():
            lpns = first + np.flatnonzero(entries)
            psas = self.table[lpns].astype(np.int64) - 1
            assert (self.reverse[psas] == lpns + 1).all(), "P2L is not the inverse of L2P"
            mapped += lpns.size
        assert self._valid.sum() == mapped, "valid sectors are not those mapped"
        for superblock in range(self._valid.size):
            part = self.reverse[superblock * self._size : (superblock + 1) * self._size]
            if self._valid[superblock]:
                assert np.count_nonzero(part) == self._valid[superblock], superblock
