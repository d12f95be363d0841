"""Memory Range Set: how on-drive DRAM is divided between window and unit cache."""

from csd_device.config import SECTOR_BYTES
from csd_device.dram import Arena, UnitCache, Window
from csd_device.errors import CommandError, DriveRefused, WindowGone
from csd_device.firmware.controller import Controller
from csd_protocol.status import Status

WINDOW = "window"
UNIT_CACHE = "unit_cache"


def divide_memory(controller: Controller, window_bytes: int, unit_cache_bytes: int) -> None:
    """Makes window and unit cache anew with these sizes; the window's file is another one then.

    Raises CommandError: Memory Range Set In Use while leases are held or another host is
    connected, Invalid Field for a window that is no whole number of 4096 bytes, DRAM Exceeded with
    figures, also when the shared memory of the machine is too small for the window, Window
    Unavailable while it is gone.
    """
    stager = controller.stager
    if stager.window.is_gone:
        raise WindowGone
    if stager.window.lease_count:
        raise CommandError(
            Status.MEMORY_RANGE_SET_IN_USE,
            f"{stager.window.lease_count} leases of the window are held; release them first",
        )
    if window_bytes <= 0 or window_bytes % SECTOR_BYTES or unit_cache_bytes < 0:
        raise CommandError(
            Status.INVALID_FIELD,
            f"window of {window_bytes} bytes, unit cache of {unit_cache_bytes}: the window must be "
            f"a positive multiple of {SECTOR_BYTES}",
        )
    if len(controller.hosts) > 1:
        raise CommandError(
            Status.MEMORY_RANGE_SET_IN_USE,
            f"{len(controller.hosts)} hosts are connected; all but one have the window open",
        )
    before = stager.window.size_bytes, stager.cache.capacity_bytes
    _resize(controller.arena, window_bytes, unit_cache_bytes)
    path = stager.window.path
    stager.window.close()
    try:
        stager.window = Window(path, window_bytes)
    except DriveRefused as error:  # shared memory is too small; what was there fits
        _resize(controller.arena, *before)
        stager.window = Window(path, before[0])
        raise CommandError(Status.DRAM_EXCEEDED, str(error)) from error
    stager.cache = UnitCache(unit_cache_bytes)


def _resize(arena: Arena, window_bytes: int, unit_cache_bytes: int) -> None:
    """Both allotments or neither. Raises DramExceeded."""
    before = arena.report()
    arena.resize(UNIT_CACHE, 0)
    try:
        arena.resize(WINDOW, window_bytes)
        arena.resize(UNIT_CACHE, unit_cache_bytes)
    except CommandError:
        arena.resize(WINDOW, before[WINDOW])
        arena.resize(UNIT_CACHE, before[UNIT_CACHE])
        raise
