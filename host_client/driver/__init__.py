"""The driver: links to a drive, queue pairs over them, and `Drive`, which the host uses."""

from host_client.driver.commands import (
    AsyncEvent,
    LostUnits,
    Origin,
    Residency,
    Staged,
    StagedSite,
    StageTarget,
    Timing,
    Told,
    TopExperts,
)
from host_client.driver.drive import Drive
from host_client.driver.errors import (
    CommandFailed,
    DriveError,
    DriveLost,
    DriveTimeout,
    DriveUnavailable,
    QueueFull,
)
from host_client.driver.queue_pair import PendingCommand

__all__ = [
    "AsyncEvent",
    "CommandFailed",
    "Drive",
    "DriveError",
    "DriveLost",
    "DriveTimeout",
    "DriveUnavailable",
    "LostUnits",
    "Origin",
    "PendingCommand",
    "QueueFull",
    "Residency",
    "StageTarget",
    "Staged",
    "StagedSite",
    "Timing",
    "Told",
    "TopExperts",
]
