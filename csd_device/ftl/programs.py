"""What a change of the flash touched, as arrays: pages programmed and read, blocks erased."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.config import Geometry
from csd_device.nand.geometry import first_ppns_of

I64 = npt.NDArray[np.int64]

NO_PAGES: I64 = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Moves:
    """Pages read and pages programmed to move data that no host asked to move."""

    read_ppns: I64
    read_bytes: I64
    ppns: I64
    transfer_bytes: I64


@dataclass(frozen=True, slots=True)
class PagePrograms:
    """Pages programmed, the bytes moved into each, and one page of each block erased.

    `moved`: what garbage collection, wear levelling and reclaim did beside; None: nothing.
    """

    ppns: I64
    transfer_bytes: I64
    erased_ppns: I64
    moved: Moves | None = None


class Work:
    """Collects what is done to the flash until somebody asks for it."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._programs: list[I64] = []
        self._move_programs: list[I64] = []
        self._move_reads: list[tuple[I64, I64]] = []
        self._erased: list[int] = []  # superblocks
        self.pages_programmed = 0  # since the drive was opened, those of moves among them
        self.pages_moved = 0
        self.superblocks_erased = 0

    def note_programs(self, first_ppn: int, end_ppn: int, is_move: bool) -> None:
        """These pages became full."""
        if end_ppn > first_ppn:
            programs = self._move_programs if is_move else self._programs
            programs.append(np.arange(first_ppn, end_ppn, dtype=np.int64))
            self.pages_programmed += end_ppn - first_ppn
            self.pages_moved += (end_ppn - first_ppn) * is_move

    def note_move_reads(self, ppns: I64, read_bytes: I64) -> None:
        self._move_reads.append((ppns, read_bytes))

    def note_erase(self, superblock: int) -> None:
        self._erased.append(superblock)
        self.superblocks_erased += 1

    def take(self) -> PagePrograms:
        """All since the last call."""
        ppns = _joined(self._programs)
        erased = [first_ppns_of(self._geometry, superblock) for superblock in self._erased]
        programs = PagePrograms(ppns, self._whole(ppns), _joined(erased), self._moves())
        for noted in (self._programs, self._move_programs, self._move_reads, self._erased):
            noted.clear()
        return programs

    def _moves(self) -> Moves | None:
        if not self._move_programs and not self._move_reads:
            return None
        ppns = _joined(self._move_programs)
        reads = _joined([ppns for ppns, _ in self._move_reads])
        sizes = _joined([sizes for _, sizes in self._move_reads])
        return Moves(reads, sizes, ppns, self._whole(ppns))

    def _whole(self, ppns: I64) -> I64:
        return np.full(ppns.size, self._geometry.page_bytes, np.int64) if ppns.size else NO_PAGES


def _joined(parts: list[I64]) -> I64:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else NO_PAGES
