"""Dot products with rows of float16, straight from their bits, and the arithmetic around them.

A row is never widened as a whole: the inner loop turns as many values as fit a vector register.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

# NaN and infinity keep their meaning: a wrong input must not look like a good score.
REORDER = {"reassoc", "contract", "nsz", "arcp"}
_HALF_TO_SINGLE = np.float32(2.0**112)  # exponent bias of float32 minus that of float16


def half_dot(weights: U16, inputs: F32) -> F32:
    """Products float32 [rows, outputs] of inputs [rows, columns] with every row of weights.

    weights uint16 [outputs, columns], float16's bits.
    """
    products = np.empty((inputs.shape[0], weights.shape[0]), np.float32)
    _half_dot(weights, inputs, products)
    return products


def rms_norm(hidden: F32, norm: F32, rms_eps: float) -> F32:
    """RMSNorm of hidden float32 [rows, hidden] with weight norm [hidden]."""
    normed = np.empty(hidden.shape, np.float32)
    _rms_norm(np.ascontiguousarray(hidden, np.float32), norm, np.float32(rms_eps), normed)
    return normed


def highest_over_rows(products: F32) -> F32:
    """The maximum over rows of products [rows, units]; minus infinity where none is a number."""
    scores = np.empty(products.shape[1], np.float32)
    _highest_over_rows(products, scores)
    return scores


def score_gated(gate: F32, up: F32, down_norm: F32) -> F32:
    """|silu(gate) * up| * down_norm, maximum over rows: float32 [units]; NaN counts as zero."""
    scores = np.empty(down_norm.size, np.float32)
    _score_silu(gate, up, down_norm, scores)
    return scores


def gated(gate: F32, up: F32) -> F32:
    """silu(gate) * up, float32 [rows, units]."""
    activities = np.empty(gate.shape, np.float32)
    _silu_times(gate.reshape(-1), up.reshape(-1), activities.reshape(-1))
    return activities


@njit(inline="always")
def single(half_bits: Any) -> Any:
    """A finite float16, subnormal or not, from its bits, with no float16 instruction needed."""
    bits = np.uint32(half_bits)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    return np.uint32(sign | magnitude).view(np.float32) * _HALF_TO_SINGLE


@njit(inline="always")
def inverse_rms(row: Any, rms_eps: Any) -> Any:
    """One over the root mean square of a row."""
    squares = 0.0
    for column in range(row.size):
        squares += float(row[column]) * float(row[column])
    return np.float32(1.0 / np.sqrt(squares / row.size + rms_eps))


@njit(nogil=True, cache=True, fastmath=REORDER)
def _half_dot(weights: Any, inputs: Any, products: Any) -> None:
    for output in range(weights.shape[0]):
        for row in range(inputs.shape[0]):
            total = np.float32(0)
            for column in range(weights.shape[1]):
                total += single(weights[output, column]) * inputs[row, column]
            products[row, output] = total


@njit(nogil=True, cache=True)
def _rms_norm(hidden: Any, norm: Any, rms_eps: Any, normed: Any) -> None:
    for row in range(hidden.shape[0]):
        factor = inverse_rms(hidden[row], rms_eps)
        for column in range(hidden.shape[1]):
            normed[row, column] = hidden[row, column] * factor * norm[column]


@njit(nogil=True, cache=True)
def _highest_over_rows(products: Any, scores: Any) -> None:
    scores[:] = -np.inf
    for row in range(products.shape[0]):
        for unit in range(scores.size):
            if products[row, unit] > scores[unit]:
                scores[unit] = products[row, unit]


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


@njit(nogil=True, cache=True)
def _silu_times(gate: Any, up: Any, activities: Any) -> None:
    for index in range(activities.size):
        silu = gate[index] / (np.float32(1) + np.exp(-gate[index]))
        activities[index] = silu * up[index]
