"""Faults as decorators over clean media, each named, seeded and set by a section of `[faults]`.

    faulty(clean, FaultSettings) -> Media    the clean media themselves where no fault is on

    bit_errors        BitErrorMedia      flipped bits, ECC, read retry
    unreadable        UnreadableMedia    sectors that no retry brings back
    program_failures  ProgramFailures
    erase_failures    EraseFailures
    power_loss        PowerLoss          everything raises PowerCut once the power is gone

    MediaSwitch(clean).put(media)            changes them while they are in use

Slow dies belong to the timeline and the window's loss to the window; they have no decorator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from csd_device.config import DriveConfig
from csd_device.fault_config import FaultsConfig
from csd_device.nand.faults.bit_errors import BitErrorMedia
from csd_device.nand.faults.decorator import I64, FaultCounters
from csd_device.nand.faults.failures import EraseFailures, ProgramFailures
from csd_device.nand.faults.power_loss import PowerCut, PowerLoss, PowerSupply
from csd_device.nand.faults.switch import MediaSwitch
from csd_device.nand.faults.unreadable import UnreadableMedia
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What faults go by beside their settings."""

    config: DriveConfig
    superblocks: Superblocks
    now: Callable[[], int]  # the drive clock's ns
    counters: FaultCounters


def faulty(
    clean: Media,
    faults: FaultsConfig,
    around: Surroundings,
    lost: I64,
    supply: PowerSupply | None = None,
) -> Media:
    """The media behind the faults that are on.

    `lost` [n]: the physical sectors that `unreadable` names, ascending, each once. `supply`: what
    the media's power comes from, where it may go.
    """
    media, seed = clean, faults.seed
    if supply:
        media = PowerLoss(media, supply)
    geometry, blocks = around.config.geometry, around.superblocks
    if faults.program_failures:
        media = ProgramFailures(
            media, around.counters, faults.program_failures, geometry, blocks, seed
        )
    if faults.erase_failures:
        media = EraseFailures(media, around.counters, faults.erase_failures, geometry, blocks, seed)
    if faults.bit_errors:
        media = BitErrorMedia(
            media, around.counters, faults.bit_errors, around.config, blocks, around.now, seed
        )
    if faults.unreadable:
        media = UnreadableMedia(
            media, around.counters, faults.unreadable, lost, geometry, blocks, seed
        )
    return media


NO_SECTORS: I64 = np.empty(0, np.int64)

__all__ = [
    "BitErrorMedia",
    "EraseFailures",
    "FaultCounters",
    "MediaSwitch",
    "NO_SECTORS",
    "PowerCut",
    "PowerLoss",
    "PowerSupply",
    "ProgramFailures",
    "Surroundings",
    "UnreadableMedia",
    "faulty",
]
