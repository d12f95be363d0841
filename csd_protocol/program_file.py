"""The program format: how a predictor travels from the host that fits it to the drive that runs it.

A program file is a safetensors file whose metadata names the kind; the host writes it (`encode_*`),
the drive checks and runs it. `docs/PROGRAMS.md` has the tensors of each kind.

Low-bit rows are symmetric: a value is `level * scale`, the level a signed integer of `bits` bits,
the scale one float16 a group of neighbouring values. A level is stored with its offset added, so as
an unsigned integer; at 4 bits the value with the even index lies in the low half of its byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit
from safetensors.numpy import save

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

PROGRAM_VERSION = "1"
LEVEL_BITS = (4, 8)
ACTIVATIONS = ("silu",)

# How far the largest magnitude of a group may be clipped where that lowers the squared error.
_CLIP_RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75], np.float32)


class ProgramKind(StrEnum):
    FREQUENCY = "frequency"
    SHADOW = "shadow"


class Key(StrEnum):
    """Names in a program file's metadata; every value is text, as safetensors has it."""

    KIND = "csd.program"
    VERSION = "csd.version"
    MODEL = "csd.model"  # the packed model that it was fitted to, for people
    BITS = "csd.bits"  # shadow: 4 or 8
    GROUP = "csd.group"  # shadow: values that share a scale
    ACTIVATION = "csd.activation"  # shadow: "silu"
    RMS_EPS = "csd.rms_eps"  # shadow: epsilon of the RMSNorm before the FFN


class Tensor(StrEnum):
    """Tensor names; a layer's own carries the layer's number: `gate.7`."""

    COUNTS = "counts"  # float32 [units]
    NORM = "norm"  # float32 [hidden]
    GATE = "gate"  # uint8 [units, hidden * bits / 8]
    UP = "up"  # uint8 [units, hidden * bits / 8]
    GATE_SCALE = "gate_scale"  # float16 [units, hidden / group]
    UP_SCALE = "up_scale"  # float16 [units, hidden / group]
    DOWN_NORM = "down_norm"  # float32 [units]

    def of(self, layer: int) -> str:
        return f"{self.value}.{layer}"


@dataclass(frozen=True, slots=True)
class ShadowLayer:
    """One FFN as a shadow program sees it."""

    norm: F32  # [hidden], weight of the RMSNorm before the FFN
    gate: F32  # [units, hidden]
    up: F32  # [units, hidden]
    down_norm: F32  # [units], L2 norm of each down column


def level_offset(bits: int) -> int:
    """What is added to a signed level before it is stored."""
    return 1 << (bits - 1)


def check_layout(hidden: int, bits: int, group: int) -> None:
    """Raises ValueError when rows of `hidden` values cannot be stored like this."""
    if bits not in LEVEL_BITS:
        raise ValueError(f"{bits} bits a value; this version knows {LEVEL_BITS}")
    if group <= 0 or hidden % group or group * bits % 8:
        raise ValueError(f"groups of {group} do not divide rows of {hidden} {bits}-bit values")


def quantise_rows(values: F32, bits: int, group: int) -> tuple[U8, F16]:
    """Low-bit levels and scales of `values` float32 [rows, hidden].

    Returns packed levels uint8 [rows, hidden * bits / 8] and scales float16 [rows, hidden / group].
    The sign of a scale puts the group's largest magnitude on the lowest level, of which there is
    one more; of several clippings the one with the least squared error is taken.
    Raises ValueError for a layout that `check_layout` refuses and for values that are not finite.
    """
    rows = np.ascontiguousarray(values, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"values must be [rows, hidden], not {rows.shape}")
    check_layout(rows.shape[1], bits, group)
    if not np.isfinite(rows).all():
        raise ValueError("values to quantise must be finite")
    exact = np.empty((rows.shape[0], rows.shape[1] // group), np.float32)
    _fit_scales(rows, np.int64(group), np.float32(level_offset(bits)), _CLIP_RATIOS, exact)
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("values are too large for a float16 scale")
    packed = np.zeros((rows.shape[0], rows.shape[1] * bits // 8), np.uint8)
    _pack_levels(rows, scales.astype(np.float32), np.int64(group), np.int64(bits), packed)
    return packed, scales


def dequantise_rows(packed: U8, scales: F16, bits: int) -> F32:
    """The values float32 [rows, hidden] that the levels and scales stand for."""
    levels = packed
    if bits == 4:
        levels = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    signed = levels.astype(np.float32) - level_offset(bits)
    group = signed.shape[1] // scales.shape[1]
    return signed * np.repeat(scales.astype(np.float32), group, axis=1)


def encode_frequency(model: str, counts: Mapping[int, npt.NDArray[Any]]) -> bytes:
    """A `frequency` program file from each layer's counts [units]."""
    tensors = {
        Tensor.COUNTS.of(layer): np.ascontiguousarray(values, np.float32)
        for layer, values in counts.items()
    }
    return save(tensors, _metadata(ProgramKind.FREQUENCY, model))


def encode_shadow(
    model: str,
    layers: Mapping[int, ShadowLayer],
    *,
    bits: int,
    group: int,
    rms_eps: float,
    activation: str = "silu",
) -> bytes:
    """A `shadow` program file. Raises ValueError as `quantise_rows` does."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for layer, weights in layers.items():
        gate, gate_scale = quantise_rows(weights.gate, bits, group)
        up, up_scale = quantise_rows(weights.up, bits, group)
        tensors |= {
            Tensor.NORM.of(layer): np.ascontiguousarray(weights.norm, np.float32),
            Tensor.GATE.of(layer): gate,
            Tensor.GATE_SCALE.of(layer): gate_scale,
            Tensor.UP.of(layer): up,
            Tensor.UP_SCALE.of(layer): up_scale,
            Tensor.DOWN_NORM.of(layer): np.ascontiguousarray(weights.down_norm, np.float32),
        }
    shadow = {
        Key.BITS.value: str(bits),
        Key.GROUP.value: str(group),
        Key.RMS_EPS.value: repr(float(rms_eps)),
        Key.ACTIVATION.value: activation,
    }
    return save(tensors, _metadata(ProgramKind.SHADOW, model) | shadow)


def shadow_layer_bytes(hidden: int, units: int, bits: int, group: int) -> int:
    """On-drive DRAM that one layer of a shadow program takes."""
    matrices = 2 * units * (hidden * bits // 8 + 2 * (hidden // group))
    return matrices + 4 * hidden + 4 * units


def _metadata(kind: ProgramKind, model: str) -> dict[str, str]:
    return {
        Key.KIND.value: kind.value,
        Key.VERSION.value: PROGRAM_VERSION,
        Key.MODEL.value: model,
    }


@njit(nogil=True, cache=True)
def _signed_peak(values: Any) -> Any:
    """The value with the largest magnitude."""
    peak = np.float32(0)
    for value in values:
        if abs(value) > abs(peak):
            peak = value
    return peak


@njit(nogil=True, cache=True)
def _squared_error(values: Any, scale: Any, offset: Any) -> Any:
    inverse = np.float32(1) / scale
    total = np.float32(0)
    for value in values:
        level = min(max(np.rint(value * inverse), -offset), offset - np.float32(1))
        error = value - level * scale
        total += error * error
    return total


@njit(nogil=True, cache=True)
def _fit_scales(rows: Any, group: Any, offset: Any, ratios: Any, scales: Any) -> None:
    """Fills scales [rows, groups]: for each group the candidate with the least squared error."""
    for row in range(rows.shape[0]):
        for index in range(scales.shape[1]):
            values = rows[row, index * group : (index + 1) * group]
            peak = _signed_peak(values)
            best, best_error = np.float32(0), np.float32(np.inf)
            if abs(peak) / offset > np.float32(1e-30):
                for ratio in ratios:
                    scale = -peak * ratio / offset
                    error = _squared_error(values, scale, offset)
                    if error < best_error:
                        best, best_error = scale, error
            scales[row, index] = best


@njit(nogil=True, cache=True)
def _pack_levels(rows: Any, scales: Any, group: Any, bits: Any, packed: Any) -> None:
    """Fills packed [rows, hidden * bits / 8], all zero before, with levels plus their offset."""
    offset = np.float32(1 << (bits - 1))
    values_per_byte = 8 // bits
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            scale = scales[row, column // group]
            level = np.float32(0)
            if scale != np.float32(0):
                level = np.rint(rows[row, column] / scale)
                level = min(max(level, -offset), offset - np.float32(1))
            stored = np.uint8(np.int32(level + offset))
            shift = np.uint8(bits * (column % values_per_byte))
            packed[row, column // values_per_byte] |= np.uint8(stored << shift)
