"""The audit of a kept fraction: how much of what the true FFN input wanted was chosen in time.

The host cannot score neurons it does not hold, so on each decoded token one layer, in turn, has the
rest of its neurons staged late and scored by |silu(g) * u| * ||down||, as the choice itself is.
Counted are the wanted units that the program chose, and those that were computed, as resident and
recent ones always are. What that moves is counted as late, and is about one layer's share of what
is staged.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Site
from host_client.runtime import kernels
from host_client.runtime.engine import Engine
from host_client.runtime.observed import down_norms
from host_client.runtime.prefetch import Block
from host_client.runtime.row_arithmetic import Encoding

U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
BOOL = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Audited:
    """Sums over the tokens at which one layer was looked at."""

    audits: int = 0
    wanted: int = 0  # units
    computed: int = 0  # chosen, or held
    found: int = 0  # wanted, and computed


class Auditor:
    """Called for each layer of a guided pass; looks closely at one layer a token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.layers = [Audited() for _ in range(engine.model.layer_count)]

    def __call__(self, site: Site, x: F32, block: Block) -> None:
        """x: the true FFN input, float32 [1, hidden]."""
        engine = self._engine
        if block.predicted is None or engine.position % engine.model.layer_count != site.layer:
            return
        entry = engine.resident[site.site]
        scores = np.zeros(site.count, np.float32)
        encoding = engine.encoding(site)
        scores[entry.units] = _scores(x, entry.values, encoding)
        scores[block.units] = _scores(x, block.values, encoding)
        recent = engine.recent(site)
        if recent is not None:
            scores[recent.units] = _scores(x, recent.values, encoding)
        for units, values in engine.missed_parts(site, block):
            scores[units] = _scores(x, values, encoding)
        kept = math.ceil(engine.kept_of(site) * site.count)
        wanted = np.argpartition(-scores, kept - 1)[:kept]
        engine.tally.wanted_units += kept
        engine.tally.wanted_in_time += int(np.isin(wanted, block.predicted).sum())
        computed = engine.computed(site, block)
        engine.tally.wanted_computed += int(computed[wanted].sum())
        self._note(site.layer, kept, computed, wanted)

    def _note(self, layer: int, kept: int, computed: BOOL, wanted: I64) -> None:
        sums = self.layers[layer]
        sums.audits += 1
        sums.wanted += kept
        sums.computed += int(computed.sum())
        sums.found += int(computed[wanted].sum())


def _scores(x: F32, values: U16, encoding: Encoding) -> F32:
    activity = np.zeros((1, values.shape[0]), np.float32)
    if values.shape[0]:
        ignored = np.zeros_like(x)
        kernels.neurons(x, values, None, ignored, encoding, activity)
    scores: F32 = activity[0] * down_norms(values, x.shape[1], encoding)
    return scores
