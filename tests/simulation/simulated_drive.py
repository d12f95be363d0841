"""Two subjects of a simulation with one face: an FTL, and a whole controller.

Both raise what the FTL raises: PowerCut, and CommandError for what the drive refuses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import numpy as np

from csd_device import drive as drive_room
from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.drive import Drive
from csd_device.errors import CommandError, WriteFault
from csd_device.firmware import commands as c
from csd_device.ftl import Ftl
from csd_device.nand.direct_media import Begin
from csd_device.nand.media import U8, Media
from csd_device.nand.superblocks import Superblocks
from csd_protocol.status import Status

_MOVE_NS = 200_000  # of idle time a sector

Wrap = Callable[[Media, Superblocks], Media]


class Subject(Protocol):
    """Sectors in, sectors out."""

    ftl: Ftl

    def write(self, lpn: int, data: bytes, fua: bool) -> None: ...

    def read(self, lpn: int, count: int) -> U8: ...

    def deallocate(self, lpn: int, count: int) -> None: ...

    def write_zeroes(self, lpn: int, count: int) -> None: ...

    def copy(self, target: int, source: int, count: int) -> None: ...

    def compare(self, lpn: int, data: bytes) -> bool: ...

    def flush(self) -> None: ...

    def idle(self, sectors: int) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """What the end of the process frees, besides the FTL's files and media."""


class SimulatedFtl:
    """The FTL alone."""

    def __init__(self, folder: Path, config: DriveConfig, wrap: Wrap) -> None:
        self.ftl = Ftl.open(folder, config, wrap)
        self._now_ns = 0

    def write(self, lpn: int, data: bytes, fua: bool) -> None:
        self.ftl.write(lpn, data, fua=fua)

    def read(self, lpn: int, count: int) -> U8:
        out = np.empty(count * SECTOR_BYTES, np.uint8)
        self.ftl.read(lpn * SECTOR_BYTES, out)
        return out

    def deallocate(self, lpn: int, count: int) -> None:
        self.ftl.deallocate(lpn, count)

    def write_zeroes(self, lpn: int, count: int) -> None:
        self.ftl.write_zeroes(lpn, count)

    def copy(self, target: int, source: int, count: int) -> None:
        self.ftl.write(target, self.read(source, count))

    def compare(self, lpn: int, data: bytes) -> bool:
        return self.read(lpn, len(data) // SECTOR_BYTES).tobytes() == data

    def flush(self) -> None:
        self.ftl.flush()

    def idle(self, sectors: int) -> None:
        self._now_ns += 1_000_000_000
        self.ftl.pass_time(self._now_ns)
        with suppress(WriteFault):  # as the firmware: a write that meets it is told
            self.ftl.work_idle(sectors)

    def close(self) -> None:
        self.ftl.close()

    def abandon(self) -> None:
        pass


class SimulatedController:
    """A drive in this process, through commands on a queue pair, in virtual time."""

    def __init__(self, folder: Path, config: DriveConfig, wrap: Wrap) -> None:
        with _wrapped(wrap):
            self._drive = Drive.open(
                config,
                folder,
                clock=VirtualClock(),
                time_mode=TimeMode.VIRTUAL,
                window_path=folder.with_name("window"),
            )
        self._queue = self._drive.connect("simulation", "simulation")
        self.ftl = self._drive._controller.ftl
        self._is_closed = False

    def write(self, lpn: int, data: bytes, fua: bool) -> None:
        self._perform(c.Write(lpn, data, fua))

    def read(self, lpn: int, count: int) -> U8:
        most = self._drive.mdts_bytes // SECTOR_BYTES
        parts = (
            self._perform(c.Read(c.BlockRange(lpn + start, min(most, count - start)))).result
            for start in range(0, count, most)
        )
        return np.frombuffer(b"".join(part.data for part in parts), np.uint8)

    def deallocate(self, lpn: int, count: int) -> None:
        self._perform(c.DatasetManagement((c.BlockRange(lpn, count),)))

    def write_zeroes(self, lpn: int, count: int) -> None:
        self._perform(c.WriteZeroes(c.BlockRange(lpn, count)))

    def copy(self, target: int, source: int, count: int) -> None:
        self._perform(c.Copy(target, (c.BlockRange(source, count),)))

    def compare(self, lpn: int, data: bytes) -> bool:
        try:
            self._perform(c.Compare(lpn, data))
        except CommandError as error:
            if error.status is not Status.COMPARE_FAILURE:
                raise
            return False
        return True

    def flush(self) -> None:
        self._perform(c.Flush())

    def idle(self, sectors: int) -> None:
        """Time passes; the next command finds what the drive did in it."""
        self._drive.clock.advance_to(self._drive.clock.now_ns() + sectors * _MOVE_NS)
        self._perform(c.KeepAlive())

    def close(self) -> None:
        self._is_closed = True
        self._drive.close()

    def abandon(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._drive._controller.stager.window.close()

    def _perform(self, command: c.Command) -> c.Completion:
        self._queue.submit(1, command, self._drive.clock.now_ns())
        (completion,) = self._queue.pop_due(self._drive.clock.now_ns())
        if completion.status is not Status.SUCCESS:
            raise CommandError(completion.status, completion.detail)
        return completion


@contextmanager
def _wrapped(wrap: Wrap) -> Iterator[None]:
    """The drive's FTL opens on decorated media."""
    plain = Ftl.open

    def opened(directory: Path, config: DriveConfig, inner: Wrap | None, begin: Begin) -> Ftl:
        def both(media: Media, superblocks: Superblocks) -> Media:
            below = wrap(media, superblocks)
            return inner(below, superblocks) if inner else below

        return plain(directory, config, both, begin)

    with patch.object(drive_room.Ftl, "open", opened):
        yield
