"""Programs and erases that the cells report as failed.

Whether a page's program fails is decided once for each of its program/erase cycles, and so is a
superblock's erase: to try again does not help, to erase and try again may.
"""

import numpy as np
import numpy.typing as npt

from csd_device.config import Geometry
from csd_device.errors import WriteFault
from csd_device.fault_config import Failures
from csd_device.nand.faults.decorator import I64, U8, Decorator, FaultCounters
from csd_device.nand.faults.dice import throw
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks

Flags = npt.NDArray[np.bool_]


class _CellFailures(Decorator):
    """What programs and erases share: the dice, and the superblocks that are named."""

    salt = 0  # each fault's own dice

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
        self._rate, self._seed = settings.rate, seed + self.salt
        self._bad = np.array(settings.superblocks, np.int64)
        self._geometry, self._superblocks = geometry, superblocks

    def _fail(self, places: I64, blocks: I64) -> Flags:
        """Which of these places (pages or superblocks), each in its superblock, fail [n]."""
        erases = self._superblocks.erases[blocks].astype(np.int64)
        is_thrown = throw(self._seed, places, erases) <= self._rate
        failing: Flags = is_thrown | np.isin(blocks, self._bad)
        return failing


class ProgramFailures(_CellFailures):
    """Raises WriteFault at the first page that fails; the pages before it are programmed."""

    salt = 2

    def write(self, start: int, data: U8) -> None:
        page_bytes = self._geometry.page_bytes
        pages = np.arange(start // page_bytes, -(-(start + data.size) // page_bytes))
        failed = pages[self._fail(pages, pages // self._geometry.pages_per_superblock)]
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


class EraseFailures(_CellFailures):
    """Raises WriteFault for a superblock that cannot be erased; its bytes stay."""

    salt = 3

    def erase(self, start: int, length: int) -> None:
        size = self._geometry.superblock_bytes
        blocks = np.arange(start // size, -(-(start + length) // size))
        failed = blocks[self._fail(blocks, blocks)]
        if failed.size:
            block = int(failed[0])
            self._counters.erase_failures += 1
            raise WriteFault(f"superblock {block} cannot be erased", block * size)
        self.inner.erase(start, length)
