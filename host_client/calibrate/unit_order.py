"""In which order a layer's units should lie, so that what a token wants is on few flash pages.

Units are cut into tiers by how often they are wanted: a page of seldom wanted units is seldom read,
and the hottest units, which hosts keep resident, lie apart from the others. In a tier the next unit
is the one that would most often have come for nothing: wanted by most of the tokens that wanted
one of the last few units, as measured on calibration text. Every token counts, not pairs of units,
so a bit a token and unit is all that is kept.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

TIERS = 8
NEIGHBOURS = 4  # of the last units that the next is to go with: about a page of small ones


def order_of(wanted: Flags) -> U32:
    """uint32 [units], hottest tier first. wanted: bool [tokens, units]."""
    bits = _bits(wanted)
    hottest = np.argsort(-wanted.sum(0), kind="stable")
    tiers = [tier[_chain(bits[tier])] for tier in np.array_split(hottest, TIERS) if tier.size]
    return np.concatenate(tiers).astype(np.uint32)


def _bits(wanted: Flags) -> U64:
    """Whether a token wants a unit, 64 tokens a word: [units, words]."""
    tokens, units = wanted.shape
    padded = np.zeros((units, -(-tokens // 64) * 64), np.bool_)
    padded[:, :tokens] = wanted.T
    return np.packbits(padded, axis=1).view(np.uint64)


@njit(nogil=True, cache=True)
def _count_ones(word: Any) -> Any:
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = np.uint64(0x3333333333333333)
    word = (word & fours) + ((word >> np.uint64(2)) & fours)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(nogil=True, cache=True)
def _chain(bits: Any) -> Any:
    """The rows in an order that begins with the first, each sharing most with the last few."""
    count, words = bits.shape
    order = np.arange(count)
    recent = np.empty(words, np.uint64)
    for place in range(1, count):
        recent[:] = 0
        for row in order[max(0, place - NEIGHBOURS) : place]:
            recent |= bits[row]
        best, best_shared = place, np.int64(-1)
        for at in range(place, count):
            shared = np.int64(0)
            for word in range(words):
                shared += np.int64(_count_ones(bits[order[at], word] & recent[word]))
            if shared > best_shared:
                best, best_shared = at, shared
        order[place], order[best] = order[best], order[place]
    return order
