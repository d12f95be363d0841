"""A world half of whose writes are sectors that the drive makes instead of storing them."""

from typing import Any

import numpy as np
from world import World

from csd_device.config import SECTOR_BYTES

KNOWN = 12  # contents


class PatternWorld(World):
    """Contents are numbers that no stamp is; the drive is told of them each time it is opened."""

    def _open(self, goes_off_at: int | None = None) -> None:
        super()._open(goes_off_at)
        self.subject.ftl.patterns.define(_sectors(np.arange(1, KNOWN + 1, dtype=np.uint64)))

    def write(self, lpn: int, count: int, fua: bool = False) -> None:
        if self._rng.random() < 0.5:
            super().write(lpn, count, fua)
            return
        values = self._rng.integers(1, KNOWN + 1, count, np.uint64)
        data = _sectors(values).tobytes()
        change = self.expected.propose(lpn, values)
        self._change([change], lambda: self.subject.write(lpn, data, fua), is_durable=fua)


def _sectors(values: Any) -> Any:
    """Sectors uint8 [n, 4096] that have these values, over and over."""
    return np.repeat(values, SECTOR_BYTES // 8).view(np.uint8).reshape(-1, SECTOR_BYTES)
