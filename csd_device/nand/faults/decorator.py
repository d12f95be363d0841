"""What every fault shares: its counters, and the arithmetic of sectors."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES
from csd_device.nand.media import Media, Pieces
from csd_device.nand.passing import PassingMedia

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

NAMED_MAX = 8  # sectors that a message names


@dataclass(slots=True)
class FaultCounters:
    """What faults did since the drive was opened. A sector that is read again counts again."""

    corrected_bits: int = 0
    corrected_sectors: int = 0  # that had a wrong bit and were corrected at the first sense
    retried_sectors: int = 0  # that needed more than one, and were corrected then
    retries: int = 0  # senses after the first
    uncorrectable_sectors: int = 0
    program_failures: int = 0
    erase_failures: int = 0


class Decorator(PassingMedia):
    """`Media` with a fault, which counts."""

    def __init__(self, inner: Media, counters: FaultCounters) -> None:
        super().__init__(inner)
        self._counters = counters


def sectors_of(pieces: Pieces) -> I64:
    """The physical sectors that the pieces touch, ascending, each once."""
    first = pieces.starts // SECTOR_BYTES
    counts = (pieces.starts + pieces.lengths - 1) // SECTOR_BYTES - first + 1
    before = np.cumsum(counts) - counts
    return np.unique(np.repeat(first - before, counts) + np.arange(int(counts.sum())))


def name_sectors(psas: I64) -> str:
    """For messages: the first few, and how many there are."""
    named = ", ".join(str(psa) for psa in psas[:NAMED_MAX].tolist())
    more = f" and {psas.size - NAMED_MAX} more" if psas.size > NAMED_MAX else ""
    return f"physical {'sector' if psas.size == 1 else 'sectors'} {named}{more}"
