"""No cell is programmed twice without an erase between, and no page is reported so."""

import numpy as np
from checker import I64, Watching

from csd_device.config import Geometry


class ProgramChecker(Watching):
    name = "programmed once"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._sectors = np.zeros(geometry.raw_sectors, np.bool_)
        self._reports = np.zeros(geometry.pages, np.int64)  # since the last erase
        self._gone = np.zeros(geometry.pages, np.int64)  # programmed, erased and not reported yet

    def wrote(self, first_psa: int, sectors: int) -> None:
        found = self._sectors[first_psa : first_psa + sectors]
        if found.any():
            again = first_psa + np.flatnonzero(found)
            raise self.broken(f"sectors {again} written without an erase")
        found[:] = True

    def erased(self, superblock: int) -> None:
        size, pages = self.geometry.sectors_per_superblock, self.geometry.pages_per_superblock
        sectors = self._sectors[superblock * size : (superblock + 1) * size]
        reports = self._reports[superblock * pages : (superblock + 1) * pages]
        is_programmed = sectors.reshape(pages, -1).any(axis=1)
        self._gone[superblock * pages : (superblock + 1) * pages] += is_programmed & (reports == 0)
        sectors[:] = False
        reports[:] = 0

    def reported(self, ppns: I64) -> None:
        found = np.bincount(ppns, minlength=self.geometry.pages)
        self._reports += np.maximum(found - self._gone, 0)
        self._gone[:] = 0
        if (self._reports > 1).any():
            again = np.flatnonzero(self._reports > 1)
            raise self.broken(f"pages {again} were reported as programmed twice")
