"""Random 4 KiB reads through firmware and FTL in virtual time, data and all, on one core.

A closed loop: each command is submitted when one completes; a call serves BATCH of them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import median_s
from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import SECTOR_BYTES, load_config
from csd_device.drive import Drive
from csd_device.firmware import commands as c

READS = 1_000_000
ALLOWED_S = 3.0
WRITE_BYTES = 1 << 20
BATCH = 1024


def run(tiny: bool) -> list[Ratio]:
    return [_read("reference", depth, tiny) for depth in (32, 256)]


def _read(name: str, depth: int, tiny: bool) -> Ratio:
    filled_bytes = (8 if tiny else 128) << 20
    reads = 2_000 if tiny else READS
    with TemporaryDirectory() as folder:
        drive = _open_filled(name, Path(folder), filled_bytes)
        slbas = np.random.default_rng(1).integers(0, filled_bytes // SECTOR_BYTES, reads)
        duration_s = median_s(lambda: _read_all(drive, slbas, depth), 1)
        drive.close()
    return Ratio(
        name=f"random 4 KiB reads in virtual time, {name}, depth {depth}",
        ours=reads / duration_s,
        reference=READS / ALLOWED_S,
        unit="reads/s",
        floor=1.0,
        against=f"{READS:,} in {ALLOWED_S:g} s",
        notes="through firmware, FTL and link, data moved, one core",
    )


def _open_filled(name: str, folder: Path, filled_bytes: int) -> Drive:
    drive = Drive.open(
        load_config(name),
        folder / "drive.csd",
        clock=VirtualClock(),
        time_mode=TimeMode.VIRTUAL,
        window_path=folder / "window",
    )
    queue = drive.connect("benchmark", "benchmark")
    data = np.random.default_rng(1).integers(0, 256, WRITE_BYTES, np.uint8).tobytes()
    for cid in range(filled_bytes // WRITE_BYTES):
        queue.submit(cid, c.Write(cid * WRITE_BYTES // SECTOR_BYTES, data), drive.clock.now_ns())
        queue.pop_due(drive.clock.now_ns())
    queue.close()
    return drive


def _read_all(drive: Drive, slbas: np.ndarray, depth: int) -> None:
    out = np.empty((BATCH, SECTOR_BYTES), np.uint8)
    slots = np.full(depth, drive.clock.now_ns())
    for start in range(0, slbas.size, BATCH):
        batch = slbas[start : start + BATCH]
        drive.read_closed_loop(batch, 1, slots, out[: batch.size])
