"""Low-bit levels rounded with a look at the inputs: later weights make up for earlier errors.

Plain rounding takes every weight to its nearest level. Here weights are rounded one input after the
other, and what an input's rounding did wrong on the calibration text is taken up by the inputs that
follow, as the second moments of the inputs say (GPTQ, Frantar et al., arXiv:2210.17323, from
Optimal Brain Surgeon). Same levels, same bytes, closed form. Rows share scales in groups as in
`csd_protocol.low_bit`, whose layout the result has.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from csd_protocol.low_bit import LowBitRows, check_layout, level_offset, pack_levels

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

DAMPING = 0.01  # of the mean second moment: keeps inputs that hardly ever vary from ruling
_CLIP_RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75], np.float32)
_SCALE_LEAST = np.float32(2.0**-24)  # the smallest float16
_NORMAL_LEAST = np.float32(2.0**-14)  # below this a float16 has fixed steps


def round_inputs_in_order(values: F32, moments: F64, bits: int, group: int) -> LowBitRows:
    """Rows that are multiplied with an input: gate and up, float32 [units, hidden].

    moments: sum of x x^T over calibration inputs, float64 [hidden, hidden]. Raises ValueError when
    they are no second moments.
    """
    return _rounded(values, moments, bits, group, _round_along)


def round_units_in_order(values: F32, moments: F64, bits: int, group: int) -> LowBitRows:
    """Rows that are summed by activity: down columns, float32 [units, hidden].

    moments: sum of a a^T over the units' activities, float64 [units, units].
    """
    return _rounded(values, moments, bits, group, _round_across)


def _rounded(
    values: F32, moments: F64, bits: int, group: int, walk: Callable[..., None]
) -> LowBitRows:
    rows, factor = np.array(values, np.float32, order="C"), _factor(moments)
    count, width = rows.shape
    check_layout(width, bits, group)
    if not np.isfinite(rows).all():
        raise ValueError("values to round must be finite")
    levels = np.empty((count, width), np.uint8)
    scales = np.empty((count, width // group), np.float32)
    walk(rows, factor, np.float32(level_offset(bits)), group, _CLIP_RATIOS, levels, scales)
    return LowBitRows(pack_levels(levels, bits), scales.astype(np.float16))


def _factor(moments: F64) -> F32:
    """Upper R with R^T R = (moments + damping)^-1, each row divided by its diagonal.

    With the order reversed, moments = U U^T for an upper U by one Cholesky, and R = U^-1. Row i of
    the result says by how much each later input takes up one unit of input i's error.
    """
    damped = moments + np.eye(moments.shape[0]) * (DAMPING * moments.diagonal().mean() + 1e-12)
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(damped[::-1, ::-1].copy()))
    if failed:
        raise ValueError("the second moments are not positive definite")
    eye = torch.eye(lower.shape[0], dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    factor: F32 = (inverse / inverse.diagonal()[:, None]).float().contiguous().numpy()
    return factor


@njit(nogil=True, cache=True)
def _half(value: Any) -> Any:
    """The float16 nearest to a float32, as a float32."""
    if abs(value) < _NORMAL_LEAST:
        return np.rint(value / _SCALE_LEAST) * _SCALE_LEAST
    step = np.float32(2.0 ** (np.floor(np.log2(abs(value))) - 10))
    return np.float32(np.rint(value / step)) * step


@njit(nogil=True, cache=True)
def _fitted_scale(values: Any, offset: Any, ratios: Any) -> Any:
    """The scale with the least squared error; it puts the largest magnitude at the lowest level."""
    peak = np.float32(0)
    for value in values:
        if abs(value) > abs(peak):
            peak = value
    best, best_error = _SCALE_LEAST, np.float32(np.inf)
    if abs(peak) / offset <= 4 * _SCALE_LEAST:
        return best
    for ratio in ratios:
        scale = _half(-peak * ratio / offset)
        total = np.float32(0)
        for value in values:
            level = min(max(np.rint(value / scale), -offset), offset - np.float32(1))
            error = value - level * scale
            total += error * error
        if total < best_error:
            best, best_error = scale, total
    return best


def _round_along(
    rows: F32,
    factor: F32,
    offset: np.float32,
    group: int,
    ratios: F32,
    levels: U8,
    scales: F32,
) -> None:
    """Inputs lie along a row: every row by itself, and groups in order, whose errors go on."""
    count, width = rows.shape
    errors = np.empty((count, group), np.float32)
    for start in range(0, width, group):
        _round_group(rows, factor, start, offset, ratios, errors, levels, scales)
        end = start + group
        rows[:, end:] -= errors @ factor[start:end, end:]


@njit(nogil=True, cache=True)
def _round_group(
    rows: Any,
    factor: Any,
    start: Any,
    offset: Any,
    ratios: Any,
    errors: Any,
    levels: Any,
    scales: Any,
) -> None:
    """One group of inputs; its errors [rows, group] are for later ones."""
    group = errors.shape[1]
    end = start + group
    for row in range(rows.shape[0]):
        values = rows[row]
        scale = _fitted_scale(values[start:end], offset, ratios)
        scales[row, start // group] = scale
        for column in range(start, end):
            level = min(max(np.rint(values[column] / scale), -offset), offset - np.float32(1))
            levels[row, column] = np.uint8(np.int32(level + offset))
            error = values[column] - level * scale
            errors[row, column - start] = error
            for later in range(column + 1, end):
                values[later] -= error * factor[column, later]


@njit(nogil=True, cache=True)
def _round_across(
    rows: Any, factor: Any, offset: Any, group: Any, ratios: Any, levels: Any, scales: Any
) -> None:
    """Inputs are the rows themselves: a row's errors go to the rows below, group by group."""
    errors = np.empty(group, np.float32)
    for start in range(0, rows.shape[1], group):
        block = rows[:, start : start + group].copy()
        for row in range(rows.shape[0]):
            scale = _fitted_scale(block[row], offset, ratios)
            scales[row, start // group] = scale
            for column in range(group):
                value = block[row, column]
                level = min(max(np.rint(value / scale), -offset), offset - np.float32(1))
                levels[row, start + column] = np.uint8(np.int32(level + offset))
                errors[column] = value - level * scale
            for later in range(row + 1, rows.shape[0]):
                share = factor[row, later]
                for column in range(group):
                    block[later, column] -= share * errors[column]
