"""The collector: moves data that is still wanted out of superblocks, a few sectors at a time.

A *job* is one superblock to be emptied, and why. What it holds is listed from P2L, gathered into a
buffer and placed in the stream it belongs to, all as arrays. A job ends with an empty superblock;
the next commit makes that durable and erases it.

Pace: collecting a superblock with v of S sectors valid gains S - v, so v / (S - v) sectors moved
for each sector that a host writes keep the drive where it is. A write moves that many, more when
free superblocks are short, and never a whole superblock at once. Only when that was not enough
does a write wait for a victim (`drain_one`).

Room: RESERVE_MAX free superblocks are left to the collector, or moving could come to a stop with
all its space gone. No commit happens while the last one of them is in use, so no crash finds a
drive without one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.errors import UnrecoveredRead
from csd_device.ftl.changes import Changes
from csd_device.ftl.mapping import fold_pages
from csd_device.ftl.placement import Placement, Stream, SuperblockRetired
from csd_device.ftl.programs import Work
from csd_device.ftl.two_way_map import TwoWayMap
from csd_device.ftl.upkeep import Cause, Upkeep
from csd_device.ftl.victims import POLICIES, choose
from csd_device.nand.media import Media, Pieces
from csd_device.nand.superblocks import Superblocks, SuperblockState

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

BATCH_SECTORS = 64  # moved at once, at least, while a host writes
BUFFER_SECTORS = 1024  # at most
PACE_MAX = 32.0  # sectors moved for each that a host writes
UPKEEP_PACE = 1.0  # the same, for what is not needed for room
RESERVE_MAX = 2  # superblocks
PACED_KEEP = 1  # of them, that a paced move leaves alone
IDLE_AHEAD = 2  # superblocks that idle time frees beyond the target
IDLE_USED_MAX = 7 / 8  # of a superblock that idle time takes back


@dataclass(slots=True)
class _Job:
    superblock: int
    cause: Cause
    at: int  # PSA from which on nothing was looked at yet
    end: int
    pace: float  # sectors to move for each that a host writes


class Collector:
    """Empties superblocks. Nothing here commits or erases."""

    def __init__(
        self,
        config: DriveConfig,
        media: Media,
        superblocks: Superblocks,
        maps: TwoWayMap,
        placement: Placement,
        changes: Changes,
        work: Work,
    ) -> None:
        self.media = media
        self._superblocks = superblocks
        self._maps = maps
        self._placement = placement
        self._changes = changes
        self._work = work
        self._policy = POLICIES[config.ftl.gc_policy]
        self._upkeep = Upkeep(config, superblocks)
        self._per_page = config.geometry.sectors_per_page
        self._buffer: U8 = np.empty(0, np.uint8)
        self._spares = max(0, config.spare_superblocks)
        self._stuck = np.zeros(superblocks.states.size, np.bool_)  # hold what cannot be read
        self._job: _Job | None = None
        self._credit = 0.0
        self.sectors_moved = 0

    # ---- how much room -----------------------------------------------------------------------

    @property
    def spares_left(self) -> int:
        """Superblocks that may still go bad; below zero: too many did."""
        return self._spares - self._superblocks.bad_count

    @property
    def reserve(self) -> int:
        """Free superblocks that hosts do not get: the last is for a move, one for its failure."""
        return min(RESERVE_MAX, 1 + max(0, self.spares_left))

    @property
    def target(self) -> int:
        """Free superblocks below which hosts' writes collect."""
        return self.reserve + min(2, 1 + max(0, self.spares_left))

    def debt_sectors(self) -> int:
        """Sectors to be moved until as many superblocks are free as should be."""
        missing = self.target - self._superblocks.free_count
        if missing <= 0:
            return 0
        valid = self._superblocks.valid[self._candidates()]
        return int(np.sort(valid)[:missing].sum())

    # ---- when --------------------------------------------------------------------------------

    def pace(self, host_sectors: int, now_ns: int) -> bool:
        """Moves what a host's write of so many sectors owes; whether a superblock is empty now."""
        if self._job is None and not self._take_job(now_ns):
            self._credit = 0.0
            return False
        job = self._job
        assert job
        if not job.pace:  # it is empty already
            self._job = None
            return True
        short = max(0, self.target - self._superblocks.free_count)
        self._credit += host_sectors * min(PACE_MAX, job.pace * max(1, short))
        while self._credit >= BATCH_SECTORS:
            moved = self._move(min(int(self._credit), BUFFER_SECTORS), PACED_KEEP)
            self._credit -= moved
            if self._job is not job:
                return True
            if not moved:
                self._credit = 0.0
        return False

    def work_idle(self, sectors_max: int, now_ns: int) -> tuple[int, bool]:
        """Moves up to so many sectors ahead of need; how many, and whether one is empty now."""
        self._placement.has_opened = True  # time has passed
        if self._job is None and not (self._take_job(now_ns) or self._take_ahead()):
            return 0, False
        moved = self._move(min(sectors_max, BUFFER_SECTORS), PACED_KEEP)
        return moved, self._job is None

    def drain_one(self) -> bool:
        """Empties one superblock now, for room; False: there is none to empty, or no room."""
        if self._job is None or self._job.cause is not Cause.ROOM:
            self._job = None
            self._take_victim(1.0)
        job = self._job
        while job is not None and self._job is job:
            before = (job.at, self._superblocks.bad_count)
            self._move(BUFFER_SECTORS, reserve=0)
            if self._job is job and before == (job.at, self._superblocks.bad_count):
                return False
        return job is not None

    def forget(self, superblock: int) -> None:
        """It was erased, or is bad."""
        self._stuck[superblock] = False
        if self._job is not None and self._job.superblock == superblock:
            self._job = None

    # ---- what --------------------------------------------------------------------------------

    def _candidates(self) -> I64:
        full = self._superblocks.states == SuperblockState.FULL
        return np.flatnonzero(full & ~self._stuck)

    def _take_job(self, now_ns: int) -> bool:
        """What has to be emptied now, if anything: bad cells before room, room before the rest."""
        free = self._superblocks.free_count
        is_retiring = (
            free > self.reserve
            and self._superblocks.bad_count > 0
            and bool(self._superblocks.retiring.any())
        )
        if not is_retiring and free < self.target and self._take_victim(1.0):
            return True
        self._placement.has_opened |= is_retiring
        if not self._placement.has_opened:
            return False
        chosen = self._upkeep.choose(self._candidates(), now_ns)
        if chosen is None:
            self._placement.has_opened = False
            return False
        self._start(*chosen, pace=UPKEEP_PACE)
        return True

    def _take_ahead(self) -> bool:
        """In idle time: room ahead of need."""
        if self._superblocks.free_count >= self.target + IDLE_AHEAD:
            return False
        return self._take_victim(IDLE_USED_MAX)

    def _take_victim(self, used_max: float) -> bool:
        size = self._placement.size
        candidates = self._candidates()
        candidates = candidates[~self._superblocks.retiring[candidates]]
        candidates = candidates[self._superblocks.valid[candidates] <= used_max * size]
        victim = choose(
            self._policy, self._superblocks, candidates, size, self._placement.programmed
        )
        if victim is None:
            return False
        valid = int(self._superblocks.valid[victim])
        self._start(victim, Cause.ROOM, pace=valid / (size - valid))
        return True

    def _start(self, superblock: int, cause: Cause, pace: float) -> None:
        first = superblock * self._placement.size
        self._job = _Job(superblock, cause, first, first + self._placement.size, pace)

    # ---- how ---------------------------------------------------------------------------------

    def _move(self, limit: int, reserve: int) -> int:
        """Moves up to `limit` sectors of the job; how many. The job ends when none is left."""
        job = self._job
        assert job
        stream, room = self._destination(job.superblock, reserve)
        psas, at = self._maps.list_valid(job.at, job.end, min(limit, room) if room else 1)
        if not psas.size:
            self._job = None
            return 0
        if not room:
            return 0
        psas = self._read(psas)
        try:
            cells = self._buffer[: psas.size * SECTOR_BYTES]
            placed = self._placement.place(stream, cells, is_move=True) if psas.size else []
        except SuperblockRetired:
            return 0
        lpns = self._maps.reverse[psas].astype(np.int64) - 1
        done = 0
        for psa, count in placed:
            self._changes.note_rows(self._maps.move(lpns[done : done + count], psa))
            done += count
        job.at = at
        self.sectors_moved += done
        if at == job.end:
            self._job = None
        return done

    def _destination(self, superblock: int, reserve: int) -> tuple[Stream, int]:
        """The stream that its data goes on in, and the room there."""
        is_cold = self._superblocks.streams[superblock] == Stream.WEIGHTS
        stream = Stream.WEIGHTS if is_cold else Stream.MOVED
        room = self._placement.room(stream, reserve)
        if not room and not reserve:  # out of superblocks: whatever is open will do
            stream = max(Stream, key=self._placement.room_in)
            room = self._placement.room_in(stream)
        return stream, room

    def _read(self, psas: I64) -> I64:
        """Reads these sectors into the buffer; those that could be read.

        What cannot be read stays where it is, and its superblock is left alone from here on: a
        host that asks for it is told, and one that overwrites it sets the superblock free.
        """
        size = psas.size * SECTOR_BYTES
        if self._buffer.size < size:
            self._buffer = np.empty(BUFFER_SECTORS * SECTOR_BYTES, np.uint8)
        targets = np.arange(psas.size, dtype=np.int64) * SECTOR_BYTES
        pieces = Pieces(psas * SECTOR_BYTES, np.full(psas.size, SECTOR_BYTES, np.int64), targets)
        try:
            self.media.gather(pieces, self._buffer[:size])
        except UnrecoveredRead as error:
            assert self._job
            self._stuck[self._job.superblock] = True
            lost = psas if error.psas is None else error.psas
            rest = np.setdiff1d(psas, lost)
            return self._read(rest) if 0 < rest.size < psas.size else rest[:0]
        ppns, read_bytes = fold_pages(psas, self._per_page)
        self._superblocks.count_reads(ppns, self._placement.size // self._per_page)
        self._work.note_move_reads(ppns, read_bytes)
        return psas
