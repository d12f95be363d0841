"""The FTL: out-of-place writes, a mapping that survives, superblocks that come back.

Bytes go to the media at once, to the next free sectors of the open superblock; the mapping changes
in memory. A *commit* (a flush, a write with FUA, or `COMMIT_ENTRIES` changes) syncs the media first
and then appends one journal record with all changes since the last. So what a record names is
there, and what it does not name has not happened. A superblock is erased only after a commit that
left it without a valid sector: no committed mapping ever points into reused cells.

A page is programmed when its last sector is filled; a flush pads the page being filled. After a
crash writing goes on behind the last committed sector.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from csd_device.checked_copy import Keep, can_copy_checked
from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.errors import CapacityExceeded, DriveRefused, LbaOutOfRange
from csd_device.ftl.folder import MediaFolder
from csd_device.ftl.journal import Checkpoint, Entry, Journal, Kind
from csd_device.ftl.mapping import (
    count_by_superblock,
    cut_units,
    pages_of,
    parts_of,
    runs_of,
    whole_units,
)
from csd_device.ftl.victims import VictimPolicy, WhollyInvalid
from csd_device.gather import gather
from csd_device.nand.geometry import first_ppns_of
from csd_device.nand.media import FileMedia, Media, Pieces, direct_copy
from csd_device.nand.superblocks import Superblocks, SuperblockState
from csd_protocol.crc32c import crc32c_units

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

COMMIT_ENTRIES = 4096  # changes held in memory before they are committed unasked
CHECKPOINT_BYTES = 8 << 20  # of journal, before a checkpoint replaces it
NO_POINTER = -1

Wrap = Callable[[Media, Superblocks], Media]


@dataclass(frozen=True, slots=True)
class PageReads:
    """Pages that a read touches, each once, and the bytes that leave each.

    `extra_ns` is what the array takes longer for each than tR (read retries); None: nothing.
    """

    ppns: I64
    transfer_bytes: I64
    extra_ns: I64 | None = None


@dataclass(frozen=True, slots=True)
class PagePrograms:
    """Pages programmed, the bytes moved into each, and one page of each block erased."""

    ppns: I64
    transfer_bytes: I64
    erased_ppns: I64


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the drive was opened, but wear: since it was made."""

    sectors_written: int
    pages_programmed: int
    superblocks_erased: int
    erases_max: int
    erases_mean: float
    write_amplification: float  # bytes programmed over bytes written; 0.0 before the first write


class Ftl:
    """One namespace of `capacity_sectors` over the media."""

    def __init__(
        self,
        media: Media,
        config: DriveConfig,
        folder: MediaFolder,
        policy: VictimPolicy | None = None,
        superblocks: Superblocks | None = None,
    ) -> None:
        """Recovers the mapping from the folder. Takes over media and folder.

        `superblocks`: those that the media were wrapped with, if any.
        """
        geometry = config.geometry
        assert media.size_bytes == geometry.raw_bytes
        self._media = media
        self._geometry = geometry
        self._folder = folder
        self._policy = policy or WhollyInvalid()
        self.capacity_sectors = config.capacity_sectors
        self.mapping_bytes = config.mapping_bytes
        self._table: U32 = np.zeros(config.capacity_sectors, np.uint32)
        self._superblocks = superblocks or Superblocks(geometry.blocks_per_plane)
        self._pointer = NO_POINTER
        self._pending: list[Entry] = []
        self._erased: list[int] = []  # superblocks, since the last PagePrograms
        self._sectors_written = 0
        self._pages_programmed = 0
        self._superblocks_erased = 0
        self._journal = self._recover(folder.path)

    @classmethod
    def open(cls, directory: Path, config: DriveConfig, wrap: Wrap | None = None) -> Self:
        """The drive kept in this folder, made if it is not there. Raises DriveRefused.

        `wrap` puts decorators around the clean media; it is given the wear that they go by.
        """
        with ExitStack() as undo:
            folder = MediaFolder.open(directory, config)
            undo.callback(folder.close)
            media: Media = FileMedia(folder.nand_path, config.geometry.raw_bytes)
            undo.callback(media.close)
            superblocks = Superblocks(config.geometry.blocks_per_plane)
            if wrap:
                media = wrap(media, superblocks)
            try:
                ftl = cls(media, config, folder, superblocks=superblocks)
            except OSError as error:
                raise DriveRefused(f"media folder {directory}: {error}") from error
            undo.pop_all()
            return ftl

    # ---- reads -------------------------------------------------------------------------------

    def read(self, offset_bytes: int, out: U8) -> PageReads:
        """Fills the flat, contiguous `out` from byte `offset_bytes` of the namespace."""
        offsets = np.array([offset_bytes], np.int64)
        return self.read_units(offsets, out.size, out.reshape(1, -1))

    def read_units(self, offsets_bytes: I64, unit_bytes: int, out: U8) -> PageReads:
        """Gathers units into `out` [n, unit_bytes], contiguous.

        Raises LbaOutOfRange, and what the media raises (UnrecoveredRead).
        """
        assert out.shape == (offsets_bytes.size, unit_bytes)
        if not out.size:
            return PageReads(np.empty(0, np.int64), np.empty(0, np.int64))
        self._check_bytes(int(offsets_bytes.min()), int(offsets_bytes.max()) + unit_bytes)
        flat = out.reshape(-1)
        pieces = cut_units(self._table, offsets_bytes, unit_bytes, flat)
        columns = np.ascontiguousarray(pieces.T)
        self._media.gather(Pieces(columns[0], columns[1], columns[2]), flat)
        return PageReads(*pages_of(pieces, self._geometry.sectors_per_page))

    def read_checked(self, offsets_bytes: I64, out: U8, keep: Keep) -> tuple[PageReads, U32]:
        """`read_units`, the CRC32C of each unit with it [n]; the first ones go to `keep` as well.

        In one pass where the media is direct, each unit lies in one piece and all places are
        multiples of 64.
        """
        copy_units, unit_bytes = direct_copy(self._media), out.shape[1]
        if copy_units and can_copy_checked(out, keep):
            self._check_bytes(int(offsets_bytes.min()), int(offsets_bytes.max()) + unit_bytes)
            pieces = cut_units(self._table, offsets_bytes, unit_bytes, out.reshape(-1))
            starts = whole_units(pieces, offsets_bytes.size, unit_bytes)
            if starts is not None:
                checksums = copy_units(starts, out, keep)
                return PageReads(*pages_of(pieces, self._geometry.sectors_per_page)), checksums
        reads = self.read_units(offsets_bytes, unit_bytes, out)
        kept = np.arange(keep.starts.size) * unit_bytes
        gather(out.reshape(-1), kept, np.full_like(kept, unit_bytes), keep.starts, keep.memory)
        return reads, crc32c_units(out)

    def is_mapped(self, lpn: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of these sectors hold data [count]."""
        self._check_range(lpn, count)
        return np.not_equal(self._table[lpn : lpn + count], 0)

    @property
    def table(self) -> U32:
        """The L2P table, for compiled readers: PSA + 1 of each logical sector, 0: unmapped."""
        return self._table

    @property
    def used_sectors(self) -> int:
        """Logical sectors that hold data."""
        return int(self._superblocks.valid.sum())

    # ---- changes -----------------------------------------------------------------------------

    def write(
        self, lpn: int, data: bytes | bytearray | memoryview | U8, fua: bool = False
    ) -> PagePrograms:
        """Writes whole sectors from `lpn` on; durable on return with `fua`.

        Raises LbaOutOfRange and CapacityExceeded, the old data untouched, and WriteFault: then
        the sectors have all old or all new data.
        """
        cells = np.frombuffer(data, np.uint8)
        assert cells.size % SECTOR_BYTES == 0
        count = cells.size // SECTOR_BYTES
        self._check_range(lpn, count)
        self._make_room(count)
        programmed: list[int] = []
        placed = self._place(cells, programmed)
        for psa, length in placed:
            self._map(lpn, psa, length)
            lpn += length
        self._sectors_written += count
        if fua:
            self._flush_to(programmed)
        else:
            self._commit_if_many()
        return self._programs(programmed)

    def deallocate(self, lpn: int, count: int) -> None:
        """The sectors read as zeroes from here on. Raises LbaOutOfRange."""
        self._check_range(lpn, count)
        self._unmap(lpn, count)
        self._pending.append((Kind.UNMAP, lpn, count, 0))
        self._commit_if_many()

    def write_zeroes(self, lpn: int, count: int) -> None:
        """Deallocates, which reads as zeroes."""
        self.deallocate(lpn, count)

    def deallocate_all(self) -> None:
        """Empties the namespace."""
        self.deallocate(0, self.capacity_sectors)

    def flush(self) -> PagePrograms:
        """All that was acknowledged is durable on return. Raises WriteFault."""
        programmed: list[int] = []
        self._flush_to(programmed)
        return self._programs(programmed)

    def counters(self) -> Counters:
        written = self._sectors_written * SECTOR_BYTES
        programmed = self._pages_programmed * self._geometry.page_bytes
        erases = self._superblocks.erases
        return Counters(
            self._sectors_written,
            self._pages_programmed,
            self._superblocks_erased,
            int(erases.max()),
            float(erases.mean()),
            programmed / written if written else 0.0,
        )

    def close(self) -> None:
        """Flushes, writes a checkpoint, gives the folder back. Raises WriteFault."""
        try:
            self._flush_to([])
            self._checkpoint()
        finally:
            self._journal.close()
            self._media.close()
            self._folder.close()

    # ---- placing sectors ---------------------------------------------------------------------

    def _make_room(self, count: int) -> None:
        """Takes superblocks back until `count` sectors fit. Raises CapacityExceeded."""
        if self._room_sectors() >= count:
            return
        self._commit()
        room = self._room_sectors()
        if room < count:
            raise CapacityExceeded(
                count * SECTOR_BYTES,
                room * SECTOR_BYTES,
                self.used_sectors * SECTOR_BYTES,
                self._geometry.raw_bytes,
            )

    def _room_sectors(self) -> int:
        free = self._superblocks.having(SuperblockState.FREE).size
        return free * self._geometry.sectors_per_superblock + self._open_room()

    def _open_room(self) -> int:
        """Sectors left in the open superblock."""
        size = self._geometry.sectors_per_superblock
        return 0 if self._pointer == NO_POINTER else size - self._pointer % size

    def _place(self, cells: U8, programmed: list[int]) -> list[tuple[int, int]]:
        """Writes cells to the next free sectors; where they went: (psa, sectors)."""
        placed = []
        at = 0
        while at < cells.size:
            if self._pointer == NO_POINTER:
                self._open_superblock()
            length = min(self._open_room() * SECTOR_BYTES, cells.size - at)
            psa = self._pointer
            self._media.write(psa * SECTOR_BYTES, cells[at : at + length])
            self._advance(length // SECTOR_BYTES, programmed)
            placed.append((psa, length // SECTOR_BYTES))
            at += length
        return placed

    def _open_superblock(self) -> None:
        """Erases once more without wear: a crash may have left bytes of writes that it undid."""
        superblock = self._superblocks.take_free()
        assert superblock is not None, "room was checked"
        size = self._geometry.superblock_bytes
        self._media.erase(superblock * size, size)
        self._pointer = superblock * self._geometry.sectors_per_superblock
        self._pending.append((Kind.OPEN, superblock, 0, 0))

    def _advance(self, sectors: int, programmed: list[int]) -> None:
        """Moves the write pointer; notes the pages that became full."""
        per_page = self._geometry.sectors_per_page
        first = self._pointer // per_page
        self._pointer += sectors
        programmed.extend(range(first, self._pointer // per_page))
        size = self._geometry.sectors_per_superblock
        if self._pointer % size == 0:
            self._superblocks.fill(self._pointer // size - 1)
            self._pointer = NO_POINTER

    def _pad_page(self, programmed: list[int]) -> None:
        if self._pointer != NO_POINTER:
            self._advance(-self._pointer % self._geometry.sectors_per_page, programmed)

    def _map(self, lpn: int, psa: int, count: int) -> None:
        self._unmap(lpn, count)
        self._table[lpn : lpn + count] = np.arange(psa + 1, psa + 1 + count, dtype=np.uint32)
        self._superblocks.valid[psa // self._geometry.sectors_per_superblock] += count
        self._pending.append((Kind.MAP, lpn, psa, count))

    def _unmap(self, lpn: int, count: int) -> None:
        for _, part in parts_of(self._table[lpn : lpn + count]):
            if part.any():
                self._superblocks.valid -= self._count(part)
                part[:] = 0

    def _count(self, entries: U32) -> I64:
        size = self._geometry.sectors_per_superblock
        return count_by_superblock(entries, size, self._superblocks.valid.size)

    def _programs(self, programmed: list[int]) -> PagePrograms:
        self._pages_programmed += len(programmed)
        erased = [first_ppns_of(self._geometry, superblock) for superblock in self._erased]
        self._erased.clear()
        ppns = np.array(programmed, np.int64)
        return PagePrograms(
            ppns,
            np.full(ppns.size, self._geometry.page_bytes, np.int64),
            np.concatenate(erased) if erased else np.empty(0, np.int64),
        )

    # ---- durability --------------------------------------------------------------------------

    def _flush_to(self, programmed: list[int]) -> None:
        self._pad_page(programmed)
        self._commit()

    def _commit_if_many(self) -> None:
        if len(self._pending) >= COMMIT_ENTRIES:
            self._commit()

    def _commit(self) -> None:
        """Makes all changes so far durable, then takes back what they left without data."""
        if self._pending:
            self._media.sync()
            self._journal.append([*self._pending, (Kind.POINTER, self._pointer, 0, 0)])
            self._pending.clear()
        self._take_back()
        if self._journal.size_bytes > CHECKPOINT_BYTES:
            self._checkpoint()

    def _take_back(self) -> None:
        """Erases victims. Only right after a commit: see the head of this file."""
        blocks = self._superblocks
        size = self._geometry.superblock_bytes
        while True:
            victim = self._policy.choose(blocks.having(SuperblockState.FULL), blocks.valid)
            if victim is None:
                return
            self._media.erase(victim * size, size)
            blocks.release(victim)
            self._superblocks_erased += 1
            self._erased.append(victim)
            self._pending.append((Kind.FREE, victim, 0, 0))

    def _checkpoint(self) -> None:
        """Only with nothing pending but erases."""
        blocks = self._superblocks
        self._journal.checkpoint(runs_of(self._table), blocks.states, blocks.erases, self._pointer)
        self._pending.clear()

    def _recover(self, directory: Path) -> Journal:
        journal, checkpoint, records = Journal.open(directory)
        if checkpoint:
            self._restore(checkpoint)
        for entries in records:
            for kind, first, second, third in entries.tolist():
                self._replay(kind, first, second, third)
        for _, part in parts_of(self._table):
            if part.any():
                self._superblocks.valid += self._count(part)
        self._close_filled()
        return journal

    def _restore(self, checkpoint: Checkpoint) -> None:
        for lpn, psa, count in checkpoint.runs.tolist():
            self._set(lpn, psa, count)
        self._superblocks.states[:] = checkpoint.states
        self._superblocks.erases[:] = checkpoint.erases
        self._pointer = checkpoint.write_pointer

    def _replay(self, kind: int, first: int, second: int, third: int) -> None:
        blocks = self._superblocks
        if kind == Kind.MAP:
            self._set(first, second, third)
        elif kind == Kind.UNMAP:
            self._table[first : first + second] = 0
        elif kind == Kind.OPEN:
            blocks.states[first] = SuperblockState.OPEN
        elif kind == Kind.FREE:
            blocks.states[first] = SuperblockState.FREE
            blocks.erases[first] += 1
        else:
            assert kind == Kind.POINTER, kind
            self._pointer = first

    def _set(self, lpn: int, psa: int, count: int) -> None:
        self._table[lpn : lpn + count] = np.arange(psa + 1, psa + 1 + count, dtype=np.uint32)

    def _close_filled(self) -> None:
        """Open superblocks that the write pointer has left are full."""
        blocks = self._superblocks
        current = NO_POINTER
        if self._pointer != NO_POINTER:
            current = self._pointer // self._geometry.sectors_per_superblock
        for superblock in blocks.having(SuperblockState.OPEN):
            if superblock != current:
                blocks.fill(int(superblock))

    # ---- bounds ------------------------------------------------------------------------------

    def _check_range(self, lpn: int, count: int) -> None:
        if lpn < 0 or count < 0 or lpn + count > self.capacity_sectors:
            raise LbaOutOfRange(lpn, count, self.capacity_sectors)

    def _check_bytes(self, start: int, end: int) -> None:
        if start < 0 or end > self.capacity_sectors * SECTOR_BYTES:
            first = start // SECTOR_BYTES
            raise LbaOutOfRange(first, -(-end // SECTOR_BYTES) - first, self.capacity_sectors)
