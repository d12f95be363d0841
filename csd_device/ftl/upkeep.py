"""What has to move although nobody needs the room: failed cells, reads, age, uneven wear."""

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from csd_device.config import DriveConfig
from csd_device.nand.superblocks import Superblocks
from csd_protocol.units import NS_PER_S

I64 = npt.NDArray[np.int64]

_NS_PER_DAY = 86_400 * NS_PER_S


class Cause(StrEnum):
    """Why a superblock is emptied."""

    ROOM = "room"
    BAD = "bad"  # a program failed there
    READS = "reads"  # reads disturb the cells beside
    AGE = "age"  # charge leaks
    WEAR = "wear"  # cold data keeps a young superblock from its share of erases


class Upkeep:
    """Limits; a limit of 0 is none."""

    def __init__(self, config: DriveConfig, superblocks: Superblocks) -> None:
        self._superblocks = superblocks
        # Reads of a superblock spread over its blocks.
        self._reads_max = config.ftl.reclaim_reads * config.geometry.planes
        self._age_max_ns = config.ftl.reclaim_days * _NS_PER_DAY
        self._spread_max = config.ftl.wear_spread

    def choose(self, candidates: I64, now_ns: int) -> tuple[int, Cause] | None:
        """Of full superblocks that hold data, the one that is due first."""
        blocks = self._superblocks
        holding = candidates[blocks.valid[candidates] > 0]
        if not holding.size:
            return None
        retiring = holding[blocks.retiring[holding]]
        if retiring.size:
            return int(retiring[0]), Cause.BAD
        most_read = int(holding[np.argmax(blocks.reads[holding])])
        if 0 < self._reads_max <= blocks.reads[most_read]:
            return most_read, Cause.READS
        oldest = int(holding[np.argmin(blocks.written_ns[holding])])
        if 0 < self._age_max_ns <= now_ns - blocks.written_ns[oldest]:
            return oldest, Cause.AGE
        youngest = int(holding[np.argmin(blocks.erases[holding])])
        spread = int(blocks.erases.max()) - int(blocks.erases[youngest])
        if 0 < self._spread_max < spread:
            return youngest, Cause.WEAR
        return None
