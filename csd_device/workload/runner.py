"""Jobs on a drive: closed loops at their depth, in virtual time.

A loop has `depth` slots; a slot's next request is submitted the moment its last one is done. Reads
alone go through `Drive.read_closed_loop`, compiled, a batch at a time. Anything else goes through a
queue pair of the job, command after command in order of arrival over all jobs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

import numpy as np

from csd_device.config import SECTOR_BYTES
from csd_device.drive import Drive
from csd_device.firmware import QueuePair
from csd_device.firmware import commands as c
from csd_device.workload.latencies import Latencies
from csd_device.workload.patterns import I64, Dice, Job, Requests, WorkloadRefused
from csd_protocol.status import Status

BATCH = 16_384  # reads of one call
CHUNK = 4_096  # requests drawn, and told, at a time
CID = 0

Progress = Callable[[int, int], None]  # requests done, nanoseconds passed on the drive's clock


@dataclass(slots=True)
class Direction:
    """Reads or writes of one job."""

    bytes: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, durations_ns: I64, size_bytes: int) -> None:
        self.latencies.add(durations_ns)
        self.bytes += int(durations_ns.size) * size_bytes

    def merge(self, other: "Direction") -> None:
        self.bytes += other.bytes
        self.latencies.merge(other.latencies)


@dataclass(slots=True)
class Outcome:
    """What became of one job or trace; times on the drive's clock."""

    name: str
    started_ns: int
    ended_ns: int
    reads: Direction = field(default_factory=Direction)
    writes: Direction = field(default_factory=Direction)

    @property
    def requests(self) -> int:
        return self.reads.latencies.count + self.writes.latencies.count


def run_jobs(drive: Drive, jobs: list[Job], dice: Dice, progress: Progress) -> list[Outcome]:
    """Runs the jobs beside each other. Raises WorkloadRefused, also for a command that fails."""
    for job in jobs:
        job.check(drive.capacity_bytes, drive.mdts_bytes)
    if len(jobs) == 1 and jobs[0].read_share == 1:
        return [_read_alone(drive, jobs[0], dice, progress)]
    return _Loops(drive, jobs, dice).run(progress)


def _read_alone(drive: Drive, job: Job, dice: Dice, progress: Progress) -> Outcome:
    start_ns = drive.clock.now_ns()
    outcome = Outcome(job.name, start_ns, start_ns)
    requests = Requests(job, drive.capacity_bytes, dice)
    slots = np.full(job.depth, start_ns, np.int64)
    left = job.requests
    while (left is None or left) and not _is_over(job, int(slots.min()) - start_ns):
        count = BATCH if left is None else min(BATCH, left)
        slbas, _ = requests.take(count)
        submitted, done = drive.read_closed_loop(slbas, job.size_bytes // SECTOR_BYTES, slots)
        if job.duration_ns is not None:
            within = submitted < start_ns + job.duration_ns
            submitted, done = submitted[within], done[within]
        outcome.reads.add(done - submitted, job.size_bytes)
        outcome.ended_ns = max(outcome.ended_ns, int(done.max()))
        left = None if left is None else left - count
        progress(outcome.requests, outcome.ended_ns - start_ns)
    return outcome


def _is_over(job: Job, passed_ns: int) -> bool:
    return job.duration_ns is not None and passed_ns >= job.duration_ns


class _Loop:
    """One job's loop through a queue pair."""

    def __init__(self, drive: Drive, job: Job, dice: Dice, number: int) -> None:
        self.job = job
        self.queue = drive.connect("workload", f"workload-{number}")
        self.started_ns = drive.clock.now_ns()
        self.outcome = Outcome(job.name, self.started_ns, self.started_ns)
        self._blocks = job.size_bytes // SECTOR_BYTES
        self._data = bytes(job.size_bytes)
        self._requests = self._draw(Requests(job, drive.capacity_bytes, dice))
        self._took: tuple[list[int], list[int]] = ([], [])  # writes, reads

    def submit(self, now_ns: int) -> int | None:
        """The next request, and when it is done; None when the job is at its end."""
        if _is_over(self.job, now_ns - self.started_ns):
            return None
        drawn = next(self._requests, None)
        if drawn is None:
            return None
        slba, is_read = drawn
        done_ns = perform(self.queue, self._command(slba, is_read), now_ns)
        self._took[is_read].append(done_ns - now_ns)
        self.outcome.ended_ns = max(self.outcome.ended_ns, done_ns)
        return done_ns

    def _command(self, slba: int, is_read: bool) -> c.Command:
        if is_read:
            return c.Read(c.BlockRange(slba, self._blocks))
        return c.Write(slba, self._data)

    def settle(self) -> int:
        """Adds up what was noted; how many requests there have been."""
        for took, part in zip(self._took, (self.outcome.writes, self.outcome.reads), strict=True):
            part.add(np.array(took, np.int64), self.job.size_bytes)
            took.clear()
        return self.outcome.requests

    def _draw(self, requests: Requests) -> Iterator[tuple[int, bool]]:
        left = self.job.requests
        while left is None or left:
            count = CHUNK if left is None else min(CHUNK, left)
            slbas, reads = requests.take(count)
            yield from zip(slbas.tolist(), reads.tolist(), strict=True)
            left = None if left is None else left - count


class _Loops:
    """Several loops, in order of arrival."""

    def __init__(self, drive: Drive, jobs: list[Job], dice: Dice) -> None:
        self._drive = drive
        self._loops = [_Loop(drive, job, dice, number) for number, job in enumerate(jobs)]

    def run(self, progress: Progress) -> list[Outcome]:
        start_ns = self._drive.clock.now_ns()
        slots = [
            (start_ns, number)
            for number, loop in enumerate(self._loops)
            for _ in range(loop.job.depth)
        ]
        heapify(slots)
        submitted = 0
        while slots:
            now_ns, number = slots[0]
            done_ns = self._loops[number].submit(now_ns)
            if done_ns is None:
                heappop(slots)
                continue
            heapreplace(slots, (done_ns, number))
            submitted += 1
            if submitted % CHUNK == 0:
                progress(sum(loop.settle() for loop in self._loops), now_ns - start_ns)
        for loop in self._loops:
            loop.settle()
            loop.queue.close()
        return [loop.outcome for loop in self._loops]


def perform(queue: QueuePair, command: c.Command, now_ns: int) -> int:
    """One command on a queue pair in virtual time: when it is done. Raises WorkloadRefused."""
    queue.submit(CID, command, now_ns)
    (completion,) = queue.pop_due(now_ns)
    if completion.status is not Status.SUCCESS:
        raise WorkloadRefused(
            f"{type(command).__name__} at {now_ns} ns ended with {completion.status}: "
            f"{completion.detail}"
        )
    return completion.timing.done_ns


def fill(drive: Drive, share: float, progress: Progress) -> int:
    """Writes this share of the namespace in order, in commands of MDTS; how many bytes that were.

    The bytes are zeroes: what a workload writes and reads is not looked at.
    """
    step = drive.mdts_bytes
    length = int(drive.capacity_bytes * share) // step * step
    queue = drive.connect("workload", "fill")
    data = bytes(step)
    for number, offset in enumerate(range(0, length, step), start=1):
        perform(queue, c.Write(offset // SECTOR_BYTES, data), drive.clock.now_ns())
        if number % CHUNK == 0:
            progress(number, drive.clock.now_ns())
    queue.close()
    return length


def age(
    drive: Drive, length_bytes: int, times: float, size_bytes: int, dice: Dice, progress: Progress
) -> None:
    """Overwrites the first bytes of the namespace at random, as often as they fit `times` over."""
    requests = int(length_bytes * times) // size_bytes
    job = Job("age", 0.0, True, size_bytes, 1, length_bytes=length_bytes, requests=requests)
    job.check(drive.capacity_bytes, drive.mdts_bytes)
    drawn = Requests(job, drive.capacity_bytes, dice)
    queue = drive.connect("workload", "age")
    data = bytes(size_bytes)
    for start in range(0, requests, CHUNK):
        for slba in drawn.take(min(CHUNK, requests - start))[0].tolist():
            perform(queue, c.Write(slba, data), drive.clock.now_ns())
        progress(start, drive.clock.now_ns())
    queue.close()
