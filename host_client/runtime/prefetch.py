"""Prefetch: staging commands go out ahead of compute, and a thread reads what they staged.

A forward pass is a fixed sequence of *steps* (`schedule`). The compute thread requests steps in
order (`request`, one command for several where it can) and takes what they bring in order (`take`);
between the two, the reading thread waits for the drive's completion, and for each step waits for
one of the staging buffers, reads the window into it, checks every unit and hands that over. A step
larger than a buffer arrives in parts, its neurons divided. Leases that are read go back with the
next command. When the compute thread is done with an arrival it gives the buffer back
(`Arrival.finish`).

The reading thread holds no lock while it waits, reads or checks, and those release the GIL, so
compute goes on meanwhile. An error in it is raised in the compute thread by the next `take`.
"""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import align_up
from host_client.driver import Drive, DriveLost, Staged, StagedSite, StageTarget
from host_client.io import Buffer, Extent, WindowLost, WindowReader
from host_client.runtime.checksums import Checksums
from host_client.runtime.copies import Copies, PendingUnits
from host_client.runtime.fetch import STAGE_TIMEOUT_S, WINDOW_LOSSES_MAX
from host_client.runtime.guidance import Ask
from host_client.runtime.plan import STAGE_ALIGN_BYTES, is_divisible
from host_client.runtime.recent import RecentUnits
from host_client.runtime.refusals import WindowTooSmall
from host_client.runtime.residency import ResidentSite
from host_client.runtime.schedule import Step, Wanted
from host_client.runtime.tally import Tally
from host_client.runtime.timeline import READING, HostTimeline

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Block:
    """Units of one site that arrived. units: uint32 [n]; values: uint16 [n, unit bytes / 2]."""

    units: U32
    values: U16


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step has of one site, in however many parts it arrives.

    units: uint32 [n], staged; predicted: what the program chose, resident or not; None when it was
    not asked.
    """

    units: U32
    predicted: U32 | None


@dataclass(slots=True)
class Arrival:
    """One step's staged blocks, or a part of them, valid until `finish`."""

    number: int  # of the step
    is_last: bool  # of the step's arrivals
    chosen: dict[int, Chosen]  # by site: of the whole step
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


@dataclass(slots=True)
class _Lease:
    """What a command staged of one wanted site."""

    wanted: Wanted
    site: StagedSite
    units: U32

    @property
    def unit_bytes(self) -> int:
        return self.wanted.site.unit_bytes


@dataclass(slots=True)
class _Reading:
    """One step's leases while they are being read."""

    leases: list[_Lease]
    generation: int  # of the window that they are in


@dataclass(frozen=True, slots=True)
class _Piece:
    """Units [start, stop) of a lease, and where in a buffer they go."""

    lease: _Lease
    start: int
    stop: int
    offset: int

    @property
    def length_bytes(self) -> int:
        return (self.stop - self.start) * self.lease.unit_bytes


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
        targets = [entry.target(self._recent) for entry in wanted]
        release = [self._read_leases.popleft() for _ in range(len(self._read_leases))]
        pending: PendingUnits | None = None
        asked_ns = self.timeline.now_ns() if self.timeline else 0
        if ask is not None and (ask.told.experts or any(entry.keep < 1.0 for entry in wanted)):
            targets += [entry.target(self._recent, to_dram=True) for entry in to_dram]
            pending = self._copies.predict_and_stage(
                ask.program, ask.token, ask.hidden, targets, release, ask.told
            )
        elif targets:
            pending = self._copies.stage(targets, release)
        self._outstanding.extend(requests)
        self._bursts.put(_Burst(requests, pending, asked_ns))

    def take(self) -> Arrival:
        """What is next of the requested steps, once it is there. Raises what went wrong with it."""
        arrival = self._outstanding[0].arrived.get()
        if isinstance(arrival, BaseException):
            self._outstanding.popleft()
            self.has_failed = True
            raise arrival
        if arrival.is_last:
            self._outstanding.popleft()
        return arrival

    def drain(self) -> None:
        """Drop everything that was requested and not taken, and give all leases back."""
        while self._outstanding:
            arrival = self._outstanding[0].arrived.get()
            if isinstance(arrival, Arrival):
                arrival.finish()
            if isinstance(arrival, BaseException) or arrival.is_last:
                self._outstanding.popleft()
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
            mine = itertools.islice(sites, len(request.step.wanted))
            leases = [
                self._lease(wanted, site)
                for wanted, site in zip(request.step.wanted, mine, strict=True)
            ]
            try:
                self._hand_over(request, leases, answer)
            except BaseException:
                self._give_back(sites)  # nobody reads the later steps of the command
                raise
            finally:
                self._give_back(lease.site for lease in leases)
            answer = None

    def _give_back(self, sites: Iterable[StagedSite]) -> None:
        self._read_leases.extend(site.lease for site in sites if site.lease)

    def _lease(self, wanted: Wanted, staged: StagedSite) -> _Lease:
        units = staged.units
        if units is None:
            units = wanted.lacking(self._resident[staged.site].missing)
        return _Lease(wanted, staged, units)

    def _hand_over(self, request: _Request, leases: list[_Lease], answer: Staged | None) -> None:
        """Reads what a step staged, and hands it over as buffers come free."""
        chosen = {lease.site.site: Chosen(lease.units, lease.site.predicted) for lease in leases}
        reading = _Reading(leases, request.generation)
        parts = list(self._parts(request, leases))
        for index, pieces in enumerate(parts):
            arrival = Arrival(request.step.number, index == len(parts) - 1, chosen)
            arrival.answer, answer = answer, None
            if pieces:
                self._read(reading, pieces, arrival)
            request.arrived.put(arrival)

    def _parts(self, request: _Request, leases: list[_Lease]) -> Iterator[list[_Piece]]:
        """What goes into each buffer; one part of nothing where nothing was staged."""
        part: list[_Piece] = []
        end = 0
        for lease in leases:
            start, count = 0, lease.units.size
            while start < count:
                stop = min(count, start + (self._buffer_bytes - end) // lease.unit_bytes)
                is_cut = stop < count
                if is_cut and not is_divisible(lease.wanted.site):
                    stop = start
                if stop > start:
                    part.append(_Piece(lease, start, stop, end))
                    end = align_up(end + part[-1].length_bytes, STAGE_ALIGN_BYTES)
                elif not part:
                    raise self._does_not_fit(request, lease)
                if is_cut:
                    yield part
                    part, end = [], 0
                start = stop
        yield part

    def _does_not_fit(self, request: _Request, lease: _Lease) -> WindowTooSmall:
        return WindowTooSmall(
            f"step {request.step.number} needs {lease.site.length_bytes} bytes of "
            f"{lease.wanted.site.name} at once; a staging buffer has {self._buffer_bytes}"
        )

    def _read(self, reading: _Reading, pieces: list[_Piece], arrival: Arrival) -> None:
        buffer = self._free.get()
        arrival.give_back = lambda: self._free.put(buffer)
        started_ns = self.timeline.now_ns() if self.timeline else 0
        try:
            self._read_window(reading, pieces, buffer)
            for piece in pieces:
                arrival.blocks[piece.lease.site.site] = self._block(piece, buffer)
        except BaseException:
            arrival.finish()
            raise
        if self.timeline is not None:
            self.timeline.note(READING, f"read and check step {arrival.number}", started_ns)

    def _read_window(self, reading: _Reading, pieces: list[_Piece], buffer: Buffer) -> None:
        """Reads what was staged; stages again what a window that went away took with it."""
        for losses_left in reversed(range(WINDOW_LOSSES_MAX)):
            extents = [
                Extent(
                    piece.lease.site.window_offset + piece.start * piece.lease.unit_bytes,
                    piece.length_bytes,
                    buffer,
                    piece.offset,
                )
                for piece in pieces
            ]
            try:
                return self._reader.read(extents, reading.generation)
            except WindowLost:
                if not losses_left:
                    raise
            reading.generation = self._reader.generation
            self._stage_again(reading.leases)
        return None

    def _stage_again(self, leases: list[_Lease]) -> None:
        """Puts the same units of each site into the window of now; the leases then say where."""
        targets = [
            StageTarget(site=lease.site.site, units=lease.units, ignore_residency=True)
            for lease in leases
        ]
        again = self._copies.stage(targets).result(STAGE_TIMEOUT_S)
        self._tally.add_staged(again)
        for lease, new in zip(leases, again.sites, strict=True):
            self._give_back([lease.site])
            lease.site = replace(lease.site, window_offset=new.window_offset, lease=new.lease)

    def _block(self, piece: _Piece, buffer: Buffer) -> Block:
        site = piece.lease.wanted.site
        units = piece.lease.units[piece.start : piece.stop]
        values = buffer.array[piece.offset : piece.offset + piece.length_bytes]
        values = values.reshape(units.size, site.unit_bytes)
        self._checksums.verify(site, units, values)
        return Block(units, values.view(np.uint16))
