"""How long a drive of 100 GB takes to open after a power loss, at its worst.

Every sector is mapped, at random, so no chunk of the checkpoint is short; the journal is nearly as
long as it gets before a checkpoint replaces it. The folder is laid out as the FTL would leave it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import seconds_of
from csd_device.config import DriveConfig, load_config
from csd_device.ftl import Ftl
from csd_device.ftl.changes import Changes
from csd_device.ftl.checkpoint import Checkpoint, Progress, encode_checkpoint
from csd_device.ftl.folder import replace_file
from csd_device.ftl.journal import Journal
from csd_device.ftl.recovery import checkpoint_arrays
from csd_device.ftl.translation import CHECKPOINT_BYTES
from csd_device.ftl.two_way_map import CHUNK_SECTORS
from csd_device.nand.superblocks import Superblocks, SuperblockState

ALLOWED_S = 5.0
SUPERBLOCKS = 401  # of edge-gen5: 100 GB for the host
RECORD_ROWS = 4096
_PROGRESS = Progress(powered_ns=0, programmed=0, pointers=(-1, -1, -1))


def run(tiny: bool) -> list[Ratio]:
    with TemporaryDirectory() as folder:
        _recover(load_config("tiny"), Path(folder) / "warm.csd")  # compiles what is needed
    config = load_config("tiny") if tiny else _drive()
    with TemporaryDirectory() as folder:
        duration_s = _recover(config, Path(folder) / "drive.csd")
    size_gb = config.capacity_bytes / 1e9
    return [
        Ratio(
            name=f"recovery of a drive of {size_gb:.0f} GB after a power loss",
            ours=size_gb / duration_s,
            reference=size_gb / ALLOWED_S,
            unit="GB/s",
            floor=1.0,
            against=f"{ALLOWED_S:g} s",
            notes=f"{duration_s:.2f} s; every sector mapped at random, the longest journal",
        )
    ]


def _drive() -> DriveConfig:
    edge = load_config("edge-gen5")
    geometry = edge.geometry.model_copy(update={"blocks_per_plane": SUPERBLOCKS})
    return edge.model_copy(update={"geometry": geometry})


def _recover(config: DriveConfig, folder: Path) -> float:
    """Lays the folder out; how many seconds opening it takes."""
    Ftl.open(folder, config).close()
    _leave_behind(config, folder)
    opened: list[Ftl] = []
    duration_s = seconds_of(lambda: opened.append(Ftl.open(folder, config)))
    ftl = opened.pop()
    assert ftl.used_sectors == config.capacity_sectors
    ftl.close()
    return duration_s


def _leave_behind(config: DriveConfig, folder: Path) -> None:
    """A checkpoint of a full drive, and as many overwrites as there are sectors to spare."""
    rng = np.random.default_rng(1)
    entries = rng.permutation(np.arange(1, config.geometry.raw_sectors + 1, dtype=np.uint32))
    mapped, spare = entries[: config.capacity_sectors], entries[config.capacity_sectors :]
    superblocks = Superblocks(config.geometry.blocks_per_plane)
    superblocks.states[:] = SuperblockState.FULL
    starts = range(0, mapped.size, CHUNK_SECTORS)
    checkpoint = Checkpoint(
        number=0,
        is_clean=False,
        progress=_PROGRESS,
        arrays=checkpoint_arrays(superblocks, powered_ns=0),
        chunk_count=len(starts),
        chunks=((start, mapped[start : start + CHUNK_SECTORS]) for start in starts),
    )
    replace_file(folder / "mapping.checkpoint", encode_checkpoint(checkpoint))
    lpns = rng.permutation(config.capacity_sectors)[: spare.size]
    _write_journal(folder, np.stack([lpns.astype(np.uint32), spare[: lpns.size]], axis=1))


def _write_journal(folder: Path, rows: np.ndarray) -> None:
    journal = Journal.open(folder)[0]
    for start in range(0, len(rows), RECORD_ROWS):
        if journal.size_bytes > CHECKPOINT_BYTES - RECORD_ROWS * 8:
            break
        changes = Changes()
        changes.note_rows(rows[start : start + RECORD_ROWS])
        journal.append(changes, _PROGRESS)
    journal.close()
