"""A decoder layer at a few bits: what `shadow` and `rollout` programs are made of.

Rounded to the nearest level, or, with second moments from calibration text, one input after the
other (`rounding`). The file holds the rows; the lab computes on the values that they stand for, so
both speak of the very same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.low_bit import LowBitRows, dequantise_rows, quantise_rows
from csd_protocol.program_file import AttentionLayer, RolloutLayer, ShadowLayer
from host_client.calibrate.dense_model import DecoderLayer
from host_client.calibrate.rounding import round_inputs_in_order, round_units_in_order

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_GROUPS = (64, 32, 16, 8)  # values that share a scale; the first that divides every row


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of x x^T over calibration tokens, of what a layer's matrices are multiplied with."""

    attention: F64  # [hidden, hidden], behind the norm before attention
    ffn: F64  # [hidden, hidden], behind the norm before the FFN
    activity: F64  # [units, units], of the units that a correction speaks for


def group_of(*widths: int) -> int:
    """Values that share a scale in rows of these widths. Raises ValueError when none fits."""
    for size in _GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError(f"rows of {widths} values: no group of {_GROUPS} divides them")


def round_layer(
    layer: DecoderLayer, bits: int, group: int, moments: Moments | None = None
) -> RolloutLayer:
    """The layer's rows at `bits` bits; with moments gate, up, down, q, k and v are made to fit."""
    before_attention: F64 | None = None
    before_ffn: F64 | None = None
    active: F64 | None = None
    if moments is not None:
        before_attention, before_ffn = moments.attention, moments.ffn
        active = moments.activity
    gate, up = _along((layer.gate, layer.up), bits, group, before_ffn)
    q, k, v = _along((layer.q, layer.k, layer.v), bits, group, before_attention)
    o = _rounded(layer.o, round_inputs_in_order, bits, group, None)
    ffn = ShadowLayer(
        norm=layer.norm.numpy(),
        gate=gate,
        up=up,
        down_norm=layer.down_norm.numpy(),
        down=_rounded(layer.down, round_units_in_order, bits, group, active),
    )
    attention = AttentionLayer(norm=layer.attn_norm.numpy(), q=q, k=k, v=v, o=o)
    return RolloutLayer(attention=attention, ffn=ffn)


def values_of(layer: DecoderLayer, rows: RolloutLayer, bits: int) -> DecoderLayer:
    """`layer` with the values that its low-bit rows stand for."""

    def values(low: F32 | LowBitRows | None) -> torch.Tensor:
        assert isinstance(low, LowBitRows)
        return torch.from_numpy(dequantise_rows(low.packed, low.scales, bits))

    ffn, attention = rows.ffn, rows.attention
    return replace(
        layer,
        gate=values(ffn.gate),
        up=values(ffn.up),
        down=values(ffn.down),
        q=values(attention.q),
        k=values(attention.k),
        v=values(attention.v),
        o=values(attention.o),
    )


_Rounding = Callable[[F32, F64, int, int], LowBitRows]


def _along(
    matrices: tuple[torch.Tensor, ...], bits: int, group: int, moments: F64 | None
) -> Iterator[LowBitRows]:
    """Matrices that are multiplied with the same input, rounded as one: a row minds no other."""
    low = _rounded(torch.cat(matrices), round_inputs_in_order, bits, group, moments)
    ends = np.cumsum([matrix.shape[0] for matrix in matrices])[:-1]
    for packed, scales in zip(np.split(low.packed, ends), np.split(low.scales, ends), strict=True):
        yield LowBitRows(packed, scales)


def _rounded(
    rows: torch.Tensor, fitted: _Rounding, bits: int, group: int, moments: F64 | None
) -> LowBitRows:
    if moments is None:
        return LowBitRows(*quantise_rows(rows.numpy(), bits, group))
    return fitted(rows.numpy(), moments, bits, group)
