"""What a forward pass asks of the drive, step by step: the same for every pass of a kind.

A *sweep* (every unit) takes a layer in parts that one staging buffer holds: projections first, as
they are needed whole, then neurons, part after part. A *guided* pass takes a layer in one step,
since a program chooses among all of its neurons at once. Slices of the output head come last in
both. What is resident is in none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Site, align_up
from host_client.driver import StageTarget
from host_client.runtime.plan import STAGE_ALIGN_BYTES, is_divisible
from host_client.runtime.recent import RecentUnits
from host_client.runtime.residency import ResidentSite

U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One site of a step: the named units, or what is not resident from `first` on, below `end`."""

    site: Site
    units: U32 | None = None
    keep: float = 1.0  # below 1: the fraction that a program chooses of all units
    first: int = 0
    end: int | None = None  # None: to the last

    def lacking(self, missing: U32) -> U32:
        """Which units that means where these are not resident, ascending."""
        if self.units is not None:
            return self.units
        end = self.site.count if self.end is None else self.end
        first, behind = np.searchsorted(missing, (self.first, end))
        return missing[first:behind]

    def target(self, recent: RecentUnits | None, to_dram: bool = False) -> StageTarget:
        """What to ask of the drive; of a choice, less what is held by now."""
        site = self.site.site
        if self.keep < 1.0:
            slots = recent.of(self.site) if recent is not None else None
            held = slots.held if slots is not None else None
            return StageTarget(site=site, keep=self.keep, to_dram=to_dram, held=held)
        if self.units is not None:
            named = self.units
            return StageTarget(site=site, units=named, ignore_residency=True, to_dram=to_dram)
        return StageTarget(site=site, all=True, first=self.first, end=self.end, to_dram=to_dram)


@dataclass(frozen=True, slots=True)
class Step:
    """What is staged and taken together."""

    number: int
    wanted: tuple[Wanted, ...]
    bytes_max: int  # of the drive's window


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a pass in order: those of each layer, at least one, then slices of the head."""

    steps: tuple[Step, ...]
    first_of: tuple[int, ...]  # by layer: its first step; behind the layers, that of the head

    @property
    def head_start(self) -> int:
        """The first slice of the output head; as many steps as there are where it is resident."""
        return self.first_of[-1]

    @property
    def slices(self) -> tuple[Step, ...]:
        return self.steps[self.head_start :]

    @property
    def layers(self) -> tuple[Step, ...]:
        return self.steps[: self.head_start]

    def steps_ahead(self, room_bytes: int, most: int) -> int:
        """How many of its steps, up to `most`, have room in the window at once; 0: not even one."""
        return min(most, room_bytes // self.largest_bytes) if self.largest_bytes else most

    @property
    def largest_bytes(self) -> int:
        """What one step may take of the window."""
        return max(step.bytes_max for step in self.steps)


class Scheduler:
    """Makes the schedules of one model."""

    def __init__(
        self, model: PackedModel, head: Site, resident: dict[int, ResidentSite], buffer_bytes: int
    ) -> None:
        """buffer_bytes: of a staging buffer; each layer's missing projections fit in one."""
        self._model, self._head, self._resident = model, head, resident
        self._buffer_bytes = buffer_bytes

    def sweep(self) -> Schedule:
        """Every unit that is not resident."""
        return self._schedule([list(self._parts(layer)) for layer in range(self._layers)])

    def guided(self, kept_of: Callable[[Site], float]) -> Schedule:
        """Of each site that lacks units the fraction that is kept, by `kept_of`."""
        layers = [
            [tuple(Wanted(site, keep=kept_of(site)) for site in self._lacking(layer))]
            for layer in range(self._layers)
        ]
        return self._schedule(layers)

    @property
    def _layers(self) -> int:
        return self._model.layer_count

    def _schedule(self, layers: list[list[tuple[Wanted, ...]]]) -> Schedule:
        first_of = [0]
        for parts in layers:
            first_of.append(first_of[-1] + len(parts))
        wanted = [part for parts in layers for part in parts]
        wanted += [(Wanted(self._head, units=rows),) for rows in self._head_slices()]
        steps = (
            Step(number, part, sum(map(self._bytes_max, part)))
            for number, part in enumerate(wanted)
        )
        return Schedule(tuple(steps), tuple(first_of))

    def _lacking(self, layer: int) -> list[Site]:
        """Sites of a layer that are not all resident, the FFN last; a mixture's experts: none."""
        sites = [
            site
            for site in self._model.sites
            if site.layer == layer and site.expert < 0 and self._missing(site).size
        ]
        return sorted(sites, key=is_divisible)

    def _parts(self, layer: int) -> Iterator[tuple[Wanted, ...]]:
        """What a layer lacks, a buffer at a time; one part of nothing where it lacks nothing."""
        lacking = self._lacking(layer)
        part = [Wanted(site) for site in lacking if not is_divisible(site)]
        room_bytes = self._buffer_bytes - sum(map(self._bytes_max, part))
        for site in filter(is_divisible, lacking):
            missing, start = self._missing(site), 0
            while start < missing.size:
                stop = min(missing.size, start + room_bytes // site.unit_bytes)
                if stop > start:
                    first, end = int(missing[start]), int(missing[stop - 1]) + 1
                    part.append(Wanted(site, first=first, end=end))
                if stop < missing.size:
                    yield tuple(part)
                    part, room_bytes = [], self._buffer_bytes
                start = stop
        yield tuple(part)

    def _head_slices(self) -> Iterator[U32]:
        rows = self._missing(self._head)
        count = max(1, self._buffer_bytes // self._head.unit_bytes)
        return (rows[start : start + count] for start in range(0, rows.size, count))

    def _missing(self, site: Site) -> U32:
        return self._resident[site.site].missing

    def _bytes_max(self, wanted: Wanted) -> int:
        count = wanted.lacking(self._missing(wanted.site)).size
        if wanted.keep < 1.0:
            count = min(count, math.ceil(wanted.keep * wanted.site.count))
        return align_up(count * wanted.site.unit_bytes, STAGE_ALIGN_BYTES)
