"""L2P and P2L are inverse: no sector stands for two, and each knows what it stands for."""

import numpy as np
from checker import Tables, Watching


class InverseChecker(Watching):
    name = "inverse"

    def settled(self, tables: Tables) -> None:
        lpns = np.flatnonzero(tables.table)
        psas = tables.table[lpns].astype(np.int64) - 1
        self.require(
            np.unique(psas).size == psas.size, "two logical sectors lie in one physical sector"
        )
        self.require(
            not psas.size or psas.max() < self.geometry.raw_sectors, "mapped beyond the media"
        )
        if tables.reverse is not None:
            named = tables.reverse[psas].astype(np.int64) - 1
            wrong = lpns[named != lpns]
            self.require(not wrong.size, f"P2L names others for sectors {wrong[:8]}")
