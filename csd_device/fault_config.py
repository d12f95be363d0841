"""Faults as data: `[faults]` of a drive's TOML, and what Set Features takes; off by default.

Each fault is a section of its own, named as users name it; a section that is there switches its
fault on. Every field states its unit and where its default comes from; docs/FAULTS.md has the
equations. One seed decides every error of a drive.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

Rate = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=0)]
Range = tuple[Count, Count]  # first and how many
RANGES_MAX = 4096  # of one fault


class _Fault(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BitErrors(_Fault):
    """Bits that read back wrong, the code that corrects them, and read retry.

    With c = cycles over rated cycles, d = age over rated retention and r = reads of a page over
    1,000, a bit is wrong with probability

        cell factor * (base + wear c^k + retention c^m d^n + disturb c^p r^q)

    Form and figures: Kim, Choi, Min, "Design Tradeoffs for SSD Reliability", FAST 2019, its
    72-layer TLC part; the coefficients are here stated at 3,000 cycles, 365 days, 1,000 reads.
    """

    rate: Rate | None = None  # of every bit, whatever wear and age say; none: by the equation
    base_rate: Rate = 1.48e-3  # epsilon
    wear_rate: Rate = 5.24e-3  # at rated cycles: alpha 3.90e-10 * 3,000^k
    wear_power: Factor = 2.05  # k
    retention_rate: Rate = 4.66e-3  # at rated cycles and retention: beta 6.28e-5 * 3,000^m * 365^n
    retention_wear_power: Factor = 0.14  # m
    retention_power: Factor = 0.54  # n
    disturb_rate: Rate = 7.07e-3  # at rated cycles, 1,000 reads: gamma 3.73e-9 * 3,000^p * 1,000^q
    disturb_wear_power: Factor = 0.33  # p
    disturb_power: Factor = 1.71  # q
    cell_factors: tuple[Factor, Factor, Factor, Factor] = (
        0.01,
        0.1,
        1.0,
        4.0,
    )  # SLC to QLC; assumed
    added_cycles: Count = (
        0  # program/erase cycles that every block has beyond those it is known for
    )
    added_days: Factor = 0.0  # days that all data is older than the drive's clock says
    correctable_bits_per_kib: Count = 72  # of a codeword of 4 KiB: four times as many; assumed
    retry_levels: Annotated[StrictInt, Field(ge=0, le=64)] = 8  # senses after the first; assumed
    retry_rate_factor: Rate = 0.7  # what is left of the rate at each level; assumed


class Unreadable(_Fault):
    """Sectors that no retry brings back."""

    psas: Annotated[tuple[Range, ...], Field(max_length=RANGES_MAX)] = ()  # physical sectors
    lbas: Annotated[tuple[Range, ...], Field(max_length=RANGES_MAX)] = ()  # cells they lie in now
    rate: Rate = 0.0  # of all sectors, anew after each erase

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.psas or self.lbas or self.rate):
            raise ValueError("name psas or lbas ([first, count] each), or a rate above 0")
        return self


class Failures(_Fault):
    """Programs, or erases, that the cells report as failed."""

    rate: Rate = 0.0  # of page programs, or of superblock erases
    superblocks: Annotated[
        tuple[Count, ...], Field(max_length=RANGES_MAX)
    ] = ()  # all of theirs fail

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.superblocks or self.rate):
            raise ValueError("name superblocks, or a rate above 0")
        return self


class SlowDies(_Fault):
    """Dies whose reads take longer in the array."""

    dies: Annotated[tuple[Range, ...], Field(min_length=1, max_length=RANGES_MAX)]
    # [channel, die of that channel] each
    read_factor: Annotated[float, Field(ge=1, le=1000)]  # of tR


class WindowLoss(_Fault):
    """The window is gone: its file and all leases with it."""

    staging_commands: Annotated[StrictInt, Field(gt=0)] | None = None
    # that are refused before it is back; none: until the fault is cleared


class PowerLossAfter(_Fault):
    """The power goes, and stays off until the daemon is started again."""

    after_operations: Count = 0  # writes, erases and syncs of the media that still come through


class FaultsConfig(_Fault):
    """Which faults are on. A section that is not there is off."""

    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] = 0
    bit_errors: BitErrors | None = None
    unreadable: Unreadable | None = None
    program_failures: Failures | None = None
    erase_failures: Failures | None = None
    slow_dies: SlowDies | None = None
    window_loss: WindowLoss | None = None
    power_loss: PowerLossAfter | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The faults, by the names of their sections."""
        return tuple(name for name in cls.model_fields if name != "seed")

    def having(self, name: str, settings: dict[str, Any] | int | None) -> "FaultsConfig":
        """With this fault set anew (None: off). Raises pydantic's ValidationError."""
        return FaultsConfig.model_validate(self.model_dump() | {name: settings})
