"""The `shadow` program: the FFN itself at a few bits a weight, so its scores follow the input.

With the down rows as well it corrects: it adds up what the units that were not computed would have.
"""

from typing import Any

import numpy as np

from csd_device.compute.gated_ffn import GatedFfn, RowFormat
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import check_activation
from csd_device.compute.program import F32, U32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import ProgramKind, Tensor


class ShadowProgram(LayeredProgram[GatedFfn]):
    """Scores by the low-bit gate and up rows; see `Program`."""

    kind = ProgramKind.SHADOW

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        check_activation(file)
        format_ = RowFormat.of(file)
        layers = numbered_layers(file, Tensor.NORM)
        self._layers = {layer: GatedFfn.read(file, format_, layer) for layer in layers}

    def score(self, layer: int, hidden: F32) -> F32:
        ffn = self.layer(layer)
        check_width(hidden, ffn.hidden)
        return ffn.score(*ffn.products(hidden))

    def cost(self, layer: int, rows: int) -> Cost:
        return self.layer(layer).score_cost(rows)

    def correct(self, layer: int, inputs: F32, computed: U32) -> tuple[F32, Cost]:
        ffn = self.layer(layer)
        if ffn.down is None:
            self.refuse_correction()
        return correct_ffn(ffn, inputs, computed)


def correct_ffn(ffn: GatedFfn, inputs: F32, computed: U32) -> tuple[F32, Cost]:
    """What the units that were not computed add, [rows, hidden], and its cost."""
    check_width(inputs, ffn.hidden)
    is_other = np.ones(ffn.units, np.bool_)
    is_other[computed] = False
    others: Any = np.flatnonzero(is_other)
    cost = ffn.correction_cost(inputs.shape[0], others.size)
    return ffn.correction(inputs, others), cost
