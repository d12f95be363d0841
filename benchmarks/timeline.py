"""Scheduling page reads: how many a second the timeline places, in batches, on one core."""

import numpy as np

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import median_s
from csd_device.config import load_config
from csd_device.nand.timeline import Timeline

REQUIRED_PER_S = 1_000_000
BATCH = 10_000
DRIVES = ("edge-gen5", "cloud-4x-gen5")


def run(tiny: bool) -> list[Ratio]:
    return [_schedule(drive, random, tiny) for drive in DRIVES for random in (False, True)]


def _schedule(drive: str, random: bool, tiny: bool) -> Ratio:
    config = load_config(drive)
    timeline = Timeline(config.geometry, config.timing)
    batches = _batches(config.geometry.pages, random, 2 if tiny else 20)
    transfer_bytes = np.full(BATCH, 4096, np.int64)
    arrival_ns = 0

    def schedule_all() -> None:
        nonlocal arrival_ns
        for ppns in batches:
            arrival_ns = int(timeline.read_pages(arrival_ns, ppns, transfer_bytes).min())

    duration_s = median_s(schedule_all, 1 if tiny else 5)
    return Ratio(
        name=f"timeline, {drive}, {'random' if random else 'sequential'} pages",
        ours=len(batches) * BATCH / duration_s,
        reference=REQUIRED_PER_S,
        unit="page reads/s",
        floor=1.0,
        against="a million a second",
        notes=f"batches of {BATCH:,}, one core",
    )


def _batches(pages: int, random: bool, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    if random:
        return [rng.integers(0, pages, BATCH) for _ in range(count)]
    starts = rng.integers(0, pages - BATCH, count)
    return [np.arange(start, start + BATCH) for start in starts]
