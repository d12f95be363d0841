"""The predict-and-stage pipeline: from a target to units that lie in the window.

    choose    the program's top units, the named ones, or all          selection
    subtract  what the host holds, by its residency and the target     hosts
    lease     one piece of the window a target                         window
    bring     from the unit cache, or from NAND with a CRC check       unit cache, FTL

A target *to DRAM* leases nothing: its units are brought into the unit cache and held there for the
command that will want them (`csd_device.dram.unit_cache`). It is a guess, so it never fails a
command for want of room or for the media's sake: it brings what it can, the highest scores first,
and says how many it could not. Nor is it waited for, unless a command has nothing else: a command
is done when its targets to the window are, and what goes to DRAM is there at its own `ready_ns`.

Everything is arrays of unit numbers, ascending; row i of a lease is unit i of them. They are read
in the order in which they lie, so that two units of a page cost one read of it. What is read
goes into its lease and into the unit cache with its CRC32C computed, in one pass where that can be
(`csd_device.checked_copy`). A command stages all of its targets or none: what fails gives back what
it had leased.

Units that the media cannot give back, or whose CRC differs, end a command only when all of its
targets were looked at, so that the host learns at once everything that it has to have from another
copy. That path may be slow: a piece with a lost unit is read again in parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.dram import Lease, UnitCache, Window
from csd_device.errors import CommandError, UnrecoveredRead
from csd_device.firmware.commands import LostUnits, StagedSite, StageResult, Target, What
from csd_device.firmware.hosts import Host, flags_of
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.models import LoadedModel, SiteRecord
from csd_device.firmware.prediction import Prediction
from csd_device.firmware.selection import kept_count, select_top
from csd_device.firmware.unreadable import PieceUnreadable, UnitsUnreadable
from csd_device.ftl import Ftl, PageReads
from csd_protocol.crc32c import crc32c_units
from csd_protocol.status import Status

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

PIECE_BYTES = 32 << 20  # read at once
ASIDE_BYTES = 4 << 20  # the same of what goes to DRAM alone, by way of memory of that size
NO_UNITS: U32 = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one target comes to. `predicted` is empty unless a program chose."""

    units: U32  # to be staged, ascending
    predicted: U32
    all_missing: bool  # everything that the host lacks of what a target of all units means
    scores: F32 | None = None  # of all units of the site, where a program chose

    def best(self, units: U32, count: int) -> U32:
        """At most `count` of these units, ascending: the highest scores, or else the first."""
        if units.size <= count:
            return units
        if self.scores is None:
            return units[:count]
        return units[select_top(self.scores[units], count)]


@dataclass(frozen=True, slots=True)
class _Brought:
    units_from_dram: int
    reads: PageReads
    read: U32  # what came from NAND
    units_from_copies: int = 0
    dram_ready_ns: int = 0  # when what was in DRAM had come from NAND
    units_no_room: int = 0
    units_lost: int = 0


class Stager:
    """Stages targets for hosts."""

    def __init__(self, ftl: Ftl, window: Window, cache: UnitCache) -> None:
        self.window = window
        self.cache = cache
        self._ftl = ftl
        self._scratch: U8 = np.empty(0, np.uint8)

    def stage(
        self,
        host: Host,
        model: LoadedModel,
        targets: tuple[Target, ...],
        prediction: Prediction | None,
        time: CommandTime,
    ) -> StageResult:
        """Stages every target or none.

        Raises CommandError: No Such Site or Unit, Invalid Field, Window Full, UnitsUnreadable
        (Unrecovered Read, End-to-end Guard Check Error), and what the program raises.
        """
        to_dram_count = sum(target.to_dram for target in targets)
        if max(to_dram_count, len(targets) - to_dram_count) > len(model.sites):
            raise CommandError(
                Status.INVALID_FIELD,
                f"{len(targets)} targets, {to_dram_count} of them to DRAM; {model.name} has "
                f"{len(model.sites)} sites",
            )
        staged: list[StagedSite] = []
        start = time.fork()
        waits_for_all = all(target.to_dram for target in targets)
        try:
            for target in targets:
                fork = start.fork()
                staged.append(self._stage_target(host, model, target, prediction, fork))
                if waits_for_all or not target.to_dram:
                    time.adopt(fork)
        except PieceUnreadable as first:
            self.give_back(host, staged)
            others = self._survey(host, model, targets, prediction, time)
            raise UnitsUnreadable(model, [first, *others]) from None
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
        copies = _copies_of(site, target, choice.units)
        if target.to_dram:
            return self._stage_to_dram(site, choice, copies, time)
        count = choice.units.size
        lease, brought = Lease(0, 0, 0), _NOTHING
        if count:
            lease = self.window.lease(count * site.unit_bytes, host.host_id)
            try:
                brought = self._bring(site, choice.units, lease, copies, choice.all_missing)
            except CommandError:
                self.window.release(lease.id, host.host_id)
                raise
        time.read_pages(brought.reads)
        time.wait_for_pages(brought.dram_ready_ns)
        time.move_dram((count + brought.units_from_dram) * site.unit_bytes)
        self.cache.set_ready(site.key, brought.read, time.now_ns)
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
            units_from_copies=brought.units_from_copies,
        )

    def _stage_to_dram(
        self, site: SiteRecord, choice: _Choice, copies: I64 | None, time: CommandTime
    ) -> StagedSite:
        """Brings units into the unit cache, as far as they can be had and have room there."""
        brought = self._bring_to_dram(site, choice, copies)
        time.read_pages(brought.reads)
        time.move_dram(brought.read.size * site.unit_bytes)
        self.cache.set_ready(site.key, brought.read, time.now_ns)
        time.wait_for_pages(brought.dram_ready_ns)
        count = brought.units_from_dram + brought.read.size
        all_missing = choice.all_missing and count == choice.units.size
        return StagedSite(
            site=site.site,
            predicted=choice.predicted,
            units=NO_UNITS if all_missing else self.cache.those_here(site.key, choice.units),
            all_missing=all_missing,
            unit_count=count,
            window_offset=0,
            length_bytes=0,
            lease=0,
            ready_ns=time.timing().done_ns,
            units_from_dram=brought.units_from_dram,
            nand_page_reads=brought.reads.ppns.size,
            units_from_copies=brought.units_from_copies,
            to_dram=True,
            units_no_room=brought.units_no_room,
            units_lost=brought.units_lost,
        )

    def _bring_to_dram(self, site: SiteRecord, choice: _Choice, copies: I64 | None) -> _Brought:
        cache = self.cache
        slots = cache.hold(site.key, choice.units, is_new=False)
        missing = choice.units[slots < 0]
        wanted = choice.best(missing, cache.room(site.unit_bytes, missing.size))
        wanted = wanted[site.by_place(wanted, np.arange(wanted.size))]
        parts, reads, lost = [NO_UNITS], [_NO_READS], 0
        for rows in _pieces(np.arange(wanted.size), site.unit_bytes, ASIDE_BYTES):
            units = wanted[rows]
            of = None if copies is None else copies[np.searchsorted(choice.units, units)]
            try:
                reads.append(self._read_aside(site, units, of))
            except PieceUnreadable as error:
                reads.append(error.reads)
            here = cache.hold(site.key, units, is_new=True) >= 0
            parts.append(units[here])
            lost += int(np.count_nonzero(~here))
        read = np.concatenate(parts)
        found = slots[slots >= 0]
        return _Brought(
            units_from_dram=found.size,
            reads=_joined(reads),
            read=read,
            units_from_copies=_count_copies(copies, np.searchsorted(choice.units, read)),
            dram_ready_ns=cache.ready_ns(site.key, found),
            units_no_room=missing.size - wanted.size,
            units_lost=lost,
        )

    def _bring(
        self, site: SiteRecord, units: U32, lease: Lease, copies: I64 | None, is_scan: bool
    ) -> _Brought:
        """Fills the lease with these units, row after row, each from its copy (None: all first)."""
        out = self.window.view(lease.offset, lease.length).reshape(units.size, site.unit_bytes)
        slots = self.cache.lookup(site.key, units)
        hits = np.flatnonzero(slots >= 0)
        if hits.size:
            self.cache.copy_out(site.key, slots[hits], out, hits)
        ready_ns = self.cache.ready_ns(site.key, slots[hits])
        if hits.size == units.size:
            return _Brought(units.size, _NO_READS, NO_UNITS, dram_ready_ns=ready_ns)
        misses = site.by_place(units, np.flatnonzero(slots < 0))
        reads = []
        for rows in _pieces(misses, site.unit_bytes):
            of = None if copies is None else copies[rows]
            reads.append(self._read_checked(site, units[rows], out, rows, of, is_scan))
        from_copies = _count_copies(copies, misses)
        return _Brought(hits.size, _joined(reads), units[misses], from_copies, ready_ns)

    def _read_aside(self, site: SiteRecord, units: U32, copies: I64 | None) -> PageReads:
        """Reads units for the sake of the unit cache alone."""
        needed = units.size * site.unit_bytes
        if self._scratch.size < needed:
            self._scratch = np.empty(needed, np.uint8)
        aside = self._scratch[:needed].reshape(units.size, site.unit_bytes)
        return self._read_checked(site, units, aside, np.arange(units.size), copies)

    def _read_checked(
        self,
        site: SiteRecord,
        units: U32,
        out: U8,
        rows: I64,
        copies: I64 | None,
        is_scan: bool = False,
    ) -> PageReads:
        """Reads units from NAND into out[rows], checks them and has them cached.

        Raises PieceUnreadable for those that cannot be had; the others are cached.
        """
        offsets = site.offsets_of(units)
        if copies is not None:
            offsets += copies * site.copy_stride_bytes
        of_bytes = site.alike_bytes if is_scan else None
        room = self.cache.claim(site.key, units, site.unit_bytes, of_bytes)
        try:
            reads, found = self._ftl.read_checked(offsets, out, rows, room.keep)
        except UnrecoveredRead as error:
            data = out[rows]
            reads, unread = self._read_apart(offsets, data, error)
            out[rows] = data
            lost = unread | (crc32c_units(data) != site.crcs[units])
            status, why = error.status, error.detail
        else:
            expected = site.crcs[units]
            if np.array_equal(found, expected):
                self.cache.own(room)
                return reads
            lost = found != expected
            at = int(np.argmax(lost))
            status = Status.GUARD_CHECK
            why = f"CRC32C {found[at]:08x}, packed with {expected[at]:08x}"
        if not lost.all():  # the others are asked for again
            self.cache.insert(site.key, units[~lost], out[rows[~lost]])
        if not lost.any():  # a second read went well
            return reads
        raise PieceUnreadable(status, why, _by_copy(site, units, lost, copies), reads)

    def _read_apart(
        self, offsets: I64, data: U8, first: UnrecoveredRead
    ) -> tuple[PageReads, Flags]:
        """Reads all that can be read of units that cannot all be, and which those are [n].

        The media says which rows are lost where it knows; else halves are tried, down to one unit.
        """
        unread = np.zeros(offsets.size, np.bool_)
        reads = [_NO_READS]
        left = _parts_left(np.arange(offsets.size), first, unread)
        while left:
            rows = left.pop()
            part = np.empty((rows.size, data.shape[1]), np.uint8)
            try:
                reads.append(self._ftl.read_units(offsets[rows], data.shape[1], part))
                data[rows] = part
            except UnrecoveredRead as error:
                left += _parts_left(rows, error, unread)
        return _joined(reads), unread

    def _survey(
        self,
        host: Host,
        model: LoadedModel,
        targets: tuple[Target, ...],
        prediction: Prediction | None,
        time: CommandTime,
    ) -> Iterator[PieceUnreadable]:
        """Everything that these targets need and cannot have; nothing is leased."""
        for target in targets:
            if target.to_dram:
                continue
            site = model.site(target.site)
            units = _choose(site, target, host, prediction, time).units
            copies = _copies_of(site, target, units)
            misses = site.by_place(units, np.flatnonzero(self.cache.lookup(site.key, units) < 0))
            for rows in _pieces(misses, site.unit_bytes, ASIDE_BYTES):
                of = None if copies is None else copies[rows]
                try:
                    time.read_pages(self._read_aside(site, units[rows], of))
                except PieceUnreadable as error:
                    time.read_pages(error.reads)
                    yield error


_NO_READS = PageReads(np.empty(0, np.int64), np.empty(0, np.int64))
_NOTHING = _Brought(0, _NO_READS, NO_UNITS)


def _choose(
    site: SiteRecord, target: Target, host: Host, prediction: Prediction | None, time: CommandTime
) -> _Choice:
    held = _held(site, target, host)
    if prediction is not None and not prediction.admits(site):
        return _Choice(NO_UNITS, NO_UNITS, False)
    if target.what is What.UNITS:
        units = _named(site, target.units)
        return _Choice(units if held is None else units[~held[units]], NO_UNITS, False)
    if target.what is What.KEEP:
        scores = _scores(site, target.keep, prediction, time)
        if scores is not None:
            predicted = select_top(scores, kept_count(target.keep, site.count))
            units = predicted if held is None else predicted[~held[predicted]]
            return _Choice(units, predicted, False, scores)
    first, end = _range(site, target)
    if held is None:
        return _Choice(np.arange(first, end, dtype=np.uint32), NO_UNITS, True)
    lacking = first + np.flatnonzero(~held[first:end])
    return _Choice(lacking.astype(np.uint32), NO_UNITS, True)


def _range(site: SiteRecord, target: Target) -> tuple[int, int]:
    """Which units a target of all means: from the first on, below the second."""
    if target.what is not What.ALL:
        return 0, site.count
    end = site.count if target.end is None else target.end
    if not target.first < end <= site.count:
        raise CommandError(
            Status.NO_SITE, f"{site.name} has {site.count} units, none from {target.first} to {end}"
        )
    return target.first, end


def _held(site: SiteRecord, target: Target, host: Host) -> Flags | None:
    """Which units of the site the host holds, so that they are not staged; None: none."""
    told = None if target.ignore_residency else host.holds(site)
    if not target.held:
        return told
    named = flags_of(site, target.held)
    return named if told is None else told | named


def _scores(
    site: SiteRecord, keep: float, prediction: Prediction | None, time: CommandTime
) -> F32 | None:
    """What the program says of the site's units; None: all are kept, which needs no program."""
    if prediction is None:
        raise CommandError(
            Status.INVALID_FIELD, f"{site.name}: a kept fraction needs PREDICT_AND_STAGE"
        )
    if not keep >= 0:
        raise CommandError(Status.INVALID_FIELD, f"{site.name}: a kept fraction of {keep}")
    if keep >= 1:
        return None
    return prediction.scores(site, time)


def _named(site: SiteRecord, units: U32) -> U32:
    if units.size and not (units[-1] < site.count and (units[1:] > units[:-1]).all()):
        raise CommandError(
            Status.NO_SITE,
            f"{site.name} has {site.count} units; those named must be ascending and below that",
        )
    return units


def _copies_of(site: SiteRecord, target: Target, units: U32) -> I64 | None:
    """Which copy each of these units is read from [n]; None: all from the first."""
    if not target.copy and not target.elsewhere:
        return None
    for copy in (target.copy, *(part.copy for part in target.elsewhere)):
        if copy >= site.copies:
            raise CommandError(
                Status.NO_SITE, f"{site.name} has {site.copies} copies, none numbered {copy}"
            )
    copies = np.full(units.size, target.copy, np.int64)
    for part in target.elsewhere:
        copies[np.isin(units, _named(site, part.units))] = part.copy
    return copies


def _count_copies(copies: I64 | None, rows: I64) -> int:
    """How many of these rows are read from another copy than the first."""
    return 0 if copies is None else int(np.count_nonzero(copies[rows]))


def _parts_left(rows: I64, error: UnrecoveredRead, unread: Flags) -> list[I64]:
    """What of these rows to read next; those that the error gives up are marked in `unread`."""
    if error.rows is not None and error.rows.size:
        unread[rows[error.rows]] = True
        return [np.delete(rows, error.rows)]
    if rows.size == 1:
        unread[rows] = True
        return []
    return list(np.array_split(rows, 2))


def _by_copy(site: SiteRecord, units: U32, lost: Flags, copies: I64 | None) -> list[LostUnits]:
    if copies is None:
        return [LostUnits(site.site, 0, np.sort(units[lost]))]
    return [
        LostUnits(site.site, int(copy), np.sort(units[lost & (copies == copy)]))
        for copy in np.unique(copies[lost])
    ]


def _pieces(rows: I64, unit_bytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[I64]:
    """Parts of the rows to be read at once, of one unit at least."""
    step = max(1, piece_bytes // unit_bytes)
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
