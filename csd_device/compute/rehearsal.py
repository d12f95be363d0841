"""Every compiled kernel of programs once, so that no command waits for one to be loaded."""

import numpy as np

from csd_device.compute import half_rows, low_bit_rows, planted, window
from csd_device.compute.attention import Attention, KeyValues
from csd_protocol.low_bit import LEVEL_BITS, quantise_rows

_SIDE, _GROUP = 16, 8


def rehearse_kernels() -> None:
    """Small arrays of the types that programs have: what a command brings cannot be written to."""
    brought = np.ones((1, _SIDE), np.float32)
    made = np.ones((1, _SIDE), np.float32)
    brought.flags.writeable = False
    ones = np.ones(_SIDE, np.float32)
    for hidden in (brought, made):
        half_rows.half_dot(np.zeros((_SIDE, _SIDE), np.uint16), hidden)
        half_rows.rms_norm(hidden, ones, 1e-5)
        for bits in LEVEL_BITS:
            _rehearse_low_bit(hidden, ones, bits)
    half_rows.highest_over_rows(made)
    half_rows.score_gated(made, made, ones)
    half_rows.gated(made, made)
    attention = Attention(heads=1, kv_heads=1, head_dim=_SIDE, rope_theta=1e4, context=2)
    KeyValues(attention, 1).attend(0, 0, made, made, made)
    planted.draw_scores(np.uint64(0), 0, 1, 0.5, ones, ones.copy())
    window.add_observed(np.zeros(_SIDE, np.uint32), ones[:1], ones)


def _rehearse_low_bit(hidden: low_bit_rows.F32, ones: low_bit_rows.F32, bits: int) -> None:
    packed, scales = quantise_rows(np.ones((_SIDE, _SIDE), np.float32), bits, _GROUP)
    rows = low_bit_rows.PackedRows(packed, scales.view(np.uint16), bits)
    low_bit_rows.Activations.normed(hidden, ones, 1e-5, bits, _GROUP)
    inputs = low_bit_rows.Activations.scaled(hidden, ones, bits, _GROUP)
    low_bit_rows.add_rows(rows, low_bit_rows.rows_dot(rows, inputs))
