"""Units by plain reads of blocks, each checked: what `csd verify` looks at, and predictors need.

Neither window nor unit cache has a part in it, so every byte comes off the flash.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.crc32c import crc32c_units
from csd_protocol.packed import PackedModel, Site
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive
from host_client.model.catalog import read_units
from host_client.runtime.copies import UnitsLost, read_any_unit_table

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """Units of a site that one copy does not have as they were packed, ascending."""

    site: Site
    copy: int
    units: U32


class PlainReads:
    """One packed model, read by blocks."""

    def __init__(self, drive: Drive, model: PackedModel) -> None:
        """Raises DamagedRecord or CommandFailed when the model's CRC table cannot be read."""
        self._drive, self._model = drive, model
        self._table = read_any_unit_table(drive, model)

    def site_units(self, site: Site) -> U16:
        """All units of a site [count, rows, words], each from a copy that has it.

        Raises UnitsLost.
        """
        return self.units(site, 0, site.count)

    def units(self, site: Site, start: int, stop: int) -> U16:
        """Units [start, stop) of a site [stop - start, rows, words]; as `site_units`.

        Where the model is placed, all of the site is read for them.
        """
        slots = self._table.slots.get(site.site)
        if slots is None:
            return self._repaired(site, start, stop)
        return self._repaired(site, 0, site.count)[slots[start:stop]]

    def _repaired(self, site: Site, start: int, stop: int) -> U16:
        """What lies in slots [start, stop), each from a copy that has it."""
        values, bad = self._read(site, 0, start, stop)
        for copy in range(1, self._model.copies):
            for row in np.flatnonzero(bad):
                slot = start + int(row)
                again, still = self._read(site, copy, slot, slot + 1)
                values[row], bad[row] = again[0], still[0]
        if bad.any():
            lost = self._units_in(site, start, bad)
            raise UnitsLost(self._model, {site: lost}, _unlike(site))
        return values

    def _units_in(self, site: Site, start: int, flags: Flags) -> U32:
        """The units in those slots from `start` on that have a flag, ascending."""
        lying = (start + np.flatnonzero(flags)).astype(np.uint32)
        slots = self._table.slots.get(site.site)
        if slots is None:
            return lying
        return np.flatnonzero(np.isin(slots, lying)).astype(np.uint32)

    def verify(self, progress: Progress) -> list[Damage]:
        """Reads every unit of every copy; what is damaged, copy by copy."""
        found: list[Damage] = []
        total = self._model.weights_bytes * self._model.copies
        done = 0
        for copy in range(self._model.copies):
            for site in self._model.sites:
                bad: list[U32] = []
                step = max(1, PIECE_BYTES // site.unit_bytes)
                for start in range(0, site.count, step):
                    stop = min(start + step, site.count)
                    flags = self._read(site, copy, start, stop)[1]
                    bad.append(self._units_in(site, start, flags))
                    done += (stop - start) * site.unit_bytes
                    progress(done, total)
                units = np.sort(np.concatenate(bad))
                if units.size:
                    found.append(Damage(site, copy, units))
        return found

    def _read(self, site: Site, copy: int, start: int, stop: int) -> tuple[U16, Flags]:
        """Slots [start, stop) from a copy [n, rows, words], and which of them are not as packed.

        What cannot be read at once is read in halves, down to single units.
        """
        place = self._model.place_of(site, copy)
        values = np.zeros((stop - start, site.rows, site.row_bytes // 2), np.uint16)
        bad = np.zeros(stop - start, np.bool_)
        left = [(start, stop)]
        while left:
            first, last = left.pop()
            rows = slice(first - start, last - start)
            try:
                values[rows] = read_units(self._drive, site, first, last, place)
                bad[rows] = self._differs(site, first, values[rows])
            except CommandFailed as failed:
                if not failed.is_media_error:
                    raise
                if last - first == 1:
                    bad[rows] = True
                else:
                    middle = (first + last) // 2
                    left += [(first, middle), (middle, last)]
        return values, bad

    def _differs(self, site: Site, start: int, values: U16) -> Flags:
        expected, slots = self._table.crcs_of(site), self._table.slots.get(site.site)
        if slots is not None:
            expected = expected[np.argsort(slots)]
        rows = values.reshape(values.shape[0], -1).view(np.uint8)
        differs: Flags = crc32c_units(rows) != expected[start : start + values.shape[0]]
        return differs


def _unlike(site: Site) -> CommandFailed:
    """The failure of reads that brought no bytes, or others than were packed."""
    status = Status.GUARD_CHECK
    detail = "no bytes, or others than their CRC32C says"
    return CommandFailed(f"Read of {site.name}", status.sct, status.sc, detail, retryable=False)
