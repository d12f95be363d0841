"""The predict-and-stage pipeline: from a target to units that lie in the window.

    choose    the program's top units, the named ones, or all          selection
    subtract  what the host holds                                      hosts
    lease     one piece of the window a target                         window
    bring     from the unit cache, or from NAND with a CRC check       unit cache, FTL

Everything is arrays of unit numbers, ascending; row i of a lease is unit i of them. What is read
goes into its lease and into the unit cache with its CRC32C computed, in one pass where that can be
(`csd_device.checked_copy`). A command stages all of its targets or none: what fails gives back what
it had leased.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.dram import Lease, UnitCache, Window
from csd_device.errors import CommandError
from csd_device.firmware.commands import StagedSite, StageResult, Target, What
from csd_device.firmware.hosts import Host
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.models import LoadedModel, SiteRecord
from csd_device.firmware.prediction import Prediction
from csd_device.ftl import Ftl, PageReads
from csd_device.gather import gather
from csd_protocol.status import Status

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

PIECE_BYTES, BULK_BYTES = 1 << 20, 16 << 20
NO_UNITS: U32 = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one target comes to. `predicted` is empty unless a program chose."""

    units: U32  # to be staged, ascending
    predicted: U32
    all_missing: bool


@dataclass(frozen=True, slots=True)
class _Brought:
    units_from_dram: int
    reads: PageReads


class Stager:
    """Stages targets for hosts."""

    def __init__(self, ftl: Ftl, window: Window, cache: UnitCache) -> None:
        self.window = window
        self.cache = cache
        self._ftl = ftl
        self._scratch: U8 = np.empty(PIECE_BYTES, np.uint8)

    def stage(
        self,
        host: Host,
        model: LoadedModel,
        targets: tuple[Target, ...],
        prediction: Prediction | None,
        time: CommandTime,
    ) -> StageResult:
        """Stages every target or none.

        Raises CommandError: No Such Site or Unit, Invalid Field, Window Full, End-to-end Guard
        Check Error naming site and unit, and what the program or the media raise.
        """
        if len(targets) > len(model.sites):
            raise CommandError(
                Status.INVALID_FIELD,
                f"{len(targets)} targets; {model.name} has {len(model.sites)} sites",
            )
        staged: list[StagedSite] = []
        start = time.fork()
        try:
            for target in targets:
                fork = start.fork()
                staged.append(self._stage_target(host, model, target, prediction, fork))
                time.adopt(fork)
        except CommandError:
            self.give_back(host, staged)
            raise
        return StageResult(tuple(staged))

    def give_back(self, host: Host, staged: list[StagedSite] | tuple[StagedSite, ...]) -> None:
        """Releases what was leased for these, unless the host released it already."""
        self.pass_back(host, tuple(site.lease for site in staged))

    def pass_back(self, host: Host, leases: tuple[int, ...]) -> None:
        """Releases those of the leases that the host still holds."""
        if not leases:
            return
        held = {lease.id for lease in self.window.leases_of(host.host_id)}
        for lease in leases:
            if lease in held:
                self.window.release(lease, host.host_id)

    def _stage_target(
        self,
        host: Host,
        model: LoadedModel,
        target: Target,
        prediction: Prediction | None,
        time: CommandTime,
    ) -> StagedSite:
        site = model.site(target.site)
        choice = _choose(site, target, host, prediction, time)
        count = choice.units.size
        lease, brought = Lease(0, 0, 0), _Brought(0, _NO_READS)
        if count:
            lease = self.window.lease(count * site.unit_bytes, host.host_id)
            try:
                brought = self._bring(site, choice.units, lease)
            except CommandError:
                self.window.release(lease.id, host.host_id)
                raise
        time.read_pages(brought.reads)
        time.move_dram((count + brought.units_from_dram) * site.unit_bytes)
        time.send(lease.length)
        return StagedSite(
            site=site.site,
            predicted=choice.predicted,
            units=NO_UNITS if choice.all_missing else choice.units,
            all_missing=choice.all_missing,
            unit_count=count,
            window_offset=lease.offset,
            length_bytes=lease.length,
            lease=lease.id,
            ready_ns=time.timing().done_ns,
            units_from_dram=brought.units_from_dram,
            nand_page_reads=brought.reads.ppns.size,
        )

    def _bring(self, site: SiteRecord, units: U32, lease: Lease) -> _Brought:
        """Fills the lease with these units, row after row."""
        out = self.window.view(lease.offset, lease.length).reshape(units.size, site.unit_bytes)
        slots = self.cache.lookup(site.key, units)
        hits = np.flatnonzero(slots >= 0)
        if hits.size:
            self.cache.copy_out(site.key, slots[hits], out, hits)
        if hits.size == units.size:
            return _Brought(units.size, _NO_READS)
        misses = np.flatnonzero(slots < 0)
        reads = [
            self._read_piece(site, units, rows, out) for rows in _pieces(misses, site.unit_bytes)
        ]
        return _Brought(hits.size, _joined(reads))

    def _read_piece(self, site: SiteRecord, units: U32, rows: I64, out: U8) -> PageReads:
        """Reads units[rows] from NAND into out[rows], checks them, and has them cached."""
        wanted = units[rows]
        side_by_side = int(rows[-1]) - int(rows[0]) + 1 == rows.size
        data = out[rows[0] : rows[-1] + 1] if side_by_side else self._scratch_rows(rows, site)
        offsets = site.offset_bytes + wanted.astype(np.int64) * site.unit_bytes
        room = self.cache.claim(site.key, wanted, site.unit_bytes)
        reads, checksums = self._ftl.read_checked(offsets, data, room.keep)
        _check_units(site, wanted, checksums)
        self.cache.own(room)
        if not side_by_side:
            lengths = np.full(rows.size, site.unit_bytes, np.int64)
            starts = np.arange(rows.size) * site.unit_bytes
            gather(data.reshape(-1), starts, lengths, rows * site.unit_bytes, out.reshape(-1))
        return reads

    def _scratch_rows(self, rows: I64, site: SiteRecord) -> U8:
        needed = rows.size * site.unit_bytes
        if self._scratch.size < needed:
            self._scratch = np.empty(needed, np.uint8)
        return self._scratch[:needed].reshape(rows.size, site.unit_bytes)


_NO_READS = PageReads(np.empty(0, np.int64), np.empty(0, np.int64))


def _choose(
    site: SiteRecord, target: Target, host: Host, prediction: Prediction | None, time: CommandTime
) -> _Choice:
    held = None if target.ignore_residency else host.holds(site)
    if target.what is What.UNITS:
        units = _named(site, target.units)
        return _Choice(units if held is None else units[~held[units]], NO_UNITS, False)
    if target.what is What.KEEP:
        predicted = _predicted(site, target.keep, prediction, time)
        if predicted is not None:
            units = predicted if held is None else predicted[~held[predicted]]
            return _Choice(units, predicted, False)
    if held is None:
        return _Choice(np.arange(site.count, dtype=np.uint32), NO_UNITS, True)
    return _Choice(np.flatnonzero(~held).astype(np.uint32), NO_UNITS, True)


def _predicted(
    site: SiteRecord, keep: float, prediction: Prediction | None, time: CommandTime
) -> U32 | None:
    """The top fraction by the program's score; None: everything, which needs no program."""
    if prediction is None:
        raise CommandError(
            Status.INVALID_FIELD, f"{site.name}: a kept fraction needs PREDICT_AND_STAGE"
        )
    if not keep >= 0:
        raise CommandError(Status.INVALID_FIELD, f"{site.name}: a kept fraction of {keep}")
    if keep >= 1:
        return None
    return prediction.top_units(site, keep, time)


def _named(site: SiteRecord, units: U32) -> U32:
    if units.size and not (units[-1] < site.count and (units[1:] > units[:-1]).all()):
        raise CommandError(
            Status.NO_SITE,
            f"{site.name} has {site.count} units; those named must be ascending and below that",
        )
    return units


def _check_units(site: SiteRecord, units: U32, found: U32) -> None:
    """Raises CommandError (Guard Check) naming the first unit whose CRC32C does not match."""
    expected = site.crcs[units]
    if np.array_equal(found, expected):
        return
    first = int(np.argmax(found != expected))
    raise CommandError(
        Status.GUARD_CHECK,
        f"unit {units[first]} of {site.name} (site {site.site}): CRC32C {found[first]:08x}, "
        f"packed with {expected[first]:08x}. Pack the model again",
    )


def _pieces(rows: I64, unit_bytes: int) -> Iterator[I64]:
    """Parts of the rows to be read at once, of one unit at least.

    Rows side by side go straight to the window, in parts of at most BULK_BYTES; others by way of
    scratch memory that stays in the processor's cache, PIECE_BYTES of it.
    """
    side_by_side = rows.size > 0 and int(rows[-1]) - int(rows[0]) + 1 == rows.size
    step = max(1, (BULK_BYTES if side_by_side else PIECE_BYTES) // unit_bytes)
    return (rows[start : start + step] for start in range(0, rows.size, step))


def _joined(reads: list[PageReads]) -> PageReads:
    if len(reads) == 1:
        return reads[0]
    extra_ns = None
    if any(part.extra_ns is not None for part in reads):
        extra_ns = np.concatenate([_extra_ns(part) for part in reads])
    return PageReads(
        np.concatenate([part.ppns for part in reads]),
        np.concatenate([part.transfer_bytes for part in reads]),
        extra_ns,
    )


def _extra_ns(reads: PageReads) -> I64:
    return np.zeros_like(reads.ppns) if reads.extra_ns is None else reads.extra_ns
