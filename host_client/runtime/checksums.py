"""The host's end of the guard: each unit's CRC32C is checked once more before it is used."""

import numpy as np
import numpy.typing as npt

from csd_protocol.crc32c import crc32c_units
from csd_protocol.packed import PackedModel, Site

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]


class UnitCorrupt(RuntimeError):
    """A unit reached the host with other bytes than were packed."""

    def __init__(self, site: Site, unit: int) -> None:
        self.site, self.unit = site, unit
        super().__init__(
            f"unit {unit} of {site.name} does not match its CRC32C: it was damaged between the "
            f"drive's window and this process. Read `csd log error`; if it stays, pack it again"
        )


class Checksums:
    """The CRC table of one model. table: uint32 [units of all sites]."""

    def __init__(self, model: PackedModel, table: U32) -> None:
        if table.shape != (model.unit_count,):
            raise ValueError(f"{table.shape} checksums for {model.unit_count} units")
        self._table = table

    def verify(self, site: Site, units: U32, values: U8) -> None:
        """Check `values` [n, unit_bytes] against `units` [n]. Raises UnitCorrupt for the first."""
        expected = self._table[site.first_crc : site.first_crc + site.count][units]
        wrong = np.flatnonzero(crc32c_units(values) != expected)
        if wrong.size:
            raise UnitCorrupt(site, int(units[wrong[0]]))
