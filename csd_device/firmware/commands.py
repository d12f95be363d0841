"""Commands and completions as the firmware sees them: plain data, no transport.

`service/` translates them from and to protobuf. Arrays are numpy's; times are the drive clock's, in
nanoseconds. A command that cannot be carried out raises `csd_device.errors.CommandError`, which the
queue pair turns into a completion with that status.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from csd_device.compute import Origin
from csd_protocol.status import Status

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]


# ---- admin -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identify:
    cns: int


@dataclass(frozen=True, slots=True)
class GetLogPage:
    log_id: int
    offset_bytes: int = 0
    length_bytes: int = 0  # 0: to the end


@dataclass(frozen=True, slots=True)
class Abort:
    cid: int


@dataclass(frozen=True, slots=True)
class SetFeatures:
    feature_id: int
    value: int
    data: bytes = b""  # a JSON object, for features that are more than a number


@dataclass(frozen=True, slots=True)
class GetFeatures:
    feature_id: int


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    pass


@dataclass(frozen=True, slots=True)
class KeepAlive:
    pass


@dataclass(frozen=True, slots=True)
class Format:
    lba_format: int


@dataclass(frozen=True, slots=True)
class LoadProgram:
    program: int
    total_bytes: int
    offset_bytes: int
    chunk: bytes
    unload: bool = False


@dataclass(frozen=True, slots=True)
class ProgramActivation:
    program: int
    active: bool


@dataclass(frozen=True, slots=True)
class MemoryRangeSet:
    window_bytes: int
    unit_cache_bytes: int


# ---- NVM -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockRange:
    slba: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Flush:
    pass


@dataclass(frozen=True, slots=True)
class Write:
    slba: int
    data: bytes
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class WriteZeroes:
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class Verify:
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class Compare:
    slba: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DatasetManagement:
    ranges: tuple[BlockRange, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    dst_slba: int
    sources: tuple[BlockRange, ...]


@dataclass(frozen=True, slots=True)
class DefinePatterns:
    data: bytes


@dataclass(frozen=True, slots=True)
class WritePatterns:
    slba: int
    patterns: npt.NDArray[np.uint16]  # one a block


# ---- compute and staging ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observed:
    """Units that were active, as the host saw it."""

    site: int
    units: U32  # ascending


class Wanted(Enum):
    UNITS = "units"  # the layer's top fraction
    CORRECTION = "correction"  # what all units but those named add


@dataclass(frozen=True, slots=True)
class ExecuteProgram:
    program: int
    model: int
    layer: int
    hidden: F32  # [rows, hidden]; for a correction the FFN's own input
    keep: float
    token: int = 0
    wanted: Wanted = Wanted.UNITS
    units: U32 = field(default_factory=lambda: np.empty(0, np.uint32))  # computed, ascending
    observed: tuple[Observed, ...] = ()
    origin: Origin | None = None


class What(Enum):
    KEEP = "keep"  # the top fraction, by the program's score
    UNITS = "units"  # named
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Those of a target's units that are read from another copy than its own."""

    copy: int
    units: U32  # ascending


@dataclass(frozen=True, slots=True)
class Target:
    """What to stage of one site."""

    site: int
    what: What
    keep: float = 1.0
    units: U32 = field(default_factory=lambda: np.empty(0, np.uint32))  # ascending
    ignore_residency: bool = False
    copy: int = 0  # which of the model's copies units are read from
    elsewhere: tuple[Elsewhere, ...] = ()
    to_dram: bool = False  # into the unit cache only, for a later command
    first: int = 0  # of all: from this unit on
    end: int | None = None  # and below this one; None: to the last


@dataclass(frozen=True, slots=True)
class TopExperts:
    """Of a mixture's targets those of so many experts a layer, the top of this program."""

    program: int
    count: int


@dataclass(frozen=True, slots=True)
class PredictAndStage:
    model: int
    program: int
    token: int
    hidden: F32  # [rows, hidden]
    targets: tuple[Target, ...]
    release: tuple[int, ...] = ()  # leases given back first; those not held are passed over
    observed: tuple[Observed, ...] = ()
    origin: Origin | None = None
    experts: TopExperts | None = None  # None: targets of all experts
    heads: int | None = None  # the program that chooses KV groups; None: `program`


@dataclass(frozen=True, slots=True)
class Stage:
    model: int
    targets: tuple[Target, ...]
    release: tuple[int, ...] = ()  # leases given back first; those not held are passed over


@dataclass(frozen=True, slots=True)
class Release:
    leases: tuple[int, ...]  # empty: all of this host's


class Held(Enum):
    BITMAP = "bitmap"
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SiteResidency:
    site: int
    held: Held
    bitmap: bytes = b""  # one bit a unit, least significant bit first


@dataclass(frozen=True, slots=True)
class HostResidency:
    model: int
    sites: tuple[SiteResidency, ...]


Command = (
    Identify
    | GetLogPage
    | Abort
    | SetFeatures
    | GetFeatures
    | AsyncEvent
    | KeepAlive
    | Format
    | LoadProgram
    | ProgramActivation
    | MemoryRangeSet
    | Flush
    | Write
    | Read
    | WriteZeroes
    | Verify
    | Compare
    | DatasetManagement
    | Copy
    | DefinePatterns
    | WritePatterns
    | ExecuteProgram
    | PredictAndStage
    | Stage
    | Release
    | HostResidency
)


# ---- completions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a command's modelled time went."""

    submitted_ns: int = 0
    done_ns: int = 0
    queue_ns: int = 0
    program_ns: int = 0
    nand_ns: int = 0
    dram_ns: int = 0
    link_ns: int = 0


@dataclass(frozen=True, slots=True)
class StagedSite:
    """What now lies in the window, or in DRAM, for one target; see the message of that name."""

    site: int
    predicted: U32
    units: U32
    all_missing: bool
    unit_count: int
    window_offset: int
    length_bytes: int
    lease: int
    ready_ns: int
    units_from_dram: int
    nand_page_reads: int
    units_from_copies: int = 0  # read from another copy than the first
    to_dram: bool = False
    units_no_room: int = 0
    units_lost: int = 0


@dataclass(frozen=True, slots=True)
class StageResult:
    sites: tuple[StagedSite, ...]


@dataclass(frozen=True, slots=True)
class LostUnits:
    """Units of a site that cannot be read from one of its copies, ascending."""

    site: int
    copy: int
    units: U32


@dataclass(frozen=True, slots=True)
class MediaError:
    """All that a staging command could not read."""

    lost: tuple[LostUnits, ...]


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    units: U32
    values: F32 | None = None  # of a correction [rows, hidden]


@dataclass(frozen=True, slots=True)
class AsyncEventResult:
    type: int
    info: int
    log_id: int


@dataclass(frozen=True, slots=True)
class Data:
    data: bytes


@dataclass(frozen=True, slots=True)
class Dword0:
    value: int


Result = StageResult | MediaError | ExecuteResult | AsyncEventResult | Data | Dword0 | None


@dataclass(frozen=True, slots=True)
class Completion:
    cid: int
    status: Status
    timing: Timing
    result: Result = None
    detail: str = ""
    do_not_retry: bool = False
