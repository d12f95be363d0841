"""Reads of sectors that the drive makes of patterns, over reads of a file in the page cache.

Ours are units of LLaMA 3 8B's size, 24,576 bytes, through the media's checked copy: every CRC32C is
computed on the way. The reference is pread(2) of the same bytes from a cached file into a buffer
that was touched before, unchecked. One thread, rounds alternate.
"""

import os
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import seconds_of
from csd_device.checked_copy import LINE_BYTES, Keep
from csd_device.config import SECTOR_BYTES
from csd_device.nand import FileMedia
from csd_device.nand.patterns import PatternMedia
from csd_protocol.units import MIB

U8 = npt.NDArray[np.uint8]

FLOOR = 1.0
UNIT_BYTES, PATTERNS = 24_576, 256


def run(tiny: bool) -> list[Ratio]:
    count, rounds = (64, 2) if tiny else (10_240, 15)
    with TemporaryDirectory() as folder:
        return [_measure(Path(folder), count, rounds)]


def _measure(folder: Path, count: int, rounds: int) -> Ratio:
    size = count * UNIT_BYTES
    media = PatternMedia(FileMedia(folder / "nand.img", size), folder)
    rng = np.random.default_rng(1)
    known = rng.integers(0, 256, (PATTERNS, SECTOR_BYTES), np.uint8)
    media.table.define(known)
    cached = os.open(folder / "cached", os.O_RDWR | os.O_CREAT)
    for start in range(0, size, MIB):
        data = known[rng.integers(0, PATTERNS, min(MIB, size - start) // SECTOR_BYTES)].reshape(-1)
        media.write(start, data)
        os.pwrite(cached, data, start)
    starts = np.arange(count, dtype=np.int64) * UNIT_BYTES
    ours, theirs = _aligned(size), _aligned(size)
    assert media.copy_units is not None
    nothing = Keep(np.empty(0, np.uint8), np.empty(0, np.int64))
    make = partial(media.copy_units, starts, ours.reshape(count, -1), np.arange(count), nothing)
    read = partial(os.preadv, cached, [theirs], 0)
    pairs = [(seconds_of(make), seconds_of(read)) for _ in range(1 + rounds)][1:]
    assert (ours == theirs).all()
    os.close(cached)
    media.close()
    ours_s, reference_s = (median(column) for column in zip(*pairs, strict=True))
    return Ratio(
        name=f"{count:,} units of sectors that are made",
        ours=size / ours_s / 1e9,
        reference=size / reference_s / 1e9,
        unit="GB/s",
        floor=FLOOR,
        against="pread of a file in the page cache",
        notes="one thread; ours computes every CRC32C",
    )


def _aligned(size: int) -> U8:
    """Memory on a line, touched."""
    room = np.ones(size + LINE_BYTES, np.uint8)
    first = -room.ctypes.data % LINE_BYTES
    return room[first : first + size]
