"""The audit of a kept fraction: how much of what the true FFN input wanted was chosen in time.

The host cannot score neurons it does not hold, so on each decoded token one layer, in turn, has the
rest of its neurons staged late and scored by |silu(g) * u| * ||down||, as the choice itself is.
Counted are the wanted units that the program chose, and those that were computed, as resident ones
always are. What that moves is counted as late, and is about one layer's share of what is staged.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Site
from host_client.runtime import kernels
from host_client.runtime.engine import Engine
from host_client.runtime.observed import Witness

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
BOOL = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Audited:
    """Sums over the tokens at which one layer was looked at."""

    audits: int = 0
    wanted: int = 0  # units
    computed: int = 0  # chosen, or resident
    found: int = 0  # wanted, and computed


class Auditor:
    """Looks closely at one layer of each guided pass."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.layers = [Audited() for _ in range(engine.model.layer_count)]

    def looks_at(self, site: Site) -> bool:
        """Whether it wants to know how active the neurons of this FFN are in the running pass."""
        engine = self._engine
        return engine.guided and engine.position % engine.model.layer_count == site.layer

    def audit(self, site: Site, x: F32, computed: BOOL, witness: Witness) -> None:
        """An FFN is computed. x: its true input, float32 [1, hidden]; computed: of its units, [n].

        witness: has seen what was computed.
        """
        engine = self._engine
        chosen = engine.chosen(site)
        if chosen is None or chosen.predicted is None:
            return
        for units, values in engine.missed_parts(site, computed):
            activity = np.zeros((1, units.size), np.float32)
            kernels.neurons(x, values, None, np.zeros_like(x), engine.encoding(site), activity)
            witness.see(units, values, activity)
        kept = math.ceil(engine.kept_of(site) * site.count)
        wanted = witness.most_active(engine.kept_of(site), site.count)
        engine.tally.wanted_units += kept
        engine.tally.wanted_in_time += int(np.isin(wanted, chosen.predicted).sum())
        engine.tally.wanted_computed += int(computed[wanted].sum())
        self._note(site.layer, kept, computed, wanted)

    def _note(self, layer: int, kept: int, computed: BOOL, wanted: U32) -> None:
        sums = self.layers[layer]
        sums.audits += 1
        sums.wanted += kept
        sums.computed += int(computed.sum())
        sums.found += int(computed[wanted].sum())
