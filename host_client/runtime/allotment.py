"""How many units each layer keeps, so that a given number of units loses least.

Units kept are dealt out greedily: the next one goes to the layer where it saves most, as TEAL does
for its layers (Liu et al., arXiv:2408.14690). What a layer loses when only so many are kept is
measured on calibration text, and weighed by how much a loss in that layer matters.
"""

import math

import numpy as np
import numpy.typing as npt

from host_client.model.calibration_record import Calibration
from host_client.runtime.head_groups import kept_fraction
from host_client.runtime.quality import Quality

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def allot(dropped: F32, weights: F32 | F64, kept: int, least: int = 1) -> list[int]:
    """Units kept by layer, `kept` in all.

    dropped: float32 [layers, units + 1], squared output lost when so many units are kept, falling
    along a row. weights: [layers]. Every layer keeps at least `least`.
    Raises ValueError when the layers cannot keep so many, or so few.
    """
    layers, units = dropped.shape[0], dropped.shape[1] - 1
    if not layers * least <= kept <= layers * units:
        raise ValueError(f"{kept} units for {layers} layers of {units} that keep {least} or more")
    saved = -np.diff(dropped.astype(np.float64), axis=1) * weights[:, None]  # [layers, units]
    saved = np.minimum.accumulate(saved, axis=1)  # a later unit never goes first
    saved[:, :least] = np.inf
    order = np.argsort(-saved, axis=None, kind="stable")[:kept]
    counts = np.bincount(order // units, minlength=layers)
    return [int(count) for count in counts]


def allotted(calibration: Calibration, share: float) -> list[int]:
    """Units kept by layer, as many in all as if each layer kept this share."""
    layers, units = calibration.order.shape
    return allot(calibration.dropped, calibration.weights, layers * math.ceil(share * units))


def kept_shares(quality: Quality, calibration: Calibration | None, layers: int) -> list[float]:
    """The share of its FFN units that each layer keeps, of which a part of a unit is a unit.

    Uniform where what is left out is corrected: what that loses was not measured.
    """
    is_uniform = quality.uniform or quality.corrected or quality.kept >= 1.0
    if calibration is None or is_uniform:
        return [quality.kept] * layers
    units = calibration.order.shape[1]
    counts = allotted(calibration, quality.kept)
    return [kept_fraction(kept, units) for kept in counts]
