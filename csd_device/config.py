"""A drive as data: read from TOML, checked as a whole before anything opens.

    load_config(name_or_path) -> DriveConfig     a preset's name or a path ending in .toml
    preset_names() -> list[str]    preset_text(name) -> str

Sizes may be written as integers (bytes) or as text (`"64 MiB"`). Every field states its unit, its
constraint, what a special value means and where the figure of the presets comes from.
"""

import re
import tomllib
from enum import StrEnum
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from csd_device.errors import ConfigRefused
from csd_device.fault_config import FaultsConfig
from csd_protocol.units import MIB, NS_PER_S, format_size, parse_size

SECTOR_BYTES = 4096  # one logical block, one mapping entry, one ECC codeword
MAPPING_ENTRY_BYTES = 4
MAPPING_ENTRIES_MAX = (1 << 32) - 2
WORKING_SUPERBLOCKS = 4  # beside the data: one open for each write stream, one to collect into

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0), BeforeValidator(parse_size)]
SizeOrZero = Annotated[int, Field(ge=0), BeforeValidator(parse_size)]
PerPageType = NonNegative | Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=4)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_LAYOUT = ("channels", "dies_per_channel", "planes_per_die")


class Geometry(_Section):
    """How the NAND is divided. A *superblock* is one block index over all planes of the drive.

    `layout = "8x4x4"` states channels x dies of a channel x planes of a die in one.
    """

    channels: Positive  # buses that work side by side
    dies_per_channel: Positive  # dies that share one bus; assumed
    planes_per_die: Positive  # planes that a multi-plane command serves together; assumed
    blocks_per_plane: Positive  # erase units of a plane; assumed, sets the capacity
    pages_per_block: Positive  # fewer than a real TLC block, so that a superblock stays small
    page_bytes: Size  # a multiple of 4096; 16 KiB is usual for TLC

    @model_validator(mode="before")
    @classmethod
    def _lay_out(cls, given: Any) -> Any:
        """What `layout` says, under the names of the fields."""
        if not isinstance(given, dict) or "layout" not in given:
            return given
        stated = {name: value for name, value in given.items() if name != "layout"}
        for name, figure in zip(_LAYOUT, _parse_layout(given["layout"]), strict=True):
            if stated.setdefault(name, figure) != figure:
                raise ValueError(
                    f"layout = {given['layout']!r} says {name} = {figure}, and {name} = "
                    f"{stated[name]} is stated as well"
                )
        return stated

    @property
    def layout(self) -> str:
        """Channels x dies of a channel x planes of a die."""
        return f"{self.channels}x{self.dies_per_channel}x{self.planes_per_die}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.page_bytes % SECTOR_BYTES:
            raise ValueError(f"page_bytes = {self.page_bytes} is no multiple of {SECTOR_BYTES}")
        if self.raw_sectors > MAPPING_ENTRIES_MAX:
            raise ValueError(
                f"{format_size(self.raw_bytes)} of NAND have more sectors than a 32-bit mapping "
                "entry can name (16 TiB)"
            )
        return self

    @property
    def dies(self) -> int:
        return self.channels * self.dies_per_channel

    @property
    def planes(self) -> int:
        return self.dies * self.planes_per_die

    @property
    def pages_per_superblock(self) -> int:
        return self.planes * self.pages_per_block

    @property
    def pages(self) -> int:
        return self.blocks_per_plane * self.pages_per_superblock

    @property
    def sectors_per_page(self) -> int:
        return self.page_bytes // SECTOR_BYTES

    @property
    def sectors_per_superblock(self) -> int:
        return self.pages_per_superblock * self.sectors_per_page

    @property
    def superblock_bytes(self) -> int:
        return self.pages_per_superblock * self.page_bytes

    @property
    def raw_sectors(self) -> int:
        return self.pages * self.sectors_per_page

    @property
    def raw_bytes(self) -> int:
        return self.pages * self.page_bytes


def _parse_layout(text: Any) -> tuple[int, int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\d+)\s*", str(text))
    if match is None:
        raise ValueError(f"layout = {text!r}; write channels x dies x planes, such as '8x4x4'")
    return int(match[1]), int(match[2]), int(match[3])


class Cell(StrEnum):
    """Bits of a cell, and so the page types of a block: page p is of type p modulo the bits.

    SLC has one type; MLC lower and upper; TLC lower, middle and upper; QLC lower, two middle and
    upper. The order of types within a block is a simplification: real parts stagger them.
    """

    SLC = "slc"
    MLC = "mlc"
    TLC = "tlc"
    QLC = "qlc"

    @property
    def bits(self) -> int:
        return ("slc", "mlc", "tlc", "qlc").index(self.value) + 1


# MT/s that a bus can do at most. ONFI: revisions 1.0, 2.3, 3.2, 4.0, 4.1, 4.2, 5.0 and 5.1.
# Toggle: JESD230 and vendors' announcements, assumed.
CHANNEL_INTERFACES_MT_S = {
    "onfi-1.0": 50,
    "onfi-2.3": 200,
    "onfi-3.2": 533,
    "onfi-4.0": 800,
    "onfi-4.1": 1200,
    "onfi-4.2": 1600,
    "onfi-5.0": 2400,
    "onfi-5.1": 3600,
    "toggle-1.0": 133,
    "toggle-2.0": 533,
    "toggle-3.0": 1000,
    "toggle-4.0": 1600,
    "toggle-5.0": 2400,
}


class CellTiming(_Section):
    """What the NAND and its bus take. See docs/TIMING.md for what each figure does."""

    cell: Cell = Cell.SLC  # sets how many figures read_ns and program_ns may have
    read_ns: PerPageType  # tR: array to page register; one figure, or one of each page type
    program_ns: PerPageType  # tPROG; one figure, or one of each page type
    erase_ns: NonNegative  # tBERS
    command_ns: NonNegative  # tCMD: command and address cycles on the bus, one plane; 290 ns
    status_ns: NonNegative = 0  # status cycles on the bus when the array is done; 0: none
    channel_interface: str | None = None  # a name of CHANNEL_INTERFACES_MT_S; none: no limit
    channel_mega_transfers_per_s: Positive  # MT/s of the bus, at most what the interface can do
    channel_width_bits: Positive  # 8 for ONFI and Toggle buses
    cache_read: bool = False  # the array works while the bus moves the page before
    cache_busy_ns: NonNegative = 0  # tRCBSY: page register to cache register, when they overlap
    read_priority: bool = False  # reads go before programs and erases that have not started
    suspends_max: NonNegative = 0  # times that one program or erase yields to reads; 0: never
    program_suspend_ns: NonNegative = 0  # from the suspend command until the die takes a read
    erase_suspend_ns: NonNegative = 0  # the same, of an erase
    resume_ns: NonNegative = 0  # what a suspended operation takes longer, each time

    @property
    def read_ns_by_type(self) -> tuple[int, ...]:
        """tR of each page type."""
        return (self.read_ns,) if isinstance(self.read_ns, int) else self.read_ns

    @property
    def program_ns_by_type(self) -> tuple[int, ...]:
        """tPROG of each page type."""
        return (self.program_ns,) if isinstance(self.program_ns, int) else self.program_ns

    @property
    def mean_read_ns(self) -> int:
        """tR over all page types, rounded up."""
        return -(-sum(self.read_ns_by_type) // len(self.read_ns_by_type))

    @property
    def channel_bytes_per_s(self) -> int:
        return self.channel_mega_transfers_per_s * 1_000_000 * self.channel_width_bits // 8

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("read_ns", "program_ns"):
            figures = len(getattr(self, f"{name}_by_type"))
            if figures not in (1, self.cell.bits):
                raise ValueError(
                    f"{name} has {figures} figures; {self.cell.value} has {self.cell.bits} "
                    "page types, and one figure stands for all"
                )
        if self.suspends_max and not self.read_priority:
            raise ValueError("suspends_max without read_priority: it is for reads that suspend")
        self._check_interface()
        return self

    def _check_interface(self) -> None:
        if self.channel_interface is None:
            return
        limit = CHANNEL_INTERFACES_MT_S.get(self.channel_interface)
        if limit is None:
            raise ValueError(
                f"channel_interface = {self.channel_interface!r}; "
                f"known are {', '.join(CHANNEL_INTERFACES_MT_S)}"
            )
        if self.channel_mega_transfers_per_s > limit:
            raise ValueError(
                f"channel_mega_transfers_per_s = {self.channel_mega_transfers_per_s}; "
                f"{self.channel_interface} ends at {limit}"
            )


# Payload bytes per second of one lane, one direction: GT/s times line coding over 8 bits. PCI
# Express base specification: 8b/10b up to generation 2, 128b/130b up to 5, 242 of 256 bytes of a
# flit in 6.
PCIE_LANE_BYTES_PER_S = {
    1: 250_000_000,
    2: 500_000_000,
    3: 8_000_000_000 * 128 // 130 // 8,
    4: 16_000_000_000 * 128 // 130 // 8,
    5: 32_000_000_000 * 128 // 130 // 8,
    6: 64_000_000_000 * 242 // 256 // 8,
}


class Link(_Section):
    """Host interface: PCIe as a rate and an overhead a packet, firmware as a constant."""

    generation: Annotated[int, Field(ge=1, le=6)] | None = None  # of PCIe; with lanes
    lanes: Positive | None = None  # 1 to 16 of one drive; more for several drives seen as one
    bytes_per_s: Positive  # one direction, after line coding; or from generation and lanes
    packet_payload_bytes: Positive  # payload of one packet; 256 is usual
    packet_overhead_bytes: NonNegative  # header, CRC, framing of one packet; 28
    firmware_ns: NonNegative  # what the firmware takes for one command; 0: none; assumed
    firmware_cores: Annotated[int, Field(gt=0, le=256)] = 1  # commands taken up side by side

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        """The rate of generation and lanes, unless the rate itself is stated."""
        if not isinstance(given, dict):
            return given
        generation, lanes = given.get("generation"), given.get("lanes")
        if (generation is None) != (lanes is None):
            raise ValueError("generation and lanes go together")
        rate = PCIE_LANE_BYTES_PER_S.get(generation) if isinstance(generation, int) else None
        if "bytes_per_s" not in given and rate and isinstance(lanes, int):
            return given | {"bytes_per_s": rate * lanes}
        if "bytes_per_s" not in given:
            raise ValueError("either bytes_per_s, or generation (1 to 6) and lanes")
        return given

    @property
    def payload_bytes_per_s(self) -> int:
        """What is left of the rate when every packet is full."""
        packet_bytes = self.packet_payload_bytes + self.packet_overhead_bytes
        return self.bytes_per_s * self.packet_payload_bytes // packet_bytes

    def transfer_ns(self, length_bytes: int) -> int:
        """Nanoseconds that `length_bytes` of payload take, rounded up."""
        packets = -(-length_bytes // self.packet_payload_bytes)
        wire_bytes = length_bytes + packets * self.packet_overhead_bytes
        return -(-wire_bytes * 1_000_000_000 // self.bytes_per_s)


class WriteBufferConfig(_Section):
    """On-drive DRAM that writes go to first. Without it a write waits for its programs."""

    capacity_bytes: SizeOrZero = 0  # 0: no buffer; else at least one command's data (MDTS)
    power_loss_protected: bool = True  # Flush and FUA need not wait; False: they wait for programs


class Dram(_Section):
    """On-drive DRAM. Mapping table, programs, unit cache and window are allotted from it."""

    total_bytes: Size  # at least mapping + window + unit cache; the rest is for programs
    bandwidth_bytes_per_s: Positive  # of the device class
    window_bytes: Size  # a multiple of 4096; real shared memory is reserved for it
    unit_cache_bytes: SizeOrZero  # 0: no unit cache

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window_bytes % SECTOR_BYTES:
            raise ValueError(f"window_bytes = {self.window_bytes} is no multiple of {SECTOR_BYTES}")
        return self


class Compute(_Section):
    """The controller's processor for programs."""

    ops_per_s: Positive  # multiply and add are two; assumed


class Endurance(_Section):
    """What the cells are rated for: wear in SMART and the rates of modelled errors go by it."""

    rated_cycles: Positive = 3_000  # program/erase cycles of a block; usual for TLC, assumed
    retention_days: Positive = 365  # that data keeps unpowered at that wear; JEDEC JESD218, client
    spare_threshold_percent: Annotated[int, Field(ge=0, le=100)] = 10  # of spares; below: a warning


class Thermal(_Section):
    """Composite temperature: one mass that work warms and its surroundings cool. All assumed."""

    ambient_celsius: float = 35.0  # of what cools the drive, and of the drive at power-on
    celsius_per_watt: Annotated[float, Field(gt=0)] = 3.5  # thermal resistance to the surroundings
    time_constant_s: Annotated[float, Field(gt=0)] = 120.0  # resistance times heat capacity
    idle_watts: Annotated[float, Field(ge=0)] = 2.0  # always
    nand_watts: Annotated[float, Field(ge=0)] = 5.0  # more, while all dies work
    link_watts: Annotated[float, Field(ge=0)] = 1.5  # more, while the link moves data both ways
    compute_watts: Annotated[float, Field(ge=0)] = 3.0  # more, while a program runs
    warning_celsius: float = 75.0  # WCTEMP: from here on time is counted
    critical_celsius: float = 85.0  # CCTEMP

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.ambient_celsius < self.warning_celsius < self.critical_celsius:
            raise ValueError(
                f"ambient {self.ambient_celsius}, warning {self.warning_celsius} and critical "
                f"{self.critical_celsius} degrees must ascend"
            )
        return self


class FtlConfig(_Section):
    """Flash translation layer."""

    over_provisioning: Annotated[float, Field(gt=0, lt=1)]  # of raw NAND, kept from the host
    gc_policy: Literal["greedy", "cost-benefit", "weights"] = "weights"  # see docs/FTL.md
    wear_spread: NonNegative = 64  # erases, most less least, before cold data moves; 0: never
    reclaim_reads: NonNegative = 100_000  # page reads of a block before its data moves; 0: never
    reclaim_days: NonNegative = 90  # powered-on age of data before it moves; 0: never


class Queues(_Section):
    """Submission and completion queues."""

    max_depth: Annotated[int, Field(gt=0, le=65536)]  # entries of one queue
    max_queues: Annotated[int, Field(gt=0, le=65535)]  # queue pairs open at once
    mdts_bytes: Size  # most data one command moves over the link; a multiple of 4096

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mdts_bytes % SECTOR_BYTES:
            raise ValueError(f"mdts_bytes = {self.mdts_bytes} is no multiple of {SECTOR_BYTES}")
        return self


class DriveConfig(_Section):
    """One drive. Relations between sections are checked when it is made.

    With `capacity` the namespace has that size, in whole MiB, and `geometry.blocks_per_plane` may
    be left out: it is then the least that over-provisioning leaves this much of.
    """

    name: str
    description: str
    capacity: Size | None = None  # of the namespace; none: raw NAND less over-provisioning
    geometry: Geometry
    timing: CellTiming
    link: Link
    dram: Dram
    compute: Compute
    ftl: FtlConfig
    queues: Queues
    write_buffer: WriteBufferConfig = WriteBufferConfig()
    endurance: Endurance = Endurance()
    thermal: Thermal = Thermal()
    faults: FaultsConfig = FaultsConfig()

    @model_validator(mode="before")
    @classmethod
    def _size_planes(cls, given: Any) -> Any:
        """The blocks of a plane that a stated capacity takes, unless they are stated."""
        if not isinstance(given, dict) or not isinstance(given.get("geometry"), dict):
            return given
        geometry, capacity = given["geometry"], given.get("capacity")
        if "blocks_per_plane" in geometry:
            return given
        if capacity is None:
            raise ValueError("either geometry.blocks_per_plane or capacity says how large it is")
        try:
            one = Geometry.model_validate(geometry | {"blocks_per_plane": 1})
            ftl = FtlConfig.model_validate(given.get("ftl"))
            raw_bytes = parse_size(capacity) / (1 - ftl.over_provisioning)
            blocks = max(ceil(raw_bytes / one.raw_bytes), 1)
        except ValueError:  # what is wrong is found, and named, in its own section
            blocks = 1
        return given | {"geometry": geometry | {"blocks_per_plane": blocks}}

    @property
    def usable_bytes(self) -> int:
        """Raw NAND less over-provisioning."""
        return int(self.geometry.raw_bytes * (1 - self.ftl.over_provisioning))

    @property
    def capacity_sectors(self) -> int:
        """Logical blocks of the namespace, whole MiB: as stated, or all that is usable."""
        usable = self.usable_bytes if self.capacity is None else self.capacity
        return usable // MIB * MIB // SECTOR_BYTES

    @property
    def capacity_bytes(self) -> int:
        return self.capacity_sectors * SECTOR_BYTES

    @property
    def nand_bytes_per_s(self) -> int:
        """What full page reads give in a long stream: the buses or the arrays, whichever is less.

        docs/TIMING.md has the closed forms; commands and status cycles are left out here.
        """
        geometry, timing = self.geometry, self.timing
        buses = geometry.channels * timing.channel_bytes_per_s
        arrays = geometry.planes * geometry.page_bytes * NS_PER_S // max(1, timing.mean_read_ns)
        return min(buses, arrays)

    @property
    def mapping_bytes(self) -> int:
        """On-drive DRAM of the L2P table."""
        return self.capacity_sectors * MAPPING_ENTRY_BYTES

    @property
    def spare_superblocks(self) -> int:
        """Superblocks that may go bad before the drive is read-only; below zero: too few of all."""
        geometry = self.geometry
        holding = -(-self.capacity_sectors // geometry.sectors_per_superblock)
        command = -(-self.queues.mdts_bytes // geometry.superblock_bytes)
        return geometry.blocks_per_plane - holding - WORKING_SUPERBLOCKS - (command - 1)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        self._check_capacity()
        self._check_write_buffer()
        self._check_dram()
        self._check_spare()
        self.check_faults(self.faults)
        return self

    def _check_capacity(self) -> None:
        geometry = self.geometry
        if self.capacity is not None and self.capacity > self.usable_bytes:
            raise ValueError(
                f"capacity = {format_size(self.capacity)}; {geometry.layout} with "
                f"blocks_per_plane = {geometry.blocks_per_plane} have "
                f"{format_size(self.usable_bytes)} beside over-provisioning. Leave "
                "blocks_per_plane out to have it follow from the capacity"
            )

    def check_faults(self, faults: FaultsConfig) -> None:
        """Raises ValueError for a fault of a die or a superblock that this drive does not have."""
        geometry = self.geometry
        for channel, die in faults.slow_dies.dies if faults.slow_dies else ():
            if channel >= geometry.channels or die >= geometry.dies_per_channel:
                raise ValueError(
                    f"faults.slow_dies: die {die} of channel {channel}; there are "
                    f"{geometry.channels} channels of {geometry.dies_per_channel} dies"
                )
        for name in ("program_failures", "erase_failures"):
            failures = getattr(faults, name)
            for superblock in failures.superblocks if failures else ():
                if superblock >= geometry.blocks_per_plane:
                    raise ValueError(
                        f"faults.{name}: superblock {superblock}; there are "
                        f"{geometry.blocks_per_plane}"
                    )

    def _check_write_buffer(self) -> None:
        capacity = self.write_buffer.capacity_bytes
        if 0 < capacity < self.queues.mdts_bytes:
            raise ValueError(
                f"a write buffer of {format_size(capacity)} is smaller than one command's data, "
                f"{format_size(self.queues.mdts_bytes)}"
            )

    def _check_dram(self) -> None:
        dram, buffered = self.dram, self.write_buffer.capacity_bytes
        needed = self.mapping_bytes + dram.window_bytes + dram.unit_cache_bytes + buffered
        if needed > dram.total_bytes:
            raise ValueError(
                f"on-drive DRAM of {format_size(dram.total_bytes)} is less than mapping table "
                f"{format_size(self.mapping_bytes)} + window {format_size(dram.window_bytes)} + "
                f"unit cache {format_size(dram.unit_cache_bytes)} + write buffer "
                f"{format_size(buffered)}"
            )

    def _check_spare(self) -> None:
        spare = self.geometry.raw_bytes - self.capacity_bytes
        if self.spare_superblocks < 0 or self.capacity_sectors == 0:
            raise ValueError(
                f"over-provisioning leaves {format_size(spare)} spare; {WORKING_SUPERBLOCKS} "
                f"superblocks of {format_size(self.geometry.superblock_bytes)}, and one command's "
                "data, are the least. Raise over_provisioning, or make superblocks smaller"
            )


def preset_names() -> list[str]:
    """Names that `load_config` knows without a path."""
    files = resources.files("csd_device.presets").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset, to start a drive of one's own from. Raises ConfigRefused."""
    if name not in preset_names():
        raise ConfigRefused(f"no preset {name!r}; there are {', '.join(preset_names())}")
    return _read(name)


def load_config(name_or_path: str | Path) -> DriveConfig:
    """The drive of this preset or TOML file. Raises ConfigRefused naming file, field and reason."""
    text = _read(str(name_or_path))
    try:
        return DriveConfig.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigRefused(f"drive {name_or_path}: not TOML: {error}") from error
    except ValidationError as error:
        reasons = "; ".join(_reason(item["loc"], item["msg"]) for item in error.errors())
        raise ConfigRefused(f"drive {name_or_path}: {reasons}") from error


def _reason(location: tuple[int | str, ...], message: str) -> str:
    return f"{'.'.join(map(str, location))}: {message}" if location else message


def _read(name_or_path: str) -> str:
    if name_or_path in preset_names():
        preset = resources.files("csd_device.presets") / f"{name_or_path}.toml"
        return preset.read_text()
    try:
        return Path(name_or_path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"drive {name_or_path!r} is no preset ({', '.join(preset_names())}) "
            f"and cannot be read as a file: {error}"
        ) from error
