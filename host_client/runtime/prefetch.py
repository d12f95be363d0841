"""Prefetch: staging commands go out ahead of compute, and a thread reads what they staged.

A forward pass is a fixed sequence of *steps*, one a layer and one a slice of the output head. The
compute thread requests steps in order (`request`) and takes them in order (`take`); between the
two, the reading thread waits for the drive's completion, waits for one of the staging buffers,
reads the window into it, checks every unit, releases the leases and hands the step over. When the
compute thread is done with a step it gives the buffer back (`Arrival.finish`).

The reading thread holds no lock while it waits, reads or checks, and those release the GIL, so
compute goes on meanwhile. An error in it is raised in the compute thread by the next `take`.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Site
from host_client.driver import Drive, PendingCommand, Staged, StagedSite, StageTarget
from host_client.io import Buffer, Extent, Reader
from host_client.runtime.checksums import Checksums
from host_client.runtime.fetch import STAGE_TIMEOUT_S
from host_client.runtime.refusals import WindowTooSmall
from host_client.runtime.residency import ResidentSite
from host_client.runtime.tally import Tally

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

PendingStage = PendingCommand[Staged]

_ALIGN = 64  # of each site's part of a staging buffer


@dataclass(frozen=True, slots=True)
class Wanted:
    """One site of a step. units: the named ones, None: all that are not resident."""

    site: Site
    units: U32 | None = None
    predictable: bool = False  # an FFN, of which a kept fraction may do


@dataclass(frozen=True, slots=True)
class Step:
    """What one layer or one slice of the output head needs from the drive."""

    number: int
    wanted: tuple[Wanted, ...]
    bytes_max: int


@dataclass(frozen=True, slots=True)
class Block:
    """Units of one site as they were staged. units: uint32 [n]; values: uint16 [n, rows * cols].

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
    wanted: tuple[Wanted, ...]  # the step's, less what is resident anyway
    pending: PendingStage | None  # None: nothing to ask of the drive
    arrived: "queue.SimpleQueue[Arrival | BaseException]"


class Prefetcher:
    """Requests steps of one model ahead of their use. Every method is the compute thread's."""

    def __init__(
        self,
        drive: Drive,
        model: int,
        reader: Reader,
        checksums: Checksums,
        resident: dict[int, ResidentSite],
        buffers: list[Buffer],
        tally: Tally,
    ) -> None:
        self._drive = drive
        self._model = model
        self._reader = reader
        self._checksums = checksums
        self._resident = resident
        self._tally = tally
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._buffer_bytes = buffers[0].size if buffers else 0
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._outstanding: deque[_Request] = deque()
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
        self,
        step: Step,
        program: int = 0,
        keep: float = 1.0,
        hidden: F32 | None = None,
        token: int = 0,
    ) -> None:
        """Ask the drive for a step; with `keep` < 1, for what `program` chooses from `hidden`."""
        wanted = tuple(
            entry
            for entry in step.wanted
            if self._resident[entry.site.site].missing.size or (entry.predictable and keep < 1.0)
        )
        targets = [self._target(entry, keep) for entry in wanted]
        pending: PendingStage | None = None
        if targets and keep < 1.0 and hidden is not None:
            pending = self._drive.predict_and_stage(self._model, program, token, hidden, targets)
        elif targets:
            pending = self._drive.stage(self._model, targets)
        request = _Request(step, wanted, pending, queue.SimpleQueue())
        self._outstanding.append(request)
        self._requests.put(request)

    def take(self) -> Arrival:
        """The next requested step, once it is there. Raises what went wrong on its way."""
        request = self._outstanding.popleft()
        arrival = request.arrived.get()
        if isinstance(arrival, BaseException):
            raise arrival
        return arrival

    def drain(self) -> None:
        """Drop everything that was requested and not taken."""
        while self._outstanding:
            arrival = self._outstanding.popleft().arrived.get()
            if isinstance(arrival, Arrival):
                arrival.finish()

    def close(self) -> None:
        self._requests.put(None)
        self.drain()
        self._thread.join()

    @staticmethod
    def _target(wanted: Wanted, keep: float) -> StageTarget:
        site = wanted.site.site
        if wanted.predictable and keep < 1.0:
            return StageTarget(site=site, keep=keep)
        if wanted.units is not None:
            return StageTarget(site=site, units=wanted.units, ignore_residency=True)
        return StageTarget(site=site, all=True)

    # ---- the reading thread ------------------------------------------------------------------

    def _read_all(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request.arrived.put(self._arrive(request))
            except Exception as error:  # noqa: BLE001 - whatever it is, the compute thread raises it
                request.arrived.put(error)

    def _arrive(self, request: _Request) -> Arrival:
        arrival = Arrival(request.step.number)
        if request.pending is None:
            return arrival
        staged = request.pending.result(STAGE_TIMEOUT_S)
        buffer = self._free.get()
        arrival.give_back = lambda: self._free.put(buffer)
        try:
            self._read(request, staged, buffer, arrival)
        except BaseException:
            arrival.finish()
            raise
        self._tally.add_staged(staged)
        return arrival

    def _read(self, request: _Request, staged: Staged, buffer: Buffer, arrival: Arrival) -> None:
        offsets, extents, end = [], [], 0
        for site in staged.sites:
            offsets.append(end)
            if site.length_bytes:
                extents.append(Extent(site.window_offset, site.length_bytes, buffer, end))
            end += -(-site.length_bytes // _ALIGN) * _ALIGN
        if end > self._buffer_bytes:
            raise WindowTooSmall(
                f"step {request.step.number} needs {end} bytes; a staging buffer has "
                f"{self._buffer_bytes}"
            )
        self._reader.read(extents)
        self._drive.release(staged.leases)
        for wanted, site, offset in zip(request.wanted, staged.sites, offsets, strict=True):
            arrival.blocks[site.site] = self._block(wanted, site, buffer, offset)

    def _block(self, wanted: Wanted, staged: StagedSite, buffer: Buffer, offset: int) -> Block:
        site = wanted.site
        units = staged.units
        if units is None:
            units = self._resident[site.site].missing
        values = buffer.array[offset : offset + staged.length_bytes]
        values = values.reshape(units.size, site.unit_bytes)
        self._checksums.verify(site, units, values)
        return Block(units, values.view(np.uint16), staged.predicted)
