"""Media that tell checkers what is done to them: the outermost decorator of a simulated drive."""

from collections.abc import Callable, Sequence

from checker import Checker, Tables

from csd_device.config import SECTOR_BYTES, Geometry
from csd_device.nand.media import U8, Media, Pieces, Retries


class WatchedMedia:
    def __init__(
        self,
        inner: Media,
        geometry: Geometry,
        checkers: Sequence[Checker],
        tables: Callable[[], Tables | None],
    ) -> None:
        self._inner = inner
        self._geometry = geometry
        self._checkers = checkers
        self._tables = tables
        self._is_closed = False

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        return self._inner.gather(pieces, out)

    def write(self, start: int, data: U8) -> None:
        assert start % SECTOR_BYTES == data.size % SECTOR_BYTES == 0
        try:
            self._inner.write(start, data)
        finally:
            for checker in self._checkers:
                checker.wrote(start // SECTOR_BYTES, data.size // SECTOR_BYTES)

    def erase(self, start: int, length: int) -> None:
        size = self._geometry.superblock_bytes
        assert start % size == length % size == 0
        for superblock in range(start // size, (start + length) // size):
            for checker in self._checkers:
                checker.erasing(superblock, self._tables())
        self._inner.erase(start, length)
        for superblock in range(start // size, (start + length) // size):
            for checker in self._checkers:
                checker.erased(superblock)

    def sync(self) -> None:
        self._inner.sync()

    def close(self) -> None:
        """Again: does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._inner.close()
