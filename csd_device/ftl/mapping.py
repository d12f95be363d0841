"""Reads as arrays: units -> byte ranges of the media -> pages."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.config import SECTOR_BYTES
from csd_device.nand.media import Retries

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

_NOWHERE: U8 = np.empty(0, np.uint8)


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


def cut_units(table: U32, offsets: I64, unit_bytes: int, out: U8 = _NOWHERE) -> I64:
    """Byte ranges [n, 3] (start, length, target) of units at `offsets`, packed into a flat array.

    What is unmapped has no range; it is zeroed in `out`, if that is given.
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


def lpns_of(offsets: I64, unit_bytes: int) -> tuple[I64, I64]:
    """The logical sectors of each unit, one after the other, and the row of the unit of each."""
    first = offsets // SECTOR_BYTES
    counts = (offsets + unit_bytes - 1) // SECTOR_BYTES - first + 1
    rows = np.repeat(np.arange(offsets.size), counts)
    before = np.cumsum(counts) - counts
    return np.arange(rows.size) - before[rows] + first[rows], rows


def pages_of(pieces: I64, sectors_per_page: int) -> tuple[I64, I64]:
    """Each page the pieces touch, once and ascending, and the bytes it moves: whole sectors.

    An ECC codeword is a sector, so a read of part of one moves all of it.
    """
    sectors_max = int((pieces[:, 1] // SECTOR_BYTES + 2).sum())
    psas = np.empty(sectors_max, np.int64)
    count, ascending = _list_sectors(pieces, psas)
    psas = psas[:count] if ascending else np.unique(psas[:count])
    return fold_pages(psas, sectors_per_page)


def fold_pages(psas: I64, sectors_per_page: int) -> tuple[I64, I64]:
    """The pages of ascending sectors, each once, and the bytes of them in each."""
    ppns, sizes = np.empty_like(psas), np.empty_like(psas)
    pages = _fold(psas, sectors_per_page, ppns, sizes)
    return ppns[:pages], sizes[:pages]


def extra_by_page(retries: Retries | None, ppns: I64, sectors_per_page: int) -> I64 | None:
    """What each page [n], ascending, takes longer: its slowest sector."""
    if retries is None:
        return None
    extra_ns = np.zeros(ppns.size, np.int64)
    pages = np.searchsorted(ppns, retries.psas // sectors_per_page)
    np.maximum.at(extra_ns, pages, retries.extra_ns)
    return extra_ns
