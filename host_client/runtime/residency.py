"""Resident units: what stays in host memory for the whole run, and where each unit lies in it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role, Site
from host_client.io import Buffer
from host_client.runtime.fetch import Fetcher
from host_client.runtime.plan import Plan

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class ResidentSite:
    """The resident units of one site.

    units: uint32 [n] ascending; values: uint16 [n, unit bytes / 2]; position: int32 [count], where
    in `values` each unit of the site lies, -1 when it does not; missing: uint32, the other units.
    """

    site: Site
    units: U32
    values: U16
    position: npt.NDArray[np.int32]
    missing: U32

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        return self.position >= 0


def choose_units(count: int, frequencies: U32 | None) -> U32:
    """Which `count` units of a site stay resident, ascending: the most frequent, else the first.

    frequencies: of each unit of the site.
    """
    if frequencies is None:
        return np.arange(count, dtype=np.uint32)
    hottest = np.argsort(-frequencies.astype(np.int64), kind="stable")[:count]
    return np.sort(hottest).astype(np.uint32)


def load_resident(
    model: PackedModel,
    plan: Plan,
    fetcher: Fetcher,
    frequencies: U32 | None,
    progress: Progress,
) -> dict[int, ResidentSite]:
    """Read what the plan keeps, site by site. frequencies: [FFNs, neurons]."""
    resident: dict[int, ResidentSite] = {}
    done_bytes = 0
    for site in model.sites:
        of_site = None
        if site.role is Role.FFN and frequencies is not None:
            of_site = frequencies[model.program_layer(site)]
        units = choose_units(plan.resident_units[site.site], of_site)
        buffer = Buffer(units.size * site.unit_bytes)
        if units.size:
            fetcher.fetch(site, units, buffer)
        resident[site.site] = _index(site, units, buffer)
        done_bytes += units.size * site.unit_bytes
        progress(done_bytes, plan.resident_bytes)
    return resident


def _index(site: Site, units: U32, buffer: Buffer) -> ResidentSite:
    position = np.full(site.count, -1, np.int32)
    position[units] = np.arange(units.size, dtype=np.int32)
    values = buffer.array.reshape(units.size, site.unit_bytes).view(np.uint16)
    missing = np.flatnonzero(position < 0).astype(np.uint32)
    return ResidentSite(site, units, values, position, missing)


def residency_of(sites: Iterable[ResidentSite]) -> dict[int, npt.NDArray[np.bool_] | bool]:
    """What to tell the drive that the host holds, by site."""
    told: dict[int, npt.NDArray[np.bool_] | bool] = {}
    for entry in sites:
        whole = entry.units.size == entry.site.count
        told[entry.site.site] = True if whole else (entry.held if entry.units.size else False)
    return told
