"""The `window` program: units that were active at the last few tokens are predicted.

LLM in a flash (Alizadeh et al., 2023) keeps the units of the last 4 to 5 tokens. Here the host says
which units were active, and the drive keeps one bit a unit and observation: bit 0 of a unit's word
is the latest, and an observation shifts all words of its layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.compute.frequency import Counts, read_counts
from csd_device.compute.layered import LayeredProgram
from csd_device.compute.numbers import number, whole_number
from csd_device.compute.program import F32, NO_COST, U32, Cost, ProgramInput, Run
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import WINDOW_TOKENS_MAX, Key, ProgramKind

Memory = dict[int, U32]  # layer: one bit an observation, [units]
_WORD_BYTES = 4


class WindowProgram(LayeredProgram[Counts]):
    """Scores are sums of decay^age over what a host observed; see `Program`."""

    kind = ProgramKind.WINDOW

    def __init__(self, file: TensorFile) -> None:
        super().__init__(file)
        self._layers = read_counts(file)
        tokens = whole_number(file, Key.TOKENS, 1, WINDOW_TOKENS_MAX)
        decay = number(file, Key.DECAY, 0.0, 1.0)
        self._weights: F32 = (decay ** np.arange(tokens)).astype(np.float32)
        self.memory_bytes = _WORD_BYTES * sum(layer.units for layer in self._layers.values())

    def new_memory(self) -> Memory:
        return {number: np.zeros(layer.units, np.uint32) for number, layer in self._layers.items()}

    def observe(self, layer: int, units: U32, memory: Memory) -> None:
        words = memory[layer]
        words <<= np.uint32(1)
        words[units] |= np.uint32(1)

    def begin(self, given: ProgramInput, memory: Memory | None = None) -> Run:
        assert memory is not None
        return _WindowRun(self, memory)

    def score_observed(self, layer: int, words: U32) -> F32:
        """Scores float32 [units] of observations [units]."""
        scores = self.layer(layer).counts.copy()
        add_observed(words, self._weights, scores)
        return scores

    def cost(self, layer: int, rows: int) -> Cost:
        counts = self.layer(layer).counts
        return Cost(counts.size * self._weights.size, counts.nbytes + _WORD_BYTES * counts.size)


@dataclass(frozen=True, slots=True)
class _WindowRun:
    program: WindowProgram
    memory: Memory

    def score(self, layer: int) -> tuple[F32, Cost]:
        cost = self.program.cost(layer, 1)
        return self.program.score_observed(layer, self.memory[layer]), cost

    def remember(self, layer: int) -> Cost:
        """Hidden states say nothing of a window; `observe` does."""
        self.program.layer(layer)
        return NO_COST


@njit(nogil=True, cache=True)
def add_observed(words: npt.NDArray[Any], weights: Any, scores: Any) -> None:
    for unit in range(words.size):
        word = words[unit]
        for age in range(weights.size):
            if (word >> np.uint32(age)) & np.uint32(1):
                scores[unit] += weights[age]
