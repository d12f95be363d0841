"""Media that tell checkers what is done to them: the outermost decorator of a simulated drive."""

from collections.abc import Callable, Sequence

from checker import Checker, Tables

from csd_device.config import SECTOR_BYTES, Geometry
from csd_device.nand.media import U8, Media
from csd_device.nand.passing import PassingMedia


class WatchedMedia(PassingMedia):
    def __init__(
        self,
        inner: Media,
        geometry: Geometry,
        checkers: Sequence[Checker],
        tables: Callable[[], Tables | None],
    ) -> None:
        super().__init__(inner)
        self._geometry = geometry
        self._checkers = checkers
        self._tables = tables
        self._is_closed = False

    def write(self, start: int, data: U8) -> None:
        assert start % SECTOR_BYTES == data.size % SECTOR_BYTES == 0
        try:
            self.inner.write(start, data)
        finally:
            for checker in self._checkers:
                checker.wrote(start // SECTOR_BYTES, data.size // SECTOR_BYTES)

    def erase(self, start: int, length: int) -> None:
        size = self._geometry.superblock_bytes
        assert start % size == length % size == 0
        for superblock in range(start // size, (start + length) // size):
            for checker in self._checkers:
                checker.erasing(superblock, self._tables())
        self.inner.erase(start, length)
        for superblock in range(start // size, (start + length) // size):
            for checker in self._checkers:
                checker.erased(superblock)

    def close(self) -> None:
        """Again: does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.inner.close()
