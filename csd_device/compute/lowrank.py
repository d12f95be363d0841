"""The `lowrank` program: two linear layers a layer, as Deja Vu (Liu et al., 2023) trains them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute.half_rows import half_dot, highest_over_rows, rms_norm
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import rms_eps
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import ProgramKind, Tensor


@dataclass(frozen=True, slots=True)
class TwoLayers:
    """One layer's two matrices; float16 as its bits."""

    norm: F32  # [hidden]
    inner: npt.NDArray[np.uint16]  # [rank, hidden]
    outer: npt.NDArray[np.uint16]  # [units, rank]
    inner_bias: F32 | None  # [rank]
    outer_bias: F32 | None  # [units]

    @property
    def units(self) -> int:
        return len(self.outer)

    @property
    def cost_bytes(self) -> int:
        parts = (self.norm, self.inner, self.outer, self.inner_bias, self.outer_bias)
        return sum(part.nbytes for part in parts if part is not None)


class LowRankProgram(LayeredProgram[TwoLayers]):
    """Scores are outer . (inner . x + inner_bias) + outer_bias; see `Program`."""

    kind = ProgramKind.LOWRANK

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        self._rms_eps = rms_eps(file)
        self._layers = {layer: _read(file, layer) for layer in numbered_layers(file, Tensor.NORM)}

    def score(self, layer: int, hidden: F32) -> F32:
        weights = self.layer(layer)
        check_width(hidden, weights.norm.size)
        inner = half_dot(weights.inner, rms_norm(hidden, weights.norm, self._rms_eps))
        if weights.inner_bias is not None:
            inner += weights.inner_bias
        outer = half_dot(weights.outer, self._between(inner))
        if weights.outer_bias is not None:
            outer += weights.outer_bias
        return highest_over_rows(outer)

    def cost(self, layer: int, rows: int) -> Cost:
        weights = self.layer(layer)
        values = weights.inner.size + weights.outer.size
        return Cost(ops=2 * values * rows, dram_bytes=weights.cost_bytes)

    def _between(self, inner: F32) -> F32:
        """What happens between the two layers."""
        return inner


def _read(file: TensorFile, layer: int) -> TwoLayers:
    hidden = file.length(Tensor.NORM.of(layer))
    rank, _ = file.matrix_shape(Tensor.INNER.of(layer))
    units, _ = file.matrix_shape(Tensor.OUTER.of(layer))
    return TwoLayers(
        norm=file.finite(Tensor.NORM.of(layer), np.float32, (hidden,)),
        inner=file.half(Tensor.INNER.of(layer), (rank, hidden)),
        outer=file.half(Tensor.OUTER.of(layer), (units, rank)),
        inner_bias=file.optional(Tensor.INNER_BIAS.of(layer), (rank,)),
        outer_bias=file.optional(Tensor.OUTER_BIAS.of(layer), (units,)),
    )
