"""The `frequency` program: units that were active most often are predicted, whatever the input."""

import re

import numpy as np

from csd_device.compute.layer_names import known_layer, numbered_layers
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import Key, ProgramKind, Tensor

_COUNT_BYTES = 4
_NAMES = re.compile(rf"{Tensor.COUNTS}\.(\d{{1,6}})")


class FrequencyProgram:
    """Scores are the counts of the file; see `Program`."""

    kind = ProgramKind.FREQUENCY

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) for counts that are none."""
        self.model = file.metadata[Key.MODEL]
        self.dram_bytes = file.size_bytes
        self._counts: dict[int, F32] = {}
        for layer in numbered_layers(file, _NAMES):
            name = Tensor.COUNTS.of(layer)
            self._counts[layer] = file.finite(name, np.float32, (file.length(name),))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def unit_count(self, layer: int) -> int:
        return known_layer(self._counts, layer).size

    def score(self, layer: int, hidden: F32) -> F32:
        return known_layer(self._counts, layer)

    def cost(self, layer: int, rows: int) -> Cost:
        """Choosing among the counts reads each of them once."""
        units = self.unit_count(layer)
        return Cost(ops=units, dram_bytes=units * _COUNT_BYTES)
