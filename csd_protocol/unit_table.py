"""The table beside each copy of a packed model: what each unit's bytes come to, and where it lies.

uint32 little endian: the CRC32C of each unit, sites in order. In a placed model the slots of its
neurons follow, FFN sites in order: neuron i of a site lies in slot `slots[i]`, so at
`site.offset_bytes + slots[i] * site.unit_bytes`. Everybody speaks of a unit by its number.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import FormatError, PackedModel, Site

U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class UnitTable:
    """crcs: uint32 [units]. slots: uint32 [count] of each placed site, by site."""

    crcs: U32
    slots: dict[int, U32]

    def crcs_of(self, site: Site) -> U32:
        return self.crcs[site.first_crc : site.first_crc + site.count]

    def encode(self) -> bytes:
        parts = [self.crcs, *(self.slots[site] for site in sorted(self.slots))]
        return np.concatenate(parts).astype("<u4").tobytes()


def decode_unit_table(model: PackedModel, data: bytes) -> UnitTable:
    """Raises FormatError when two units of a site would lie in one slot."""
    table = np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
    crcs, left = np.split(table, [model.unit_count])
    slots: dict[int, U32] = {}
    for site in model.ffns() if model.placed else ():
        slots[site.site], left = np.split(left, [site.count])
        if not np.array_equal(np.sort(slots[site.site]), np.arange(site.count)):
            raise FormatError(f"unit table of {model.name}: {site.name} has slots twice, or none")
    return UnitTable(crcs, slots)
