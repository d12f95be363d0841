"""Dot products with rows of 4- or 8-bit levels, straight from the packed bytes.

A row is never unpacked: at 4 bits the inputs are split once into those of even and those of odd
index, so that one packed byte meets one input of each. The levels stay unsigned in the inner loop;
what their offset adds is taken off once a group, as offset * scale * (sum of the group's inputs).
The inner loop runs over the bytes of one group and adds into one accumulator a byte position, which
compiles to wide vector instructions with no sum across lanes until the row's end.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_protocol.low_bit import level_offset

F32 = npt.NDArray[np.float32]

# NaN and infinity keep their meaning: a wrong input must not look like a good score.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}
_HALF_TO_SINGLE = np.float32(2.0**112)  # exponent bias of float32 minus that of float16


@dataclass(frozen=True, slots=True)
class Activations:
    """Inputs in the order that the kernels want them, and each group's sum."""

    planes: F32  # [rows, 8 / bits, hidden * bits / 8]: values by their place in a byte
    group_sums: F32  # [rows, hidden / group]
    offset: np.float32

    @classmethod
    def normed(cls, hidden: F32, norm: F32, rms_eps: float, bits: int, group: int) -> "Activations":
        """RMSNorm of hidden float32 [rows, hidden] with weight norm [hidden]."""
        rows, width = hidden.shape
        planes = np.empty((rows, 8 // bits, width * bits // 8), np.float32)
        sums = np.empty((rows, width // group), np.float32)
        contiguous = np.ascontiguousarray(hidden, np.float32)
        _norm_and_split(contiguous, norm, np.float32(rms_eps), planes, sums)
        return cls(planes, sums, np.float32(level_offset(bits)))


def rows_dot(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint16], inputs: Activations
) -> F32:
    """Products float32 [rows, units] of every input with every packed row.

    packed uint8 [units, hidden * bits / 8]; scales [units, hidden / group], float16's bits.
    """
    products = np.empty((inputs.planes.shape[0], packed.shape[0]), np.float32)
    kernel = _dot_nibbles if inputs.planes.shape[1] == 2 else _dot_bytes
    kernel(packed, scales, inputs.planes, inputs.group_sums, inputs.offset, products)
    return products


def score_gated(gate: F32, up: F32, down_norm: F32) -> F32:
    """|silu(gate) * up| * down_norm, maximum over rows: float32 [units]; NaN counts as zero."""
    scores = np.empty(down_norm.size, np.float32)
    _score_silu(gate, up, down_norm, scores)
    return scores


@njit(inline="always")
def _single(half_bits: Any) -> Any:
    """A finite float16, subnormal or not, from its bits, with no float16 instruction needed."""
    bits = np.uint32(half_bits)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    return np.uint32(sign | magnitude).view(np.float32) * _HALF_TO_SINGLE


@njit(nogil=True, cache=True)
def _norm_and_split(hidden: Any, norm: Any, rms_eps: Any, planes: Any, group_sums: Any) -> None:
    rows, width = hidden.shape
    places, group = planes.shape[1], width // group_sums.shape[1]
    for row in range(rows):
        squares = 0.0
        for column in range(width):
            squares += float(hidden[row, column]) * float(hidden[row, column])
        inverse_rms = np.float32(1.0 / np.sqrt(squares / width + rms_eps))
        for index in range(group_sums.shape[1]):
            total = np.float32(0)
            for column in range(index * group, (index + 1) * group):
                value = hidden[row, column] * inverse_rms * norm[column]
                planes[row, column % places, column // places] = value
                total += value
            group_sums[row, index] = total


@njit(nogil=True, cache=True, fastmath=_REORDER)
def _dot_nibbles(
    packed: Any, scales: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    units, groups = scales.shape
    group_bytes = packed.shape[1] // groups
    lanes = np.empty(group_bytes, np.float32)
    for unit in range(units):
        for row in range(planes.shape[0]):
            even, odd = planes[row, 0], planes[row, 1]
            lanes[:] = 0
            shift = np.float32(0)
            for group in range(groups):
                scale = _single(scales[unit, group])
                shift += scale * group_sums[row, group]
                start = group * group_bytes
                for lane in range(group_bytes):
                    byte = packed[unit, start + lane]
                    low = np.float32(np.int32(byte & np.uint8(15)))
                    high = np.float32(np.int32(byte >> np.uint8(4)))
                    lanes[lane] += scale * (low * even[start + lane] + high * odd[start + lane])
            products[row, unit] = lanes.sum() - offset * shift


@njit(nogil=True, cache=True, fastmath=_REORDER)
def _dot_bytes(
    packed: Any, scales: Any, planes: Any, group_sums: Any, offset: Any, products: Any
) -> None:
    units, groups = scales.shape
    group_bytes = packed.shape[1] // groups
    lanes = np.empty(group_bytes, np.float32)
    for unit in range(units):
        for row in range(planes.shape[0]):
            inputs = planes[row, 0]
            lanes[:] = 0
            shift = np.float32(0)
            for group in range(groups):
                scale = _single(scales[unit, group])
                shift += scale * group_sums[row, group]
                start = group * group_bytes
                for lane in range(group_bytes):
                    level = np.float32(np.int32(packed[unit, start + lane]))
                    lanes[lane] += scale * (level * inputs[start + lane])
            products[row, unit] = lanes.sum() - offset * shift


@njit(nogil=True, cache=True)
def _score_silu(gate: Any, up: Any, down_norm: Any, scores: Any) -> None:
    for unit in range(scores.size):
        best = np.float32(0)
        for row in range(gate.shape[0]):
            silu = gate[row, unit] / (np.float32(1) + np.exp(-gate[row, unit]))
            score = abs(silu * up[row, unit]) * down_norm[unit]
            if score > best:
                best = score
        scores[unit] = best
