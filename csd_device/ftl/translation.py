"""The FTL: out-of-place writes, a mapping that survives, superblocks that come back.

Bytes go to the media at once, to the next free sectors of their stream's open superblock; the
mapping changes in memory. A *commit* (a flush, a write with FUA, or `COMMIT_ROWS` changes) syncs
the media first and then appends one journal record with all changes since the last. So what a
record names is there, and what it does not name has not happened. A superblock is erased only after
a commit that left it without a valid sector: no committed mapping ever points into reused cells.
While a write is being placed nothing is committed, so it is whole or not there.

A page is programmed when its last sector is filled; a flush pads the pages being filled. After a
crash open superblocks are closed where their committed part ends. docs/FTL.md says why.
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
from csd_device.errors import (
    CapacityExceeded,
    DriveRefused,
    LbaOutOfRange,
    UnrecoveredRead,
    WriteProtected,
)
from csd_device.ftl.changes import Changes, EventKind
from csd_device.ftl.checkpoint import Checkpoint, Progress
from csd_device.ftl.collector import Collector
from csd_device.ftl.folder import MediaFolder
from csd_device.ftl.journal import Journal
from csd_device.ftl.mapping import cut_units, extra_by_page, lpns_of, pages_of, whole_units
from csd_device.ftl.placement import NO_POINTER, Placement, Stream, SuperblockRetired
from csd_device.ftl.programs import PagePrograms, Work
from csd_device.ftl.recovery import Recovered, checkpoint_arrays, recover
from csd_device.ftl.two_way_map import TwoWayMap
from csd_device.gather import gather
from csd_device.nand.direct_media import Begin, DirectMedia, at_once
from csd_device.nand.media import FileMedia, Media, Pieces, Retries, direct_copy
from csd_device.nand.patterns import PatternMedia, PatternTable
from csd_device.nand.superblocks import Superblocks, SuperblockState
from csd_protocol.crc32c import crc32c_units

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

COMMIT_ROWS = 4096  # of changes held in memory before they are committed unasked
CHECKPOINT_BYTES = 16 << 20  # of journal, before a checkpoint replaces it
LBAS_NAMED_MAX = 8  # in a message
READS_STEP = 1024  # page reads of a superblock that a crash may forget

Wrap = Callable[[Media, Superblocks], Media]


@dataclass(frozen=True, slots=True)
class PageReads:
    """Pages that a read touches, each once, and the bytes that leave each.

    `extra_ns` is what the array takes longer for each than tR (read retries); None: nothing.
    `retries` is the same by sector, for who asks again for some of them.
    """

    ppns: I64
    transfer_bytes: I64
    extra_ns: I64 | None = None
    retries: Retries | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the drive was opened; but wear, spares and what is bad since it was made."""

    sectors_written: int  # by hosts
    sectors_moved: int  # by garbage collection, wear levelling and reclaim
    pages_programmed: int  # in all
    pages_moved: int  # of them, those that moves filled
    superblocks_erased: int
    write_amplification: float  # bytes programmed over bytes written; 0.0 before the first write
    gc_debt_sectors: int  # to be moved until as many superblocks are free as should be
    erases_min: int  # of a superblock
    erases_mean: float
    erases_max: int
    erases_spread: int
    free_superblocks: int
    bad_superblocks: int  # those that are still being emptied among them
    spare_superblocks: int  # that may yet go bad
    spare_superblocks_initial: int
    is_read_only: bool


class Ftl:
    """One namespace of `capacity_sectors` over the media."""

    def __init__(
        self,
        media: Media,
        config: DriveConfig,
        folder: MediaFolder,
        superblocks: Superblocks | None = None,
        patterns: PatternTable | None = None,
    ) -> None:
        """Recovers the mapping from the folder. Takes over media and folder.

        `superblocks`: those that the media were wrapped with, if any; `patterns`: what the media
        need not store.
        """
        geometry = config.geometry
        assert media.size_bytes == geometry.raw_bytes
        self._media = media
        self.patterns = patterns or PatternTable()
        self._geometry = geometry
        self._folder = folder
        self.capacity_sectors = config.capacity_sectors
        self.mapping_bytes = config.mapping_bytes
        self._superblocks = superblocks or Superblocks(geometry.blocks_per_plane)
        self._maps = TwoWayMap(
            config.capacity_sectors,
            geometry.raw_sectors,
            geometry.sectors_per_superblock,
            self._superblocks.valid,
        )
        self._table: U32 = self._maps.table
        self._changes = Changes()
        self._work = Work(geometry)
        self._placement = Placement(
            media, geometry, self._superblocks, self._changes, self._work
        )  # fmt: skip
        self._collector = Collector(
            config, media, self._superblocks, self._maps, self._placement, self._changes, self._work
        )
        self._spares_initial = max(0, config.spare_superblocks)
        self._sectors_written = 0
        self._now_ns = 0
        self._journal = self._recover(folder.path)
        self._saved_reads = self._superblocks.reads.copy()

    @classmethod
    def open(
        cls,
        directory: Path,
        config: DriveConfig,
        wrap: Wrap | None = None,
        begin: Begin = at_once,
    ) -> Self:
        """The drive kept in this folder, made if it is not there. Raises DriveRefused.

        `wrap` puts decorators around the clean media; it is given the wear that they go by.
        `begin` is who carries direct reads out.
        """
        with ExitStack() as undo:
            folder = MediaFolder.open(directory, config)
            undo.callback(folder.close)
            stored = _open_media(folder.nand_path, config, begin)
            undo.callback(stored.close)
            cells = PatternMedia(stored, folder.path)
            media: Media = cells
            superblocks = Superblocks(config.geometry.blocks_per_plane)
            if wrap:
                media = wrap(media, superblocks)
            try:
                ftl = cls(media, config, folder, superblocks, cells.table)
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

        Raises LbaOutOfRange, and UnrecoveredRead with the lost LBAs and `rows`.
        """
        assert out.shape == (offsets_bytes.size, unit_bytes)
        if not out.size:
            return PageReads(np.empty(0, np.int64), np.empty(0, np.int64))
        self._check_bytes(int(offsets_bytes.min()), int(offsets_bytes.max()) + unit_bytes)
        flat = out.reshape(-1)
        pieces = cut_units(self._table, offsets_bytes, unit_bytes, flat)
        columns = np.ascontiguousarray(pieces.T)
        try:
            retries = self._media.gather(Pieces(columns[0], columns[1], columns[2]), flat)
        except UnrecoveredRead as error:
            raise self._located(error, offsets_bytes, unit_bytes) from None
        ppns, sizes = self._pages_read(pieces)
        per_page = self._geometry.sectors_per_page
        return PageReads(ppns, sizes, extra_by_page(retries, ppns, per_page), retries)

    def _pages_read(self, pieces: I64) -> tuple[I64, I64]:
        """The pages of what was read, and the bytes of each; counts them."""
        ppns, sizes = pages_of(pieces, self._geometry.sectors_per_page)
        self._superblocks.count_reads(ppns, self._geometry.pages_per_superblock)
        return ppns, sizes

    def _located(self, error: UnrecoveredRead, offsets: I64, unit_bytes: int) -> UnrecoveredRead:
        """The same error with the LBAs and the rows of the read that it means."""
        if error.psas is None:
            return error
        lpns, units = lpns_of(offsets, unit_bytes)
        is_lost = np.isin(self._table[lpns].astype(np.int64) - 1, error.psas)
        lost = np.unique(lpns[is_lost])
        named = ", ".join(str(lpn) for lpn in lost[:LBAS_NAMED_MAX].tolist())
        more = f" and {lost.size - LBAS_NAMED_MAX} more" if lost.size > LBAS_NAMED_MAX else ""
        detail = f"{'LBA' if lost.size == 1 else 'LBAs'} {named}{more} ({error.detail})"
        return UnrecoveredRead(detail, error.psas, np.unique(units[is_lost]))

    def psas_of(self, lpn: int, count: int) -> I64:
        """The physical sectors of these logical ones, ascending; those not mapped have none."""
        self._check_range(lpn, count)
        entries = self._table[lpn : lpn + count].astype(np.int64)
        return np.sort(entries[entries > 0] - 1)

    @property
    def superblocks(self) -> Superblocks:
        return self._superblocks

    @property
    def media(self) -> Media:
        """The cells, as they were wrapped."""
        return self._media

    def read_checked(
        self, offsets_bytes: I64, out: U8, rows: I64, keep: Keep
    ) -> tuple[PageReads, U32]:
        """`read_units` into out[rows], the CRC32C of each unit with it [n].

        The first ones go to `keep` as well.
        In one pass where the media is direct, each unit lies in one piece and all places are
        multiples of 64.
        """
        copy_units, unit_bytes = direct_copy(self._media), out.shape[1]
        if copy_units and can_copy_checked(out, keep):
            self._check_bytes(int(offsets_bytes.min()), int(offsets_bytes.max()) + unit_bytes)
            pieces = cut_units(self._table, offsets_bytes, unit_bytes)
            starts = whole_units(pieces, offsets_bytes.size, unit_bytes)
            if starts is not None:
                checksums = copy_units(starts, out, rows, keep)
                return PageReads(*self._pages_read(pieces)), checksums
        data = np.empty((rows.size, unit_bytes), np.uint8)
        reads = self.read_units(offsets_bytes, unit_bytes, data)
        kept = np.arange(keep.starts.size) * unit_bytes
        gather(data.reshape(-1), kept, np.full_like(kept, unit_bytes), keep.starts, keep.memory)
        out[rows] = data
        return reads, crc32c_units(data)

    def is_mapped(self, lpn: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of these sectors hold data [count]."""
        self._check_range(lpn, count)
        return np.not_equal(self._table[lpn : lpn + count], 0)

    @property
    def table(self) -> U32:
        """The L2P table, for compiled readers: PSA + 1 of each logical sector, 0: unmapped."""
        return self._table

    @property
    def reverse(self) -> U32:
        """The P2L table: LPN + 1 of what each physical sector holds, 0: nothing that counts."""
        return self._maps.reverse

    @property
    def pointers(self) -> tuple[int, ...]:
        """The next PSA of each stream (`Stream`), -1 where none is open."""
        return tuple(self._placement.pointers)

    @property
    def used_sectors(self) -> int:
        """Logical sectors that hold data."""
        return int(self._superblocks.valid.sum())

    # ---- changes -----------------------------------------------------------------------------

    def write(
        self,
        lpn: int,
        data: bytes | bytearray | memoryview | U8,
        fua: bool = False,
        stream: Stream = Stream.HOST,
    ) -> PagePrograms:
        """Writes whole sectors from `lpn` on; durable on return with `fua`.

        Raises LbaOutOfRange, CapacityExceeded and WriteProtected, the old data untouched, and
        WriteFault: then the sectors have all old or all new data.
        """
        cells = np.frombuffer(data, np.uint8)
        assert cells.size % SECTOR_BYTES == 0
        count = cells.size // SECTOR_BYTES
        self._check_range(lpn, count)
        for psa, length in self._place(stream, cells):
            self._maps.map_run(lpn, psa, length)
            self._changes.note_run(lpn, psa + 1, length)
            lpn += length
        self._sectors_written += count
        has_emptied = self._collector.pace(count, self._now_ns)
        if fua:
            self._placement.pad_pages()
        if fua or has_emptied or self._changes.row_count >= COMMIT_ROWS:
            self._commit()
        return self._work.take()

    def deallocate(self, lpn: int, count: int) -> None:
        """The sectors read as zeroes from here on. Raises LbaOutOfRange and WriteProtected."""
        self._check_range(lpn, count)
        self._check_writable()
        self._maps.unmap(lpn, count)
        self._changes.note_run(lpn, 0, count)
        if self._changes.row_count >= COMMIT_ROWS:
            self._commit()

    def write_zeroes(self, lpn: int, count: int) -> None:
        """Deallocates, which reads as zeroes."""
        self.deallocate(lpn, count)

    def deallocate_all(self) -> None:
        """Empties the namespace."""
        self.deallocate(0, self.capacity_sectors)

    def flush(self) -> PagePrograms:
        """All that was acknowledged is durable on return. Raises WriteFault."""
        self._placement.pad_pages()
        self._commit()
        return self._work.take()

    def pass_time(self, now_ns: int) -> None:
        """It is this late on the drive's clock: the age of data goes by it."""
        self._now_ns = self._placement.opened_ns = max(self._now_ns, now_ns)

    def work_idle(self, sectors_max: int) -> PagePrograms | None:
        """Moves at most so many sectors ahead of need; None: there is nothing to do.

        Room that will be needed, and data that its cells should not hold much longer: failed ones,
        those read or aged beyond their limits, young ones that cold data keeps from wear.
        """
        if self.is_read_only:
            return None
        moved, has_emptied = self._collector.work_idle(sectors_max, self._now_ns)
        if has_emptied:
            self._commit()
        return self._work.take() if moved or has_emptied else None

    # ---- what it says of itself --------------------------------------------------------------

    @property
    def is_read_only(self) -> bool:
        """More superblocks went bad than were spare."""
        return self._collector.spares_left < 0

    def counters(self) -> Counters:
        written = self._sectors_written * SECTOR_BYTES
        programmed = self._work.pages_programmed * self._geometry.page_bytes
        erases = self._superblocks.erases
        return Counters(
            sectors_written=self._sectors_written,
            sectors_moved=self._collector.sectors_moved,
            pages_programmed=self._work.pages_programmed,
            pages_moved=self._work.pages_moved,
            superblocks_erased=self._work.superblocks_erased,
            write_amplification=programmed / written if written else 0.0,
            gc_debt_sectors=self._collector.debt_sectors(),
            erases_min=int(erases.min()),
            erases_mean=float(erases.mean()),
            erases_max=int(erases.max()),
            erases_spread=int(erases.max()) - int(erases.min()),
            free_superblocks=self._superblocks.free_count,
            bad_superblocks=self._superblocks.bad_count,
            spare_superblocks=max(0, self._collector.spares_left),
            spare_superblocks_initial=self._spares_initial,
            is_read_only=self.is_read_only,
        )

    def check(self) -> None:
        """Asserts the invariants that hold between commands."""
        self._maps.check()
        blocks = self._superblocks
        is_empty = (blocks.states == SuperblockState.FREE) | (blocks.states == SuperblockState.BAD)
        assert not blocks.valid[is_empty].any(), "a free or bad superblock holds data"
        counted = blocks.free_count, blocks.bad_count
        blocks.recount()
        assert counted == (blocks.free_count, blocks.bad_count), counted
        opened = [psa // self._placement.size for psa in self.pointers if psa != NO_POINTER]
        assert sorted(opened) == blocks.having(SuperblockState.OPEN).tolist()
        for psa in self.pointers:
            if psa != NO_POINTER:
                end = (psa // self._placement.size + 1) * self._placement.size
                assert not self.reverse[psa:end].any(), "data beyond a write pointer"

    def close(self) -> None:
        """Flushes, writes a checkpoint, gives the folder back. Raises WriteFault."""
        try:
            self._placement.pad_pages()
            self._commit()
            self._checkpoint(is_clean=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Gives the folder back as it is: what a loss of power leaves."""
        self._journal.close()
        self._media.close()
        self._folder.close()

    # ---- room --------------------------------------------------------------------------------

    def _place(self, stream: Stream, cells: U8) -> list[tuple[int, int]]:
        """Makes room, writes, and starts over when cells fail; where it went: (psa, sectors)."""
        while True:
            self._check_writable()
            self._make_room(stream, cells.size // SECTOR_BYTES)
            try:
                return self._placement.place(stream, cells)
            except SuperblockRetired:
                continue

    def _make_room(self, stream: Stream, count: int) -> None:
        """Takes superblocks back until `count` sectors fit. Raises CapacityExceeded."""
        if self._room(stream) >= count:
            return
        self._commit()
        while self._room(stream) < count:
            if not (self._is_possible(count) and self._collector.drain_one()):
                raise CapacityExceeded(
                    count * SECTOR_BYTES,
                    self._room(stream) * SECTOR_BYTES,
                    self.used_sectors * SECTOR_BYTES,
                    self._geometry.raw_bytes,
                )
            self._commit()
            self._check_writable()

    def _room(self, stream: Stream) -> int:
        return self._placement.room(stream, self._collector.reserve)

    def _is_possible(self, count: int) -> bool:
        """Whether so many sectors would fit if nothing stale were left."""
        blocks = self._superblocks
        good = blocks.states.size - blocks.bad_count - self._collector.reserve
        return good * self._placement.size - self.used_sectors >= count

    # ---- durability --------------------------------------------------------------------------

    def _commit(self) -> None:
        """Makes all changes so far durable, then takes back what they left without data."""
        self._note_reads()
        if not self._changes.is_empty:
            self._media.sync()
            self._journal.append(self._changes, self._progress())
            self._changes.clear()
        self._take_back()
        if self._journal.size_bytes > CHECKPOINT_BYTES:
            self._checkpoint()

    def _take_back(self) -> None:
        """Erases what holds nothing. Only right after a commit: see the head of this file."""
        blocks = self._superblocks
        is_stale = (blocks.states == SuperblockState.FULL) & (blocks.valid == 0)
        for superblock in np.flatnonzero(is_stale).tolist():
            if not blocks.retiring[superblock] and self._placement.erase(superblock):
                blocks.release(superblock)
                self._work.note_erase(superblock)
                self._changes.note_event(EventKind.FREE, superblock)
            else:
                blocks.condemn(superblock)
                self._changes.note_event(EventKind.BAD, superblock)
            self._collector.forget(superblock)

    def _note_reads(self) -> None:
        reads = self._superblocks.reads
        grown = np.flatnonzero(reads - self._saved_reads >= READS_STEP)
        for superblock in grown.tolist():
            self._changes.note_event(EventKind.READS, superblock, int(reads[superblock]))
        self._saved_reads[grown] = reads[grown]
        np.minimum(self._saved_reads, reads, out=self._saved_reads)

    def _progress(self) -> Progress:
        placement = self._placement
        powered_ns = placement.powered_ns + self._now_ns
        return Progress(powered_ns, placement.programmed, tuple(placement.pointers))

    def _checkpoint(self, is_clean: bool = False) -> None:
        """Only with nothing pending but what `_take_back` did."""
        arrays = checkpoint_arrays(self._superblocks, self._placement.powered_ns)
        self._journal.replace_by(
            Checkpoint(
                number=self._journal.number,
                is_clean=is_clean,
                progress=self._progress(),
                arrays=arrays,
                chunk_count=self._maps.chunk_count,
                chunks=self._maps.chunks(),
            )
        )
        self._changes.clear()

    def _recover(self, directory: Path) -> Journal:
        journal, checkpoint, records = Journal.open(directory)
        try:
            found = recover(checkpoint, records, self._maps, self._superblocks)
            self._go_on(found, journal)
        except BaseException:
            journal.close()
            raise
        return journal

    def _go_on(self, found: Recovered, journal: Journal) -> None:
        """Goes on behind the last sector, or in new superblocks when a crash came between."""
        placement = self._placement
        placement.programmed = found.progress.programmed
        placement.powered_ns = found.progress.powered_ns
        if found.is_clean:
            placement.pointers = list(found.progress.pointers)
            if any(pointer != NO_POINTER for pointer in placement.pointers):
                journal.append(self._changes, self._progress())  # from here on it is not clean
        else:
            placement.close_open()

    # ---- bounds ------------------------------------------------------------------------------

    def _check_range(self, lpn: int, count: int) -> None:
        if lpn < 0 or count < 0 or lpn + count > self.capacity_sectors:
            raise LbaOutOfRange(lpn, count, self.capacity_sectors)

    def _check_writable(self) -> None:
        if self.is_read_only:
            raise WriteProtected(self._superblocks.bad_count, self._spares_initial)

    def _check_bytes(self, start: int, end: int) -> None:
        if start < 0 or end > self.capacity_sectors * SECTOR_BYTES:
            first = start // SECTOR_BYTES
            raise LbaOutOfRange(first, -(-end // SECTOR_BYTES) - first, self.capacity_sectors)


def _open_media(path: Path, config: DriveConfig, begin: Begin) -> Media:
    """The cells as the drive's file says that they are read. Raises DriveRefused."""
    size_bytes = config.geometry.raw_bytes
    if config.media.direct_io:
        return DirectMedia(path, size_bytes, begin)
    return FileMedia(path, size_bytes)
