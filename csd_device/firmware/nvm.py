"""NVM commands: blocks of 4096 bytes, in and out."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES
from csd_device.errors import CommandError, LbaOutOfRange
from csd_device.firmware import upkeep
from csd_device.firmware.commands import (
    BlockRange,
    Compare,
    Copy,
    Data,
    DatasetManagement,
    DefinePatterns,
    Flush,
    Read,
    Verify,
    Write,
    WritePatterns,
    WriteZeroes,
)
from csd_device.firmware.context import Context
from csd_device.ftl import PagePrograms, PageReads, Stream
from csd_protocol.status import Status
from csd_protocol.units import format_size

DATASET_RANGES_MAX = 256  # NVMe's own limit
COPY_RANGES_MAX = 128
COPY_BYTES_MAX = 64 << 20
PATTERN_BLOCKS_MAX = COPY_BYTES_MAX // SECTOR_BYTES
PATTERN_NUMBER_BYTES = 2
_PIECE_BLOCKS = 256  # blocks that a command without data transfer moves at a time


def handle_flush(context: Context, command: Flush) -> None:
    """What was acknowledged before is on the media when this is answered."""
    context.time.flush(context.controller.ftl.flush())
    upkeep.after_flush(context.controller)


def handle_write(context: Context, command: Write) -> None:
    """Raises CommandError: Invalid Field, LBA Out of Range, Capacity Exceeded, Write Fault."""
    blocks = _blocks_of(context, command.data)
    _check_range(context, command.slba, blocks)
    context.time.receive(len(command.data))
    context.controller.counters.written_bytes += len(command.data)
    _write(context, command.slba, command.data, command.fua)


def handle_read(context: Context, command: Read) -> Data:
    """Blocks that were never written read as zeroes."""
    wanted = command.blocks
    _check_range(context, wanted.slba, wanted.blocks)
    _check_transfer(context, wanted.blocks * SECTOR_BYTES)
    data = _read_for_host(context, wanted)
    context.time.send(data.size)
    return Data(data.tobytes())


def handle_compare(context: Context, command: Compare) -> None:
    """Raises CommandError (Compare Failure) naming the first block that differs."""
    blocks = _blocks_of(context, command.data)
    _check_range(context, command.slba, blocks)
    context.time.receive(len(command.data))
    stored = _read_for_host(context, BlockRange(command.slba, blocks))
    different = np.flatnonzero(stored != np.frombuffer(command.data, np.uint8))
    if different.size:
        block = command.slba + int(different[0]) // SECTOR_BYTES
        raise CommandError(Status.COMPARE_FAILURE, f"block {block} holds other bytes")


def handle_verify(context: Context, command: Verify) -> None:
    """Reads the blocks and moves nothing. Raises what reading raises."""
    _check_range(context, command.blocks.slba, command.blocks.blocks)
    for piece in _pieces(context, command.blocks):
        _read_for_host(context, piece)


def handle_write_zeroes(context: Context, command: WriteZeroes) -> None:
    """Zeroes are what an unmapped block reads as, so the blocks are unmapped."""
    wanted = command.blocks
    _check_range(context, wanted.slba, wanted.blocks)
    context.controller.ftl.write_zeroes(wanted.slba, wanted.blocks)
    _note_change(context, wanted)


def handle_dataset_management(context: Context, command: DatasetManagement) -> None:
    """Deallocates all ranges, or none when one of them is out of range."""
    if not 0 < len(command.ranges) <= DATASET_RANGES_MAX:
        raise CommandError(
            Status.INVALID_FIELD, f"{len(command.ranges)} ranges; 1 to {DATASET_RANGES_MAX} go"
        )
    for blocks in command.ranges:
        _check_range(context, blocks.slba, blocks.blocks)
    for blocks in command.ranges:
        context.controller.ftl.deallocate(blocks.slba, blocks.blocks)
        _note_change(context, blocks)


def handle_copy(context: Context, command: Copy) -> None:
    """Copies the sources one after the other to the destination, inside the drive.

    Raises CommandError (Invalid Field) for too many or too much, and where they overlap.
    """
    total = sum(source.blocks for source in command.sources)
    if not (0 < len(command.sources) <= COPY_RANGES_MAX and total * SECTOR_BYTES <= COPY_BYTES_MAX):
        raise CommandError(
            Status.INVALID_FIELD,
            f"{len(command.sources)} sources of {format_size(total * SECTOR_BYTES)}; 1 to "
            f"{COPY_RANGES_MAX} of {format_size(COPY_BYTES_MAX)} in all go",
        )
    _check_range(context, command.dst_slba, total)
    for source in command.sources:
        _check_range(context, source.slba, source.blocks)
        if (
            source.slba < command.dst_slba + total
            and command.dst_slba < source.slba + source.blocks
        ):
            raise CommandError(Status.INVALID_FIELD, f"source {source} overlaps the destination")
    at = command.dst_slba
    for source in command.sources:
        for piece in _pieces(context, source):
            _write(context, at, _read(context, piece), fua=False)
            at += piece.blocks


def handle_define_patterns(context: Context, command: DefinePatterns) -> Data:
    """The number of each block; those that the drive does not know yet are added for good.

    Raises CommandError: Invalid Field, Capacity Exceeded, Write Fault.
    """
    _blocks_of(context, command.data)
    context.time.receive(len(command.data))
    sectors = np.frombuffer(command.data, np.uint8).reshape(-1, SECTOR_BYTES)
    return Data(context.controller.ftl.patterns.define(sectors).astype("<u2").tobytes())


def handle_write_patterns(context: Context, command: WritePatterns) -> None:
    """As Write with the bytes of these patterns, of which their numbers alone cross the link.

    Raises CommandError: Invalid Field for a pattern that was not defined, and as Write.
    """
    blocks, ftl = command.patterns.size, context.controller.ftl
    if blocks > PATTERN_BLOCKS_MAX:
        raise CommandError(
            Status.INVALID_FIELD, f"{blocks} patterns in one command; {PATTERN_BLOCKS_MAX} go"
        )
    _check_range(context, command.slba, blocks)
    ftl.patterns.check(command.patterns)
    context.time.receive(blocks * PATTERN_NUMBER_BYTES)
    context.controller.counters.written_bytes += blocks * SECTOR_BYTES
    for piece in _pieces(context, BlockRange(0, blocks)):
        numbers = command.patterns[piece.slba : piece.slba + piece.blocks]
        cells = ftl.patterns.sectors(numbers).reshape(-1)
        _write(context, command.slba + piece.slba, cells, fua=False)


def _read_for_host(context: Context, blocks: BlockRange) -> npt.NDArray[np.uint8]:
    """As NVMe counts data units: what Read, Compare and Verify read."""
    context.controller.counters.read_bytes += blocks.blocks * SECTOR_BYTES
    return _read(context, blocks)


def _read(context: Context, blocks: BlockRange) -> npt.NDArray[np.uint8]:
    data = np.empty(blocks.blocks * SECTOR_BYTES, np.uint8)
    reads: PageReads = context.controller.ftl.read(blocks.slba * SECTOR_BYTES, data)
    context.controller.counters.nand_page_reads += reads.ppns.size
    context.time.read_pages(reads)
    return data


def _write(context: Context, slba: int, data: bytes | npt.NDArray[np.uint8], fua: bool) -> None:
    controller = context.controller
    through = fua or not controller.features.writes_are_volatile
    is_cold = controller.models.holds_weights(slba * SECTOR_BYTES, len(data))
    stream = Stream.WEIGHTS if is_cold else Stream.HOST
    programs: PagePrograms = controller.ftl.write(slba, data, fua=through, stream=stream)
    context.time.write(len(data), programs, must_last=through)
    _note_change(context, BlockRange(slba, len(data) // SECTOR_BYTES))


def _note_change(context: Context, blocks: BlockRange) -> None:
    context.controller.models.note_change(blocks.slba * SECTOR_BYTES, blocks.blocks * SECTOR_BYTES)


def _blocks_of(context: Context, data: bytes) -> int:
    """Raises CommandError (Invalid Field) unless it is a whole number of blocks."""
    if not data or len(data) % SECTOR_BYTES:
        raise CommandError(
            Status.INVALID_FIELD, f"{len(data)} bytes are no whole number of {SECTOR_BYTES}"
        )
    _check_transfer(context, len(data))
    return len(data) // SECTOR_BYTES


def _check_transfer(context: Context, length_bytes: int) -> None:
    limit = context.controller.config.queues.mdts_bytes
    if length_bytes > limit:
        raise CommandError(
            Status.INVALID_FIELD,
            f"{format_size(length_bytes)} in one command; this drive moves at most "
            f"{format_size(limit)} (MDTS)",
        )


def _check_range(context: Context, slba: int, blocks: int) -> None:
    if blocks <= 0 or slba < 0:
        raise CommandError(Status.INVALID_FIELD, f"{blocks} blocks from {slba}")
    if slba + blocks > context.controller.ftl.capacity_sectors:
        raise LbaOutOfRange(slba, blocks, context.controller.ftl.capacity_sectors)


def _pieces(context: Context, blocks: BlockRange) -> Iterator[BlockRange]:
    """Of at most what one command may transfer: the FTL has room for that much at a time."""
    mdts_blocks = context.controller.config.queues.mdts_bytes // SECTOR_BYTES
    step = min(_PIECE_BLOCKS, mdts_blocks)
    for start in range(0, blocks.blocks, step):
        yield BlockRange(blocks.slba + start, min(step, blocks.blocks - start))
