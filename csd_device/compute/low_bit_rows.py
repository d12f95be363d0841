"""Arithmetic with rows of 2-, 3-, 4- or 8-bit levels, straight from the packed bytes.

A row is never unpacked: inputs are split once into *planes*, one for each place of a value in its
byte (or in its three-byte word, at 3 bits), so that one packed byte meets one input of each plane.
The levels stay unsigned in the inner loop; what their offset adds is taken off once a group, as
offset * scale * (sum of the group's inputs). The inner loop runs over the bytes of one group and
adds into one accumulator a byte position, which compiles to wide vector instructions with no sum
across lanes until the row's end; at 3 bits, where a group has few words, it runs over the whole row
with a scale for each. `add_rows` runs the same way backwards: its accumulators are planes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.compute.half_rows import REORDER, inverse_rms, single
from csd_protocol.low_bit import level_offset

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

PLACES = {2: 4, 3: 8, 4: 2, 8: 1}  # values of a byte, or of a three-byte word, by bits
ALL_ROWS: I64 = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Low-bit rows as a program file holds them."""

    packed: npt.NDArray[np.uint8]  # [rows, columns * bits / 8]
    scales: npt.NDArray[np.uint16]  # [rows, columns / group], float16's bits
    bits: int

    @property
    def count(self) -> int:
        return len(self.scales)

    @property
    def columns(self) -> int:
        return len(self.packed[0]) * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class Activations:
    """Inputs in the order that the kernels want them, and each group's sum."""

    planes: F32  # [rows, places, columns / places]: values by their place in a byte or word
    group_sums: F32  # [rows, columns / group]
    offset: np.float32

    @classmethod
    def normed(cls, hidden: F32, norm: F32, rms_eps: float, bits: int, group: int) -> "Activations":
        """RMSNorm of hidden float32 [rows, hidden] with weight norm [hidden]."""
        made = cls._empty(hidden, bits, group)
        contiguous = np.ascontiguousarray(hidden, np.float32)
        _norm_and_split(contiguous, norm, np.float32(rms_eps), made.planes, made.group_sums)
        return made

    @classmethod
    def scaled(cls, inputs: F32, factors: F32, bits: int, group: int) -> "Activations":
        """Inputs float32 [rows, columns], each column times its factor."""
        made = cls._empty(inputs, bits, group)
        contiguous = np.ascontiguousarray(inputs, np.float32)
        _scale_and_split(contiguous, factors, made.planes, made.group_sums)
        return made

    @classmethod
    def _empty(cls, inputs: F32, bits: int, group: int) -> "Activations":
        places, (rows, columns) = PLACES[bits], inputs.shape
        return cls(
            np.empty((rows, places, columns // places), np.float32),
            np.empty((rows, columns // group), np.float32),
            np.float32(level_offset(bits)),
        )


def rows_dot(rows: PackedRows, inputs: Activations, chosen: I64 = ALL_ROWS) -> F32:
    """Products float32 [input rows, packed rows] of every input with every packed row.

    `chosen`, where it names any, says which packed rows, and how many products there are.
    """
    count = chosen.size or rows.count
    products = np.empty((inputs.planes.shape[0], count), np.float32)
    kernel = _DOTS[rows.bits]
    kernel(
        rows.packed,
        rows.scales,
        chosen,
        inputs.planes,
        inputs.group_sums,
        inputs.offset,
        products,
    )
    return products


def add_rows(rows: PackedRows, factors: F32, chosen: I64 = ALL_ROWS) -> F32:
    """Sums float32 [input rows, columns] of packed rows, each times its factor.

    factors [input rows, packed rows], or [input rows, chosen rows] where `chosen` names any.
    """
    places = PLACES[rows.bits]
    inputs, groups = factors.shape[0], rows.scales.shape[1]
    planes = np.zeros((inputs, places, rows.columns // places), np.float32)
    group_sums = np.zeros((inputs, groups), np.float32)
    bits = np.int64(rows.bits)
    _sum_rows(rows.packed, rows.scales, chosen, factors, bits, planes, group_sums)
    offsets = np.repeat(group_sums * np.float32(level_offset(rows.bits)), rows.columns // groups, 1)
    with np.errstate(invalid="ignore"):  # of sums past float32, which a program may be made for
        together: F32 = planes.transpose(0, 2, 1).reshape(inputs, rows.columns) - offsets
    return together


# ---- inputs -----------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _norm_and_split(hidden: Any, norm: Any, rms_eps: Any, planes: Any, group_sums: Any) -> None:
    for row in range(hidden.shape[0]):
        factor = inverse_rms(hidden[row], rms_eps)
        _split(hidden[row], factor, norm, planes[row], group_sums[row])


@njit(nogil=True, cache=True)
def _scale_and_split(inputs: Any, factors: Any, planes: Any, group_sums: Any) -> None:
    for row in range(inputs.shape[0]):
        _split(inputs[row], np.float32(1), factors, planes[row], group_sums[row])


@njit(inline="always")
def _split(row: Any, factor: Any, factors: Any, planes: Any, group_sums: Any) -> None:
    places, group = planes.shape[0], row.size // group_sums.size
    for index in range(group_sums.size):
        total = np.float32(0)
        for column in range(index * group, (index + 1) * group):
            value = row[column] * factor * factors[column]
            planes[column % places, column // places] = value
            total += value
        group_sums[index] = total


# ---- products: one kernel a width, alike but for the inner loop ---------------------------------


@njit(nogil=True, cache=True, fastmath=REORDER)
def _dot_2(
    packed: Any, scales: Any, chosen: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    groups = scales.shape[1]
    group_bytes = packed.shape[1] // groups
    lanes = np.empty(group_bytes, np.float32)
    for index in range(products.shape[1]):
        unit = chosen[index] if chosen.size else index
        for row in range(planes.shape[0]):
            first, second = planes[row, 0], planes[row, 1]
            third, fourth = planes[row, 2], planes[row, 3]
            lanes[:] = 0
            shift = np.float32(0)
            for group in range(groups):
                scale = single(scales[unit, group])
                shift += scale * group_sums[row, group]
                start = group * group_bytes
                for lane in range(group_bytes):
                    at, byte = start + lane, packed[unit, start + lane]
                    lanes[lane] += scale * (
                        np.float32(np.int32(byte & np.uint8(3))) * first[at]
                        + np.float32(np.int32((byte >> np.uint8(2)) & np.uint8(3))) * second[at]
                        + np.float32(np.int32((byte >> np.uint8(4)) & np.uint8(3))) * third[at]
                        + np.float32(np.int32(byte >> np.uint8(6))) * fourth[at]
                    )
            products[row, index] = lanes.sum() - offset * shift


@njit(nogil=True, cache=True, fastmath=REORDER)
def _dot_3(
    packed: Any, scales: Any, chosen: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    groups, width = scales.shape[1], planes.shape[2]
    lanes = width // groups
    words, lane_scales = np.empty(width, np.int32), np.empty(width, np.float32)
    for index in range(products.shape[1]):
        unit = chosen[index] if chosen.size else index
        _read_words(packed[unit], words)
        for group in range(groups):
            lane_scales[group * lanes : (group + 1) * lanes] = single(scales[unit, group])
        for row in range(planes.shape[0]):
            inputs = planes[row]
            shift, total = np.float32(0), np.float32(0)
            for group in range(groups):
                shift += lane_scales[group * lanes] * group_sums[row, group]
            for at in range(width):
                word = words[at]
                total += lane_scales[at] * (
                    np.float32(word & np.int32(7)) * inputs[0, at]
                    + np.float32((word >> np.int32(3)) & np.int32(7)) * inputs[1, at]
                    + np.float32((word >> np.int32(6)) & np.int32(7)) * inputs[2, at]
                    + np.float32((word >> np.int32(9)) & np.int32(7)) * inputs[3, at]
                    + np.float32((word >> np.int32(12)) & np.int32(7)) * inputs[4, at]
                    + np.float32((word >> np.int32(15)) & np.int32(7)) * inputs[5, at]
                    + np.float32((word >> np.int32(18)) & np.int32(7)) * inputs[6, at]
                    + np.float32(word >> np.int32(21)) * inputs[7, at]
                )
            products[row, index] = total - offset * shift


@njit(nogil=True, cache=True, fastmath=REORDER)
def _dot_4(
    packed: Any, scales: Any, chosen: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    groups = scales.shape[1]
    group_bytes = packed.shape[1] // groups
    lanes = np.empty(group_bytes, np.float32)
    for index in range(products.shape[1]):
        unit = chosen[index] if chosen.size else index
        for row in range(planes.shape[0]):
            even, odd = planes[row, 0], planes[row, 1]
            lanes[:] = 0
            shift = np.float32(0)
            for group in range(groups):
                scale = single(scales[unit, group])
                shift += scale * group_sums[row, group]
                start = group * group_bytes
                for lane in range(group_bytes):
                    byte = packed[unit, start + lane]
                    low = np.float32(np.int32(byte & np.uint8(15)))
                    high = np.float32(np.int32(byte >> np.uint8(4)))
                    lanes[lane] += scale * (low * even[start + lane] + high * odd[start + lane])
            products[row, index] = lanes.sum() - offset * shift


@njit(nogil=True, cache=True, fastmath=REORDER)
def _dot_8(
    packed: Any, scales: Any, chosen: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    groups = scales.shape[1]
    group_bytes = packed.shape[1] // groups
    lanes = np.empty(group_bytes, np.float32)
    for index in range(products.shape[1]):
        unit = chosen[index] if chosen.size else index
        for row in range(planes.shape[0]):
            inputs = planes[row, 0]
            lanes[:] = 0
            shift = np.float32(0)
            for group in range(groups):
                scale = single(scales[unit, group])
                shift += scale * group_sums[row, group]
                start = group * group_bytes
                for lane in range(group_bytes):
                    level = np.float32(np.int32(packed[unit, start + lane]))
                    lanes[lane] += scale * (level * inputs[start + lane])
            products[row, index] = lanes.sum() - offset * shift


# ---- sums -------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath=REORDER)
def _sum_rows(
    packed: Any, scales: Any, chosen: Any, factors: Any, bits: Any, planes: Any, group_sums: Any
) -> None:
    """Adds to planes [rows, places, columns / places] and group sums, both zero before.

    One place at a time over the whole row: a loop with one array to write to becomes vector code.
    """
    groups, width = scales.shape[1], planes.shape[2]
    lanes = width // groups
    words, lane_factors = np.empty(width, np.int32), np.empty(width, np.float32)
    mask = np.int32((1 << bits) - 1)
    for index in range(factors.shape[1]):
        unit = chosen[index] if chosen.size else index
        _read_words(packed[unit], words)
        for row in range(planes.shape[0]):
            for group in range(groups):
                scale = single(scales[unit, group]) * factors[row, index]
                group_sums[row, group] += scale
                lane_factors[group * lanes : (group + 1) * lanes] = scale
            for place in range(planes.shape[1]):
                sums, shift = planes[row, place], np.int32(bits * place)
                for at in range(width):
                    sums[at] += lane_factors[at] * np.float32((words[at] >> shift) & mask)


@njit(inline="always")
def _read_words(row: Any, words: Any) -> None:
    """The bytes of a row, or at 3 bits its three-byte words, as integers."""
    width = words.size
    if row.size == width:
        for at in range(width):
            words[at] = np.int32(row[at])
    else:
        for at in range(width):
            word = np.int32(row[at]) | (np.int32(row[width + at]) << np.int32(8))
            words[at] = word | (np.int32(row[2 * width + at]) << np.int32(16))


_DOTS: dict[int, Callable[..., None]] = {2: _dot_2, 3: _dot_3, 4: _dot_4, 8: _dot_8}
