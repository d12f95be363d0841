"""What a program is to the drive, and what one run of it costs."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from csd_protocol.program_file import ProgramKind
from csd_protocol.units import NS_PER_S

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run takes of the embedded processor and of on-drive DRAM."""

    ops: int  # multiplications and additions
    dram_bytes: int  # read once, whatever the number of input rows


@dataclass(frozen=True, slots=True)
class CostModel:
    """A roofline: the slower of arithmetic and memory decides."""

    ops_per_s: float
    dram_bytes_per_s: float

    def duration_ns(self, cost: Cost) -> int:
        """Time of one run on an idle processor, at least 1 ns for any work at all."""
        compute_ns = cost.ops * NS_PER_S / self.ops_per_s
        memory_ns = cost.dram_bytes * NS_PER_S / self.dram_bytes_per_s
        return int(-(-max(compute_ns, memory_ns) // 1))


class Program(Protocol):
    """A loaded program: scores the FFN units of the layers that it knows."""

    @property
    def kind(self) -> ProgramKind: ...

    @property
    def model(self) -> str:
        """Name of the packed model that it was fitted to."""

    @property
    def dram_bytes(self) -> int:
        """On-drive DRAM that it holds while loaded."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it can score, ascending."""

    def unit_count(self, layer: int) -> int:
        """Units of a layer. Raises CommandError (Invalid Field) for a layer it does not know."""

    def score(self, layer: int, hidden: F32) -> F32:
        """Scores float32 [units] for hidden float32 [rows, hidden]; the maximum over the rows.

        Raises CommandError (Invalid Field) for an unknown layer or hidden states of another width.
        """

    def cost(self, layer: int, rows: int) -> Cost:
        """What `score` takes for `rows` hidden states."""
