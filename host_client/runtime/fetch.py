"""Bring named units into host memory now: resident units, embedding rows, what was missed.

The calling thread waits. Reads that can be known ahead go through `prefetch` instead.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Site
from host_client.driver import Drive, StageTarget
from host_client.io import Buffer, Extent, WindowLost, WindowReader
from host_client.runtime.checksums import Checksums
from host_client.runtime.copies import Copies
from host_client.runtime.refusals import WindowTooSmall
from host_client.runtime.tally import Tally

U32 = npt.NDArray[np.uint32]

WINDOW_SHARE = 4  # one fetch takes at most this part of the window, so that prefetch goes on
STAGE_TIMEOUT_S = 60.0
WINDOW_LOSSES_MAX = 4  # times that one read is staged again because the window went away


class Fetcher:
    """Stages named units of one model and reads them into a buffer."""

    def __init__(
        self,
        drive: Drive,
        copies: Copies,
        reader: WindowReader,
        checksums: Checksums,
        tally: Tally,
    ) -> None:
        self._drive = drive
        self._copies = copies
        self._reader = reader
        self._checksums = checksums
        self._tally = tally

    def fetch(self, site: Site, units: U32, buffer: Buffer, offset_bytes: int = 0) -> None:
        """Read `units` [n], ascending, packed into `buffer` from `offset_bytes` on.

        Raises UnitsLost, UnitCorrupt, DriveLost, CommandFailed, WindowTooSmall, WindowLost.
        """
        for part in self._parts(site, units):
            self._fetch_part(site, part, buffer, offset_bytes)
            offset_bytes += part.size * site.unit_bytes

    def _parts(self, site: Site, units: U32) -> Iterator[U32]:
        most = self._drive.window_bytes // WINDOW_SHARE // site.unit_bytes
        if most == 0:
            raise WindowTooSmall(
                f"one unit of {site.name} has {site.unit_bytes} bytes; a quarter of the drive's "
                f"window is {self._drive.window_bytes // WINDOW_SHARE}. Enlarge the window"
            )
        for start in range(0, units.size, most):
            yield units[start : start + most]

    def _fetch_part(self, site: Site, units: U32, buffer: Buffer, offset_bytes: int) -> None:
        target = StageTarget(site=site.site, units=units, ignore_residency=True)
        for losses_left in reversed(range(WINDOW_LOSSES_MAX)):
            try:
                self._stage_and_read(target, buffer, offset_bytes)
                break
            except WindowLost:
                if not losses_left:
                    raise
        values = buffer.array[offset_bytes : offset_bytes + units.size * site.unit_bytes]
        self._checksums.verify(site, units, values.reshape(units.size, site.unit_bytes))

    def _stage_and_read(self, target: StageTarget, buffer: Buffer, offset_bytes: int) -> None:
        generation = self._reader.generation
        staged = self._copies.stage([target]).result(STAGE_TIMEOUT_S)
        self._tally.add_staged(staged)
        lease = staged.sites[0]
        extent = Extent(lease.window_offset, lease.length_bytes, buffer, offset_bytes)
        try:
            self._reader.read([extent], generation)
        finally:
            self._drive.release(staged.leases)
