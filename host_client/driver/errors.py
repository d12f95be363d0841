"""What can go wrong between a host and its drive. All of it is expected; none of it is a bug."""

from csd_protocol.status import Status, describe, lookup
from host_client.driver.commands import LostUnits

_MEDIA_ERRORS = (Status.UNRECOVERED_READ, Status.GUARD_CHECK)


class DriveError(Exception):
    """Anything that the drive or the way to it can answer with."""


class CommandFailed(DriveError):
    """The drive completed a command with a status other than success.

    `lost`: every unit that a staging command could not read; empty for any other failure.
    """

    def __init__(
        self,
        what: str,
        sct: int,
        sc: int,
        detail: str,
        retryable: bool,
        lost: tuple[LostUnits, ...] = (),
    ) -> None:
        super().__init__(f"{what}: {describe(sct, sc)}" + (f": {detail}" if detail else ""))
        self.what = what
        self.sct = sct
        self.sc = sc
        self.detail = detail
        self.retryable = retryable
        self.lost = lost

    @property
    def status(self) -> Status | None:
        """None when this version does not know the status code."""
        return lookup(self.sct, self.sc)

    @property
    def is_media_error(self) -> bool:
        """Whether the media could not give back what was written."""
        return self.status in _MEDIA_ERRORS


class DriveLost(DriveError):
    """The way to the drive broke: what was pending may or may not have been done."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"the drive at {address} is gone: {reason}")
        self.address = address
        self.reason = reason


class DriveUnavailable(DriveError):
    """No drive answers at this address, or a daemon could not be started."""


class DriveTimeout(DriveError):
    """A command was not completed in time; it has been asked to abort."""


class QueueFull(DriveError):
    """Every entry of the submission queue is in flight."""
