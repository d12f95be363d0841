"""Sectors that no retry brings back: named ones, and a share of all."""

import numpy as np

from csd_device.config import Geometry
from csd_device.errors import UnrecoveredRead
from csd_device.fault_config import Unreadable
from csd_device.nand.faults.decorator import (
    I64,
    U8,
    Decorator,
    FaultCounters,
    name_sectors,
    sectors_of,
)
from csd_device.nand.faults.dice import throw
from csd_device.nand.media import Media, Pieces, Retries
from csd_device.nand.superblocks import Superblocks

_SALT = 1  # this fault's own dice


class UnreadableMedia(Decorator):
    """Raises UnrecoveredRead, naming the sectors; the other bytes of such a read are no good.

    A named sector stays bad until its superblock is erased: `bad` are pairs of sector and erases.
    """

    def __init__(
        self,
        inner: Media,
        counters: FaultCounters,
        settings: Unreadable,
        bad: I64,
        geometry: Geometry,
        superblocks: Superblocks,
        seed: int,
    ) -> None:
        """`bad` [n]: physical sectors that are lost, ascending, each once."""
        super().__init__(inner, counters)
        self._rate, self._seed = settings.rate, seed + _SALT
        self._per_superblock = geometry.sectors_per_superblock
        self._superblocks = superblocks
        self._bad, self._bad_erases = bad, self._erases_of(bad)

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        retries = self.inner.gather(pieces, out)
        lost = self._lost_of(sectors_of(pieces))
        if lost.size:
            self._counters.uncorrectable_sectors += lost.size
            raise UnrecoveredRead(f"{name_sectors(lost)} cannot be read", psas=lost)
        return retries

    def _lost_of(self, psas: I64) -> I64:
        is_lost = np.zeros(psas.size, np.bool_)
        if self._rate:
            is_lost = throw(self._seed, psas, self._erases_of(psas)) <= self._rate
        still_bad = self._bad[self._erases_of(self._bad) == self._bad_erases]
        return psas[is_lost | np.isin(psas, still_bad)]

    def _erases_of(self, psas: I64) -> I64:
        return self._superblocks.erases[psas // self._per_superblock].astype(np.int64)
