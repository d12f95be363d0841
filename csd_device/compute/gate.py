"""The `gate` program: a mixture's router, asked before its layer comes.

The next layer's router on the current hidden state finds the experts of a mixture far more often
than not (Eliseev and Mazur, 2023, on Mixtral).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute.half_rows import half_dot, highest_over_rows, rms_norm
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import rms_eps
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_protocol.packed import Role
from csd_protocol.program_file import Key, ProgramKind, Tensor


@dataclass(frozen=True, slots=True)
class GateLayer:
    """One router; float16 as its bits."""

    norm: F32  # [hidden]
    router: npt.NDArray[np.uint16]  # [experts, hidden]

    @property
    def units(self) -> int:
        return len(self.router)


class GateProgram(LayeredProgram[GateLayer]):
    """Units are experts, and the score of one is its logit; see `Program`."""

    kind = ProgramKind.GATE

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        self._rms_eps = rms_eps(file)
        if self.role is not Role.ROUTER:
            raise invalid(f"{Key.ROLE} is {self.role}; a gate speaks for {Role.ROUTER}")
        layers = numbered_layers(file, Tensor.NORM)
        self._layers = {layer: _read(file, layer) for layer in layers}

    def score(self, layer: int, hidden: F32) -> F32:
        weights = self.layer(layer)
        check_width(hidden, weights.norm.size)
        logits = half_dot(weights.router, rms_norm(hidden, weights.norm, self._rms_eps))
        return highest_over_rows(logits)

    def cost(self, layer: int, rows: int) -> Cost:
        weights = self.layer(layer)
        dram_bytes = weights.router.nbytes + weights.norm.nbytes
        return Cost(ops=2 * weights.router.size * rows, dram_bytes=dram_bytes)


def _read(file: TensorFile, layer: int) -> GateLayer:
    hidden = file.length(Tensor.NORM.of(layer))
    experts, _ = file.matrix_shape(Tensor.ROUTER.of(layer))
    return GateLayer(
        norm=file.finite(Tensor.NORM.of(layer), np.float32, (hidden,)),
        router=file.half(Tensor.ROUTER.of(layer), (experts, hidden)),
    )
