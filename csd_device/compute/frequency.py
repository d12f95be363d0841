"""The `frequency` program: units that were active most often are predicted, whatever the input."""

from dataclasses import dataclass

import numpy as np

from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import ProgramKind, Tensor


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each unit of a layer was active."""

    counts: F32  # [units]

    @property
    def units(self) -> int:
        return self.counts.size


def read_counts(file: TensorFile) -> dict[int, Counts]:
    """Every layer's counts. Raises CommandError (Invalid Program Data) for counts that are none."""
    layers = {}
    for layer in numbered_layers(file, Tensor.COUNTS):
        name = Tensor.COUNTS.of(layer)
        layers[layer] = Counts(file.finite(name, np.float32, (file.length(name),)))
    return layers


class FrequencyProgram(LayeredProgram[Counts]):
    """Scores are the counts of the file; see `Program`."""

    kind = ProgramKind.FREQUENCY

    def __init__(self, file: TensorFile) -> None:
        super().__init__(file)
        self._layers = read_counts(file)

    def score(self, layer: int, hidden: F32) -> F32:
        return self.layer(layer).counts

    def cost(self, layer: int, rows: int) -> Cost:
        """Choosing among the counts reads each of them once."""
        counts = self.layer(layer).counts
        return Cost(ops=counts.size, dram_bytes=counts.nbytes)
