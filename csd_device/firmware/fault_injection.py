"""Faults of a running drive: which are on, and putting them where they act.

Decorators go around the media, slow dies into the timeline, and the window's loss to the window.
`[faults]` of the drive's TOML is what is on when it opens; Set Features changes it until it closes.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from csd_device.config import DriveConfig
from csd_device.dram import Window
from csd_device.errors import CommandError, DriveRefused, WindowGone
from csd_device.fault_config import FaultsConfig
from csd_device.ftl import Ftl
from csd_device.nand import Timeline
from csd_device.nand.faults import (
    NO_SECTORS,
    FaultCounters,
    MediaSwitch,
    PowerSupply,
    Surroundings,
    faulty,
)
from csd_device.nand.faults.dice import seeded
from csd_device.nand.media import I64
from csd_protocol.status import Status

SETTINGS_BYTES_MAX = 1 << 20
SECTORS_NAMED_MAX = 1 << 20  # by `unreadable`


class _Change(BaseModel):
    """What Set Features carries: one fault and its settings, None: off. No name: all of them."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    settings: dict[str, Any] | None = None
    seed: int | None = None


class FaultInjection:
    """The faults of one drive."""

    def __init__(
        self, config: DriveConfig, ftl: Ftl, timeline: Timeline | None, around: Surroundings
    ) -> None:
        """The FTL's media are a `MediaSwitch`; nothing is on before `apply`.

        `timeline` None: time is off, and slow dies are as fast as others.
        """
        self.faults = FaultsConfig()
        assert isinstance(ftl.media, MediaSwitch)
        self._config, self._ftl, self._timeline = config, ftl, timeline
        self._media, self._around = ftl.media, around
        self._refusals_left: int | None = None  # of staging commands, before the window is back
        self._supply: PowerSupply | None = None

    @property
    def counters(self) -> FaultCounters:
        return self._around.counters

    @property
    def may_retry(self) -> bool:
        """Whether a read may take the array longer than tR of its pages."""
        return self.faults.bit_errors is not None

    @property
    def is_off(self) -> bool:
        """Whether the power is gone: the drive answers nothing any more."""
        return self._supply is not None and not self._supply.is_on

    def apply(self, faults: FaultsConfig, window: Window) -> None:
        """These faults are on from now on, and no others.

        Raises ValueError for a place that the drive does not have, and DriveRefused when the window
        was gone and cannot be made again.
        """
        self._config.check_faults(faults)
        lost = self._lost_sectors(faults)
        if faults.window_loss is None and window.is_gone:
            window.come_back()
        elif faults.window_loss is not None and faults.window_loss != self.faults.window_loss:
            self._refusals_left = faults.window_loss.staging_commands
            if not window.is_gone:
                window.lose()
        if self._timeline:
            slow = faults.slow_dies
            self._timeline.slow_down_reads(
                slow.dies if slow else (), slow.read_factor if slow else 1
            )
        if faults.power_loss != self.faults.power_loss:
            self._supply = _supply_of(faults)
        self.faults = faults
        self._media.put(faulty(self._media.clean, faults, self._around, lost, self._supply))

    def change(self, data: bytes, window: Window) -> None:
        """What Set Features asks for. Raises CommandError (Invalid Field) naming the field."""
        try:
            self.apply(self._changed(data), window)
        except ValidationError as error:
            raise _invalid("; ".join(_reason(item) for item in error.errors())) from None
        except ValueError as error:
            raise _invalid(str(error)) from None
        except DriveRefused as error:
            raise CommandError(Status.DRAM_EXCEEDED, str(error)) from error

    def report(self) -> dict[str, Any]:
        """A JSON object: the seed, the settings of each fault (null: off), and the counters."""
        return {
            **self.faults.model_dump(mode="json"),
            "counters": asdict(self.counters),
        }

    def admit_staging(self, window: Window) -> None:
        """A staging command has come. Raises WindowGone, until it was gone for long enough."""
        if not window.is_gone:
            return
        if self._refusals_left is not None:
            self._refusals_left -= 1
            if self._refusals_left < 0:
                self.apply(self.faults.model_copy(update={"window_loss": None}), window)
                return
        raise WindowGone

    def _changed(self, data: bytes) -> FaultsConfig:
        if len(data) > SETTINGS_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes of settings; {SETTINGS_BYTES_MAX} are the most")
        change = _Change.model_validate_json(data or b"{}")
        seed = self.faults.seed if change.seed is None else change.seed
        if change.name is None:
            if change.settings is not None:
                raise ValueError("settings without the name of a fault")
            return (
                FaultsConfig(seed=seed) if change.seed is None else self.faults.having("seed", seed)
            )
        if change.name not in FaultsConfig.names():
            raise ValueError(f"fault {change.name!r}; there are {', '.join(FaultsConfig.names())}")
        return self.faults.having("seed", seed).having(change.name, change.settings)

    def _lost_sectors(self, faults: FaultsConfig) -> I64:
        """Those that `unreadable` names, ascending; an LBA's is where it lies now."""
        if faults.unreadable is None:
            return NO_SECTORS
        raw, named = self._config.geometry.raw_sectors, faults.unreadable
        total = sum(count for _, count in named.psas + named.lbas)
        if total > SECTORS_NAMED_MAX:
            raise ValueError(f"unreadable: {total} sectors; {SECTORS_NAMED_MAX} are the most")
        parts = [NO_SECTORS]
        for first, count in named.psas:
            if first + count > raw:
                raise ValueError(f"unreadable: psas end at {raw}, not at {first + count}")
            parts.append(np.arange(first, first + count, dtype=np.int64))
        for first, count in named.lbas:
            parts.append(self._ftl.psas_of(first, count))
        return np.unique(np.concatenate(parts))


def _supply_of(faults: FaultsConfig) -> PowerSupply | None:
    if faults.power_loss is None:
        return None
    supply = PowerSupply(seeded(faults.seed))
    supply.go_off_at(faults.power_loss.after_operations)
    return supply


def _reason(item: Any) -> str:
    place = ".".join(map(str, item["loc"]))
    return f"{place}: {item['msg']}" if place else str(item["msg"])


def _invalid(detail: str) -> CommandError:
    return CommandError(Status.INVALID_FIELD, f"fault injection: {detail}")
