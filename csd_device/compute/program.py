"""What a program is to the drive, and what one run of it costs."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Role
from csd_protocol.program_file import ProgramKind
from csd_protocol.units import NS_PER_S

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run takes of the embedded processor and of on-drive DRAM."""

    ops: int  # multiplications and additions
    dram_bytes: int  # read once, whatever the number of input rows

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.ops + other.ops, self.dram_bytes + other.dram_bytes)


NO_COST = Cost(0, 0)


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


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the model hidden states are from: they entered a layer, or left its attention."""

    layer: int
    behind_attention: bool


@dataclass(frozen=True, slots=True)
class ProgramInput:
    """What a command gives a program."""

    hidden: F32  # [rows, hidden]
    token: int = 0  # position of row 0
    origin: Origin | None = None


class Run(Protocol):
    """A program at work on one command's input."""

    def score(self, layer: int) -> tuple[F32, Cost]:
        """Scores float32 [units], and the cost of what had to be done for them.

        Raises CommandError (Invalid Field) for an unknown layer or input that the program does not
        take.
        """

    def remember(self, layer: int) -> Cost:
        """Takes note of the input without scores, for a host that wants no unit of this layer.

        Raises CommandError as `score`.
        """


@runtime_checkable
class HeadsRun(Run, Protocol):
    """A run that scores KV groups beside the units of its program's role."""

    def score_heads(self, layer: int) -> tuple[F32, Cost]:
        """Scores float32 [groups] of a layer's attention; as `score`.

        Raises CommandError (Invalid Field) also where the input lies behind that attention.
        """


class Program(Protocol):
    """A loaded program: scores the units of the layers that it knows."""

    @property
    def kind(self) -> ProgramKind: ...

    @property
    def model(self) -> str:
        """Name of the packed model that it was fitted to."""

    @property
    def role(self) -> Role:
        """The sites that it speaks for."""

    @property
    def kv_groups(self) -> int:
        """KV groups of each layer that its runs score beside its role's units; 0: none do."""

    @property
    def dram_bytes(self) -> int:
        """On-drive DRAM that it holds while loaded."""

    @property
    def memory_bytes(self) -> int:
        """On-drive DRAM for each host that runs it; 0: it remembers nothing."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it can score, ascending."""

    def unit_count(self, layer: int) -> int:
        """Units of a layer. Raises CommandError (Invalid Field) for a layer it does not know."""

    def new_memory(self) -> Any:
        """What it remembers of a host that it has not met yet; None when `memory_bytes` is 0."""

    def observe(self, layer: int, units: U32, memory: Any) -> None:
        """A host says which units, ascending, were active; no matter to most programs."""

    def begin(self, given: ProgramInput, memory: Any) -> Run:
        """One command's run. `memory` is of the host that asks, and may change.

        Raises CommandError (Invalid Field) for input that the program does not take.
        """

    def correct(self, layer: int, inputs: F32, computed: U32) -> tuple[F32, Cost]:
        """What the units that were not computed add, float32 [rows, hidden]; and its cost.

        `inputs` float32 [rows, hidden] are the FFN's own; `computed` ascending. Raises CommandError
        (Invalid Field) for a program that cannot, an unknown layer or inputs of another width.
        """
