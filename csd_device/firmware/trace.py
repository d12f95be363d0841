"""A bounded record of what the drive did when, for `trace_events` to draw.

Off, it costs nothing: a traced command has another kind of time (`TracedTime`), NAND's timeline is
wrapped (`TracedNand`), and lanes have somebody to tell only while a trace is taken. What comes
after `limit` spans is counted and left out. Times are the drive clock's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from csd_device.bookings import booked_spans, newly_booked
from csd_device.compute import Cost
from csd_device.dram import Lease
from csd_device.firmware.modelled_time import CommandTime, DriveTime, NandTimeline
from csd_device.ftl import PagePrograms, PageReads
from csd_device.nand.timeline import DIE, BusyTimes, Timeline

I64 = npt.NDArray[np.int64]

FIRMWARE, PROGRAMS, DRAM, LINK, CHANNELS, DIES = (
    "firmware", "programs", "dram", "link", "channels", "dies",
)  # fmt: skip
_OPERATIONS = ("read", "program", "erase")
_CELL_EVENTS_MAX = 1 << 16  # of one call
Step = tuple[str, int, int]  # part, start ns, end ns


class Span(NamedTuple):
    """A use of one resource: server, direction, channel or die `member` of a group."""

    group: str
    member: int
    name: str
    start_ns: int
    end_ns: int
    command: str


class TracedCommand(NamedTuple):
    """One command; its steps follow each other from `start_ns` to `end_ns`."""

    queue: int
    cid: int
    name: str
    host: str
    status: str
    start_ns: int
    end_ns: int
    steps: list[Step]


class TracedLease(NamedTuple):
    """A lease from the command that took it to the one by which it was back; None: still held."""

    id: int
    owner: str
    size_bytes: int
    start_ns: int
    end_ns: int | None


class Trace:
    """What was recorded since it was started."""

    def __init__(self, time: DriveTime, timeline: NandTimeline, limit: int) -> None:
        """Starts. Raises nothing; `stop` before another is started."""
        self.limit = limit
        self.is_on = True
        self.dropped = 0
        self.commands: list[TracedCommand] = []
        self.spans: list[Span] = []
        self.leases: list[TracedLease] = []
        self.page = b""  # what is being read of it, in pieces
        self._held: dict[int, TracedLease] = {}
        self._command = ""
        self._time = time
        self._timeline = timeline
        self._attach(time, timeline)

    def stop(self) -> None:
        """Nothing more is recorded; what was stays to be read."""
        if not self.is_on:
            return
        self.is_on = False
        self._time.nand = self._timeline
        if isinstance(self._timeline, Timeline):
            self._timeline.record_events(0)
        for lane in (self._time.processor, self._time.engine):
            lane.note = None
        for pipe in (self._time.dram, self._time.link_down, self._time.link_up):
            pipe.note = None

    def begin(self, name: str, queue: int, cid: int) -> None:
        """Spans from here on are this command's."""
        self._command = f"{name}, queue {queue}, CID {cid}"

    def end(self, command: TracedCommand, held: dict[int, tuple[str, Lease]]) -> None:
        """A command was carried out, and these leases are held now."""
        if self._has_room():
            self.commands.append(command)
        for lease_id in self._held.keys() - held.keys():
            closed = self._held.pop(lease_id)._replace(end_ns=command.start_ns)
            self.leases.append(closed)
        for lease_id in held.keys() - self._held.keys():
            if self._has_room():
                owner, lease = held[lease_id]
                self._held[lease_id] = TracedLease(
                    lease_id, owner, lease.length, command.start_ns, None
                )

    def all_leases(self) -> list[TracedLease]:
        """Those that are back, then those still held."""
        return [*self.leases, *self._held.values()]

    def add(self, group: str, index: int, name: str, start_ns: int, end_ns: int) -> None:
        if end_ns > start_ns and self._has_room():
            self.spans.append(Span(group, index, name, start_ns, end_ns, self._command))

    def _has_room(self) -> bool:
        kept = len(self.commands) + len(self.spans) + len(self.leases) + len(self._held)
        if kept < self.limit:
            return True
        self.dropped += 1
        return False

    def _attach(self, time: DriveTime, timeline: NandTimeline) -> None:
        def tell(group: str, name: str, index: int | None = None) -> Callable[..., None]:
            def note(server: int, start_ns: int, end_ns: int) -> None:
                self.add(group, server if index is None else index, name, start_ns, end_ns)

            return note

        time.processor.note = tell(FIRMWARE, "fetch")
        time.engine.note = tell(PROGRAMS, "program")
        time.dram.note = tell(DRAM, "move")
        time.link_down.note = tell(LINK, "to the host", 0)
        time.link_up.note = tell(LINK, "from the host", 1)
        if isinstance(timeline, Timeline):
            timeline.record_events(_CELL_EVENTS_MAX)
            time.nand = TracedNand(timeline, self)


class TracedNand:
    """NAND's timeline that tells a trace of every die and channel that it uses."""

    def __init__(self, timeline: Timeline, trace: Trace) -> None:
        self._timeline = timeline
        self._trace = trace

    @property
    def state(self) -> Any:
        return self._timeline.state

    @property
    def rules(self) -> Any:
        return self._timeline.rules

    @property
    def read(self) -> Any:
        return self._timeline.read

    def read_pages(
        self, arrival_ns: int, ppns: I64, transfer_bytes: I64, extra_ns: I64 | None = None
    ) -> I64:
        timeline = self._timeline
        return self._tell(
            "read", lambda: timeline.read_pages(arrival_ns, ppns, transfer_bytes, extra_ns)
        )

    def program_pages(self, arrival_ns: int, ppns: I64, transfer_bytes: I64) -> I64:
        timeline = self._timeline
        return self._tell(
            "program", lambda: timeline.program_pages(arrival_ns, ppns, transfer_bytes)
        )

    def erase_blocks(self, arrival_ns: int, ppns: I64) -> I64:
        return self._tell("erase", lambda: self._timeline.erase_blocks(arrival_ns, ppns))

    def moves_ns(self, transfer_bytes: I64) -> I64:
        return self._timeline.moves_ns(transfer_bytes)

    def busy_times(self) -> BusyTimes:
        return self._timeline.busy_times()

    def idle_ns(self) -> int:
        return self._timeline.idle_ns()

    def _tell(self, name: str, operate: Callable[[], I64]) -> I64:
        bus, trace = self._timeline.state.bus, self._trace
        channels = range(self._timeline.rules.channels)
        before = [booked_spans(bus, channel) for channel in channels]
        done = operate()
        for channel in channels:
            for start_ns, end_ns in newly_booked(bus, channel, before[channel]).tolist():
                trace.add(CHANNELS, channel, name, start_ns, end_ns)
        for resource, index, kind, start_ns, end_ns in self._timeline.take_events().tolist():
            if resource == DIE:
                trace.add(DIES, index, _OPERATIONS[kind], start_ns, end_ns)
        return done


class TracedTime(CommandTime):
    """A command's time that remembers its steps; of forks, those of the one that ends last."""

    __slots__ = ("_part", "steps")

    def __init__(self, drive: DriveTime | None, submitted_ns: int) -> None:
        super().__init__(drive, submitted_ns)
        self._part = "queue"
        self.steps: list[Step] = []

    def fetch(self) -> None:
        self._part = "queue"
        super().fetch()

    def run_program(self, cost: Cost) -> None:
        self._part = "program"
        super().run_program(cost)

    def read_pages(self, reads: PageReads) -> None:
        self._part = "nand"
        super().read_pages(reads)

    def wait_for_pages(self, ready_ns: int) -> None:
        self._part = "nand"
        super().wait_for_pages(ready_ns)

    def write(self, length_bytes: int, programs: PagePrograms, must_last: bool) -> None:
        self._part = "nand"
        super().write(length_bytes, programs, must_last)

    def flush(self, programs: PagePrograms) -> None:
        self._part = "nand"
        super().flush(programs)

    def program_pages(self, programs: PagePrograms) -> None:
        self._part = "nand"
        super().program_pages(programs)

    def move_dram(self, moved_bytes: int) -> None:
        self._part = "dram"
        super().move_dram(moved_bytes)

    def send(self, length_bytes: int) -> None:
        self._part = "link"
        super().send(length_bytes)

    def receive(self, length_bytes: int) -> None:
        self._part = "link"
        super().receive(length_bytes)

    def _pass_to(self, done_ns: int) -> int:
        if done_ns > self.now_ns:
            self.steps.append((self._part, self.now_ns, done_ns))
        return super()._pass_to(done_ns)

    def _take(self, other: CommandTime) -> None:
        super()._take(other)
        if isinstance(other, TracedTime):
            self.steps = list(other.steps)
