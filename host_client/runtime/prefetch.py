"""Prefetch: staging commands go out ahead of compute, and a thread reads what they staged.

A forward pass is a fixed sequence of *steps*, one a layer and one a slice of the output head. The
compute thread requests steps in order (`request`, one command for several where it can) and takes
them in order (`take`); between the two, the reading thread waits for the drive's completion, and
for each step waits for one of the staging buffers, reads the window into it, checks every unit and
hands the step over. Leases that are read go back with the next command. When the compute thread is
done with a step it gives the buffer back (`Arrival.finish`).

The reading thread holds no lock while it waits, reads or checks, and those release the GIL, so
compute goes on meanwhile. An error in it is raised in the compute thread by the next `take`.
"""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Site
from host_client.driver import Drive, DriveLost, Staged, StagedSite, StageTarget
from host_client.io import Buffer, Extent, WindowLost, WindowReader
from host_client.runtime.checksums import Checksums
from host_client.runtime.copies import Copies, PendingUnits
from host_client.runtime.fetch import STAGE_TIMEOUT_S, WINDOW_LOSSES_MAX
from host_client.runtime.guidance import Ask
from host_client.runtime.plan import STAGE_ALIGN_BYTES
from host_client.runtime.recent import RecentUnits
from host_client.runtime.refusals import WindowTooSmall
from host_client.runtime.residency import ResidentSite
from host_client.runtime.tally import Tally
from host_client.runtime.timeline import READING, HostTimeline

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One site of a step. units: the named ones, None: all that are not resident."""

    site: Site
    units: U32 | None = None
    keep: float = 1.0  # below 1: the fraction that a program chooses


@dataclass(frozen=True, slots=True)
class Step:
    """What one layer or one slice of the output head needs from the drive; resident sites: no."""

    number: int
    wanted: tuple[Wanted, ...]
    bytes_max: int


@dataclass(frozen=True, slots=True)
class Block:
    """Units of one site as they were staged. units: uint32 [n]; values: uint16 [n, unit bytes / 2].

    predicted: what the program chose, resident or not; None when it was not asked.
    """

    units: U32
    values: U16
    predicted: U32 | None


@dataclass(slots=True)
class Arrival:
    """One step's staged blocks, valid until `finish`."""

    number: int
    blocks: dict[int, Block] = field(default_factory=dict)  # by site
    answer: Staged | None = None  # to its command, with the first of that command's steps
    give_back: Callable[[], None] | None = None

    def finish(self) -> None:
        """The buffer may be used for another step. Once."""
        if self.give_back is not None:
            self.give_back()
            self.give_back = None
        self.blocks.clear()


@dataclass(frozen=True, slots=True)
class _Request:
    step: Step
    generation: int  # of the window when it was asked for
    arrived: "queue.SimpleQueue[Arrival | BaseException]"


@dataclass(frozen=True, slots=True)
class _Burst:
    """What one command asks for."""

    requests: tuple[_Request, ...]
    pending: PendingUnits | None  # None: nothing to ask of the drive
    asked_ns: int = 0  # with a timeline: when the command was sent


class Prefetcher:
    """Requests steps of one model ahead of their use. Every method is the compute thread's."""

    def __init__(
        self,
        drive: Drive,
        copies: Copies,
        reader: WindowReader,
        checksums: Checksums,
        resident: dict[int, ResidentSite],
        buffers: list[Buffer],
        tally: Tally,
        recent: RecentUnits | None = None,
    ) -> None:
        self._drive = drive
        self._copies = copies
        self._reader = reader
        self._checksums = checksums
        self._resident = resident
        self._tally = tally
        self._recent = recent
        self.timeline: HostTimeline | None = None
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._buffer_bytes = buffers[0].size if buffers else 0
        self._bursts: queue.SimpleQueue[_Burst | None] = queue.SimpleQueue()
        self._read_leases: deque[int] = deque()  # to go back with the next command
        self._outstanding: deque[_Request] = deque()
        self.has_failed = False  # what else was requested then is not worth taking
        self._thread = threading.Thread(target=self._read_all, name="csd-prefetch", daemon=True)
        self._thread.start()

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def next_number(self) -> int | None:
        """The step that the next `take` returns; None when nothing was requested."""
        return self._outstanding[0].step.number if self._outstanding else None

    def request(
        self, steps: Sequence[Step], ask: Ask | None = None, to_dram: Sequence[Wanted] = ()
    ) -> None:
        """Ask the drive for steps, in one command; with `ask` where a program is to choose.

        to_dram: what the same command is to bring into the drive's DRAM, if a program is asked.
        """
        generation = self._reader.generation
        requests = tuple(_Request(step, generation, queue.SimpleQueue()) for step in steps)
        wanted = [wanted for step in steps for wanted in step.wanted]
        targets = [target_of(entry, self._recent) for entry in wanted]
        release = [self._read_leases.popleft() for _ in range(len(self._read_leases))]
        pending: PendingUnits | None = None
        asked_ns = self.timeline.now_ns() if self.timeline else 0
        if ask is not None and (ask.told.experts or any(entry.keep < 1.0 for entry in wanted)):
            targets += [target_of(entry, self._recent, to_dram=True) for entry in to_dram]
            pending = self._copies.predict_and_stage(
                ask.program, ask.token, ask.hidden, targets, release, ask.told
            )
        elif targets:
            pending = self._copies.stage(targets, release)
        self._outstanding.extend(requests)
        self._bursts.put(_Burst(requests, pending, asked_ns))

    def take(self) -> Arrival:
        """The next requested step, once it is there. Raises what went wrong on its way."""
        request = self._outstanding.popleft()
        arrival = request.arrived.get()
        if isinstance(arrival, BaseException):
            self.has_failed = True
            raise arrival
        return arrival

    def drain(self) -> None:
        """Drop everything that was requested and not taken, and give all leases back."""
        while self._outstanding:
            arrival = self._outstanding.popleft().arrived.get()
            if isinstance(arrival, Arrival):
                arrival.finish()
        self.has_failed = False
        leases = [self._read_leases.popleft() for _ in range(len(self._read_leases))]
        with contextlib.suppress(DriveLost):  # then they are back already
            self._drive.release(leases)

    def close(self) -> None:
        self._bursts.put(None)
        self.drain()
        self._thread.join()

    # ---- the reading thread ------------------------------------------------------------------

    def _read_all(self) -> None:
        while (burst := self._bursts.get()) is not None:
            try:
                self._read_burst(burst)
            except Exception as error:  # noqa: BLE001 - the compute thread raises it
                for request in burst.requests:
                    request.arrived.put(error)

    def _read_burst(self, burst: _Burst) -> None:
        """Hand over each step of a command; after an error `_read_all` tells all of them."""
        sites: Iterator[StagedSite] = iter(())
        answer: Staged | None = None
        if burst.pending is not None:
            answer = burst.pending.result(STAGE_TIMEOUT_S)
            self._tally.add_staged(answer)
            if self.timeline is not None and burst.asked_ns:
                numbers = [request.step.number for request in burst.requests]
                self.timeline.note_command(numbers, burst.asked_ns, answer.timing)
            sites = iter(answer.sites)
        for request in burst.requests:
            mine = list(itertools.islice(sites, len(request.step.wanted)))
            try:
                arrival = self._arrive(request, mine)
            except BaseException:
                mine += sites  # the later steps of the command will not be read either
                raise
            finally:
                self._read_leases.extend(site.lease for site in mine if site.lease)
            arrival.answer, answer = answer, None
            request.arrived.put(arrival)

    def _arrive(self, request: _Request, staged: list[StagedSite]) -> Arrival:
        arrival = Arrival(request.step.number)
        if not staged:
            return arrival
        buffer = self._free.get()
        arrival.give_back = lambda: self._free.put(buffer)
        try:
            self._read(request, staged, buffer, arrival)
        except BaseException:
            arrival.finish()
            raise
        return arrival

    def _read(
        self, request: _Request, staged: list[StagedSite], buffer: Buffer, arrival: Arrival
    ) -> None:
        offsets, end = [], 0
        for site in staged:
            offsets.append(end)
            end += -(-site.length_bytes // STAGE_ALIGN_BYTES) * STAGE_ALIGN_BYTES
        if end > self._buffer_bytes:
            raise WindowTooSmall(
                f"step {request.step.number} needs {end} bytes; a staging buffer has "
                f"{self._buffer_bytes}"
            )
        started_ns = self.timeline.now_ns() if self.timeline else 0
        self._read_window(request, staged, buffer, offsets)
        for wanted, site, offset in zip(request.step.wanted, staged, offsets, strict=True):
            arrival.blocks[site.site] = self._block(wanted, site, buffer, offset)
        if self.timeline is not None:
            self.timeline.note(READING, f"read and check step {request.step.number}", started_ns)

    def _read_window(
        self, request: _Request, staged: list[StagedSite], buffer: Buffer, offsets: list[int]
    ) -> None:
        """Reads what was staged; stages again what a window that went away took with it."""
        generation = request.generation
        for losses_left in reversed(range(WINDOW_LOSSES_MAX)):
            extents = [
                Extent(site.window_offset, site.length_bytes, buffer, offset)
                for site, offset in zip(staged, offsets, strict=True)
                if site.length_bytes
            ]
            try:
                return self._reader.read(extents, generation)
            except WindowLost:
                if not losses_left:
                    raise
            generation = self._reader.generation
            self._stage_again(staged)
        return None

    def _stage_again(self, staged: list[StagedSite]) -> None:
        """Puts the same units of each site into the window of now; `staged` then says where."""
        targets = [
            StageTarget(site=site.site, units=self._units_of(site), ignore_residency=True)
            for site in staged
        ]
        again = self._copies.stage(targets).result(STAGE_TIMEOUT_S)
        self._tally.add_staged(again)
        self._read_leases.extend(site.lease for site in staged if site.lease)
        staged[:] = [
            replace(site, window_offset=new.window_offset, lease=new.lease)
            for site, new in zip(staged, again.sites, strict=True)
        ]

    def _units_of(self, staged: StagedSite) -> U32:
        return self._resident[staged.site].missing if staged.units is None else staged.units

    def _block(self, wanted: Wanted, staged: StagedSite, buffer: Buffer, offset: int) -> Block:
        site = wanted.site
        units = self._units_of(staged)
        values = buffer.array[offset : offset + staged.length_bytes]
        values = values.reshape(units.size, site.unit_bytes)
        self._checksums.verify(site, units, values)
        return Block(units, values.view(np.uint16), staged.predicted)


def target_of(
    wanted: Wanted, recent: RecentUnits | None = None, to_dram: bool = False
) -> StageTarget:
    """What to ask of the drive for one site of a step; of a choice, less what is held by now."""
    site = wanted.site.site
    if wanted.keep < 1.0:
        slots = recent.of(wanted.site) if recent is not None else None
        held = slots.held if slots is not None else None
        return StageTarget(site=site, keep=wanted.keep, to_dram=to_dram, held=held)
    if wanted.units is not None:
        return StageTarget(site=site, units=wanted.units, ignore_residency=True, to_dram=to_dram)
    return StageTarget(site=site, all=True, to_dram=to_dram)
