"""What a host asks of staging and what it gets back: plain data, no transport."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class StageTarget:
    """What to stage of one site: exactly one of `keep`, `units` and `all`.

    `keep` is the fraction of units a program chooses (predict_and_stage only); `units` are named,
    ascending; `all` are those from `first` on and below `end` (None: to the last).
    `ignore_residency` stages named units even where the host said that it holds them. Units are
    read from `copy` of the model; those that are in `elsewhere`, from the copy beside them there
    (each in one entry at most, ascending). `to_dram` brings units into the drive's DRAM only, as
    many as there is room for, the highest scores first; a later command finds them there.
    """

    site: int
    keep: float | None = None
    units: U32 | None = None
    all: bool = False
    first: int = 0
    end: int | None = None
    ignore_residency: bool = False
    copy: int = 0
    elsewhere: tuple[tuple[int, U32], ...] = ()
    to_dram: bool = False

    def __post_init__(self) -> None:
        chosen = (self.keep is not None) + (self.units is not None) + self.all
        if chosen != 1:
            raise ValueError(f"site {self.site}: name one of keep, units and all, not {chosen}")
        if self.keep is not None and not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"site {self.site}: keep is a fraction, not {self.keep}")
        if not self.all and (self.first or self.end is not None):
            raise ValueError(f"site {self.site}: `first` and `end` are of all units")
        if self.end is not None and not 0 <= self.first < self.end:
            raise ValueError(f"site {self.site}: no units from {self.first} to {self.end}")


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """What the drive reports unasked: NVMe's event type and information, and which log says more.

    Further events of its type are told once that log page was read.
    """

    type: int  # 0 error, 1 SMART / health
    info: int
    log_id: int

    def __str__(self) -> str:
        known = _EVENT_NAMES.get((self.type, self.info))
        return known or f"event type {self.type}, information {self.info:02X}h"


_EVENT_NAMES = {
    (0, 4): "a write failed (transient internal error)",
    (1, 0): "reliability compromised",
    (1, 1): "temperature at the threshold",
    (1, 2): "available spare below its threshold",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the model hidden states are from: they entered a layer, or left its attention."""

    layer: int
    behind_attention: bool = False


@dataclass(frozen=True, slots=True)
class TopExperts:
    """Of a mixture's targets those of so many experts a layer, the top of this program."""

    program: int
    count: int


@dataclass(frozen=True, slots=True)
class Told:
    """What a drive is told beside the hidden states; most programs need none of it.

    `origin` is for rollouts, `observed`, the active units (ascending) by site, for windows.
    `experts` says which targets of a mixture are staged at all; None: all of them. `heads` is the
    program that chooses KV groups; None: the command's own.
    """

    origin: Origin | None = None
    observed: Mapping[int, U32] = field(default_factory=dict)
    experts: TopExperts | None = None
    heads: int | None = None


NOTHING_TOLD = Told()


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a command's modelled time went, in ns of the drive's clock; all 0 with time off."""

    submitted_ns: int = 0
    done_ns: int = 0
    queue_ns: int = 0
    program_ns: int = 0
    nand_ns: int = 0
    dram_ns: int = 0
    link_ns: int = 0
    late_ns: int = 0  # wall time only: how much later than done_ns it was posted


@dataclass(frozen=True, slots=True)
class StagedSite:
    """What of one site now lies in the window, packed without gaps, ascending.

    `predicted` is what the program chose (None when none ran for this target); `units` is what was
    staged, None when that is every unit of the site that the host does not hold. Of a target to
    DRAM nothing lies in the window: `units` is what lies in DRAM from `ready_ns` on.
    """

    site: int
    predicted: U32 | None
    units: U32 | None
    unit_count: int
    window_offset: int
    length_bytes: int
    lease: int  # 0: nothing was staged
    ready_ns: int
    units_from_dram: int
    nand_page_reads: int
    units_from_copies: int = 0  # read from another copy than the first
    to_dram: bool = False
    units_no_room: int = 0  # to DRAM only: not brought, there was no room
    units_lost: int = 0  # to DRAM only: not brought, they could not be read


@dataclass(frozen=True, slots=True)
class LostUnits:
    """Units of a site that the drive cannot read from one of its copies, ascending."""

    site: int
    copy: int
    units: U32


@dataclass(frozen=True, slots=True)
class Staged:
    """The answer to one staging command, sites in the order of its targets."""

    sites: tuple[StagedSite, ...]
    timing: Timing = field(default_factory=Timing)

    @property
    def leases(self) -> tuple[int, ...]:
        """What to release once the window was read."""
        return tuple(site.lease for site in self.sites if site.lease)


Residency = Bits | bool
"""What the host holds of a site: one bool a unit, or True for all and False for none."""
