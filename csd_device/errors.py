"""Expected errors, each one NVMe status, and refusals to open a drive at all.

A `CommandError` ends one command with `status` and `detail`; the drive goes on. A `DriveRefused` is
raised before there is a drive: its message is for the person who started the daemon.
"""

import numpy as np
import numpy.typing as npt

from csd_protocol.status import Status
from csd_protocol.units import format_size

I64 = npt.NDArray[np.int64]


class CommandError(Exception):
    """A command that cannot be carried out. `detail` says what was wrong, where, what to do."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


class DramExceeded(CommandError):
    """An allotment that on-drive DRAM has no room for."""

    def __init__(self, name: str, asked_bytes: int, free_bytes: int, total_bytes: int) -> None:
        super().__init__(
            Status.DRAM_EXCEEDED,
            f"{name} asks for {format_size(asked_bytes)} of on-drive DRAM; "
            f"{format_size(free_bytes)} of {format_size(total_bytes)} are free",
        )


class WindowFull(CommandError):
    """A lease that the window has no room for until others are released."""

    def __init__(self, asked_bytes: int, free_bytes: int, largest: int, size_bytes: int) -> None:
        super().__init__(
            Status.WINDOW_FULL,
            f"a lease of {format_size(asked_bytes)} does not fit: {format_size(free_bytes)} of the "
            f"window's {format_size(size_bytes)} are free, {format_size(largest)} in one piece",
        )


class WindowGone(CommandError):
    """There is no window now; it may come back."""

    def __init__(self) -> None:
        super().__init__(
            Status.WINDOW_UNAVAILABLE,
            "the drive's window is gone and all leases with it. Open its file again when it is "
            "back, and stage again",
        )


class NoLease(CommandError):
    """A lease that does not exist or belongs to another host."""

    def __init__(self, lease: int, owner: str) -> None:
        super().__init__(Status.NO_LEASE, f"host {owner!r} holds no lease {lease}")


class LbaOutOfRange(CommandError):
    """Logical blocks beyond the end of the namespace."""

    def __init__(self, first: int, count: int, blocks: int) -> None:
        super().__init__(
            Status.LBA_OUT_OF_RANGE,
            f"blocks {first} to {first + count - 1} asked for; the namespace has {blocks}",
        )


class CapacityExceeded(CommandError):
    """A write that garbage collection cannot make room for."""

    def __init__(self, asked_bytes: int, free_bytes: int, valid_bytes: int, raw_bytes: int) -> None:
        super().__init__(
            Status.CAPACITY_EXCEEDED,
            f"a write of {format_size(asked_bytes)} does not fit: {format_size(free_bytes)} of "
            f"{format_size(raw_bytes)} NAND are erased, {format_size(valid_bytes)} hold valid "
            "data, and a write needs room beside the data that it replaces. "
            "Write less at once, or deallocate",
        )


class WriteFault(CommandError):
    """The media could not take the bytes, or not erase them; `address` is where, if known."""

    def __init__(self, detail: str, address: int | None = None) -> None:
        super().__init__(Status.WRITE_FAULT, detail)
        self.address = address


class WriteProtected(CommandError):
    """A change to a drive that has become read-only."""

    def __init__(self, bad: int, spares: int) -> None:
        super().__init__(
            Status.WRITE_PROTECTED,
            f"{bad} superblocks went bad and {spares} were spare: the drive is read-only. "
            "Read what you need and replace it",
        )


class UnrecoveredRead(CommandError):
    """The media could not give the bytes back.

    `psas` [n] are the physical sectors that are lost, ascending, where the media knows them; `rows`
    [m] the rows of a read of units that they belong to, where it was one (`Ftl.read_units`).
    """

    def __init__(self, detail: str, psas: I64 | None = None, rows: I64 | None = None) -> None:
        super().__init__(Status.UNRECOVERED_READ, detail)
        self.psas = psas
        self.rows = rows


class DriveRefused(Exception):
    """A drive that cannot be opened: its media, window or configuration says no."""


class ConfigRefused(DriveRefused):
    """A drive configuration that is missing, malformed or contradicts itself."""
