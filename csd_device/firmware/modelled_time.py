"""When each step of a command would be done: a lane for each thing that serves one at a time.

The firmware's processor, the compute engine, the DRAM and the link are lanes: work arrives, waits
for what came before, and leaves. NAND has its own timeline. A command's time moves from step to
step, and each step is booked under its name, so the parts of a completion add up to its whole.
Steps that run side by side are forks; the command adopts the fork that ends last, parts and all.

DRAM is charged one write for a unit that comes from NAND, a read and a write for one that comes
from the unit cache; the link's own reads overlap with its transfer.
"""

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from csd_device.compute import Cost, CostModel
from csd_device.config import DriveConfig
from csd_device.firmware.commands import Timing
from csd_device.ftl import PagePrograms, PageReads
from csd_protocol.units import NS_PER_S

I64 = npt.NDArray[np.int64]


class NandTimeline(Protocol):
    """What the firmware needs of NAND's timeline; times in and out are the drive clock's."""

    def read_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64: ...

    def program_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64: ...

    def erase_blocks(self, arrival_ns: int, ppns: I64) -> I64: ...


class Lane:
    """Serves one thing at a time, in the order asked."""

    def __init__(self) -> None:
        self._busy_until_ns = 0

    def serve(self, arrival_ns: int, duration_ns: int) -> int:
        """When work that arrives now and takes this long is done."""
        self._busy_until_ns = max(self._busy_until_ns, arrival_ns) + duration_ns
        return self._busy_until_ns


class DriveTime:
    """The lanes of one drive."""

    def __init__(self, config: DriveConfig, nand: NandTimeline) -> None:
        self.nand = nand
        self.link_model = config.link
        self.cost_model = CostModel(config.compute.ops_per_s, config.dram.bandwidth_bytes_per_s)
        self.dram_bytes_per_s = config.dram.bandwidth_bytes_per_s
        self.processor, self.engine = Lane(), Lane()
        self.dram, self.link_down, self.link_up = Lane(), Lane(), Lane()

    def dram_ns(self, moved_bytes: int) -> int:
        """Nanoseconds, rounded up, that on-drive DRAM takes to move this much."""
        return -(-moved_bytes * NS_PER_S // self.dram_bytes_per_s)


class CommandTime:
    """Where one command's time went so far. With time off (no drive time) it stands still."""

    __slots__ = (
        "_drive",
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
            duration_ns = self._drive.cost_model.duration_ns(cost)
            self.program_ns += self._pass_to(self._drive.engine.serve(self.now_ns, duration_ns))

    def read_pages(self, reads: PageReads) -> None:
        """NAND pages into on-drive DRAM."""
        if self._drive and reads.ppns.size:
            done = self._drive.nand.read_pages(self.now_ns, reads.ppns, reads.transfer_bytes)
            self.nand_ns += self._pass_to(int(done.max()))

    def program_pages(self, programs: PagePrograms) -> None:
        """Blocks erased, then pages programmed."""
        if not self._drive:
            return
        nand = self._drive.nand
        if programs.erased_ppns.size:
            erased = nand.erase_blocks(self.now_ns, programs.erased_ppns)
            self.nand_ns += self._pass_to(int(erased.max()))
        if programs.ppns.size:
            done = nand.program_pages(self.now_ns, programs.ppns, programs.transfer_bytes)
            self.nand_ns += self._pass_to(int(done.max()))

    def move_dram(self, moved_bytes: int) -> None:
        """Bytes read from or written to on-drive DRAM."""
        if self._drive and moved_bytes:
            duration_ns = self._drive.dram_ns(moved_bytes)
            self.dram_ns += self._pass_to(self._drive.dram.serve(self.now_ns, duration_ns))

    def send(self, length_bytes: int) -> None:
        """Bytes over the link to the host."""
        if self._drive and length_bytes:
            duration_ns = self._drive.link_model.transfer_ns(length_bytes)
            self.link_ns += self._pass_to(self._drive.link_down.serve(self.now_ns, duration_ns))

    def receive(self, length_bytes: int) -> None:
        """Bytes over the link from the host."""
        if self._drive and length_bytes:
            duration_ns = self._drive.link_model.transfer_ns(length_bytes)
            self.link_ns += self._pass_to(self._drive.link_up.serve(self.now_ns, duration_ns))

    def fork(self) -> "CommandTime":
        """A second time that starts now, for steps that run beside this command's others."""
        other = CommandTime(self._drive, self.submitted_ns)
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
