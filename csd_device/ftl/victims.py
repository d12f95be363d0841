"""Which superblock to take back next: policies as scores over arrays.

    greedy          fewest valid sectors: least to move for what is gained. Optimal when every
                    sector is as likely to be overwritten as any other
    cost-benefit    (1 - u) / 2u * age (Kawaguchi, Nishioka and Motoda, "A flash-memory based file
                    system", USENIX 1995, after Rosenblum and Ousterhout): u is the valid fraction,
                    age how long ago it was opened, in sectors programmed since. What is old and
                    cold is worth taking back at a higher u than what is about to go stale by itself
    weights         greedy, but one sector gained from packed weights counts as COLD_GAIN: weights
                    that outlived their neighbours stay where they are moved to, so that gain lasts

A superblock with nothing to gain is never a candidate: packed weights that nobody removed are left
alone by all three.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from csd_device.ftl.placement import Stream
from csd_device.nand.superblocks import Superblocks

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

COLD_GAIN = 4.0

# (superblocks, candidates [n], valid fraction of each [n], sectors programmed by now) -> [n]
Policy = Callable[[Superblocks, I64, F64, int], F64]


def _gain(used: F64) -> F64:
    """Sectors gained for each sector moved."""
    return (1 - used) / np.maximum(used, 1e-9)


def greedy(superblocks: Superblocks, candidates: I64, used: F64, programmed: int) -> F64:
    return -used


def cost_benefit(superblocks: Superblocks, candidates: I64, used: F64, programmed: int) -> F64:
    ages = np.maximum(programmed - superblocks.opened_at[candidates], 1)
    return _gain(used) / 2 * ages


def weights(superblocks: Superblocks, candidates: I64, used: F64, programmed: int) -> F64:
    is_cold = superblocks.streams[candidates] == Stream.WEIGHTS
    return _gain(used) * np.where(is_cold, COLD_GAIN, 1.0)


POLICIES: dict[str, Policy] = {
    "greedy": greedy,
    "cost-benefit": cost_benefit,
    "weights": weights,
}


def choose(
    policy: Policy, superblocks: Superblocks, candidates: I64, size: int, programmed: int
) -> int | None:
    """The candidate with the highest score, among equals the least worn; None without any."""
    candidates = candidates[superblocks.valid[candidates] < size]
    if not candidates.size:
        return None
    used = superblocks.valid[candidates] / size
    scores = policy(superblocks, candidates, used, programmed)
    best = candidates[scores == scores.max()]
    return int(best[np.argmin(superblocks.erases[best])])
