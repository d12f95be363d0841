"""States and wear of superblocks, as arrays.

    FREE --take--> OPEN --fill--> FULL --release (erase)--> FREE
                     |              |
                     +--- retire ---+--> FULL, to be emptied --condemn--> BAD

A superblock is one block index over all planes; it is written from front to back and erased whole.
One whose program failed is *retiring*: what it holds can be read and is moved away, then it is bad.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


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

    def having(self, state: SuperblockState) -> I64:
        """Indices of those in this state, ascending."""
        return np.flatnonzero(self.states == state)

    @property
    def free_count(self) -> int:
        return int(np.count_nonzero(self.states == SuperblockState.FREE))

    @property
    def bad_count(self) -> int:
        """Those that are bad, or will be when they are empty."""
        return int(np.count_nonzero(self.retiring | (self.states == SuperblockState.BAD)))

    def take_free(self) -> int | None:
        """Opens the free superblock with the fewest erases; None when there is none."""
        free = self.having(SuperblockState.FREE)
        if not free.size:
            return None
        chosen = int(free[np.argmin(self.erases[free])])
        self.states[chosen] = SuperblockState.OPEN
        return chosen

    def fill(self, superblock: int) -> None:
        assert self.states[superblock] == SuperblockState.OPEN
        self.states[superblock] = SuperblockState.FULL

    def retire(self, superblock: int) -> None:
        """Nothing is written to it any more, and when it is empty it is bad."""
        self.states[superblock] = SuperblockState.FULL
        self.retiring[superblock] = True

    def condemn(self, superblock: int) -> None:
        """It is bad for good."""
        assert self.valid[superblock] == 0
        self.states[superblock] = SuperblockState.BAD
        self.retiring[superblock] = False

    def release(self, superblock: int) -> None:
        """Counts the erase and makes it free."""
        assert self.states[superblock] == SuperblockState.FULL
        assert self.valid[superblock] == 0
        self.erases[superblock] += 1
        self.reads[superblock] = 0
        self.states[superblock] = SuperblockState.FREE

    def count_reads(self, ppns: I64, pages_per_superblock: int) -> None:
        """Counts one read of each of these pages."""
        if ppns.size:
            touched = ppns // pages_per_superblock
            self.reads += np.bincount(touched, minlength=self.reads.size)
