"""The `svd` program: gate and up as products of thin matrices, in closed form and untrained."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute.half_rows import half_dot, rms_norm, score_gated
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import check_activation, rms_eps
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import ProgramKind, Tensor

U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class SvdLayer:
    """One FFN's thin matrices; float16 as its bits."""

    norm: F32  # [hidden]
    gate_inner: U16  # [gate rank, hidden]
    gate_outer: U16  # [units, gate rank]
    up_inner: U16  # [up rank, hidden]
    up_outer: U16  # [units, up rank]
    down_norm: F32  # [units]

    @property
    def units(self) -> int:
        return self.down_norm.size


class SvdProgram(LayeredProgram[SvdLayer]):
    """Scores as the shadow's, by thin matrices; see `Program`."""

    kind = ProgramKind.SVD

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        self._rms_eps = rms_eps(file)
        check_activation(file)
        self._layers = {layer: _read(file, layer) for layer in numbered_layers(file, Tensor.NORM)}

    def score(self, layer: int, hidden: F32) -> F32:
        weights = self.layer(layer)
        check_width(hidden, weights.norm.size)
        inputs = rms_norm(hidden, weights.norm, self._rms_eps)
        gate = half_dot(weights.gate_outer, half_dot(weights.gate_inner, inputs))
        up = half_dot(weights.up_outer, half_dot(weights.up_inner, inputs))
        return score_gated(gate, up, weights.down_norm)

    def cost(self, layer: int, rows: int) -> Cost:
        weights = self.layer(layer)
        matrices = (weights.gate_inner, weights.gate_outer, weights.up_inner, weights.up_outer)
        values = sum(matrix.size for matrix in matrices)
        vector_bytes = weights.norm.nbytes + weights.down_norm.nbytes
        return Cost(ops=2 * values * rows, dram_bytes=2 * values + vector_bytes)


def _read(file: TensorFile, layer: int) -> SvdLayer:
    hidden = file.length(Tensor.NORM.of(layer))
    units = file.length(Tensor.DOWN_NORM.of(layer))
    gate_rank, _ = file.matrix_shape(Tensor.GATE_INNER.of(layer))
    up_rank, _ = file.matrix_shape(Tensor.UP_INNER.of(layer))
    return SvdLayer(
        norm=file.finite(Tensor.NORM.of(layer), np.float32, (hidden,)),
        gate_inner=file.half(Tensor.GATE_INNER.of(layer), (gate_rank, hidden)),
        gate_outer=file.half(Tensor.GATE_OUTER.of(layer), (units, gate_rank)),
        up_inner=file.half(Tensor.UP_INNER.of(layer), (up_rank, hidden)),
        up_outer=file.half(Tensor.UP_OUTER.of(layer), (units, up_rank)),
        down_norm=file.finite(Tensor.DOWN_NORM.of(layer), np.float32, (units,)),
    )
