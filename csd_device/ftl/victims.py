"""Which superblock to take back next: the seam for garbage collection."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class VictimPolicy(Protocol):
    """Chooses among full superblocks."""

    def choose(self, candidates: I64, valid: I64) -> int | None:
        """One of `candidates` (indices, ascending), or None to take none back now.

        `valid` [all superblocks] counts the sectors that would have to be moved first.
        """
        ...


class WhollyInvalid:
    """Takes only what needs no move: a superblock without one valid sector."""

    def choose(self, candidates: I64, valid: I64) -> int | None:
        empty = candidates[valid[candidates] == 0]
        return int(empty[0]) if empty.size else None
