"""The counts of valid sectors are those of the mapping."""

import numpy as np
from checker import Tables, Watching


class ValidChecker(Watching):
    name = "valid counts"

    def settled(self, tables: Tables) -> None:
        psas = tables.table[tables.table != 0].astype(np.int64) - 1
        size = self.geometry.sectors_per_superblock
        counted = np.bincount(psas // size, minlength=self.geometry.blocks_per_plane)
        stated = tables.superblocks.valid
        wrong = np.flatnonzero(counted != stated)
        if wrong.size:
            raise self.broken(
                f"superblocks {wrong[:8]} have {counted[wrong[:8]]} valid sectors, "
                f"{stated[wrong[:8]]} are stated"
            )
