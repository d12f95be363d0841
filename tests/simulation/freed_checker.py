"""A superblock that is erased, or free, holds no mapped sector."""

import numpy as np
from checker import Tables, Watching

from csd_device.nand.superblocks import SuperblockState


class FreedChecker(Watching):
    name = "freed"

    def erasing(self, superblock: int, tables: Tables | None) -> None:
        if tables is not None:
            self._check(np.array([superblock]), tables)

    def settled(self, tables: Tables) -> None:
        self._check(np.flatnonzero(tables.superblocks.states == SuperblockState.FREE), tables)

    def _check(self, superblocks: np.ndarray, tables: Tables) -> None:
        lpns = np.flatnonzero(tables.table)
        psas = tables.table[lpns].astype(np.int64) - 1
        is_freed = np.zeros(self.geometry.blocks_per_plane, np.bool_)
        is_freed[superblocks] = True
        inside = is_freed[psas // self.geometry.sectors_per_superblock]
        if inside.any():
            raise self.broken(f"mapped sectors {lpns[inside][:8]} lie in superblocks being freed")
