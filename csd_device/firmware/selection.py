"""Which units a program's scores choose."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]


def kept_count(keep: float, count: int) -> int:
    """Units that a fraction `keep` of `count` stands for; a part of a unit is a unit."""
    return min(count, math.ceil(keep * count))


def select_top(scores: F32, count: int) -> U32:
    """The `count` units with the highest scores, ascending; of equal ones the lower indices."""
    if count <= 0:
        return np.empty(0, np.uint32)
    least = np.partition(scores, scores.size - count)[scores.size - count]
    chosen = np.empty(count, np.uint32)
    _emit(scores, least, chosen)
    return chosen


@njit(nogil=True, cache=True)
def _emit(scores: Any, least: Any, chosen: Any) -> None:
    """Fills `chosen` with what lies above `least`, and with as many equals as there is room for."""
    above = 0
    for score in scores:
        if score > least:
            above += 1
    equals_left = chosen.size - above
    filled = 0
    for unit in range(scores.size):
        if scores[unit] > least:
            chosen[filled] = unit
            filled += 1
        elif scores[unit] == least and equals_left > 0:
            chosen[filled] = unit
            filled += 1
            equals_left -= 1
