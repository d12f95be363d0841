"""States and wear of superblocks, as arrays.

    FREE --take--> OPEN --fill--> FULL --release (erase)--> FREE

A superblock is one block index over all planes; it is written from front to back and erased whole.
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
    erase; `written_ns` is when, on the drive's clock, it was opened: its data is that old.
    """

    def __init__(self, count: int) -> None:
        self.states: npt.NDArray[np.uint8] = np.zeros(count, np.uint8)
        self.erases: npt.NDArray[np.uint32] = np.zeros(count, np.uint32)
        self.valid: I64 = np.zeros(count, np.int64)
        self.reads: I64 = np.zeros(count, np.int64)
        self.written_ns: I64 = np.zeros(count, np.int64)

    def having(self, state: SuperblockState) -> I64:
        """Indices of those in this state, ascending."""
        return np.flatnonzero(self.states == state)

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

    def release(self, superblock: int) -> None:
        """Counts the erase and makes it free."""
        assert self.states[superblock] == SuperblockState.FULL
        assert self.valid[superblock] == 0
        self.erases[superblock] += 1
        self.states[superblock] = SuperblockState.FREE
