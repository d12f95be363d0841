"""The `planted` program: which units are active is drawn, as a real model's would be, by a seed.

For models without weights of their own, where it is the traffic that counts. Units are drawn
without replacement by weight (the counts of the file): Gumbel noise on the logarithm of each, and
the highest scores win. From one token to the next a unit keeps its noise with the probability
`overlap`, so neighbours share more of their units than chance would have them share. A draw depends
on seed, layer, unit and token alone, so the same is drawn for whoever asks, and as often as asked.

What a run costs, and what the program takes of on-drive DRAM, is that of a `lowrank` program of the
stated rank: the predictor that models with sparse activations are published with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from csd_device.compute.frequency import Counts, read_counts
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import number, whole_number
from csd_device.compute.program import F32, NO_COST, Cost, ProgramInput, Run
from csd_device.compute.tensor_file import TensorFile
from csd_protocol.program_file import OVERLAP_MAX, RANK_MAX, SEED_MAX, WIDTH_MAX, Key, ProgramKind

_HALF_BYTES = 2
_KEPT_TOKENS_MAX = 64  # that a unit keeps its noise
_TOKEN_MASK = (1 << 48) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_UNIT = np.uint64(0xD1B54A32D192ED03)
_KEEPS, _NOISE = np.uint64(1), np.uint64(2)
_TO_FRACTION = 2.0**-53


@njit(nogil=True, cache=True)
def _fraction(key: Any, unit: Any, token: Any, what: Any) -> Any:
    """A number in (0, 1) for these: the finaliser of SplitMix64 (Steele et al., 2014), twice."""
    mixed = key ^ (np.uint64(unit) * _UNIT) ^ (np.uint64(token) * _STEP)
    for salt in (what, _STEP):
        mixed += salt * _STEP
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (np.float64(mixed >> np.uint64(11)) + 0.5) * _TO_FRACTION


@njit(nogil=True, cache=True)
def draw_scores(key: Any, token: Any, rows: Any, overlap: Any, logs: Any, scores: Any) -> None:
    """Fills `scores` [units] with the highest of `rows` tokens from `token` on."""
    for unit in range(scores.shape[0]):
        noise = -np.inf
        for at in range(token, token + rows):
            drawn_at = at
            while (
                drawn_at > max(0, at - _KEPT_TOKENS_MAX)
                and _fraction(key, unit, drawn_at, _KEEPS) < overlap
            ):
                drawn_at -= 1
            noise = max(noise, -np.log(-np.log(_fraction(key, unit, drawn_at, _NOISE))))
        scores[unit] = logs[unit] + noise


class PlantedProgram(LayeredProgram[Counts]):
    """Scores are log(count) + noise; see `Program`."""

    kind = ProgramKind.PLANTED

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        self._layers = read_counts(file)
        self._logs = {number: _log(layer.counts) for number, layer in self._layers.items()}
        self._seed = whole_number(file, Key.SEED, 0, SEED_MAX)
        self._overlap = number(file, Key.OVERLAP, 0.0, OVERLAP_MAX)
        self._width = whole_number(file, Key.WIDTH, 1, WIDTH_MAX)
        self._rank = whole_number(file, Key.RANK, 1, RANK_MAX)
        self.dram_bytes += sum(self.cost(layer, 1).dram_bytes for layer in self._layers)

    def begin(self, given: ProgramInput, memory: Any = None) -> Run:
        return _PlantedRun(self, given)

    def draw(self, layer: int, hidden: F32, token: int) -> F32:
        """Scores float32 [units] of hidden float32 [rows, hidden], row 0 being this token's."""
        check_width(hidden, self._width)
        scores = np.empty(self.layer(layer).units, np.float32)
        key = np.uint64((self._seed << 20) + layer)
        logs = self._logs[layer]
        draw_scores(key, token & _TOKEN_MASK, len(hidden), self._overlap, logs, scores)
        return scores

    def cost(self, layer: int, rows: int) -> Cost:
        values = self._rank * (self._width + self.layer(layer).units)
        return Cost(ops=2 * values * rows, dram_bytes=_HALF_BYTES * values)


def _log(counts: F32) -> F32:
    """Of counts [units]; those that are none come last."""
    return np.log(np.maximum(counts, np.finfo(np.float32).tiny))


@dataclass(frozen=True, slots=True)
class _PlantedRun:
    program: PlantedProgram
    given: ProgramInput

    def score(self, layer: int) -> tuple[F32, Cost]:
        hidden = self.given.hidden
        scores = self.program.draw(layer, hidden, self.given.token)
        return scores, self.program.cost(layer, len(hidden))

    def remember(self, layer: int) -> Cost:
        """Nothing is remembered."""
        self.program.layer(layer)
        return NO_COST
