"""The mapping on disk: a checkpoint and the journal of what changed since.

The journal is a row of records; a record is what one commit made durable, all or nothing: it
counts only when its CRC32C is right, so a torn tail is as if it had not been written. Records are
numbered; the checkpoint names the last one it contains, and replaces the one before by a rename. A
crash between that rename and the emptying of the journal leaves records that the checkpoint
contains already: their numbers say so.

    record      magic, number u64, entries u32, CRC32C u32, then int64[entries, 4]
    entry       kind, then three fields by kind (see `Kind`)
    checkpoint  magic, number u64, runs u64, superblocks u64, write pointer i64, CRC32C u32,
                then runs int64[runs, 3] (lpn, psa, count), states uint8[], erases uint32[]

PSA: physical sector address, counted over the whole NAND in sectors of 4096 bytes.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from csd_device.errors import DriveRefused, WriteFault
from csd_device.ftl.folder import replace_file, sync_folder, write_all
from csd_protocol.crc32c import crc32c

I64 = npt.NDArray[np.int64]

JOURNAL_NAME = "mapping.journal"
CHECKPOINT_NAME = "mapping.checkpoint"

_RECORD = struct.Struct("<8sQII")
_RECORD_MAGIC = b"CSDJRNL1"
_CHECKPOINT = struct.Struct("<8sQQQqI")
_CHECKPOINT_MAGIC = b"CSDCKPT1"
_ENTRY_BYTES = 32


class Kind(IntEnum):
    """What an entry says, and its three fields."""

    MAP = 1  # lpn, psa, count: sectors written side by side
    UNMAP = 2  # lpn, count, 0
    OPEN = 3  # superblock, 0, 0
    FREE = 4  # superblock, 0, 0: erased
    POINTER = 5  # next psa to write, -1: none, 0, 0


Entry = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state after record `number`."""

    number: int
    runs: I64  # [n, 3] lpn, psa, count
    states: npt.NDArray[np.uint8]
    erases: npt.NDArray[np.uint32]
    write_pointer: int  # next psa to write, -1: no open superblock


class Journal:
    """Appends records; knows the number of the last one."""

    def __init__(self, path: Path, file: int, number: int, size_bytes: int) -> None:
        """Use `open`."""
        self._path = path
        self._file = file
        self._number = number
        self._size_bytes = size_bytes

    @classmethod
    def open(cls, directory: Path) -> tuple[Self, Checkpoint | None, list[I64]]:
        """The journal ready for appending, the checkpoint, and the records behind it.

        Raises DriveRefused when the checkpoint is damaged or the journal does not continue it.
        """
        checkpoint = _read_checkpoint(directory / CHECKPOINT_NAME)
        number = checkpoint.number if checkpoint else 0
        path = directory / JOURNAL_NAME
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        sync_folder(directory)
        size_bytes, records = 0, []
        for found, entries, end in _records(path.read_bytes()):
            size_bytes = end
            if found <= number:
                continue
            if found != number + 1:
                os.close(file)
                raise DriveRefused(f"{path}: record {found} follows record {number}; one is lost")
            number = found
            records.append(entries)
        os.ftruncate(file, size_bytes)
        return cls(directory, file, number, size_bytes), checkpoint, records

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def append(self, entries: list[Entry]) -> None:
        """One record, durable on return. Raises WriteFault; the journal then is as before."""
        payload = np.array(entries, np.int64).reshape(-1, 4).tobytes()
        checksum = _record_crc(self._number + 1, len(entries), payload)
        head = _RECORD.pack(_RECORD_MAGIC, self._number + 1, len(entries), checksum)
        try:
            write_all(self._file, head + payload)
            os.fdatasync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size_bytes)
            raise WriteFault(f"{self._path / JOURNAL_NAME} cannot be written: {error}") from error
        self._number += 1
        self._size_bytes += len(head) + len(payload)

    def checkpoint(
        self,
        runs: I64,
        states: npt.NDArray[np.uint8],
        erases: npt.NDArray[np.uint32],
        write_pointer: int,
    ) -> None:
        """Replaces checkpoint and journal by this state. Raises WriteFault."""
        state = Checkpoint(self._number, runs, states, erases, write_pointer)
        try:
            replace_file(self._path / CHECKPOINT_NAME, _encode_checkpoint(state))
            os.ftruncate(self._file, 0)
        except OSError as error:
            raise WriteFault(f"{self._path / CHECKPOINT_NAME}: {error}") from error
        self._size_bytes = 0

    def close(self) -> None:
        os.close(self._file)


def _record_crc(number: int, count: int, payload: bytes) -> int:
    return crc32c(struct.pack("<QI", number, count) + payload)


def _records(data: bytes) -> Iterator[tuple[int, I64, int]]:
    """Number, entries [n, 4] and end offset of each valid record up to the first that is not."""
    at = 0
    while at + _RECORD.size <= len(data):
        magic, number, count, checksum = _RECORD.unpack_from(data, at)
        end = at + _RECORD.size + count * _ENTRY_BYTES
        payload = data[at + _RECORD.size : end]
        if magic != _RECORD_MAGIC or len(data) < end:
            return
        if _record_crc(number, count, payload) != checksum:
            return
        yield number, np.frombuffer(payload, np.int64).reshape(-1, 4), end
        at = end


def _encode_checkpoint(state: Checkpoint) -> bytes:
    payload = state.runs.tobytes() + state.states.tobytes() + state.erases.tobytes()
    sizes = (state.number, len(state.runs), len(state.states), state.write_pointer)
    checksum = crc32c(struct.pack("<QQQq", *sizes) + payload)
    return _CHECKPOINT.pack(_CHECKPOINT_MAGIC, *sizes, checksum) + payload


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """None when there is none. Raises DriveRefused when it is damaged: a rename is never torn."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _CHECKPOINT.size:
        raise DriveRefused(f"{path}: damaged, {len(data)} bytes are no checkpoint")
    magic, number, runs, superblocks, pointer, checksum = _CHECKPOINT.unpack_from(data)
    payload = data[_CHECKPOINT.size :]
    sizes = struct.pack("<QQQq", number, runs, superblocks, pointer)
    if magic != _CHECKPOINT_MAGIC or crc32c(sizes + payload) != checksum:
        raise DriveRefused(f"{path}: damaged (CRC32C does not match); the mapping is lost")
    states_at, erases_at = runs * 24, runs * 24 + superblocks
    return Checkpoint(
        number,
        np.frombuffer(payload[:states_at], np.int64).reshape(-1, 3),
        np.frombuffer(payload[states_at:erases_at], np.uint8),
        np.frombuffer(payload[erases_at:], np.uint32),
        pointer,
    )
