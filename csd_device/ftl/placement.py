"""Where sectors go: an open superblock and a write pointer for each stream.

What a host writes (HOST), packed weights (WEIGHTS) and what garbage collection moves (MOVED) have
lifetimes of their own, so they never share a superblock: one goes stale as a whole, or not at all.
A superblock is opened with the fewest erases first, written from front to back and erased whole.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES, Geometry
from csd_device.errors import WriteFault
from csd_device.ftl.changes import Changes, EventKind
from csd_device.ftl.programs import Work
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks, SuperblockState

U8 = npt.NDArray[np.uint8]

NO_POINTER = -1


class Stream(IntEnum):
    """What is written together; the number is kept in `Superblocks.streams`."""

    HOST = 0
    WEIGHTS = 1
    MOVED = 2


class SuperblockRetired(Exception):
    """A program or erase failed: the superblock is out of use, and what was asked is not done."""


class Placement:
    """The write pointers. `pointers` [streams]: next PSA, -1 where no superblock is open."""

    def __init__(
        self,
        media: Media,
        geometry: Geometry,
        superblocks: Superblocks,
        changes: Changes,
        work: Work,
    ) -> None:
        self.size = geometry.sectors_per_superblock
        self.pointers = [NO_POINTER] * len(Stream)
        self.programmed = 0  # sectors, over the drive's life
        self.opened_ns = 0  # drive clock: what is opened now is opened then
        self.powered_ns = 0  # time that the drive was on when its clock was 0
        self.has_opened = False  # since somebody looked
        self.media = media
        self._geometry = geometry
        self._superblocks = superblocks
        self._changes = changes
        self._work = work
        # A crash may have left bytes of writes that it undid in what counts as erased.
        self._suspect = np.ones(geometry.blocks_per_plane, np.bool_)

    def room_in(self, stream: Stream) -> int:
        """Sectors left in the stream's open superblock."""
        pointer = self.pointers[stream]
        return 0 if pointer == NO_POINTER else self.size - pointer % self.size

    def room(self, stream: Stream, reserve: int) -> int:
        """Sectors that can be placed with `reserve` free superblocks left alone."""
        free = max(0, self._superblocks.free_count - reserve)
        return self.room_in(stream) + free * self.size

    def place(self, stream: Stream, cells: U8, is_move: bool = False) -> list[tuple[int, int]]:
        """Writes cells to the next free sectors; where they went: (psa, sectors).

        The caller has checked the room. Raises SuperblockRetired, and WriteFault when it is not
        the cells that failed; either way what was written so far is stale.
        """
        placed = []
        at = 0
        while at < cells.size:
            if self.pointers[stream] == NO_POINTER:
                self._open(stream)
            length = min(self.room_in(stream) * SECTOR_BYTES, cells.size - at)
            psa = self.pointers[stream]
            self._write(stream, psa, cells[at : at + length], is_move)
            placed.append((psa, length // SECTOR_BYTES))
            at += length
        return placed

    def pad_pages(self) -> None:
        """Programs the pages that are filled in part."""
        for stream in Stream:
            pointer = self.pointers[stream]
            padding = -pointer % self._geometry.sectors_per_page
            if pointer != NO_POINTER and padding:
                self._advance(stream, padding, is_move=stream is Stream.MOVED)

    def erase(self, superblock: int) -> bool:
        """Whether it could be erased. Raises WriteFault when it is not the cells that failed."""
        size = self._geometry.superblock_bytes
        try:
            self.media.erase(superblock * size, size)
        except WriteFault as fault:
            if fault.address is None:
                raise
            return False
        self._suspect[superblock] = False
        return True

    def _write(self, stream: Stream, psa: int, cells: U8, is_move: bool) -> None:
        sectors = cells.size // SECTOR_BYTES
        try:
            self.media.write(psa * SECTOR_BYTES, cells)
        except WriteFault as fault:
            if fault.address is None:  # who knows how much was written: no page a second time
                padding = -(psa + sectors) % self._geometry.sectors_per_page
                self._skip(stream, sectors + padding)
                raise
            superblock = psa // self.size
            self._superblocks.retire(superblock)
            self._changes.note_event(EventKind.RETIRE, superblock)
            self.pointers[stream] = NO_POINTER
            raise SuperblockRetired from fault
        self._advance(stream, sectors, is_move)

    def _open(self, stream: Stream) -> None:
        superblock = self._superblocks.take_free()
        assert superblock is not None, "room was checked"
        try:
            is_erased = not self._suspect[superblock] or self.erase(superblock)
        except WriteFault:
            self._superblocks.put_back(superblock)
            raise
        if not is_erased:
            self._superblocks.condemn(superblock)
            self._changes.note_event(EventKind.BAD, superblock)
            raise SuperblockRetired
        self.pointers[stream] = superblock * self.size
        self._suspect[superblock] = True
        self._superblocks.streams[superblock] = stream
        self._superblocks.opened_at[superblock] = self.programmed
        self._superblocks.written_ns[superblock] = self.opened_ns
        self._changes.note_event(EventKind.OPEN, superblock, stream, self.programmed)
        powered_ns = self.powered_ns + self.opened_ns
        self._changes.note_event(EventKind.WRITTEN, superblock, powered_ns)
        self.has_opened = True

    def _advance(self, stream: Stream, sectors: int, is_move: bool) -> None:
        """Moves the write pointer; notes the pages that became full."""
        per_page = self._geometry.sectors_per_page
        before = self.pointers[stream]
        self.programmed += sectors
        self._work.note_programs(before // per_page, (before + sectors) // per_page, is_move)
        self._skip(stream, sectors)

    def _skip(self, stream: Stream, sectors: int) -> None:
        after = self.pointers[stream] + sectors
        self.pointers[stream] = after
        if after % self.size == 0:
            self._superblocks.fill(after // self.size - 1)
            self.pointers[stream] = NO_POINTER

    def close_open(self) -> None:
        """After a crash: open superblocks are full where their committed part ends.

        What lies behind it may be programmed already, and is not programmed again.
        """
        self.pointers = [NO_POINTER] * len(Stream)
        for superblock in self._superblocks.having(SuperblockState.OPEN):
            self._superblocks.fill(int(superblock))
