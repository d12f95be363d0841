"""No cell is programmed twice without an erase between."""

import numpy as np
from checker import I64, Watching

from csd_device.config import Geometry


class ProgramChecker(Watching):
    name = "programmed once"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._sectors = np.zeros(geometry.raw_sectors, np.bool_)
        self._pages = np.zeros(geometry.pages, np.bool_)  # that the FTL reported

    def wrote(self, first_psa: int, sectors: int) -> None:
        found = self._sectors[first_psa : first_psa + sectors]
        if found.any():
            again = first_psa + np.flatnonzero(found)
            raise self.broken(f"sectors {again} written without an erase")
        found[:] = True

    def erased(self, superblock: int) -> None:
        size = self.geometry.sectors_per_superblock
        self._sectors[superblock * size : (superblock + 1) * size] = False
        pages = self.geometry.pages_per_superblock
        self._pages[superblock * pages : (superblock + 1) * pages] = False

    def reported(self, ppns: I64) -> None:
        by_page = self._sectors.reshape(-1, self.geometry.sectors_per_page)
        standing = ppns[by_page[ppns].any(axis=1)]  # the others were erased again since
        again = standing[self._pages[standing]]
        if again.size or np.unique(ppns).size != ppns.size:
            raise self.broken(f"pages reported as programmed twice: {again} in {ppns}")
        self._pages[standing] = True
