"""Units at 12, 8 or 4 bits: which sites have them, and how rows come to their levels.

FFN neurons, heads, keys and values take the bits that were asked for. Rows of the embedding and of
the output head take 8 in place of 4: every token passes them, and 4 bits there alone cost as much
as 4 bits in all layers. Norms, biases and routers stay as they are: they are small.

At 12 bits no value changes (`lossless_units`).

Rows that a checkpoint has as levels of the same kind are kept as they are. What is laid down from
columns (down and output projections) has its groups across the checkpoint's, so it is rounded
again, as rows of 16-bit checkpoints are: to the nearest level, at 4 bits between the least and the
greatest value of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from csd_protocol.lossless_units import COLS_MAX
from csd_protocol.low_bit import round_rows
from csd_protocol.low_bit_units import GROUP, join_rows, pack_nibbles
from csd_protocol.packed import Bits, PackedModel, Role, row_bytes
from host_client.model.checkpoint import Checkpoint, Dtype, StoredLevels
from host_client.model.errors import UnsupportedModel
from host_client.model.families import Piece, SiteShape
from host_client.model.synthetic import SyntheticCheckpoint, is_synthetic

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_VALUE_MAX = float(np.finfo(np.float16).max)
_LEVELS_MAX = 15  # of 4 bits
_SIGN = np.uint8(128)  # what makes a level with its offset added a signed byte
_AT_BITS = (Role.FFN, Role.HEADS, Role.KV)
_AT_8_BITS_OR_MORE = (Role.EMBED, Role.LM_HEAD)


def at_bits(
    shapes: Sequence[SiteShape], bits: Bits, checkpoint: Checkpoint, dtype: Dtype
) -> tuple[SiteShape, ...]:
    """The sites as they are packed at so many bits; dtype: of the values that have 16.

    Raises UnsupportedModel for rows, values or a checkpoint that cannot have them.
    """
    if bits == 12:
        _check_lossless(checkpoint, dtype)
    return tuple(_site_at(shape, bits, checkpoint) for shape in shapes)


def bits_of(role: Role, bits: Bits) -> Bits:
    """What sites of a role have in a model that is packed at so many bits."""
    if role in _AT_BITS:
        return bits
    return max(bits, 8) if role in _AT_8_BITS_OR_MORE else 16


def fewer_bits(model: PackedModel) -> list[Bits]:
    """The bits below its own that a model could be packed at, most first."""
    ffn = model.ffns(0)[0]
    could: list[Bits] = [8, 4]
    if model.dtype == "bfloat16" and not is_synthetic(model):
        could.insert(0, 12)
    return [bits for bits in could if bits < ffn.bits and ffn.cols % GROUP == 0]


def weights_bytes_at(model: PackedModel, bits: Bits) -> int:
    """What all units of a model would take, packed at so many bits, of `fewer_bits`."""
    return sum(
        site.count * site.rows * row_bytes(site.cols, bits_of(site.role, bits))
        for site in model.sites
    )


def _check_lossless(checkpoint: Checkpoint, dtype: Dtype) -> None:
    if isinstance(checkpoint, SyntheticCheckpoint):
        raise UnsupportedModel(
            f"{checkpoint.source}: its blocks are drawn, and begin anywhere in a row; a row of 12 "
            "bits has a beginning and an end. Pack at 16, 8 or 4 bits"
        )
    if dtype == "float16":
        raise UnsupportedModel(
            f"{checkpoint.source}: 12 bits hold bfloat16 without loss, and would not hold float16, "
            "which has three bits of exponent less to save and three of mantissa more. Pack at 16 "
            "bits; or, rounded to bfloat16 first, with --dtype bfloat16"
        )


def _site_at(shape: SiteShape, bits: Bits, checkpoint: Checkpoint) -> SiteShape:
    found = bits_of(shape.role, bits)
    if found < 16 and shape.cols % GROUP:
        raise UnsupportedModel(
            f"{checkpoint.source}: rows of {shape.cols} values do not divide into groups of "
            f"{GROUP}, as units at {bits} bits need. Pack at 16 bits"
        )
    if found == 12 and shape.cols > COLS_MAX:
        raise UnsupportedModel(
            f"{checkpoint.source}: rows of {shape.cols} values; at 12 bits a row has {COLS_MAX} at "
            "most. Pack at 16 bits"
        )
    return replace(shape, bits=found)


def kept_levels(checkpoint: Checkpoint, piece: Piece, bits: Bits) -> StoredLevels | None:
    """The checkpoint's own levels of a piece, where units of so many bits can have just those."""
    levels = None if piece.columns else checkpoint.levels(piece.tensor)
    return levels if levels is not None and levels.bits == bits else None


def rounded(values: F32, bits: Bits) -> U8:
    """Rows uint8 [rows, row bytes] of float32 values [rows, cols], each to the nearest level.

    Raises ValueError for values that are not finite, or beyond what float16 holds.
    """
    if not (np.abs(values) <= _VALUE_MAX).all():
        raise ValueError(f"values beyond {_VALUE_MAX:.0f}, what a float16 scale can hold")
    if bits == 8:
        levels, scales = round_rows(values, bits, GROUP)
        return join_rows(levels ^ _SIGN, scales)
    groups = values.reshape(values.shape[0], -1, GROUP)
    minima = groups.min(axis=2).astype(np.float16)
    above = groups - minima[:, :, None].astype(np.float32)
    scales = (above.max(axis=2) / _LEVELS_MAX).astype(np.float16)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)
    nearest = np.rint(above / steps[:, :, None]).clip(0, _LEVELS_MAX).astype(np.uint8)
    return join_rows(pack_nibbles(nearest.reshape(values.shape)), scales, minima)
