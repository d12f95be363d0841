"""Block traces in the format of MSR Cambridge, played open loop: requests arrive when they did.

A line is `Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime`: the time in ticks of 100 ns
(Windows' file time), `Read` or `Write`, bytes. The response time is that of the traced disk and is
not used. Requests go to the drive in the order of the file; one that is stamped earlier than the
one before arrives with it. Byte ranges are widened to whole blocks, and a request that is larger
than one command may be becomes several that arrive together; the last of them ends it.

D. Narayanan, A. Donnelly, A. Rowstron: Write Off-Loading: Practical Power Management for Enterprise
Storage, FAST 2008; http://iotta.snia.org/traces/block-io/388
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from csd_device.config import SECTOR_BYTES
from csd_device.drive import Drive
from csd_device.firmware import commands as c
from csd_device.workload.patterns import WorkloadRefused
from csd_device.workload.runner import CHUNK, Direction, Outcome, Progress, perform

TICK_NS = 100
_FIELDS = 7
_KINDS = {"read": True, "write": False}


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a trace."""

    ticks: int
    disk: str
    is_read: bool
    offset_bytes: int
    size_bytes: int


@dataclass(slots=True)
class Played:
    """A trace's outcome, and what had to be changed about it."""

    outcome: Outcome
    widened: int = 0  # requests of byte ranges that were not whole blocks
    wrapped: int = 0  # requests beyond the namespace, taken modulo its size
    delayed: int = 0  # requests stamped earlier than the one before


def read_trace(path: Path) -> Iterator[tuple[int, Record]]:
    """Line numbers and records. Raises WorkloadRefused naming the line, and OSError."""
    disk = None
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _record(line, f"{path}:{number}")
            if disk not in (None, record.disk):
                raise WorkloadRefused(
                    f"{path}:{number}: disk {record.disk}, and {disk} before; a drive plays one"
                )
            disk = record.disk
            yield number, record


def play_trace(drive: Drive, path: Path, speedup: float, wraps: bool, progress: Progress) -> Played:
    """Plays all of the trace, `speedup` times as fast as it was recorded.

    `wraps`: offsets beyond the namespace are taken modulo its size; otherwise they are refused.
    Raises WorkloadRefused.
    """
    if not speedup > 0:
        raise WorkloadRefused(f"a speedup of {speedup}; it is above 0")
    start_ns = drive.clock.now_ns()
    player = _Player(drive, Played(Outcome(path.name, start_ns, start_ns)), wraps)
    first: int | None = None
    arrival_ns = start_ns
    for count, (number, record) in enumerate(read_trace(path), start=1):
        first = record.ticks if first is None else first
        stamped_ns = start_ns + int((record.ticks - first) * TICK_NS / speedup)
        player.played.delayed += stamped_ns < arrival_ns
        arrival_ns = max(arrival_ns, stamped_ns)
        player.play(record, arrival_ns, f"{path}:{number}")
        if count % CHUNK == 0:
            player.settle()
            progress(count, arrival_ns - start_ns)
    if first is None:
        raise WorkloadRefused(f"{path}: no request in it")
    player.settle()
    player.queue.close()
    return player.played


class _Player:
    def __init__(self, drive: Drive, played: Played, wraps: bool) -> None:
        self.played = played
        self.queue = drive.connect("workload", "trace")
        self._capacity = drive.capacity_bytes
        self._step = drive.mdts_bytes // SECTOR_BYTES
        self._data = bytes(drive.mdts_bytes)
        self._wraps = wraps
        self._took: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # ns, bytes

    def play(self, record: Record, arrival_ns: int, where: str) -> None:
        slba, end = self._blocks(record, where)
        done_ns = arrival_ns
        for at in range(slba, end, self._step):
            blocks = min(self._step, end - at)
            command = (
                c.Read(c.BlockRange(at, blocks))
                if record.is_read
                else c.Write(at, self._data[: blocks * SECTOR_BYTES])
            )
            done_ns = max(done_ns, perform(self.queue, command, arrival_ns))
        self._took[record.is_read].append((done_ns - arrival_ns, (end - slba) * SECTOR_BYTES))
        self.played.outcome.ended_ns = max(self.played.outcome.ended_ns, done_ns)

    def settle(self) -> None:
        outcome = self.played.outcome
        for is_read, took in self._took.items():
            direction: Direction = outcome.reads if is_read else outcome.writes
            direction.latencies.add(np.array([ns for ns, _ in took], np.int64))
            direction.bytes += sum(size for _, size in took)
            took.clear()

    def _blocks(self, record: Record, where: str) -> tuple[int, int]:
        """The first block and one past the last."""
        offset = record.offset_bytes
        if offset + record.size_bytes > self._capacity:
            if not self._wraps or record.size_bytes > self._capacity:
                raise WorkloadRefused(
                    f"{where}: {record.size_bytes} bytes from {offset} lie beyond the namespace of "
                    f"{self._capacity} bytes; take a larger drive, or --wrap"
                )
            offset %= self._capacity
            offset = min(offset, self._capacity - record.size_bytes)
            self.played.wrapped += 1
        slba, end = offset // SECTOR_BYTES, -(-(offset + record.size_bytes) // SECTOR_BYTES)
        self.played.widened += (end - slba) * SECTOR_BYTES != record.size_bytes
        return slba, end


def _record(line: str, where: str) -> Record:
    fields = line.strip().split(",")
    if len(fields) != _FIELDS:
        raise WorkloadRefused(f"{where}: {len(fields)} fields; a record has {_FIELDS}")
    ticks, host, disk, kind, offset, size, _ = fields
    if kind.lower() not in _KINDS:
        raise WorkloadRefused(f"{where}: type {kind!r}; it is Read or Write")
    try:
        numbers = int(ticks), int(offset), int(size)
    except ValueError as error:
        raise WorkloadRefused(f"{where}: {error}") from None
    if min(numbers) < 0 or not numbers[2]:
        raise WorkloadRefused(f"{where}: {numbers[2]} bytes from {numbers[1]} at {numbers[0]}")
    return Record(numbers[0], f"{host}.{disk}", _KINDS[kind.lower()], numbers[1], numbers[2])


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="ascii", errors="replace")
    return path.open(encoding="ascii", errors="replace")
