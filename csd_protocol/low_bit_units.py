"""Rows of units at 8 or 4 bits a value, as they lie on a drive.

A row of `cols` values is cut into groups of 32. First lie the levels of all groups, then a float16
scale for each, then, at 4 bits, a float16 minimum for each:

    8 bits    value = level * scale              a signed byte each
    4 bits    value = level * scale + minimum    16 bytes a group: byte i has value i of the group
                                                 in its low half, value i + 16 in its high one

So a row is one run of bytes, and a unit of several rows as well: 8.5 and 5 bits a value. Levels of
GGUF's Q8_0, Q4_1 and Q4_0 (whose minimum is -8 scales) lie here as they are there.
"""

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

GROUP = 32
_NUMBERS = {8: 1, 4: 2}  # float16 numbers of a group
_NUMBER_BYTES = 2


def low_bit_row_bytes(cols: int, bits: int) -> int:
    """Bytes of one row. Raises ValueError for a row that is not of whole groups."""
    if cols % GROUP:
        raise ValueError(f"{cols} values at {bits} bits are not whole groups of {GROUP}")
    return cols * bits // 8 + cols // GROUP * _NUMBERS[bits] * _NUMBER_BYTES


def pack_nibbles(levels: U8) -> U8:
    """4-bit levels uint8 [rows, cols] as bytes [rows, cols / 2]."""
    halves = levels.reshape(levels.shape[0], -1, 2, GROUP // 2)
    packed: U8 = halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)
    return packed.reshape(levels.shape[0], -1)


def unpack_nibbles(packed: U8) -> U8:
    """The levels uint8 [rows, cols] of bytes [rows, cols / 2]."""
    groups = packed.reshape(packed.shape[0], -1, GROUP // 2)
    levels = np.concatenate([groups & np.uint8(15), groups >> np.uint8(4)], axis=2)
    return levels.reshape(packed.shape[0], -1)


def join_rows(packed: U8, *numbers: F16) -> U8:
    """Rows uint8 [rows, row bytes] of packed levels, and of scales and minima [rows, groups]."""
    parts = [np.ascontiguousarray(part, "<f2").view(np.uint8) for part in numbers]
    return np.concatenate([packed, *parts], axis=1)


def decode_rows(rows: U8, cols: int, bits: int) -> F32:
    """The values float32 [rows, cols] that rows uint8 [rows, row bytes] stand for."""
    count, groups, level_bytes = rows.shape[0], cols // GROUP, cols * bits // 8
    packed = np.ascontiguousarray(rows[:, :level_bytes])
    numbers = np.ascontiguousarray(rows[:, level_bytes:]).view("<f2").astype(np.float32)
    numbers = numbers.reshape(count, _NUMBERS[bits], groups, 1)
    if bits == 8:
        levels = packed.view(np.int8).reshape(count, groups, GROUP)
        return (levels * numbers[:, 0]).reshape(count, cols)
    nibbles = unpack_nibbles(packed).reshape(count, groups, GROUP)
    return (nibbles * numbers[:, 0] + numbers[:, 1]).reshape(count, cols)
