"""Programs and erases that the cells report as failed.

Whether a page's program fails is decided once for each of its program/erase cycles, and so is a
superblock's erase: to try again does not help, to erase and try again may.
"""

import numpy as np

from csd_device.config import Geometry
from csd_device.errors import WriteFault
from csd_device.fault_config import Failures
from csd_device.nand.faults.decorator import I64, U8, Decorator, FaultCounters
from csd_device.nand.faults.dice import throw
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks

_PROGRAM_SALT, _ERASE_SALT = 2, 3  # each fault's own dice


class ProgramFailures(Decorator):
    """Raises WriteFault at the first page that fails; the pages before it are programmed."""

    def __init__(
        self,
        inner: Media,
        counters: FaultCounters,
        settings: Failures,
        geometry: Geometry,
        superblocks: Superblocks,
        seed: int,
    ) -> None:
        super().__init__(inner, counters)
        self._rate, self._seed = settings.rate, seed + _PROGRAM_SALT
        self._bad = np.array(settings.superblocks, np.int64)
        self._geometry, self._superblocks = geometry, superblocks

    def write(self, start: int, data: U8) -> None:
        page_bytes = self._geometry.page_bytes
        pages = np.arange(start // page_bytes, -(-(start + data.size) // page_bytes))
        failed = pages[self._fails(pages)]
        if not failed.size:
            self.inner.write(start, data)
            return
        page = int(failed[0])
        address = max(start, page * page_bytes)
        if address > start:
            self.inner.write(start, data[: address - start])
        self._counters.program_failures += 1
        block = page // self._geometry.pages_per_superblock
        raise WriteFault(f"page {page} of superblock {block} cannot be programmed", address)

    def _fails(self, pages: I64) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        blocks = pages // self._geometry.pages_per_superblock
        erases = self._superblocks.erases[blocks].astype(np.int64)
        is_thrown = throw(self._seed, pages, erases) <= self._rate
        failing: np.ndarray[tuple[int], np.dtype[np.bool_]] = is_thrown | np.isin(blocks, self._bad)
        return failing


class EraseFailures(Decorator):
    """Raises WriteFault for a superblock that cannot be erased; its bytes stay."""

    def __init__(
        self,
        inner: Media,
        counters: FaultCounters,
        settings: Failures,
        geometry: Geometry,
        superblocks: Superblocks,
        seed: int,
    ) -> None:
        super().__init__(inner, counters)
        self._rate, self._seed = settings.rate, seed + _ERASE_SALT
        self._bad = frozenset(settings.superblocks)
        self._superblock_bytes, self._superblocks = geometry.superblock_bytes, superblocks

    def erase(self, start: int, length: int) -> None:
        size = self._superblock_bytes
        for block in range(start // size, -(-(start + length) // size)):
            if self._fails(block):
                self._counters.erase_failures += 1
                raise WriteFault(f"superblock {block} cannot be erased", block * size)
        self.inner.erase(start, length)

    def _fails(self, block: int) -> bool:
        erases = int(self._superblocks.erases[block])
        thrown = throw(self._seed, np.array([block]), np.array([erases]))[0]
        return block in self._bad or bool(thrown <= self._rate)
