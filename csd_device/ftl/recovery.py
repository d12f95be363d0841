"""From checkpoint and journal back to the state of the last commit."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from csd_device.errors import DriveRefused
from csd_device.ftl.changes import EventKind
from csd_device.ftl.checkpoint import Checkpoint, Progress
from csd_device.ftl.journal import Record
from csd_device.ftl.placement import NO_POINTER, Stream
from csd_device.ftl.two_way_map import TwoWayMap
from csd_device.nand.superblocks import Superblocks, SuperblockState

_NEW = Progress(0, 0, (NO_POINTER,) * len(Stream))


@dataclass(frozen=True, slots=True)
class Recovered:
    """`is_clean`: nothing was written to the media behind the write pointers."""

    progress: Progress
    is_clean: bool


def checkpoint_arrays(superblocks: Superblocks, powered_ns: int) -> dict[str, npt.NDArray[Any]]:
    """What a checkpoint keeps of superblocks; `powered_ns`: when the drive's clock was 0."""
    return {
        "states": superblocks.states,
        "erases": superblocks.erases,
        "streams": superblocks.streams,
        "retiring": superblocks.retiring,
        "reads": superblocks.reads,
        "written_ns": superblocks.written_ns + powered_ns,
        "opened_at": superblocks.opened_at,
    }


def recover(
    checkpoint: Checkpoint | None,
    records: list[Record],
    maps: TwoWayMap,
    superblocks: Superblocks,
) -> Recovered:
    """Fills in maps and superblocks. Raises DriveRefused for what names sectors beyond the end."""
    progress = _NEW
    if checkpoint:
        progress = checkpoint.progress
        _restore(checkpoint, maps, superblocks)
    for record in records:
        if not maps.replay(record.rows):
            raise DriveRefused(f"journal record {record.number} names sectors that there are not")
        for event in record.events.tolist():
            _replay_event(superblocks, *event)
        progress = record.progress
    superblocks.recount()
    superblocks.written_ns -= progress.powered_ns  # the drive's clock starts at 0 again
    return Recovered(progress, is_clean=not records and (checkpoint is None or checkpoint.is_clean))


def _restore(checkpoint: Checkpoint, maps: TwoWayMap, superblocks: Superblocks) -> None:
    for name, values in checkpoint.arrays.items():
        array = getattr(superblocks, name)
        if array.shape != values.shape:
            raise DriveRefused(f"checkpoint of {values.size} superblocks; the drive has others")
        array[:] = values
    for first_lpn, entries in checkpoint.chunks:
        if not maps.load(first_lpn, entries):
            raise DriveRefused(f"checkpoint: the chunk at block {first_lpn} names no such sectors")


def _replay_event(
    superblocks: Superblocks, kind: int, superblock: int, first: int, second: int
) -> None:
    if kind == EventKind.OPEN:
        superblocks.states[superblock] = SuperblockState.OPEN
        superblocks.streams[superblock] = first
        superblocks.opened_at[superblock] = second
    elif kind == EventKind.WRITTEN:
        superblocks.written_ns[superblock] = first
    elif kind == EventKind.FREE:
        superblocks.states[superblock] = SuperblockState.FREE
        superblocks.erases[superblock] += 1
        superblocks.reads[superblock] = 0
    elif kind == EventKind.RETIRE:
        superblocks.states[superblock] = SuperblockState.FULL
        superblocks.retiring[superblock] = True
    elif kind == EventKind.BAD:
        superblocks.states[superblock] = SuperblockState.BAD
        superblocks.retiring[superblock] = False
    else:
        assert kind == EventKind.READS, kind
        superblocks.reads[superblock] = first
