"""The packed models on the drive, as the firmware needs them: where units lie, and their CRCs.

Read from the drive's own flash when a command first names a model; forgotten when a host writes to
the directory or into the model's extent. Tables take on-drive DRAM while they are loaded.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.dram import Arena
from csd_device.errors import CommandError, UnrecoveredRead
from csd_device.firmware.modelled_time import CommandTime
from csd_device.ftl import Ftl
from csd_protocol.packed import (
    BLOCK_BYTES,
    DIRECTORY_SLOT_BYTES,
    DIRECTORY_SLOTS,
    MODELS_OFFSET_BYTES,
    Directory,
    DirectoryEntry,
    Extent,
    FormatError,
    PackedModel,
    Role,
    Site,
    decode_directory,
    decode_manifest,
)
from csd_protocol.status import Status
from csd_protocol.unit_table import UnitTable, decode_unit_table
from csd_protocol.units import format_size

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

MANIFEST_BYTES_MAX = 64 << 20  # hosts write manifests: what one may make the firmware read
SITE_ENTRY_BYTES = 64  # of on-drive DRAM, in the firmware's own site table; assumed


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One site, ready for the hot path."""

    site: int
    name: str
    layer: int
    role: Role
    expert: int  # of a mixture's layer; -1: no expert's
    program_layer: int  # what programs call its layer
    count: int
    unit_bytes: int
    alike_bytes: int  # of all units of this size in the model
    offset_bytes: int
    copies: int
    copy_stride_bytes: int
    key: tuple[int, int]  # (model, site)
    crcs: U32  # [count]
    slots: U32 | None  # [count], where each unit lies; None: in the order of their numbers

    def offsets_of(self, units: U32) -> I64:
        """Where these units lie in the first copy, in bytes of the namespace [n]."""
        slots = units if self.slots is None else self.slots[units]
        return self.offset_bytes + slots.astype(np.int64) * self.unit_bytes

    def by_place(self, units: U32, rows: I64) -> I64:
        """`rows` of `units`, in the order in which those lie."""
        if self.slots is None:
            return rows
        return rows[np.argsort(self.slots[units[rows]])]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A packed model's tables in on-drive DRAM."""

    model: int
    name: str
    entry: DirectoryEntry
    sites: tuple[SiteRecord, ...]

    def site(self, index: int) -> SiteRecord:
        """Raises CommandError (No Such Site or Unit)."""
        if not 0 <= index < len(self.sites):
            raise CommandError(
                Status.NO_SITE, f"{self.name} has {len(self.sites)} sites, none numbered {index}"
            )
        return self.sites[index]

    def find(self, role: Role, program_layer: int) -> SiteRecord:
        """The site that programs call this. Raises CommandError (No Such Site or Unit)."""
        for site in self.sites:
            if site.role is role and site.program_layer == program_layer:
                return site
        raise CommandError(
            Status.NO_SITE, f"{self.name} has no {role.value} in layer {program_layer}"
        )


class ModelCatalog:
    """Models by identifier, loaded when first named."""

    def __init__(self, ftl: Ftl, arena: Arena, on_forgotten: Callable[[int], None]) -> None:
        """`on_forgotten(model)` is told of each model whose units may have changed."""
        self._ftl = ftl
        self._arena = arena
        self._on_forgotten = on_forgotten
        self._directory: Directory | None = None
        self._extents: tuple[Extent, ...] | None = None  # of all models; None: not known
        self._loaded: dict[int, LoadedModel] = {}

    def get(self, model: int, time: CommandTime) -> LoadedModel:
        """The model's tables; reads them from NAND, in `time`, when they are not loaded.

        Raises CommandError: No Such Packed Model for one that is not there, not complete or
        damaged, On-Drive DRAM Exceeded when its tables do not fit.
        """
        found = self._loaded.get(model)
        if found is None:
            found = self._loaded[model] = self._load(self._entry(model, time), time)
        return found

    def holds_weights(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether these bytes lie in a model, packed or being packed. Takes no modelled time."""
        if offset_bytes < MODELS_OFFSET_BYTES:
            return False
        if self._extents is None:
            self._extents = self._find_extents()
        end_bytes = offset_bytes + length_bytes
        return any(
            extent.offset_bytes <= offset_bytes
            and end_bytes <= extent.offset_bytes + extent.length_bytes
            for extent in self._extents
        )

    def note_change(self, offset_bytes: int, length_bytes: int) -> None:
        """These bytes of the namespace may have changed: forgets what was read from them."""
        if offset_bytes < MODELS_OFFSET_BYTES:
            self._directory = self._extents = None
            self._forget(list(self._loaded.values()))
        end_bytes = offset_bytes + length_bytes
        self._forget(
            [
                loaded
                for loaded in self._loaded.values()
                if offset_bytes
                < loaded.entry.extent.offset_bytes + loaded.entry.extent.length_bytes
                and loaded.entry.extent.offset_bytes < end_bytes
            ]
        )

    def _forget(self, models: list[LoadedModel]) -> None:
        for loaded in models:
            del self._loaded[loaded.model]
            self._arena.free(_allotment(loaded.model))
            self._on_forgotten(loaded.model)

    def _entry(self, model: int, time: CommandTime) -> DirectoryEntry:
        if self._directory is None:
            self._directory = self._read_directory(time)
        for entry in self._directory.models:
            if entry.model == model:
                if entry.state != "complete":
                    raise _no_model(f"model {model} ({entry.name}) is not packed to its end")
                return entry
        known = ", ".join(f"{entry.model} ({entry.name})" for entry in self._directory.models)
        raise _no_model(f"no model {model} on this drive; there are: {known or 'none'}")

    def _find_extents(self) -> tuple[Extent, ...]:
        """None where there is no directory, or none that can be read."""
        try:
            directory = self._directory or self._read_directory(CommandTime(None, 0))
        except CommandError:
            return ()
        return tuple(entry.extent for entry in directory.models)

    def _read_directory(self, time: CommandTime) -> Directory:
        data = self._read(Extent(offset_bytes=0, length_bytes=MODELS_OFFSET_BYTES), time)
        slots = [
            data[slot * DIRECTORY_SLOT_BYTES : (slot + 1) * DIRECTORY_SLOT_BYTES].tobytes()
            for slot in range(DIRECTORY_SLOTS)
        ]
        try:
            return decode_directory(slots)
        except FormatError as error:
            raise _no_model(str(error)) from error

    def _load(self, entry: DirectoryEntry, time: CommandTime) -> LoadedModel:
        if entry.manifest.length_bytes > MANIFEST_BYTES_MAX:
            raise _no_model(
                f"model {entry.model} ({entry.name}): a manifest of "
                f"{format_size(entry.manifest.length_bytes)}; "
                f"{format_size(MANIFEST_BYTES_MAX)} is the most"
            )
        try:
            manifest = decode_manifest(self._read(entry.manifest, time).tobytes())
        except FormatError as error:
            raise _no_model(f"model {entry.model} ({entry.name}): {error}") from error
        self._check_extents(entry, manifest)
        table_bytes = manifest.crc_table.length_bytes + SITE_ENTRY_BYTES * len(manifest.sites)
        self._arena.allot(_allotment(entry.model), table_bytes)
        try:
            table = decode_unit_table(manifest, self._read_table(manifest, time).tobytes())
        except FormatError as error:
            self._arena.free(_allotment(entry.model))
            raise _no_model(f"model {entry.model} ({entry.name}): {error}") from error
        except CommandError:
            self._arena.free(_allotment(entry.model))
            raise
        alike_bytes: Counter[int] = Counter()
        for site in manifest.sites:
            alike_bytes[site.unit_bytes] += site.length_bytes
        sites = tuple(
            _record(entry.model, manifest, site, table, alike_bytes) for site in manifest.sites
        )
        return LoadedModel(entry.model, entry.name, entry, sites)

    def _read_table(self, manifest: PackedModel, time: CommandTime) -> U8:
        """The CRC table beside the first copy that can be read."""
        for copy in range(manifest.copies - 1):
            with suppress(UnrecoveredRead):
                return self._read(manifest.table_of(copy), time)
        return self._read(manifest.table_of(manifest.copies - 1), time)

    def _check_extents(self, entry: DirectoryEntry, manifest: PackedModel) -> None:
        """Raises CommandError when a manifest points outside the model's own extent."""
        begin = entry.extent.offset_bytes
        further_bytes = (manifest.copies - 1) * manifest.copy_stride_bytes
        end = begin + entry.extent.length_bytes - further_bytes
        spans = [(site.offset_bytes, site.length_bytes, site.name) for site in manifest.sites]
        table = manifest.crc_table
        for offset, length, name in [*spans, (table.offset_bytes, table.length_bytes, "CRC table")]:
            if not begin <= offset <= offset + length <= end:
                raise _no_model(
                    f"model {entry.model} ({entry.name}): {name} lies at bytes {offset} to "
                    f"{offset + length}, outside its extent {begin} to {end}"
                )

    def _read(self, extent: Extent, time: CommandTime) -> U8:
        if extent.offset_bytes + extent.length_bytes > self._ftl.capacity_sectors * BLOCK_BYTES:
            raise _no_model(f"bytes from {extent.offset_bytes} lie beyond the namespace")
        data = np.empty(extent.length_bytes, np.uint8)
        time.read_pages(self._ftl.read(extent.offset_bytes, data))
        return data


def _allotment(model: int) -> str:
    return f"model.{model}"


def _no_model(detail: str) -> CommandError:
    return CommandError(Status.NO_MODEL, detail)


def _record(
    model: int, manifest: PackedModel, site: Site, table: UnitTable, alike_bytes: Mapping[int, int]
) -> SiteRecord:
    return SiteRecord(
        site=site.site,
        name=site.name,
        layer=site.layer,
        role=site.role,
        expert=site.expert,
        program_layer=manifest.program_layer(site),
        count=site.count,
        unit_bytes=site.unit_bytes,
        alike_bytes=alike_bytes[site.unit_bytes],
        offset_bytes=site.offset_bytes,
        copies=manifest.copies,
        copy_stride_bytes=manifest.copy_stride_bytes,
        key=(model, site.site),
        crcs=table.crcs_of(site),
        slots=table.slots.get(site.site),
    )
