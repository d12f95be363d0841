"""When each step of a command would be done: a lane for each thing that serves one at a time.

The firmware's processor, the compute engine, the DRAM and the link are lanes: work arrives, waits
for what came before, and leaves. NAND has its own timeline. A command's time moves from step to
step, and each step is booked under its name, so the parts of a completion add up to its whole.
Steps that run side by side are forks; the command adopts the fork that ends last, parts and all.

DRAM and link do not wait for the last page: the sectors of a read flow through them as they leave
the flash (a sector is an ECC codeword: none of it goes on before all of it is there). Each may use
what an earlier command left idle. What a step is booked with is how long after the step before it
ended. A flow has at most FLOW_PARTS_MAX equal parts; beyond that a part is several sectors.

DRAM is charged one write for a unit that comes from NAND, a read and a write for one that comes
from the unit cache; the link's own reads overlap with its transfer.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.bookings import (
    BUSY,
    booked_spans,
    forget,
    make_bookings,
    newly_booked,
    stream,
)
from csd_device.compute import Cost, CostModel
from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.firmware.commands import Timing
from csd_device.firmware.write_buffer import WriteBuffer
from csd_device.ftl import PagePrograms, PageReads
from csd_device.nand.timeline import BusyTimes
from csd_protocol.units import NS_PER_S

I64 = npt.NDArray[np.int64]
Note = Callable[[int, int, int], None]  # server, start ns, end ns

FLOW_PARTS_MAX = 256  # 1 MiB by sectors


class NandTimeline(Protocol):
    """What the firmware needs of NAND's timeline; times in and out are the drive clock's.

    `state`, `rules` and `read` are for what is compiled (`firmware.batch`).
    """

    @property
    def state(self) -> Any: ...

    @property
    def rules(self) -> Any: ...

    @property
    def read(self) -> Any: ...

    def read_pages(
        self, arrival_ns: int, ppns: I64, transfer_bytes: I64, extra_ns: I64 | None = None
    ) -> I64: ...

    def program_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64: ...

    def erase_blocks(self, arrival_ns: int, ppns: I64) -> I64: ...

    def moves_ns(self, transfer_bytes: I64) -> I64: ...

    def busy_times(self) -> BusyTimes: ...

    def idle_ns(self) -> int: ...


class Lane:
    """Serves one thing at a time on each of its servers, in the order asked."""

    def __init__(self, servers: int = 1) -> None:
        self.free_ns: I64 = np.zeros(servers, np.int64)
        self.busy_ns = 0  # summed over servers
        self.note: Note | None = None  # told of each server's span, while a trace is taken

    def serve(self, arrival_ns: int, duration_ns: int) -> int:
        """When work that arrives now and takes this long is done."""
        server = int(self.free_ns.argmin())
        done_ns = max(int(self.free_ns[server]), arrival_ns) + duration_ns
        self.free_ns[server] = done_ns
        self.busy_ns += duration_ns
        if self.note is not None and duration_ns:
            self.note(server, done_ns - duration_ns, done_ns)
        return done_ns


class Pipe:
    """Passes one thing at a time, whatever is ready first; commands may ask in any order."""

    def __init__(self) -> None:
        self.bookings = make_bookings(1)
        self.note: Note | None = None  # told of each span taken, while a trace is taken

    @property
    def busy_ns(self) -> int:
        return int(self.bookings.lanes[0, BUSY])

    def pass_through(self, ready_ns: I64, duration_ns: int, horizon_ns: int) -> I64:
        """When each of equal parts, ready at these times (ascending), has passed, ascending.

        Nothing is asked for before `horizon_ns` any more.
        """
        passed = ready_ns.copy()
        forget(self.bookings, 0, horizon_ns)
        before = booked_spans(self.bookings, 0) if self.note is not None else None
        stream(self.bookings, 0, passed, duration_ns)
        if self.note is not None and before is not None:
            for start_ns, end_ns in newly_booked(self.bookings, 0, before).tolist():
                self.note(0, start_ns, end_ns)
        return passed


class DriveTime:
    """The lanes of one drive."""

    def __init__(self, config: DriveConfig, nand: NandTimeline) -> None:
        self.nand = nand
        self.link_model = config.link
        self.cost_model = CostModel(config.compute.ops_per_s, config.dram.bandwidth_bytes_per_s)
        self.dram_bytes_per_s = config.dram.bandwidth_bytes_per_s
        self.processor, self.engine = Lane(config.link.firmware_cores), Lane()
        self.dram, self.link_down, self.link_up = Pipe(), Pipe(), Pipe()
        buffered = config.write_buffer
        self.is_protected = buffered.power_loss_protected
        self.write_buffer: WriteBuffer | None = None
        if buffered.capacity_bytes:
            self.write_buffer = WriteBuffer(buffered.capacity_bytes, config.geometry.page_bytes)

    def dram_ns(self, moved_bytes: int) -> int:
        """Nanoseconds, rounded up, that on-drive DRAM takes to move this much."""
        return -(-moved_bytes * NS_PER_S // self.dram_bytes_per_s)

    def worked_ns(self) -> tuple[int, int, int]:
        """How long NAND (mean over dies), the link (both ways) and the compute engine worked."""
        dies = self.nand.busy_times().die_ns
        link_ns = (self.link_down.busy_ns + self.link_up.busy_ns) // 2
        return int(dies.sum()) // dies.size, link_ns, self.engine.busy_ns

    def sector_times(self, done: I64, transfer_bytes: I64) -> I64:
        """When each sector of pages that are done at these times had left the flash, ascending."""
        moves = self.nand.moves_ns(transfer_bytes)
        times = spread_sectors(done, moves, transfer_bytes // SECTOR_BYTES)
        parts: I64 = thin_out(times)
        return parts


@njit(nogil=True, cache=True)
def thin_out(times: Any) -> Any:
    """At most FLOW_PARTS_MAX of these times, ascending: of each part the last."""
    if times.shape[0] <= FLOW_PARTS_MAX:
        return times
    parts = np.empty(FLOW_PARTS_MAX, np.int64)
    for part in range(FLOW_PARTS_MAX):
        parts[part] = times[(part + 1) * times.shape[0] // FLOW_PARTS_MAX - 1]
    return parts


@njit(nogil=True, cache=True)
def spread_sectors(done: Any, moves: Any, sectors: Any) -> Any:
    """When each sector had left the flash: evenly over the time that its page moved; ascending."""
    times = np.empty(sectors.sum(), np.int64)
    at = 0
    for page in range(done.shape[0]):
        count = sectors[page]
        for left in range(count - 1, -1, -1):
            times[at] = done[page] - moves[page] * left // count
            at += 1
    if done.shape[0] > 1:
        times.sort()
    return times


def _last_of(now_ns: int, *times: I64) -> int:
    """The latest of these times, and of now."""
    return max([now_ns, *(int(part.max()) for part in times if part.size)])


class CommandTime:
    """Where one command's time went so far. With time off (no drive time) it stands still."""

    __slots__ = (
        "_drive",
        "_flow",
        "dram_ns",
        "link_ns",
        "nand_ns",
        "now_ns",
        "program_ns",
        "queue_ns",
        "submitted_ns",
    )

    def __init__(self, drive: DriveTime | None, submitted_ns: int) -> None:
        self._drive = drive
        self._flow: I64 | None = None  # when each part of what was read is ready
        self.submitted_ns = self.now_ns = submitted_ns
        self.queue_ns = self.program_ns = self.nand_ns = self.dram_ns = self.link_ns = 0

    def fetch(self) -> None:
        """The firmware takes the command up."""
        if self._drive:
            done_ns = self._drive.processor.serve(self.now_ns, self._drive.link_model.firmware_ns)
            self.queue_ns += self._pass_to(done_ns)

    def run_program(self, cost: Cost) -> None:
        """One run of a program on the compute engine."""
        if self._drive:
            self._flow = None
            duration_ns = self._drive.cost_model.duration_ns(cost)
            self.program_ns += self._pass_to(self._drive.engine.serve(self.now_ns, duration_ns))

    def read_pages(self, reads: PageReads) -> None:
        """NAND pages into on-drive DRAM."""
        self._flow = None
        if self._drive and reads.ppns.size:
            done = self._drive.nand.read_pages(
                self.now_ns, reads.ppns, reads.transfer_bytes, reads.extra_ns
            )
            self.nand_ns += self._pass_to(int(done.max()))
            self._flow = self._drive.sector_times(done, reads.transfer_bytes)

    def wait_for_pages(self, ready_ns: int) -> None:
        """What another command has under way from NAND is there then."""
        if self._drive and ready_ns > self.now_ns:
            self._flow = None
            self.nand_ns += self._pass_to(ready_ns)

    def write(self, length_bytes: int, programs: PagePrograms, must_last: bool) -> None:
        """Bytes into the write buffer, and the programs that this sets off.

        `must_last`: done when they would survive a loss of power. Without a buffer the programs
        are waited for.
        """
        if not self._drive:
            return
        buffer = self._drive.write_buffer
        if buffer is None:
            self.program_pages(programs)
            return
        self.nand_ns += self._pass_to(buffer.admit(self.now_ns, length_bytes))
        done = self._start(programs)[1]
        buffer.drain(done)
        if must_last and not self._drive.is_protected and done.size:
            self.nand_ns += self._pass_to(int(done.max()))

    def flush(self, programs: PagePrograms) -> None:
        """Done when all that was written would survive a loss of power."""
        if not self._drive:
            return
        buffer = self._drive.write_buffer
        if buffer is None:
            self.program_pages(programs)
            return
        buffer.drain(self._start(programs)[1])
        if not self._drive.is_protected:
            self.nand_ns += self._pass_to(max(self.now_ns, buffer.drained_ns()))

    def program_pages(self, programs: PagePrograms) -> None:
        """Blocks erased and pages programmed, and waited for."""
        if self._drive:
            erased, done, _ = self._start(programs)
            self.nand_ns += self._pass_to(_last_of(self.now_ns, erased, done))

    def work_in_background(self, programs: PagePrograms) -> None:
        """Whatever was programmed, erased and moved, and waited for."""
        if self._drive:
            self.nand_ns += self._pass_to(_last_of(self.now_ns, *self._start(programs)))

    def _start(self, programs: PagePrograms) -> tuple[I64, I64, I64]:
        """Each die's erases, then its programs, then its moves, from now on; when each is done.

        Moves come last: they are what the drive owes, and the command's own programs need not wait.
        What is moved is programmed when all of it has been read.
        """
        assert self._drive
        nand, moved = self._drive.nand, programs.moved
        erased = nand.erase_blocks(self.now_ns, programs.erased_ppns)
        done = nand.program_pages(self.now_ns, programs.ppns, programs.transfer_bytes)
        if moved is None:
            return erased, done, done[:0]
        read = nand.read_pages(self.now_ns, moved.read_ppns, moved.read_bytes, moved.read_extra_ns)
        read_ns = _last_of(self.now_ns, read)
        moves = nand.program_pages(read_ns, moved.ppns, moved.transfer_bytes)
        return erased, done, np.append(moves, read_ns)

    def move_dram(self, moved_bytes: int) -> None:
        """Bytes read from or written to on-drive DRAM."""
        if self._drive and moved_bytes:
            duration_ns = self._drive.dram_ns(moved_bytes)
            self.dram_ns += self._pass(self._drive.dram, duration_ns)

    def send(self, length_bytes: int) -> None:
        """Bytes over the link to the host."""
        if self._drive and length_bytes:
            duration_ns = self._drive.link_model.transfer_ns(length_bytes)
            self.link_ns += self._pass(self._drive.link_down, duration_ns)

    def receive(self, length_bytes: int) -> None:
        """Bytes over the link from the host."""
        if self._drive and length_bytes:
            duration_ns = self._drive.link_model.transfer_ns(length_bytes)
            self.link_ns += self._pass(self._drive.link_up, duration_ns)

    def _pass(self, pipe: Pipe, duration_ns: int) -> int:
        """What flows, or else all at once from now on, through a pipe; how long that was."""
        flow = np.array([self.now_ns], np.int64) if self._flow is None else self._flow
        passed = pipe.pass_through(flow, duration_ns, self.submitted_ns)
        self._flow = None if self._flow is None else passed
        return self._pass_to(max(self.now_ns, int(passed[-1])))

    def fork(self) -> "CommandTime":
        """A second time that starts now, for steps that run beside this command's others."""
        other = type(self)(self._drive, self.submitted_ns)
        other._take(self)
        return other

    def adopt(self, fork: "CommandTime") -> Self:
        """Waits for a fork: when it ends later than this, it is what this command waited for."""
        if fork.now_ns > self.now_ns:
            self._take(fork)
        return self

    def timing(self) -> Timing:
        """The breakdown; all zero with time off."""
        if not self._drive:
            return Timing()
        return Timing(
            submitted_ns=self.submitted_ns,
            done_ns=self.now_ns,
            queue_ns=self.queue_ns,
            program_ns=self.program_ns,
            nand_ns=self.nand_ns,
            dram_ns=self.dram_ns,
            link_ns=self.link_ns,
        )

    def _pass_to(self, done_ns: int) -> int:
        """Moves to `done_ns`; how long that was."""
        passed_ns = done_ns - self.now_ns
        assert passed_ns >= 0
        self.now_ns = done_ns
        return passed_ns

    def _take(self, other: "CommandTime") -> None:
        self.now_ns = other.now_ns
        self.queue_ns, self.program_ns = other.queue_ns, other.program_ns
        self.nand_ns, self.dram_ns = other.nand_ns, other.dram_ns
        self.link_ns = other.link_ns
        self._flow = other._flow
