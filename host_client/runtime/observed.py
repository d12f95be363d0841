"""Which neurons of an FFN were active: what a `window` program on the drive is told.

Only what was computed is known: what was chosen, and what is resident. Of that the best count, as
many as are kept, by |silu(g) * u| * ||down||, the score that the true choice would go by.
"""

import math

import numpy as np
import numpy.typing as npt

from host_client.runtime import kernels
from host_client.runtime.row_arithmetic import Encoding

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]


class Witness:
    """Collects what the parts of one FFN say of one token."""

    def __init__(self, hidden: int, encoding: Encoding) -> None:
        self._hidden, self._encoding = hidden, encoding
        self._units: list[U32] = []
        self._scores: list[F32] = []

    def see(self, units: U32, values: U16, activity: F32) -> None:
        """units uint32 [n]; values uint16 [n, words]; activity float32 [1, n]."""
        self._units.append(units)
        self._scores.append(activity[0] * down_norms(values, self._hidden, self._encoding))

    def most_active(self, share: float, count: int) -> U32:
        """Of an FFN's `count` neurons the share that was most active of those seen, ascending."""
        units = np.concatenate(self._units) if self._units else np.empty(0, np.uint32)
        kept = min(units.size, math.ceil(share * count))
        if kept < units.size:
            scores = np.concatenate(self._scores)
            units = units[np.argpartition(-scores, kept - 1)[:kept]]
        return np.sort(units)


def down_norms(units: U16, hidden: int, encoding: Encoding) -> F32:
    """L2 norm of each neuron's down column. units uint16 [n, words] -> float32 [n]."""
    down = np.empty((units.shape[0], hidden), np.float32)
    rows = units.reshape(3 * units.shape[0], units.shape[1] // 3)
    kernels.widen_rows(rows, np.arange(2, rows.shape[0], 3), down, encoding)
    norms: F32 = np.linalg.norm(down, axis=1)
    return norms
