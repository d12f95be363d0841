"""Units at 8 or 4 bits: which sites have them, and how rows come to their levels.

FFN neurons, heads, keys and values take the bits that were asked for. Rows of the embedding and of
the output head take 8: every token passes them, and 4 bits there alone cost as much as 4 bits in
all layers. Norms, biases and routers stay as they are: they are small.

Rows that a checkpoint has as levels of the same kind are kept as they are. What is laid down from
columns (down and output projections) has its groups across the checkpoint's, so it is rounded
again, as rows of 16-bit checkpoints are: to the nearest level, at 4 bits between the least and the
greatest value of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from csd_protocol.low_bit import round_rows
from csd_protocol.low_bit_units import GROUP, join_rows, pack_nibbles
from csd_protocol.packed import Bits, PackedModel, Role, row_bytes
from host_client.model.checkpoint import Checkpoint, StoredLevels
from host_client.model.errors import UnsupportedModel
from host_client.model.families import Piece, SiteShape

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_VALUE_MAX = float(np.finfo(np.float16).max)
_LEVELS_MAX = 15  # of 4 bits
_SIGN = np.uint8(128)  # what makes a level with its offset added a signed byte
_AT_BITS = (Role.FFN, Role.HEADS, Role.KV)
_AT_8_BITS = (Role.EMBED, Role.LM_HEAD)


def at_bits(
    shapes: Sequence[SiteShape], bits: Bits, checkpoint: Checkpoint
) -> tuple[SiteShape, ...]:
    """The sites as they are packed at so many bits. Raises UnsupportedModel for odd rows."""
    return tuple(_site_at(shape, bits, checkpoint) for shape in shapes)


def bits_of(role: Role, bits: Bits) -> Bits:
    """What sites of a role have in a model that is packed at so many bits."""
    if role in _AT_BITS:
        return bits
    return 8 if role in _AT_8_BITS and bits < 16 else 16


def weights_bytes_at(model: PackedModel, bits: Bits) -> int:
    """What all units of a model would take, packed at so many bits; where its rows allow it."""
    return sum(
        site.count * site.rows * row_bytes(site.cols, bits_of(site.role, bits))
        for site in model.sites
    )


def _site_at(shape: SiteShape, bits: Bits, checkpoint: Checkpoint) -> SiteShape:
    found = bits_of(shape.role, bits)
    if found < 16 and shape.cols % GROUP:
        raise UnsupportedModel(
            f"{checkpoint.source}: rows of {shape.cols} values do not divide into groups of "
            f"{GROUP}, as units at {bits} bits need. Pack at 16 bits"
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
