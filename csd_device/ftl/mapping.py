"""The L2P table, and reads as arrays: units -> byte ranges of the media -> pages.

The table has one 32-bit entry a logical sector: PSA + 1, or 0 where nothing is mapped. It is all
zeroes at first and touched where something is written, so an empty drive takes no memory for it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.config import SECTOR_BYTES

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

SCAN_SECTORS = 1 << 20  # of the table at a time, so that temporaries stay small


@njit(nogil=True, cache=True)
def _cut(table: Any, offsets: Any, unit_bytes: Any, out: Any, pieces: Any) -> Any:
    """Fills `pieces` [:, 3] with start, length, target; zeroes what is unmapped; how many.

    Pieces that follow each other both on the media and in `out` become one.
    """
    count = 0
    expected: Any = np.int64(-1)  # media address that would extend the last piece
    for unit in range(offsets.shape[0]):
        offset = offsets[unit]
        target = unit * unit_bytes
        end = offset + unit_bytes
        while offset < end:
            lpn = offset // SECTOR_BYTES
            inner = offset - lpn * SECTOR_BYTES
            length = min(SECTOR_BYTES - inner, end - offset)
            entry = np.int64(table[lpn])
            start = (entry - 1) * SECTOR_BYTES + inner
            if entry == 0:
                out[target : target + length] = 0
                expected = -1
            elif start == expected:
                pieces[count - 1, 1] += length
                expected += length
            else:
                pieces[count, 0], pieces[count, 1], pieces[count, 2] = start, length, target
                count += 1
                expected = start + length
            offset += length
            target += length
    return count


@njit(nogil=True, cache=True)
def _list_sectors(pieces: Any, psas: Any) -> Any:
    """Fills `psas` with the sectors of the pieces; how many, and whether strictly ascending."""
    count = 0
    last = np.int64(-1)
    ascending = True
    for index in range(pieces.shape[0]):
        psa = pieces[index, 0] // SECTOR_BYTES
        end = (pieces[index, 0] + pieces[index, 1] - 1) // SECTOR_BYTES + 1
        if psa == last:
            psa += 1
        elif psa < last:
            ascending = False
        while psa < end:
            psas[count] = psa
            count += 1
            last = psa
            psa += 1
    return count, ascending


@njit(nogil=True, cache=True)
def _fold(psas: Any, sectors_per_page: Any, ppns: Any, sizes: Any) -> Any:
    """Ascending sectors to pages and bytes of each; how many pages."""
    count = 0
    for index in range(psas.shape[0]):
        ppn = psas[index] // sectors_per_page
        if count == 0 or ppns[count - 1] != ppn:
            ppns[count] = ppn
            sizes[count] = 0
            count += 1
        sizes[count - 1] += SECTOR_BYTES
    return count


@njit(nogil=True, cache=True)
def _list_runs(part: Any, first_lpn: Any, runs: Any) -> Any:
    """Fills `runs` [:, 3] with lpn, psa, count of what is mapped in a part of the table."""
    count = 0
    for index in range(part.shape[0]):
        entry = np.int64(part[index])
        if entry == 0:
            continue
        lpn = first_lpn + index
        psa = entry - 1
        if count > 0:
            run = runs[count - 1]
            if run[0] + run[2] == lpn and run[1] + run[2] == psa:
                run[2] += 1
                continue
        runs[count, 0], runs[count, 1], runs[count, 2] = lpn, psa, 1
        count += 1
    return count


def cut_units(table: U32, offsets: I64, unit_bytes: int, out: U8) -> I64:
    """Byte ranges [n, 3] (start, length, target) of units at `offsets` into the flat `out`.

    What is unmapped is zeroed in `out` and has no range.
    """
    per_unit = (unit_bytes - 1) // SECTOR_BYTES + 2
    pieces = np.empty((offsets.size * per_unit, 3), np.int64)
    return pieces[: _cut(table, offsets, unit_bytes, out, pieces)]


def whole_units(pieces: I64, count: int, unit_bytes: int) -> I64 | None:
    """The media address of each unit of `cut_units` [count]; None when one is in several pieces."""
    targets = np.arange(count) * unit_bytes
    piece = np.searchsorted(pieces[:, 2], targets, side="right") - 1
    if not pieces.size or piece[0] < 0:
        return None
    inner = targets - pieces[piece, 2]
    if (inner + unit_bytes > pieces[piece, 1]).any():
        return None
    starts: I64 = pieces[piece, 0] + inner
    return starts


def pages_of(pieces: I64, sectors_per_page: int) -> tuple[I64, I64]:
    """Each page the pieces touch, once and ascending, and the bytes it moves: whole sectors.

    An ECC codeword is a sector, so a read of part of one moves all of it.
    """
    sectors_max = int((pieces[:, 1] // SECTOR_BYTES + 2).sum())
    psas = np.empty(sectors_max, np.int64)
    count, ascending = _list_sectors(pieces, psas)
    psas = psas[:count] if ascending else np.unique(psas[:count])
    ppns, sizes = np.empty_like(psas), np.empty_like(psas)
    pages = _fold(psas, sectors_per_page, ppns, sizes)
    return ppns[:pages], sizes[:pages]


def parts_of(table: U32) -> Iterator[tuple[int, U32]]:
    """The table in views of at most SCAN_SECTORS entries, each with its first LPN."""
    for lpn in range(0, table.size, SCAN_SECTORS):
        yield lpn, table[lpn : lpn + SCAN_SECTORS]


def runs_of(table: U32) -> I64:
    """All mapped sectors as runs [n, 3]: lpn, psa, count."""
    found = []
    for lpn, part in parts_of(table):
        if part.any():
            runs = np.empty((part.size, 3), np.int64)
            found.append(runs[: _list_runs(part, lpn, runs)].copy())
    return np.concatenate(found) if found else np.empty((0, 3), np.int64)


def count_by_superblock(entries: U32, sectors_per_superblock: int, superblocks: int) -> I64:
    """How many of these table entries point into each superblock [superblocks]."""
    psas = entries[entries != 0].astype(np.int64) - 1
    return np.bincount(psas // sectors_per_superblock, minlength=superblocks)
