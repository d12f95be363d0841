"""Rows of numbers at a few bits each: levels and scales, quantised on the host, run on the drive.

A value is `level * scale`, the level a signed integer of `bits` bits, the scale one float16 a group
of neighbouring values. A level is stored with its offset added, so as an unsigned integer, values
of lower index in lower bits: 4 values a byte at 2 bits, 2 at 4, 1 at 8. At 3 bits eight values make
a word of three bytes; a row holds first the low byte of each of its words, then the middle bytes,
then the high ones, so that kernels load each of the three side by side.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

LEVEL_BITS = (2, 3, 4, 8)
_WORD_VALUES = 8  # values of a three-byte word at 3 bits

# How far the largest magnitude of a group may be clipped where that lowers the squared error.
_CLIP_RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75], np.float32)


@dataclass(frozen=True, slots=True)
class LowBitRows:
    """Rows as a program file holds them."""

    packed: U8  # [rows, hidden * bits / 8]
    scales: F16  # [rows, hidden / group]


def level_offset(bits: int) -> int:
    """What is added to a signed level before it is stored."""
    return 1 << (bits - 1)


def check_layout(hidden: int, bits: int, group: int) -> None:
    """Raises ValueError when rows of `hidden` values cannot be stored like this."""
    if bits not in LEVEL_BITS:
        raise ValueError(f"{bits} bits a value; this version knows {LEVEL_BITS}")
    if group <= 0 or hidden % group or group * bits % 8:
        raise ValueError(f"groups of {group} do not divide rows of {hidden} {bits}-bit values")


def quantise_rows(values: F32, bits: int, group: int) -> tuple[U8, F16]:
    """Low-bit levels and scales of `values` float32 [rows, hidden], each rounded to the nearest.

    Returns packed levels uint8 [rows, hidden * bits / 8] and scales float16 [rows, hidden / group].
    The sign of a scale puts the group's largest magnitude on the lowest level, of which there is
    one more; of several clippings the one with the least squared error is taken.
    Raises ValueError for a layout that `check_layout` refuses and for values that are not finite.
    """
    levels, scales = round_rows(values, bits, group)
    return pack_levels(levels, bits), scales


def round_rows(values: F32, bits: int, group: int) -> tuple[U8, F16]:
    """As `quantise_rows`, but for the levels, which are a byte each: uint8 [rows, hidden]."""
    rows = np.ascontiguousarray(values, np.float32)
    scales = fit_scales(rows, bits, group)
    levels = np.empty(rows.shape, np.uint8)
    _round_levels(rows, scales.astype(np.float32), np.int64(group), np.int64(bits), levels)
    return levels, scales


def fit_scales(values: F32, bits: int, group: int) -> F16:
    """The scales float16 [rows, hidden / group] that `quantise_rows` takes; raises as it does."""
    rows = np.ascontiguousarray(values, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"values must be [rows, hidden], not {rows.shape}")
    check_layout(rows.shape[1], bits, group)
    if not np.isfinite(rows).all():
        raise ValueError("values to quantise must be finite")
    exact = np.empty((rows.shape[0], rows.shape[1] // group), np.float32)
    _fit_scales(rows, np.int64(group), np.float32(level_offset(bits)), _CLIP_RATIOS, exact)
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("values are too large for a float16 scale")
    return scales


def pack_levels(levels: U8, bits: int) -> U8:
    """Bytes uint8 [rows, hidden * bits / 8] of stored levels uint8 [rows, hidden], offset added.

    For those who round by a rule of their own. Raises ValueError for levels of more than `bits`.
    """
    check_layout(levels.shape[1], bits, levels.shape[1])
    if levels.size and int(levels.max()) >> bits:
        raise ValueError(f"a level of {levels.max()} takes more than {bits} bits")
    if bits == 3:
        words = levels.reshape(levels.shape[0], -1, _WORD_VALUES).astype(np.uint32)
        words = np.bitwise_or.reduce(words << np.arange(0, 24, 3, dtype=np.uint32), axis=2)
        planes = [(words >> shift).astype(np.uint8) for shift in (0, 8, 16)]
        return np.concatenate(planes, axis=1)
    bytes_of = levels.reshape(levels.shape[0], -1, 8 // bits)
    shifted = bytes_of << np.arange(0, 8, bits, dtype=np.uint8)
    packed: U8 = np.bitwise_or.reduce(shifted, axis=2)
    return packed


def unpack_levels(packed: U8, bits: int) -> U8:
    """The stored levels uint8 [rows, hidden] of packed rows."""
    rows = packed.shape[0]
    if bits == 3:
        low, middle, high = packed.astype(np.uint32).reshape(rows, 3, -1).swapaxes(0, 1)
        words = (low | middle << 8 | high << 16)[:, :, None]
        return (
            (words >> np.arange(0, 24, 3, dtype=np.uint32) & 7).astype(np.uint8).reshape(rows, -1)
        )
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    levels = packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return levels.reshape(rows, -1)


def dequantise_rows(packed: U8, scales: F16, bits: int) -> F32:
    """The values float32 [rows, hidden] that the levels and scales stand for."""
    signed = unpack_levels(packed, bits).astype(np.float32) - level_offset(bits)
    group = signed.shape[1] // scales.shape[1]
    return signed * np.repeat(scales.astype(np.float32), group, axis=1)


def low_bit_bytes(rows: int, hidden: int, bits: int, group: int) -> int:
    """Bytes of levels and scales."""
    return rows * (hidden * bits // 8 + 2 * (hidden // group))


@njit(nogil=True, cache=True)
def _signed_peak(values: Any) -> Any:
    """The value with the largest magnitude."""
    peak = np.float32(0)
    for value in values:
        if abs(value) > abs(peak):
            peak = value
    return peak


@njit(nogil=True, cache=True)
def _squared_error(values: Any, scale: Any, offset: Any) -> Any:
    inverse = np.float32(1) / scale
    total = np.float32(0)
    for value in values:
        level = min(max(np.rint(value * inverse), -offset), offset - np.float32(1))
        error = value - level * scale
        total += error * error
    return total


@njit(nogil=True, cache=True)
def _fit_scales(rows: Any, group: Any, offset: Any, ratios: Any, scales: Any) -> None:
    """Fills scales [rows, groups]: for each group the candidate with the least squared error."""
    for row in range(rows.shape[0]):
        for index in range(scales.shape[1]):
            values = rows[row, index * group : (index + 1) * group]
            peak = _signed_peak(values)
            best, best_error = np.float32(0), np.float32(np.inf)
            if abs(peak) / offset > np.float32(1e-30):
                for ratio in ratios:
                    scale = -peak * ratio / offset
                    error = _squared_error(values, scale, offset)
                    if error < best_error:
                        best, best_error = scale, error
            scales[row, index] = best


@njit(nogil=True, cache=True)
def _round_levels(rows: Any, scales: Any, group: Any, bits: Any, levels: Any) -> None:
    """Fills levels [rows, hidden] with the nearest levels, offset added."""
    offset = np.float32(1 << (bits - 1))
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            scale = scales[row, column // group]
            level = np.float32(0)
            if scale != np.float32(0):
                level = np.rint(rows[row, column] / scale)
                level = min(max(level, -offset), offset - np.float32(1))
            levels[row, column] = np.uint8(np.int32(level + offset))
