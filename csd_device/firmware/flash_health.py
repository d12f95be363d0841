"""What the FTL's figures mean for the drive's health. The one place that reads them for it."""

from dataclasses import dataclass

from csd_device.config import DriveConfig
from csd_device.ftl import Ftl

PERCENTAGE_USED_MAX = 255  # of a byte


@dataclass(frozen=True, slots=True)
class FlashHealth:
    """As SMART states it."""

    available_spare: int  # percent of the spare superblocks that the drive began with
    percentage_used: int  # mean erases over rated ones; passes 100, ends at 255
    bad_superblocks: int
    is_read_only: bool
    written_bytes: int  # into NAND, since power-on


def flash_health(ftl: Ftl, config: DriveConfig) -> FlashHealth:
    figures = ftl.counters()
    spares = figures.spare_superblocks_initial
    used = int(100 * figures.erases_mean / config.endurance.rated_cycles)
    return FlashHealth(
        available_spare=100 * figures.spare_superblocks // spares if spares else 100,
        percentage_used=min(used, PERCENTAGE_USED_MAX),
        bad_superblocks=figures.bad_superblocks,
        is_read_only=figures.is_read_only,
        written_bytes=figures.pages_programmed * config.geometry.page_bytes,
    )
