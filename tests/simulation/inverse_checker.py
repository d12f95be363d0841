"""L2P and P2L are inverse: no sector stands for two, and each knows what it stands for."""

import numpy as np
from checker import Tables, Watching


class InverseChecker(Watching):
    name = "inverse"

    def settled(self, tables: Tables) -> None:
        lpns = np.flatnonzero(tables.table)
        psas = tables.table[lpns].astype(np.int64) - 1
        if psas.size and psas.max() >= self.geometry.raw_sectors:
            raise self.broken(f"sectors {lpns[psas >= self.geometry.raw_sectors]} beyond the media")
        holders = np.bincount(psas, minlength=self.geometry.raw_sectors)
        if (holders > 1).any():
            raise self.broken(f"several logical sectors lie in {np.flatnonzero(holders > 1)}")
        wrong = lpns[tables.reverse[psas] != lpns + 1]
        if wrong.size:
            raise self.broken(f"P2L names others for sectors {wrong[:8]}")
        stale = np.flatnonzero((tables.reverse != 0) & (holders == 0))
        if stale.size:
            raise self.broken(f"P2L names sectors {stale[:8]} that L2P does not")
