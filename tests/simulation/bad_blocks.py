"""Superblocks that go bad: a program or an erase fails, and every one after it.

The cells of a failed program hold a part of what was to be written. What is bad stays so over
restarts, so one `BadBlocks` serves all openings of a drive.
"""

import numpy as np

from csd_device.config import Geometry
from csd_device.errors import WriteFault
from csd_device.nand.media import U8, Media
from csd_device.nand.passing import PassingMedia


class BadBlocks:
    """At most `limit` superblocks fail, one in so many operations at `rate`."""

    def __init__(
        self, geometry: Geometry, rng: np.random.Generator, rate: float, limit: int
    ) -> None:
        self.failed: set[int] = set()
        self._size = geometry.superblock_bytes
        self._rng = rng
        self._rate = rate
        self._limit = limit

    def around(self, media: Media) -> Media:
        return _FailingMedia(media, self)

    def fails(self, start: int) -> bool:
        superblock = start // self._size
        if len(self.failed) < self._limit and self._rng.random() < self._rate:
            self.failed.add(superblock)
        return superblock in self.failed

    def part_of(self, whole: int) -> int:
        return int(self._rng.integers(0, whole + 1))


class _FailingMedia(PassingMedia):
    def __init__(self, inner: Media, blocks: BadBlocks) -> None:
        super().__init__(inner)
        self._blocks = blocks

    def write(self, start: int, data: U8) -> None:
        if self._blocks.fails(start):
            super().write(start, data[: self._blocks.part_of(data.size)])
            raise WriteFault(f"program at {start} failed", address=start)
        super().write(start, data)

    def erase(self, start: int, length: int) -> None:
        if self._blocks.fails(start):
            raise WriteFault(f"erase at {start} failed", address=start)
        super().erase(start, length)
