"""Rows of units at 12 bits a value, as they lie on a drive: bfloat16 without loss.

Of a weight's 16 bits, sign and mantissa are as good as random, but the 8 of its exponent say
little: the weights of a row lie within a few powers of two of each other. That the exponents of
trained models hold about 2.6 bits was published with DFloat11 (arXiv 2504.11651), which gives them
Huffman codes. Here each has 4 bits, so that all rows of a site have one size, and a row is decoded
in registers. In groups of 32, as rows of levels are (`low_bit_units`), a row of `cols` values has

    cols bytes        sign (bit 7) and mantissa of each value
    cols / 2 bytes    codes, 16 bytes a group: byte i has the code of value i of the group in its
                      low half, that of value i + 16 in its high one
    1 byte            base, and three bytes of zero
    4 bytes each      patches: column and value, uint16 each, until the row is whole lines

A value is bfloat16(sign, code in the place of the exponent, mantissa) * 2 ** base. So code 0 is a
zero and, in a row of base 0, a subnormal; another code is the exponent base + code. A value that
has no code is a patch, and where it would lie is 0. Patches come in order of columns; the first
whose column is none of the row's (NO_COLUMN) ends them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_protocol.low_bit_units import GROUP, pack_nibbles, unpack_nibbles

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

COLS_MAX = 65504  # whole groups, of columns that are less than NO_COLUMN
NO_COLUMN = 0xFFFF
_EXPONENT_SHIFT = 7  # of bfloat16
_CODES = 15  # that stand for exponents other than 0
_EXPONENTS = 256
_BASE_MAX = 127  # 2 ** base is a float32, and a value no more than 65280
PATCH_BYTES = 4  # and as many for the base
_LINE_BYTES = 64  # rows are whole lines: what copies units line by line takes them
_PATCHES_LEAST, _COLS_PER_PATCH = 4, 128


class TooManyPatches(ValueError):
    """A row with more exponents that no code stands for than it has patches."""

    def __init__(self, row: int, patches: int, room: int) -> None:
        super().__init__(f"row {row} needs {patches} patches and has {room}")
        self.row, self.patches, self.room = row, patches, room


def patches_of(cols: int) -> int:
    """How many patches a row has room for: one for 128 values and four more, at least."""
    return (lossless_row_bytes(cols) - _coded_bytes(cols)) // PATCH_BYTES - 1


def lossless_row_bytes(cols: int) -> int:
    """Bytes of one row. Raises ValueError for a row of no whole groups, or of too many."""
    if cols % GROUP:
        raise ValueError(f"{cols} values at 12 bits are not whole groups of {GROUP}")
    if cols > COLS_MAX:
        raise ValueError(f"{cols} values at 12 bits; a row has {COLS_MAX} at most")
    least = cols // _COLS_PER_PATCH + _PATCHES_LEAST
    return -(-(_coded_bytes(cols) + (1 + least) * PATCH_BYTES) // _LINE_BYTES) * _LINE_BYTES


def _coded_bytes(cols: int) -> int:
    return cols + cols // 2


def encode_rows(patterns: U16) -> U8:
    """Rows uint8 [rows, row bytes] of bfloat16's bit patterns uint16 [rows, cols].

    Each row has the base that leaves it the fewest patches. Raises TooManyPatches for the first row
    in which even those are too many; ValueError as `lossless_row_bytes` does.
    """
    count, cols = patterns.shape
    row_bytes, room = lossless_row_bytes(cols), patches_of(cols)
    signed, codes = np.empty((count, cols), np.uint8), np.empty((count, cols), np.uint8)
    tail = np.zeros((count, 2 * (1 + room)), "<u2")
    tail[:, 2::2] = NO_COLUMN
    needed = np.empty(count, np.int64)
    _encode(patterns, signed, codes, tail, needed)
    if (needed > room).any():
        row = int(np.argmax(needed > room))
        raise TooManyPatches(row, int(needed[row]), room)
    rows = np.concatenate([signed, pack_nibbles(codes), tail.view(np.uint8)], axis=1)
    assert rows.shape == (count, row_bytes)
    return rows


def decode_rows(rows: U8, cols: int) -> U16:
    """The bit patterns uint16 [rows, cols] that rows uint8 [rows, row bytes] stand for."""
    signed, tail = rows[:, :cols].astype(np.uint16), rows[:, cols * 3 // 2 :]
    codes = unpack_nibbles(rows[:, cols : cols * 3 // 2]).astype(np.uint16)
    exponents = np.where(codes > 0, codes + tail[:, :1], 0).astype(np.uint16)
    signs = (signed & np.uint16(0x80)) << np.uint16(8)
    patterns: U16 = signs | signed & np.uint16(0x7F) | exponents << np.uint16(_EXPONENT_SHIFT)
    patches = np.ascontiguousarray(tail).view("<u2")
    columns, values = patches[:, 2::2], patches[:, 3::2]
    used = np.logical_and.accumulate(columns < cols, axis=1)
    patterns[np.nonzero(used)[0], columns[used]] = values[used]
    return patterns


@njit(nogil=True, cache=True)
def _best_base(counts: Any) -> Any:
    """The base that leaves the fewest patches, and how many, of how often each exponent is [256].

    Of the exponent 0 are subnormals alone.
    """
    covered, base = counts[: 1 + _CODES].sum(), 0
    best, total = covered, counts.sum()
    for candidate in range(1, _BASE_MAX + 1):
        covered += counts[candidate + _CODES] - counts[candidate]
        if candidate == 1:
            covered -= counts[0]
        if covered > best:
            best, base = covered, candidate
    return base, total - best


@njit(nogil=True, cache=True)
def _encode(patterns: Any, signed: Any, codes: Any, tail: Any, needed: Any) -> None:
    """Fills all but patterns; `needed` [rows] counts patches that have no room as well."""
    counts = np.empty(_EXPONENTS, np.int64)
    for row in range(patterns.shape[0]):
        counts[:] = 0
        zeros = 0
        for pattern in patterns[row]:
            counts[(pattern >> _EXPONENT_SHIFT) & 0xFF] += 1
            zeros += (pattern & 0x7FFF) == 0
        counts[0] -= zeros
        base, needed[row] = _best_base(counts)
        tail[row, 0] = base
        _encode_row(patterns[row], np.int32(base), signed[row], codes[row])
        if needed[row]:
            _note_patches(patterns[row], base, tail[row, 2:])


@njit(nogil=True, cache=True)
def _encode_row(patterns: Any, base: Any, signed: Any, codes: Any) -> None:
    """Everything of a row but its patches, which are 0."""
    for column in range(patterns.shape[0]):
        pattern = np.int32(patterns[column])
        code = (pattern >> np.int32(_EXPONENT_SHIFT) & np.int32(0xFF)) - base
        has_code = (code > np.int32(0)) & (code <= np.int32(_CODES))
        is_zero = (pattern & np.int32(0x7FFF)) == np.int32(0)
        is_coded = has_code | is_zero | ((code == np.int32(0)) & (base == np.int32(0)))
        sign_and_mantissa = pattern >> np.int32(8) & np.int32(0x80) | pattern & np.int32(0x7F)
        signed[column] = sign_and_mantissa if is_coded else np.int32(0)
        codes[column] = code if has_code else np.int32(0)


@njit(nogil=True, cache=True)
def _note_patches(patterns: Any, base: Any, patches: Any) -> None:
    """Notes the values that have no code, as long as there is room for them."""
    at = 0
    for column in range(patterns.shape[0]):
        magnitude = np.int64(patterns[column]) & 0x7FFF
        code = (magnitude >> _EXPONENT_SHIFT) - base
        if magnitude and not 0 < code <= _CODES and not (code == 0 and base == 0):
            if at >= patches.shape[0]:
                return
            patches[at] = column
            patches[at + 1] = patterns[column]
            at += 2
