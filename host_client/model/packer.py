"""Writes a checkpoint to a drive as units, one chunk of a site at a time.

In memory at any time: two chunks, the CRC table, and, for pieces that are columns of a tensor, that
one tensor at 16 bits. One thread writes a chunk while the next is put together.

Further copies are made by the drive itself, out of the first, when all of that is written.

A pack that was interrupted goes on after the last site that its progress record covers. That record
is written only after a flush, so it never speaks of units that the drive could still lose.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.crc32c import crc32c, crc32c_units
from csd_protocol.lossless_units import TooManyPatches, encode_rows
from csd_protocol.packed import (
    BLOCK_BYTES,
    COPIES_MAX,
    FORMAT_VERSION,
    VALUE_BYTES,
    Bits,
    Directory,
    DirectoryEntry,
    Extent,
    PackedModel,
    Site,
    align_up,
    decode_progress,
    encode_manifest,
    encode_progress,
)
from csd_protocol.packed import Progress as ProgressRecord
from csd_protocol.unit_table import UnitTable
from host_client.model.catalog import (
    commit,
    find_free,
    open_model,
    pad,
    read_directory,
    read_manifest,
    remove_model,
    store_manifest,
    write_record,
)
from host_client.model.checkpoint import Checkpoint, Dtype
from host_client.model.errors import DifferentModel, UnsupportedModel, ValueOverflow
from host_client.model.families import Piece, SiteShape, family_sites
from host_client.model.layout import Layout, extent_bytes, place
from host_client.model.storage import BlockStorage
from host_client.model.synthetic import SyntheticCheckpoint, is_drawn
from host_client.model.unit_bits import at_bits, kept_levels, rounded

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, what was written
Units = Callable[[Site], Iterator[U8]]  # as they are to lie, [n, unit bytes] at a time

CHUNK_BYTES = 4 << 20
SAVE_EVERY_BYTES = 256 << 20  # what an interruption may cost
DRAWN_SAVE_EVERY_BYTES = 8 << 30  # the same, of what is drawn and not copied
_TILE = 512  # rows of a tensor laid down at once, so that they stay in the processor's cache
_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def pack(
    checkpoint: Checkpoint,
    storage: BlockStorage,
    name: str,
    progress: Progress | None = None,
    *,
    dtype: Dtype | None = None,
    bits: Bits = 16,
    copies: int = 1,
    replace: bool = False,
    save_every_bytes: int = SAVE_EVERY_BYTES,
) -> PackedModel:
    """Packs a checkpoint under `name`, or what is left of it, and returns its manifest.

    `dtype` is the checkpoint's own 16-bit type unless given; `bits` are those of a unit's values,
    but for what stays larger (`unit_bits`); `copies` is how often every unit lies on the drive, 1
    to COPIES_MAX. With `replace`, another model of that name goes first. Raises a ModelError;
    DriveTooSmall and all that is wrong with the checkpoint's names and shapes before anything is
    written.
    """
    if not 1 <= copies <= COPIES_MAX:
        raise UnsupportedModel(f"{copies} copies; a model has 1 to {COPIES_MAX}")
    if BLOCK_BYTES % storage.block_bytes:
        raise UnsupportedModel(f"the drive has blocks of {storage.block_bytes}, not {BLOCK_BYTES}")
    dtype = dtype or checkpoint.dtype
    shapes = at_bits(family_sites(checkpoint), bits, checkpoint, dtype)
    draft = _draft(checkpoint, name, dtype, bits, copies)
    entry = read_directory(storage).find(name)
    if entry is not None and entry.fingerprint != draft.fingerprint:
        _give_way(storage, entry, checkpoint, replace)
        entry = None
    if entry is not None and entry.state == "complete":
        return open_model(storage, name)[1]
    job = open_job(storage, draft, shapes, entry)

    def units(site: Site) -> Iterator[U8]:
        return _SiteReader(checkpoint, shapes[site.site], _TORCH_DTYPES[draft.dtype]).chunks()

    with _one_torch_thread():
        synthetic = checkpoint if isinstance(checkpoint, SyntheticCheckpoint) else None
        write_sites(job, units, progress or _ignore, save_every_bytes, synthetic)
    return _finish(job)


def manifest_of(checkpoint: Checkpoint, name: str, bits: Bits = 16) -> PackedModel:
    """What `pack` would write, of an extent that starts at 0; no drive is needed for it.

    Raises a ModelError as `pack` does for what does not pack.
    """
    shapes = at_bits(family_sites(checkpoint), bits, checkpoint, checkpoint.dtype)
    return place(_draft(checkpoint, name, checkpoint.dtype, bits, 1), shapes, 0).model


@dataclass(frozen=True, slots=True)
class Job:
    """One model being packed. order: of a placed one by site, the unit in each slot."""

    storage: BlockStorage
    shapes: tuple[SiteShape, ...]
    layout: Layout
    first_step: int  # as in a progress record: what comes before it is on the drive
    checksums: U32  # [units]
    order: Mapping[int, U32] = field(default_factory=dict)

    @property
    def model(self) -> PackedModel:
        return self.layout.model

    def unit_table(self) -> bytes:
        """As far as it is known."""
        slots = {site: np.argsort(units).astype(np.uint32) for site, units in self.order.items()}
        return UnitTable(self.checksums, slots).encode()


def _draft(checkpoint: Checkpoint, name: str, dtype: Dtype, bits: Bits, copies: int) -> PackedModel:
    """The manifest as far as it does not depend on the drive."""
    return PackedModel(
        name=name,
        family=checkpoint.config["model_type"],
        config=checkpoint.config,
        dtype=dtype,
        source=checkpoint.source,
        fingerprint=_fingerprint(checkpoint, dtype, bits, copies),
        sites=(),
        crc_table=Extent(offset_bytes=0, length_bytes=0),
        copies=copies,
    )


def _fingerprint(checkpoint: Checkpoint, dtype: Dtype, bits: Bits, copies: int) -> str:
    """Of everything that decides the packed bytes; equal for a copy of the same files."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    text = f"{FORMAT_VERSION} {dtype} {checkpoint.digest()} {config}"
    text += f" {copies} copies" if copies > 1 else ""
    text += f" {bits} bits" if bits < 16 else ""
    return hashlib.sha256(text.encode()).hexdigest()


def _give_way(
    storage: BlockStorage, entry: DirectoryEntry, checkpoint: Checkpoint, replace: bool
) -> None:
    if not replace:
        raise DifferentModel(
            f"{entry.name} on the drive ({entry.state}) was packed from other files, as another "
            f"type, at other bits or in another number of copies, than {checkpoint.source} now. "
            f"Choose another name, or replace it"
        )
    remove_model(storage, entry.name)


# ---- beginning, going on, finishing --------------------------------------------------------------


def open_job(
    storage: BlockStorage,
    draft: PackedModel,
    shapes: tuple[SiteShape, ...],
    entry: DirectoryEntry | None,
    order: Mapping[int, U32] | None = None,
) -> Job:
    """Begins to pack, or goes on with what the entry of an interrupted pack stands for."""
    if entry is not None:
        layout = place(draft, shapes, entry.extent.offset_bytes)
        begun = read_manifest(storage, entry)
        if (layout.extent, layout.model.sites) == (entry.extent, begun.sites):
            return _resume(storage, layout, shapes, order or {})
        remove_model(storage, entry.name)  # begun by a version that laid models out otherwise
    return _begin(storage, draft, shapes, order or {})


def _begin(
    storage: BlockStorage,
    draft: PackedModel,
    shapes: tuple[SiteShape, ...],
    order: Mapping[int, U32],
) -> Job:
    """Takes an extent and enters the model as being packed."""
    directory = read_directory(storage)
    length = extent_bytes(draft, shapes)
    what = draft.name if draft.copies == 1 else f"{draft.name} in {draft.copies} copies"
    offset = find_free(directory, storage.capacity_bytes, length, what)
    layout = place(draft, shapes, offset)
    manifest = write_record(storage, layout.slots.manifests[0], encode_manifest(layout.model))
    job = Job(storage, shapes, layout, 0, np.zeros(layout.model.unit_count, np.uint32), order)
    _write_progress(job, 0)
    entry = DirectoryEntry(
        model=_free_identifier(directory),
        name=draft.name,
        state="packing",
        fingerprint=draft.fingerprint,
        extent=layout.extent,
        manifest=manifest,
        progress=layout.progress,
    )
    commit(storage, directory, [*directory.models, entry])
    return job


def _free_identifier(directory: Directory) -> int:
    return 1 + max((entry.model for entry in directory.models), default=0)


def _resume(
    storage: BlockStorage,
    layout: Layout,
    shapes: tuple[SiteShape, ...],
    order: Mapping[int, U32],
) -> Job:
    """Goes on where the progress record says; at the start when there is none."""
    record = decode_progress(storage.read(layout.progress.offset_bytes, BLOCK_BYTES))
    checksums = np.zeros(layout.model.unit_count, np.uint32)
    if record is None or record.fingerprint != layout.model.fingerprint:
        return Job(storage, shapes, layout, 0, checksums, order)
    table = layout.model.crc_table
    padded = len(pad(bytes(table.length_bytes)))
    data = storage.read(table.offset_bytes, padded)[: table.length_bytes]
    done = sum(site.count for site in layout.model.sites[: record.next_site])  # all, in a copy
    checksums[:done] = np.frombuffer(data, "<u4")[:done]
    return Job(storage, shapes, layout, record.next_site, checksums, order)


def seal_units(job: Job) -> PackedModel:
    """The manifest of what was written, with the CRC table beside every copy of it."""
    table = job.unit_table()
    for copy in range(1, job.model.copies):
        job.storage.write(job.model.table_of(copy).offset_bytes, pad(table))
    extent = job.model.crc_table.model_copy(update={"crc32c": crc32c(table)})
    return job.model.model_copy(update={"crc_table": extent})


def _finish(job: Job) -> PackedModel:
    model = seal_units(job)
    directory = read_directory(job.storage)
    entry = directory.find(model.name)
    if entry is None or entry.fingerprint != model.fingerprint:
        raise DifferentModel(f"{model.name} was removed or replaced on the drive while packing it")
    store_manifest(job.storage, directory, entry, model)
    return model


def _save(job: Job, next_step: int) -> None:
    """Makes all steps before `next_step` durable, and says so on the drive."""
    job.storage.write(job.model.crc_table.offset_bytes, pad(job.unit_table()))
    job.storage.flush()
    _write_progress(job, next_step)
    job.storage.flush()


def _write_progress(job: Job, next_step: int) -> None:
    record = ProgressRecord(fingerprint=job.model.fingerprint, next_site=next_step)
    job.storage.write(job.layout.progress.offset_bytes, encode_progress(record))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Conversions are short and bound by memory: a second thread mostly spins, on a core that the
    drive's daemon could use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ignore(done_bytes: int, total_bytes: int, what: str) -> None:
    """The progress callback of those who give none."""


# ---- sites ---------------------------------------------------------------------------------------


class _WriteBehind:
    """Writes one chunk while its caller prepares the next; errors come out at the next call."""

    def __init__(self, storage: BlockStorage) -> None:
        self._storage = storage
        self._executor = ThreadPoolExecutor(1, "csd-pack")
        self._pending: Future[None] | None = None

    def write(self, offset_bytes: int, data: memoryview) -> None:
        self.drain()
        self._pending = self._executor.submit(self._storage.write, offset_bytes, data)

    def write_patterns(self, offset_bytes: int, numbers: U16) -> None:
        self.drain()
        write = self._storage.write_patterns
        self._pending = self._executor.submit(write, offset_bytes, numbers)

    def drain(self) -> None:
        """Waits until everything is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True)


def write_sites(
    job: Job,
    units: Units,
    progress: Progress,
    save_every_bytes: int = SAVE_EVERY_BYTES,
    synthetic: SyntheticCheckpoint | None = None,
) -> None:
    """Writes what is left of all copies. synthetic: whose sites the drive makes, where it can."""
    steps = job.model.sites * job.model.copies
    total = job.model.weights_bytes * job.model.copies
    done = saved = sum(site.length_bytes for site in steps[: job.first_step])
    progress(done, total, job.model.name)
    drawn = _Drawn(job, synthetic) if synthetic is not None else None
    with _WriteBehind(job.storage) as writer:
        for step in range(job.first_step, len(steps)):
            site, copy = steps[step], step // len(job.model.sites)
            if copy:
                parts = _copy_site(job, site, copy)
            elif drawn and is_drawn(job.shapes[site.site]):
                parts = _draw_site(job, drawn, site, writer)
            else:
                parts = _write_site(job, units, site, writer)
            for written in parts:
                done += written
                progress(done, total, site.name)
            if done - saved >= save_every_bytes or site is job.model.sites[-1]:
                writer.drain()
                _save(job, step + 1)
                saved = done


def _write_site(job: Job, units: Units, site: Site, writer: _WriteBehind) -> Iterator[int]:
    """Writes a site's units and notes their CRCs; yields the bytes of each chunk."""
    offset = site.offset_bytes
    numbers = job.order.get(site.site, np.arange(site.count, dtype=np.uint32))
    for rows in units(site):
        written, numbers = np.split(numbers, [rows.shape[0]])
        job.checksums[site.first_crc + written] = crc32c_units(rows)
        writer.write(offset, _whole_blocks(rows))
        offset += rows.size
        yield rows.size


class _Drawn:
    """A synthetic model's patterns by the bits of their values, and what the drive calls them."""

    def __init__(self, job: Job, checkpoint: SyntheticCheckpoint) -> None:
        self.checkpoint = checkpoint
        drawn = sorted({shape.bits for shape in job.shapes if is_drawn(shape)})
        self.patterns = {bits: checkpoint.patterns(bits) for bits in drawn}
        define = job.storage.define_patterns
        self.numbers = {bits: define(made.tobytes()) for bits, made in self.patterns.items()}


def _draw_site(job: Job, drawn: _Drawn, site: Site, writer: _WriteBehind) -> Iterator[int]:
    """Has the drive make a site's blocks, and notes its units' CRCs; yields the bytes of each."""
    blocks = drawn.checkpoint.draw(site)
    writer.write_patterns(site.offset_bytes, drawn.numbers[site.bits][blocks])
    step = units_per_chunk(site.unit_bytes)
    for start in range(0, site.count, step):
        count = min(step, site.count - start)
        size = count * site.unit_bytes
        first = start * site.unit_bytes // BLOCK_BYTES
        chunk = drawn.patterns[site.bits][blocks[first : first + -(-size // BLOCK_BYTES)]]
        rows = chunk.reshape(-1)[:size].reshape(count, -1)
        first_crc = site.first_crc + start
        job.checksums[first_crc : first_crc + count] = crc32c_units(rows)
        yield size


def _copy_site(job: Job, site: Site, copy: int) -> Iterator[int]:
    """Has the drive copy a site's blocks from the first copy; yields the bytes of each chunk."""
    length = align_up(site.length_bytes, BLOCK_BYTES)
    source, target = job.model.place_of(site), job.model.place_of(site, copy)
    for start in range(0, length, CHUNK_BYTES):
        job.storage.copy(source + start, target + start, min(CHUNK_BYTES, length - start))
        yield min(start + CHUNK_BYTES, site.length_bytes) - start


def _whole_blocks(rows: U8) -> memoryview:
    """The bytes of a chunk; the last of a site is filled up with zeroes to a whole block."""
    if rows.size % BLOCK_BYTES:
        return memoryview(pad(rows.tobytes()))
    return rows.reshape(-1).data


def units_per_chunk(unit_bytes: int) -> int:
    """How many units make a chunk of about CHUNK_BYTES that ends on a whole block."""
    step = BLOCK_BYTES // gcd(BLOCK_BYTES, unit_bytes)
    return step * max(1, CHUNK_BYTES // (step * unit_bytes))


class _SiteReader:
    """A site's units out of a checkpoint, in chunks."""

    def __init__(self, checkpoint: Checkpoint, shape: SiteShape, dtype: torch.dtype) -> None:
        self._checkpoint, self._shape, self._dtype = checkpoint, shape, dtype
        self._columns = {
            piece.tensor: _read_16bit(checkpoint, piece, dtype)
            for piece in shape.pieces
            if piece.columns
        }

    def chunks(self) -> Iterator[U8]:
        """[units, unit bytes] each."""
        shape, step = self._shape, units_per_chunk(self._shape.unit_bytes)
        row_bytes = shape.unit_bytes // shape.stack_rows
        for start in range(0, shape.count, step):
            stop = min(start + step, shape.count)
            units = np.empty((stop - start, shape.stack_rows, row_bytes), np.uint8)
            first_row = 0
            for piece in shape.pieces:
                last_row = first_row + piece.rows_per_unit
                self._fill(piece, start, stop, units[:, first_row:last_row])
                first_row = last_row
            yield units.reshape(stop - start, -1)

    def _fill(self, piece: Piece, start: int, stop: int, into: U8) -> None:
        """What a piece gives to units [start, stop): [units, rows of the piece, row bytes]."""
        kept = kept_levels(self._checkpoint, piece, self._shape.bits)
        if kept is not None:
            rows = kept.read(start * piece.rows_per_unit, stop * piece.rows_per_unit)
            into[...] = rows.reshape(into.shape)
        elif self._shape.bits == 16:
            self._fill_16bit(piece, start, stop, into.view(np.uint16))
        else:
            values = np.empty((*into.shape[:2], self._shape.width), np.uint16)
            self._fill_16bit(piece, start, stop, values)
            rows = self._encoded(piece, start, values.reshape(-1, self._shape.width))
            into[...] = rows.reshape(into.shape)

    def _encoded(self, piece: Piece, start: int, patterns: U16) -> U8:
        """Rows as they are to lie, of 16-bit patterns [rows, width]: of units from `start` on."""
        what = f"{self._checkpoint.source}: tensor {piece.tensor}"
        try:
            if self._shape.bits == 12:
                return encode_rows(patterns)
            widened = torch.from_numpy(patterns.view(np.int16)).view(self._dtype).float()
            return rounded(widened.numpy(), self._shape.bits)
        except TooManyPatches as error:
            line = "column" if piece.columns else "row"
            raise ValueOverflow(
                f"{what} cannot be packed at 12 bits: {line} "
                f"{start * piece.rows_per_unit + error.row} has {error.patches} values with an "
                f"exponent far from the others', and room for {error.room}. Pack at 16 bits"
            ) from error
        except ValueError as error:
            raise ValueOverflow(
                f"{what} cannot be packed at {self._shape.bits} bits: {error}. Pack at 16 bits"
            ) from error

    def _fill_16bit(self, piece: Piece, start: int, stop: int, into: U16) -> None:
        first, last = start * piece.rows_per_unit, stop * piece.rows_per_unit
        if piece.columns:
            _lay_down(self._columns[piece.tensor][:, first:last], into)
        else:
            rows = _rows_16bit(self._checkpoint, piece.tensor, first, last, self._dtype)
            into[...] = rows.reshape(into.shape)


def _lay_down(columns: U16, into: U16) -> None:
    """Columns [width, units * rows] as rows `into` [units, rows, width], a tile at a time."""
    for start in range(0, columns.shape[0], _TILE):
        tile = columns[start : start + _TILE]
        into[..., start : start + _TILE] = tile.T.reshape(*into.shape[:2], -1)


def _read_16bit(checkpoint: Checkpoint, piece: Piece, dtype: torch.dtype) -> U16:
    """A whole tensor as 16-bit patterns, converted a block of rows at a time."""
    values = np.empty(piece.shape, np.uint16)
    step = max(1, CHUNK_BYTES // (piece.shape[1] * VALUE_BYTES))
    for start in range(0, piece.shape[0], step):
        stop = min(start + step, piece.shape[0])
        values[start:stop] = _rows_16bit(checkpoint, piece.tensor, start, stop, dtype)
    return values


def _rows_16bit(
    checkpoint: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype
) -> U16:
    """Rows [start, stop) of a tensor as 16-bit patterns; a vector is one row a unit wide."""
    if len(checkpoint.shape(name)) == 1:
        start, stop = 0, checkpoint.shape(name)[0]
    rows = checkpoint.read_rows(name, start, stop)
    values = rows.to(dtype)
    if rows.dtype != dtype and bool(torch.isinf(values).any()):
        raise ValueOverflow(
            f"{checkpoint.source}: tensor {name} has values beyond what {dtype} can hold "
            f"({torch.finfo(dtype).max:.0f}). Pack with --dtype bfloat16"
        )
    patterns: U16 = values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return patterns
