"""The `oracle` program: the host sends the true activities itself. For tests and upper bounds."""

from dataclasses import dataclass

import numpy as np

from csd_device.compute.half_rows import highest_over_rows
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import ProgramKind, Tensor


@dataclass(frozen=True, slots=True)
class OracleLayer:
    """What each true activity is multiplied by."""

    down_norm: F32  # [units]

    @property
    def units(self) -> int:
        return self.down_norm.size


class OracleProgram(LayeredProgram[OracleLayer]):
    """Scores are |input| * down_norm, the input being [rows, units]; see `Program`."""

    kind = ProgramKind.ORACLE

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor at fault."""
        super().__init__(file)
        for layer in numbered_layers(file, Tensor.DOWN_NORM):
            name = Tensor.DOWN_NORM.of(layer)
            values = file.finite(name, np.float32, (file.length(name),))
            self._layers[layer] = OracleLayer(values)

    def score(self, layer: int, hidden: F32) -> F32:
        down_norm = self.layer(layer).down_norm
        check_width(hidden, down_norm.size)
        with np.errstate(over="ignore", invalid="ignore"):
            return highest_over_rows(np.abs(hidden) * down_norm)

    def cost(self, layer: int, rows: int) -> Cost:
        down_norm = self.layer(layer).down_norm
        return Cost(ops=down_norm.size * rows, dram_bytes=down_norm.nbytes)
