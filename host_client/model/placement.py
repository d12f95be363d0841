"""Lays the neurons of a packed model down in another order; nothing else of it changes.

The model is written once more, beside itself, as a pack that takes its units from the drive: so it
goes on where it was interrupted, and what is valid is not touched. Then one write of the directory
puts the new extent in the place of the old, under the same name and identifier. Until then the
directory has the new one as a model of its own that is being packed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import DirectoryEntry, Extent, PackedModel, Site, encode_manifest
from host_client.model.catalog import (
    commit,
    complete_entry,
    read_calibration,
    read_directory,
    read_frequencies,
    read_manifest,
    read_unit_table,
    remove_model,
    write_measured,
    write_record,
)
from host_client.model.errors import DifferentModel, NotCalibrated
from host_client.model.families import SiteShape, find_family
from host_client.model.packer import (
    SAVE_EVERY_BYTES,
    Job,
    Progress,
    Units,
    open_job,
    seal_units,
    units_per_chunk,
    write_sites,
)
from host_client.model.storage import BlockStorage

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

ReadUnits = Callable[[Site, int, int], U16]  # units [start, stop) of a site, checked


def place_units(
    storage: BlockStorage,
    name: str,
    read: ReadUnits,
    progress: Progress,
    *,
    save_every_bytes: int = SAVE_EVERY_BYTES,
) -> PackedModel:
    """Places a model's neurons as its calibration says, and returns the new manifest.

    `read` reads the model as it is. Raises NotCalibrated, NotPacked, DriveTooSmall, and what
    reading raises; the model is then what it was.
    """
    directory = read_directory(storage)
    entry = complete_entry(directory, name)
    packed = read_manifest(storage, entry)
    order = _order_of(storage, packed)
    if _lies_so(storage, packed, order):
        return packed
    draft = _draft(packed, order)
    begun = directory.find(draft.name)
    if begun is not None and begun.fingerprint != draft.fingerprint:
        remove_model(storage, draft.name)  # of another calibration
        begun = None
    job = open_job(storage, draft, _shapes_of(packed), begun, order)
    write_sites(job, _units_of(packed, read, order), progress, save_every_bytes)
    return _take_over(job, entry)


def _order_of(storage: BlockStorage, packed: PackedModel) -> dict[int, U32]:
    """By FFN site, the unit that each slot is to have."""
    calibration = read_calibration(storage, packed)
    if calibration is None:
        raise NotCalibrated(
            f"{packed.name} on the drive was never calibrated, so nobody knows which neurons are "
            f"wanted together. Run `csd calibrate` on it first"
        )
    sites = (site.site for site in packed.ffns())
    return dict(zip(sites, calibration.order, strict=True))


def _shapes_of(packed: PackedModel) -> tuple[SiteShape, ...]:
    """The sites of its family, with the bits that it was packed at."""
    shapes = find_family(packed.config, packed.source).sites(packed.config)
    pairs = zip(shapes, packed.sites, strict=True)
    return tuple(replace(shape, bits=site.bits) for shape, site in pairs)


def _lies_so(storage: BlockStorage, packed: PackedModel, order: Mapping[int, U32]) -> bool:
    if not packed.placed:
        return False
    slots = read_unit_table(storage, packed).slots
    return all(np.array_equal(np.argsort(slots[site]), units) for site, units in order.items())


def _draft(packed: PackedModel, order: Mapping[int, U32]) -> PackedModel:
    """The manifest of the model in its new place, as long as it is being written."""
    digest = hashlib.sha256(packed.fingerprint.encode())
    for units in order.values():
        digest.update(units.tobytes())
    return packed.model_copy(
        update={
            "name": f"{packed.name} (being placed)",
            "fingerprint": digest.hexdigest(),
            "sites": (),
            "crc_table": Extent(offset_bytes=0, length_bytes=0),
            "frequencies": None,
            "calibration": None,
            "placed": True,
        }
    )


def _units_of(packed: PackedModel, read: ReadUnits, order: Mapping[int, U32]) -> Units:
    def units(target: Site) -> Iterator[U8]:
        site, step = packed.sites[target.site], units_per_chunk(target.unit_bytes)
        lying = order.get(site.site)
        whole = None if lying is None else read(site, 0, site.count)[lying]
        for start in range(0, site.count, step):
            stop = min(start + step, site.count)
            chunk = read(site, start, stop) if whole is None else whole[start:stop]
            yield chunk.view(np.uint8).reshape(stop - start, -1)

    return units


def _take_over(job: Job, old: DirectoryEntry) -> PackedModel:
    """Puts what was written in the place of the model that it was read from."""
    storage, directory = job.storage, read_directory(job.storage)
    now, new = directory.find(old.name), directory.find(job.model.name)
    if now is None or now.extent != old.extent or new is None:
        raise DifferentModel(f"{old.name} was removed or replaced on the drive while placing it")
    packed = read_manifest(storage, now)  # it may have been calibrated again
    model = seal_units(job).model_copy(
        update={"name": packed.name, "fingerprint": packed.fingerprint}
    )
    counts = read_frequencies(storage, packed)
    assert counts is not None, "a calibration is stored with its frequencies"
    calibration = read_calibration(storage, packed)
    slots = job.layout.slots
    model = write_measured(storage, model, slots, counts, packed.frequency_tokens, calibration)
    manifest = write_record(storage, slots.next_manifest(new.manifest), encode_manifest(model))
    moved = now.model_copy(
        update={"extent": new.extent, "manifest": manifest, "progress": new.progress}
    )
    others = [entry for entry in directory.models if entry not in (now, new)]
    commit(storage, directory, [*others, moved])
    storage.deallocate(old.extent.offset_bytes, old.extent.length_bytes)
    return model
