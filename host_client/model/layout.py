"""Where everything of one model lies inside its extent; see docs/FORMAT.md.

Whatever is rewritten after packing has two slots, so that the directory decides which is valid and
a torn write leaves the other: the manifest, the frequencies, and the calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from csd_protocol.packed import (
    BLOCK_BYTES,
    MODEL_ALIGN_BYTES,
    DirectoryEntry,
    Extent,
    PackedModel,
    Role,
    Site,
    align_up,
    encode_manifest,
)
from host_client.model.calibration_record import calibration_bytes
from host_client.model.families import SiteShape

_OFFSET_MAX = 10**18  # as many digits as any offset will have
_TOKENS_MAX = 10**18


@dataclass(frozen=True, slots=True)
class Slots:
    """The two places of the manifest, of the frequencies and of the calibration."""

    manifests: tuple[int, int]  # offsets in bytes
    manifest_bytes: int  # of each
    frequencies: tuple[int, int]
    frequencies_bytes: int
    calibrations: tuple[int, int] | None  # None: packed when there was none

    def next_manifest(self, current: Extent) -> int:
        """The offset of the manifest slot that is not in use."""
        return self.manifests[current.offset_bytes == self.manifests[0]]

    def next_frequencies(self, current: Extent | None) -> int:
        """The offset of the frequencies slot that is not in use."""
        return _unused(self.frequencies, current)

    def next_calibration(self, current: Extent | None) -> int:
        """The offset of the calibration slot that is not in use."""
        assert self.calibrations is not None
        return _unused(self.calibrations, current)


def _unused(slots: tuple[int, int], current: Extent | None) -> int:
    return slots[current is not None and current.offset_bytes == slots[0]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's manifest with every site placed, and the extents around it."""

    model: PackedModel
    extent: Extent
    progress: Extent
    slots: Slots


def extent_bytes(model: PackedModel, shapes: Sequence[SiteShape]) -> int:
    """How long a model's extent is. `model` is its manifest without sites."""
    return place(model, shapes, 0).extent.length_bytes


def place(model: PackedModel, shapes: Sequence[SiteShape], offset_bytes: int) -> Layout:
    """The layout of a model whose extent starts at `offset_bytes`, a multiple of 1 MiB."""
    slot_bytes = _manifest_slot_bytes(model, shapes)
    table_start = offset_bytes + 2 * slot_bytes
    neurons = sum(shape.count for shape in shapes if shape.role is Role.FFN)
    table_bytes = 4 * (sum(shape.count for shape in shapes) + neurons * model.placed)
    progress = Extent(
        offset_bytes=table_start + align_up(table_bytes, BLOCK_BYTES), length_bytes=BLOCK_BYTES
    )
    sites_start = _frequencies_start(progress) + 2 * sum(_measured_bytes(shapes))
    sites = _place_sites(shapes, sites_start)
    placed = model.model_copy(
        update={
            "sites": sites,
            "crc_table": Extent(offset_bytes=table_start, length_bytes=table_bytes),
        }
    )
    once = sites[-1].offset_bytes + sites[-1].length_bytes
    stride = align_up(once - table_start, MODEL_ALIGN_BYTES) if model.copies > 1 else 0
    placed = placed.model_copy(update={"copy_stride_bytes": stride}).in_oldest_version
    end = align_up(once + (model.copies - 1) * stride, MODEL_ALIGN_BYTES)
    extent = Extent(offset_bytes=offset_bytes, length_bytes=end - offset_bytes)
    return Layout(placed, extent, progress, _slots(placed, extent, progress))


def slots_of(model: PackedModel, entry: DirectoryEntry) -> Slots:
    """The slots of a model that is on a drive."""
    return _slots(model, entry.extent, entry.progress)


def _slots(model: PackedModel, extent: Extent, progress: Extent) -> Slots:
    manifest_bytes = (model.crc_table.offset_bytes - extent.offset_bytes) // 2
    start = _frequencies_start(progress)
    slot_bytes = (model.sites[0].offset_bytes - start) // 2
    frequencies_bytes, calibration_room = _measured_bytes(model.ffns())
    places = (start, start + slot_bytes)
    behind = (places[0] + frequencies_bytes, places[1] + frequencies_bytes)
    has_room = slot_bytes >= frequencies_bytes + calibration_room
    return Slots(
        manifests=(extent.offset_bytes, extent.offset_bytes + manifest_bytes),
        manifest_bytes=manifest_bytes,
        frequencies=places,
        frequencies_bytes=frequencies_bytes,
        calibrations=behind if has_room else None,
    )


def _measured_bytes(shapes: Sequence[SiteShape | Site]) -> tuple[int, int]:
    """Room for the frequencies of these sites, and for a calibration behind them."""
    counts = [shape.count for shape in shapes if shape.role is Role.FFN]
    if not counts:
        return 0, 0
    sizes = (4 * sum(counts), calibration_bytes(len(counts), counts[0]))
    return align_up(sizes[0], BLOCK_BYTES), align_up(sizes[1], BLOCK_BYTES)


def _frequencies_start(progress: Extent) -> int:
    return progress.offset_bytes + BLOCK_BYTES


def _manifest_slot_bytes(model: PackedModel, shapes: Sequence[SiteShape]) -> int:
    """Room for the manifest with the longest numbers it can come to hold."""
    longest = Extent(offset_bytes=_OFFSET_MAX, length_bytes=_OFFSET_MAX, crc32c=(1 << 32) - 1)
    draft = model.model_copy(
        update={
            "sites": _place_sites(shapes, _OFFSET_MAX),
            "crc_table": longest,
            "frequencies": longest,
            "frequency_tokens": _TOKENS_MAX,
            "calibration": longest,
            "copy_stride_bytes": _OFFSET_MAX,
        }
    )
    return align_up(len(encode_manifest(draft)), BLOCK_BYTES)


def _place_sites(shapes: Sequence[SiteShape], start: int) -> tuple[Site, ...]:
    """Sites one behind the other from `start`, each on a whole block."""
    lengths = [align_up(shape.count * shape.unit_bytes, BLOCK_BYTES) for shape in shapes]
    offsets = accumulate(lengths, initial=start)
    first_crcs = accumulate((shape.count for shape in shapes), initial=0)
    return tuple(
        Site(
            site=index,
            role=shape.role,
            kind=shape.kind,
            layer=shape.layer,
            count=shape.count,
            rows=shape.rows,
            cols=shape.cols,
            offset_bytes=offset,
            first_crc=first_crc,
            parts=shape.parts,
            expert=shape.expert,
            bits=shape.bits,
        )
        for index, (shape, offset, first_crc) in enumerate(
            zip(shapes, offsets, first_crcs, strict=False)
        )
    )
