"""The models on a drive: its directory, their manifests and what is kept beside them.

A change is written where nothing valid lies, flushed, and then made valid by one write of the
directory. One host changes a drive's directory at a time; any number read it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_protocol.crc32c import crc32c
from csd_protocol.packed import (
    BLOCK_BYTES,
    DIRECTORY_SLOT_BYTES,
    DIRECTORY_SLOTS,
    MODEL_ALIGN_BYTES,
    MODELS_OFFSET_BYTES,
    Directory,
    DirectoryEntry,
    Extent,
    FormatError,
    PackedModel,
    Role,
    Site,
    align_up,
    decode_directory,
    decode_manifest,
    directory_slot,
    encode_directory,
    encode_manifest,
)
from csd_protocol.unit_table import UnitTable, decode_unit_table
from csd_protocol.units import format_size
from host_client.model.calibration_record import Calibration, decode_calibration
from host_client.model.errors import (
    DamagedRecord,
    DriveTooSmall,
    InvalidConfig,
    NotPacked,
    PackedBefore,
)
from host_client.model.layout import Slots, slots_of
from host_client.model.storage import BlockStorage

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


def list_models(storage: BlockStorage) -> tuple[DirectoryEntry, ...]:
    """The models on a drive, complete or not. Raises DamagedRecord."""
    return read_directory(storage).models


def open_model(storage: BlockStorage, name: str) -> tuple[int, PackedModel]:
    """A complete model's identifier for commands, and its manifest.

    Raises NotPacked when there is none, DamagedRecord when what is there cannot be trusted.
    """
    entry = complete_entry(read_directory(storage), name)
    return entry.model, read_manifest(storage, entry)


def remove_model(storage: BlockStorage, name: str) -> None:
    """Takes a model off the directory, then gives its blocks back. Raises NotPacked."""
    directory = read_directory(storage)
    entry = directory.find(name)
    if entry is None:
        raise _not_there(directory, name)
    commit(storage, directory, [other for other in directory.models if other != entry])
    storage.deallocate(entry.extent.offset_bytes, entry.extent.length_bytes)


def store_frequencies(
    storage: BlockStorage,
    name: str,
    counts: U32,
    tokens: int,
    calibration: Calibration | None = None,
) -> PackedModel:
    """Keeps how often each neuron was active, [layers, neurons], over so many tokens.

    With it whatever else was measured; what is not given stays as it was. Returns the new manifest.
    Raises NotPacked, ValueError for another shape, PackedBefore where there is no room for a
    calibration.
    """
    directory = read_directory(storage)
    entry = complete_entry(directory, name)
    model = read_manifest(storage, entry)
    model = write_measured(storage, model, slots_of(model, entry), counts, tokens, calibration)
    store_manifest(storage, directory, entry, model)
    return model


def check_room(storage: BlockStorage, name: str) -> None:
    """Raises PackedBefore for a model that has no room for a calibration, NotPacked for none."""
    entry = complete_entry(read_directory(storage), name)
    model = read_manifest(storage, entry)
    _check_room(model, slots_of(model, entry))


def _check_room(model: PackedModel, slots: Slots) -> None:
    if slots.calibrations is None:
        raise PackedBefore(
            f"{model.name} was packed by an earlier version, without room for a calibration. "
            f"Remove it and pack it again"
        )


def write_measured(
    storage: BlockStorage,
    model: PackedModel,
    slots: Slots,
    counts: U32,
    tokens: int,
    calibration: Calibration | None,
) -> PackedModel:
    """The manifest with this in it, written where nothing valid lies; the manifest is not."""
    shape = _frequencies_shape(model)
    if counts.shape != shape:
        raise ValueError(f"counts are {counts.shape}, not {shape}")
    changes: dict[str, Any] = {"frequency_tokens": tokens}
    if calibration is not None:
        calibration.check(*shape)
        _check_room(model, slots)
        offset = slots.next_calibration(model.calibration)
        changes["calibration"] = write_record(storage, offset, calibration.encode())
    data = np.ascontiguousarray(counts, "<u4").tobytes()
    offset = slots.next_frequencies(model.frequencies)
    changes["frequencies"] = write_record(storage, offset, data)
    return model.model_copy(update=changes).in_oldest_version


def read_frequencies(storage: BlockStorage, model: PackedModel) -> U32 | None:
    """How often each neuron was active, [layers, neurons]; None when never counted."""
    if model.frequencies is None:
        return None
    data = read_record(storage, model.frequencies, f"frequencies of {model.name}")
    return np.frombuffer(data, "<u4").reshape(_frequencies_shape(model))


def read_calibration(storage: BlockStorage, model: PackedModel) -> Calibration | None:
    """What `csd calibrate` measured; None when it never did. Raises DamagedRecord."""
    if model.calibration is None:
        return None
    what = f"calibration of {model.name}"
    data = read_record(storage, model.calibration, what)
    try:
        return decode_calibration(data, *_frequencies_shape(model))
    except ValueError as error:
        raise DamagedRecord(f"{what}: {error}. Calibrate again") from error


def read_unit_table(storage: BlockStorage, model: PackedModel, copy: int = 0) -> UnitTable:
    """CRC32C and place of each unit, from beside one of the copies. Raises DamagedRecord."""
    data = read_record(storage, model.table_of(copy), f"CRC table of {model.name}")
    try:
        return decode_unit_table(model, data)
    except FormatError as error:
        raise DamagedRecord(f"{error}. Remove the model and pack it again") from error


def read_units(storage: BlockStorage, site: Site, start: int, stop: int, at: int = 0) -> U16:
    """What lies in slots [start, stop) of a site: 16-bit words [stop - start, rows, words].

    Units [start, stop), where the model is not placed. `at` is where slot 0 lies, when not in the
    first copy (`PackedModel.place_of`).
    """
    offset = (at or site.offset_bytes) + start * site.unit_bytes
    data = _read_range(storage, offset, (stop - start) * site.unit_bytes)
    return np.frombuffer(data, "<u2").reshape(stop - start, site.rows, site.row_bytes // 2)


def _frequencies_shape(model: PackedModel) -> tuple[int, int]:
    sites = [site for site in model.sites if site.role is Role.FFN]
    if not sites:
        raise InvalidConfig(f"{model.name} has no FFN neurons to count")
    return len(sites), sites[0].count


# ---- records -----------------------------------------------------------------------------------


def read_directory(storage: BlockStorage) -> Directory:
    """The current directory; an empty one on a drive that never had any. Raises DamagedRecord."""
    if storage.capacity_bytes < MODELS_OFFSET_BYTES:
        raise DriveTooSmall(
            f"the drive has {format_size(storage.capacity_bytes)}; the directory alone takes "
            f"{format_size(MODELS_OFFSET_BYTES)}. Use a larger drive"
        )
    slots = [
        storage.read(slot * DIRECTORY_SLOT_BYTES, DIRECTORY_SLOT_BYTES)
        for slot in range(DIRECTORY_SLOTS)
    ]
    try:
        return decode_directory(slots)
    except FormatError as error:
        raise DamagedRecord(f"{error}. Format the drive and pack its models again") from error


def commit(
    storage: BlockStorage, directory: Directory, models: Iterable[DirectoryEntry]
) -> Directory:
    """Makes `models` the drive's directory; what was written before becomes durable with it."""
    following = Directory(generation=directory.generation + 1, models=tuple(models))
    try:
        data = encode_directory(following)
    except FormatError as error:
        raise DriveTooSmall(str(error)) from error
    storage.flush()
    storage.write(directory_slot(following.generation), pad(data))
    storage.flush()
    return following


def replace_entry(directory: Directory, entry: DirectoryEntry) -> list[DirectoryEntry]:
    """The directory's models with the one of this identifier exchanged."""
    return [entry if other.model == entry.model else other for other in directory.models]


def read_manifest(storage: BlockStorage, entry: DirectoryEntry) -> PackedModel:
    """Raises DamagedRecord."""
    data = read_record(storage, entry.manifest, f"manifest of {entry.name}")
    try:
        return decode_manifest(data)
    except FormatError as error:
        raise DamagedRecord(f"{error}. Remove {entry.name} and pack it again") from error


def store_manifest(
    storage: BlockStorage, directory: Directory, entry: DirectoryEntry, model: PackedModel
) -> None:
    """Writes a complete model's manifest to its unused slot and makes it the valid one."""
    offset = slots_of(model, entry).next_manifest(entry.manifest)
    manifest = write_record(storage, offset, encode_manifest(model))
    changed = entry.model_copy(update={"manifest": manifest, "state": "complete"})
    commit(storage, directory, replace_entry(directory, changed))


def write_record(storage: BlockStorage, offset_bytes: int, data: bytes) -> Extent:
    """Writes `data` and says where it lies, with its CRC32C."""
    storage.write(offset_bytes, pad(data))
    return Extent(offset_bytes=offset_bytes, length_bytes=len(data), crc32c=crc32c(data))


def read_record(storage: BlockStorage, extent: Extent, what: str) -> bytes:
    """The bytes of an extent. Raises DamagedRecord when its CRC32C does not match."""
    data = _read_range(storage, extent.offset_bytes, extent.length_bytes)
    if crc32c(data) != extent.crc32c:
        raise DamagedRecord(
            f"{what} at byte {extent.offset_bytes} of the drive does not match its CRC32C. "
            "Remove the model and pack it again"
        )
    return data


def _read_range(storage: BlockStorage, offset_bytes: int, length_bytes: int) -> bytes:
    """Any bytes of a drive, by whole blocks."""
    first = offset_bytes - offset_bytes % BLOCK_BYTES
    stop = align_up(offset_bytes + length_bytes, BLOCK_BYTES)
    data = storage.read(first, stop - first)
    return data[offset_bytes - first :][:length_bytes]


def pad(data: bytes) -> bytes:
    """`data` with zeroes to a whole block."""
    return data.ljust(align_up(len(data), BLOCK_BYTES), b"\0")


# ---- space -------------------------------------------------------------------------------------


def find_free(directory: Directory, capacity_bytes: int, length_bytes: int, name: str) -> int:
    """The offset of the first free run of this length. Raises DriveTooSmall with the figures."""
    largest = 0
    start = MODELS_OFFSET_BYTES
    for extent in [
        *_extents(directory.models),
        Extent(offset_bytes=capacity_bytes, length_bytes=0),
    ]:
        free = extent.offset_bytes - start
        if free >= length_bytes:
            return start
        largest = max(largest, free)
        start = align_up(extent.offset_bytes + extent.length_bytes, MODEL_ALIGN_BYTES)
    held = ", ".join(
        f"{entry.name} {format_size(entry.extent.length_bytes)}" for entry in directory.models
    )
    raise DriveTooSmall(
        f"{name} needs {format_size(length_bytes)} ({length_bytes} bytes) in one piece; the drive "
        f"of {format_size(capacity_bytes)} has {format_size(largest)} free in one piece "
        f"(models on it: {held or 'none'}). Remove a model, or use a larger drive"
    )


def _extents(models: Sequence[DirectoryEntry]) -> list[Extent]:
    return sorted((entry.extent for entry in models), key=lambda extent: extent.offset_bytes)


def complete_entry(directory: Directory, name: str) -> DirectoryEntry:
    entry = directory.find(name)
    if entry is None:
        raise _not_there(directory, name)
    if entry.state != "complete":
        raise NotPacked(
            f"{name} on the drive is not complete: its packing was interrupted. "
            "Pack it again; that goes on where it stopped"
        )
    return entry


def _not_there(directory: Directory, name: str) -> NotPacked:
    there = ", ".join(entry.name for entry in directory.models) or "none"
    return NotPacked(f"no model {name!r} on the drive (models on it: {there}). Pack it first")
