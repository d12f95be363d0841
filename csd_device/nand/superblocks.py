"""States and wear of superblocks, as arrays.

    FREE --take--> OPEN --fill--> FULL --release (erase)--> FREE
                     |              |
                     +--- retire ---+--> FULL, to be emptied --condemn--> BAD

A superblock is one block index over all planes; it is written from front to back and erased whole.
One whose program failed is *retiring*: what it holds can be read and is moved away, then it is bad.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

I64 = npt.NDArray[np.int64]


@njit(nogil=True, cache=True)
def _count(reads: Any, ppns: Any, pages_per_superblock: Any) -> None:
    for index in range(ppns.shape[0]):
        reads[ppns[index] // pages_per_superblock] += 1


class SuperblockState(IntEnum):
    FREE = 0  # erased
    OPEN = 1  # being written
    FULL = 2
    BAD = 3  # never used again


class Superblocks:
    """One entry a superblock.

    `valid` counts its sectors that a mapping points to, `reads` its page reads since the last
    erase; `written_ns` is when, on the drive's clock, it was opened: its data is that old (below
    zero: before the drive was last opened). `streams` is what was written to it
    (`csd_device.ftl.Stream`), `opened_at` how many sectors the drive had programmed by then.
    """

    def __init__(self, count: int) -> None:
        self.states: npt.NDArray[np.uint8] = np.zeros(count, np.uint8)
        self.erases: npt.NDArray[np.uint32] = np.zeros(count, np.uint32)
        self.valid: I64 = np.zeros(count, np.int64)
        self.reads: I64 = np.zeros(count, np.int64)
        self.written_ns: I64 = np.zeros(count, np.int64)
        self.opened_at: I64 = np.zeros(count, np.int64)
        self.streams: npt.NDArray[np.uint8] = np.zeros(count, np.uint8)
        self.retiring: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        self.free_count = count
        self.bad_count = 0  # those that are bad, or will be when they are empty

    def having(self, state: SuperblockState) -> I64:
        """Indices of those in this state, ascending."""
        return np.flatnonzero(self.states == state)

    def recount(self) -> None:
        """After states were changed other than by the methods below."""
        self.free_count = self.having(SuperblockState.FREE).size
        self.bad_count = int(self.retiring.sum()) + self.having(SuperblockState.BAD).size

    def take_free(self) -> int | None:
        """Opens the free superblock with the fewest erases; None when there is none."""
        free = self.having(SuperblockState.FREE)
        if not free.size:
            return None
        chosen = int(free[np.argmin(self.erases[free])])
        self.states[chosen] = SuperblockState.OPEN
        self.free_count -= 1
        return chosen

    def put_back(self, superblock: int) -> None:
        """It was taken, and nothing written to it."""
        assert self.states[superblock] == SuperblockState.OPEN
        self.states[superblock] = SuperblockState.FREE
        self.free_count += 1

    def fill(self, superblock: int) -> None:
        assert self.states[superblock] == SuperblockState.OPEN
        self.states[superblock] = SuperblockState.FULL

    def retire(self, superblock: int) -> None:
        """Nothing is written to it any more, and when it is empty it is bad."""
        assert not self.retiring[superblock]
        self.states[superblock] = SuperblockState.FULL
        self.bad_count += 1
        self.retiring[superblock] = True

    def condemn(self, superblock: int) -> None:
        """It is bad for good."""
        assert self.valid[superblock] == 0
        self.bad_count += not self.retiring[superblock]
        self.states[superblock] = SuperblockState.BAD
        self.retiring[superblock] = False

    def release(self, superblock: int) -> None:
        """Counts the erase and makes it free."""
        assert self.states[superblock] == SuperblockState.FULL
        assert self.valid[superblock] == 0
        self.erases[superblock] += 1
        self.reads[superblock] = 0
        self.states[superblock] = SuperblockState.FREE
        self.free_count += 1

    def count_reads(self, ppns: I64, pages_per_superblock: int) -> None:
        """Counts one read of each of these pages."""
        _count(self.reads, ppns, pages_per_superblock)
