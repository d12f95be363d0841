"""The `shadow` program: the FFN itself at a few bits a weight, so its scores follow the input.

A unit's score is |silu(gate . x) * (up . x)| * ||down column||, x the hidden state behind the FFN's
own RMSNorm: the magnitude of what the unit would add to the residual stream.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute.layer_names import known_layer, numbered_layers
from csd_device.compute.low_bit_rows import Activations, rows_dot, score_gated
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.low_bit import check_layout
from csd_protocol.program_file import (
    ACTIVATIONS,
    Key,
    ProgramKind,
    Tensor,
    shadow_layer_bytes,
)
from csd_protocol.status import Status

_NAMES = re.compile(rf"{Tensor.NORM}\.(\d{{1,6}})")
_OPS_PER_WEIGHT = 2  # one multiplication, one addition


@dataclass(frozen=True, slots=True)
class _Layer:
    norm: F32  # [hidden]
    gate: npt.NDArray[np.uint8]  # [units, hidden * bits / 8]
    up: npt.NDArray[np.uint8]  # [units, hidden * bits / 8]
    gate_scale: npt.NDArray[np.uint16]  # [units, hidden / group], float16's bits
    up_scale: npt.NDArray[np.uint16]  # [units, hidden / group], float16's bits
    down_norm: F32  # [units]


class ShadowProgram:
    """Scores by the low-bit gate and up rows; see `Program`."""

    kind = ProgramKind.SHADOW

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        self.model = file.metadata[Key.MODEL]
        self.dram_bytes = file.size_bytes
        self._bits = _whole_number(file, Key.BITS)
        self._group = _whole_number(file, Key.GROUP)
        self._rms_eps = _rms_eps(file)
        if file.metadata.get(Key.ACTIVATION) not in ACTIVATIONS:
            raise invalid(f"{Key.ACTIVATION} must be one of {ACTIVATIONS}")
        self._layers = {layer: self._read(file, layer) for layer in numbered_layers(file, _NAMES)}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    def unit_count(self, layer: int) -> int:
        return known_layer(self._layers, layer).down_norm.size

    def score(self, layer: int, hidden: F32) -> F32:
        weights = known_layer(self._layers, layer)
        if hidden.ndim != 2 or hidden.shape[0] == 0 or hidden.shape[1] != weights.norm.size:
            raise CommandError(
                Status.INVALID_FIELD,
                f"hidden states {list(hidden.shape)}; it takes [rows, {weights.norm.size}]",
            )
        inputs = Activations.normed(hidden, weights.norm, self._rms_eps, self._bits, self._group)
        gate = rows_dot(weights.gate, weights.gate_scale, inputs)
        up = rows_dot(weights.up, weights.up_scale, inputs)
        return score_gated(gate, up, weights.down_norm)

    def cost(self, layer: int, rows: int) -> Cost:
        weights = known_layer(self._layers, layer)
        hidden, units = weights.norm.size, weights.down_norm.size
        return Cost(
            ops=_OPS_PER_WEIGHT * 2 * units * hidden * rows,
            dram_bytes=shadow_layer_bytes(hidden, units, self._bits, self._group),
        )

    def _read(self, file: TensorFile, layer: int) -> _Layer:
        hidden = file.length(Tensor.NORM.of(layer))
        units = file.length(Tensor.DOWN_NORM.of(layer))
        try:
            check_layout(hidden, self._bits, self._group)
        except ValueError as error:
            raise invalid(f"layer {layer}: {error}") from error
        packed, scales = (units, hidden * self._bits // 8), (units, hidden // self._group)
        return _Layer(
            norm=file.finite(Tensor.NORM.of(layer), np.float32, (hidden,)),
            gate=file.tensor(Tensor.GATE.of(layer), np.uint8, packed),
            up=file.tensor(Tensor.UP.of(layer), np.uint8, packed),
            gate_scale=file.finite(Tensor.GATE_SCALE.of(layer), np.float16, scales).view(np.uint16),
            up_scale=file.finite(Tensor.UP_SCALE.of(layer), np.float16, scales).view(np.uint16),
            down_norm=file.finite(Tensor.DOWN_NORM.of(layer), np.float32, (units,)),
        )


def _whole_number(file: TensorFile, key: Key) -> int:
    text = file.metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid(f"metadata {key} is {text!r}; wanted a whole number")
    return int(text)


def _rms_eps(file: TensorFile) -> float:
    text = file.metadata.get(Key.RMS_EPS, "")
    try:
        value = float(text)
    except ValueError as error:
        raise invalid(f"metadata {Key.RMS_EPS} is {text!r}; wanted a number") from error
    if not 0 < value < 1:
        raise invalid(f"metadata {Key.RMS_EPS} is {text!r}; wanted a number between 0 and 1")
    return value
