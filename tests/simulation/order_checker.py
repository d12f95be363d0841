"""The pages of a block are programmed from the first to the last, and their sectors too."""

import numpy as np
from checker import I64, Watching

from csd_device.config import Geometry


class OrderChecker(Watching):
    """A sector that was programmed before is another checker's affair."""

    name = "in order"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._written = np.zeros(geometry.raw_sectors, np.bool_)
        self._last = np.full(geometry.blocks_per_plane * geometry.planes, -1)  # by block

    def wrote(self, first_psa: int, sectors: int) -> None:
        psas = np.arange(first_psa, first_psa + sectors)
        blocks, places = self._places(psas)
        early = ~self._written[psas] & (places < self._last[blocks])
        if early.any():
            raise self.broken(
                f"sectors {psas[early]} come before what their blocks were programmed with last"
            )
        self._written[psas] = True
        np.maximum.at(self._last, blocks, places)

    def erased(self, superblock: int) -> None:
        size = self.geometry.sectors_per_superblock
        self._written[superblock * size : (superblock + 1) * size] = False
        planes = self.geometry.planes
        self._last[superblock * planes : (superblock + 1) * planes] = -1

    def _places(self, psas: I64) -> tuple[I64, I64]:
        """The block of each sector, and its place in the block."""
        per_page, planes = self.geometry.sectors_per_page, self.geometry.planes
        ppns, sectors = np.divmod(psas, per_page)
        rows, plane = np.divmod(ppns, planes)
        superblocks, pages = np.divmod(rows, self.geometry.pages_per_block)
        return superblocks * planes + plane, pages * per_page + sectors
