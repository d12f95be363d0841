"""The checkpoint: mapping and superblocks as of one journal record, in one file.

    head     magic, number u64, superblocks u32, chunks u32, is_clean u32, power-on ns i64,
             sectors programmed i64, next PSA of each stream i64[3] (-1: none), CRC32C u32 of the
             head and the superblocks' arrays
    arrays   of all superblocks, one after the other: states u8, erases u32, streams u8,
             retiring u8, reads i64, written (power-on ns) i64, opened at (sectors) i64
    chunk    first LPN u32, form u32, bytes u32, CRC32C u32 of what follows; form 0: entries
             u32[n] of the L2P table; form 1: runs u32[n, 3] (offset in the chunk, entry, count)

Chunks that nothing was ever mapped in are left out, and each takes the shorter form, so a sparse
or sequentially written drive has a short checkpoint, and any other 4 bytes a sector. Chunks are
written and read one at a time: none of this takes memory by the size of the drive.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.errors import DriveRefused
from csd_device.ftl.two_way_map import CHUNK_SECTORS
from csd_protocol.crc32c import crc32c

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

CHECKPOINT_NAME = "mapping.checkpoint"

_HEAD = struct.Struct("<8sQIIIqq3q")
_CRC = struct.Struct("<I")
_CHUNK = struct.Struct("<IIII")
_MAGIC = b"CSDCKPT2"
_ENTRIES, _RUNS = 0, 1
_ARRAYS: tuple[tuple[str, type[np.generic]], ...] = (
    ("states", np.uint8),
    ("erases", np.uint32),
    ("streams", np.uint8),
    ("retiring", np.bool_),
    ("reads", np.int64),
    ("written_ns", np.int64),
    ("opened_at", np.int64),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a drive has come."""

    powered_ns: int  # time that it was on, over all its life
    programmed: int  # sectors
    pointers: tuple[int, ...]  # next PSA of each stream, -1: no open superblock

    def numbers(self) -> tuple[int, ...]:
        return (self.powered_ns, self.programmed, *self.pointers)

    @classmethod
    def of(cls, numbers: list[int]) -> Self:
        return cls(numbers[0], numbers[1], tuple(numbers[2:]))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state after record `number`; `is_clean`: nothing was written behind it."""

    number: int
    is_clean: bool
    progress: Progress
    arrays: dict[str, npt.NDArray[Any]]  # by superblock; `written_ns` in power-on time
    chunk_count: int
    chunks: Iterable[tuple[int, U32]]  # first LPN, table entries


@njit(nogil=True, cache=True)
def _list_runs(entries: Any, runs: Any) -> Any:
    """Fills `runs` with offset, entry and count; how many, or -1 when they do not fit."""
    count = 0
    for index in range(entries.shape[0]):
        entry = np.int64(entries[index])
        if entry == 0:
            continue
        if count:
            last = runs[count - 1]
            if last[0] + last[2] == index and last[1] + last[2] == entry:
                last[2] += 1
                continue
        if count == runs.shape[0]:
            return -1
        runs[count, 0], runs[count, 1], runs[count, 2] = index, entry, 1
        count += 1
    return count


@njit(nogil=True, cache=True)
def _expand_runs(runs: Any, entries: Any) -> None:
    for index in range(runs.shape[0]):
        first, entry, count = runs[index]
        for each in range(min(count, entries.shape[0] - first)):
            entries[first + each] = entry + each


def encode_checkpoint(checkpoint: Checkpoint) -> Iterator[bytes]:
    """The file, a part at a time."""
    arrays = b"".join(checkpoint.arrays[name].tobytes() for name, _ in _ARRAYS)
    head = _HEAD.pack(
        _MAGIC,
        checkpoint.number,
        checkpoint.arrays["states"].size,
        checkpoint.chunk_count,
        checkpoint.is_clean,
        *checkpoint.progress.numbers(),
    )
    yield head + _CRC.pack(crc32c(head + arrays)) + arrays
    for first_lpn, entries in checkpoint.chunks:
        form, payload = _encode_chunk(entries)
        yield _CHUNK.pack(first_lpn, form, len(payload), crc32c(payload)) + payload


def read_checkpoint(path: Path) -> Checkpoint | None:
    """None when there is none; its chunks are read as they are asked for.

    Raises DriveRefused when it is damaged (a rename is never torn), at once or at a chunk.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        head = _read(file, path, _HEAD.size)
        (checksum,) = _CRC.unpack(_read(file, path, _CRC.size))
        magic, number, superblocks, chunks, is_clean, *progress = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise _damaged(path, "no checkpoint")
        parts = [_read(file, path, superblocks * np.dtype(kind).itemsize) for _, kind in _ARRAYS]
        if crc32c(head + b"".join(parts)) != checksum:
            raise _damaged(path, "CRC32C does not match")
        chunks_at = file.tell()
    arrays = {
        name: np.frombuffer(part, kind) for (name, kind), part in zip(_ARRAYS, parts, strict=True)
    }
    return Checkpoint(
        number=number,
        is_clean=bool(is_clean),
        progress=Progress.of(progress),
        arrays=arrays,
        chunk_count=chunks,
        chunks=_chunks(path, chunks_at, chunks),
    )


def _encode_chunk(entries: U32) -> tuple[int, bytes]:
    runs = np.empty((entries.size // 3, 3), np.uint32)
    count = _list_runs(entries, runs)
    return (_ENTRIES, entries.tobytes()) if count < 0 else (_RUNS, runs[:count].tobytes())


def _chunks(path: Path, at: int, count: int) -> Iterator[tuple[int, U32]]:
    with path.open("rb") as file:
        file.seek(at)
        for _ in range(count):
            first_lpn, form, size, checksum = _CHUNK.unpack(_read(file, path, _CHUNK.size))
            payload = _read(file, path, size)
            if crc32c(payload) != checksum:
                raise _damaged(path, f"CRC32C of the chunk at block {first_lpn} does not match")
            yield first_lpn, _decode_chunk(form, np.frombuffer(payload, np.uint32))


def _decode_chunk(form: int, words: U32) -> U32:
    if form == _ENTRIES:
        return words
    entries = np.zeros(CHUNK_SECTORS, np.uint32)
    _expand_runs(words.reshape(-1, 3).astype(np.int64), entries)
    return entries


def _read(file: BinaryIO, path: Path, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _damaged(path, "it ends early")
    return data


def _damaged(path: Path, why: str) -> DriveRefused:
    return DriveRefused(f"{path}: damaged ({why}); the mapping is lost")
