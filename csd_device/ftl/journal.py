"""The journal: what changed since the checkpoint, a record a commit, all or nothing.

A record counts only when its CRC32C is right, so a torn tail is as if it had not been written.
Records are numbered; the checkpoint names the last one it contains, and replaces the one before by
a rename. A crash between that rename and the emptying of the journal leaves records that the
checkpoint contains already: their numbers say so. All integers are little-endian.

    record      magic, number u64, rows u32, events u32, power-on ns i64, sectors programmed i64,
                next PSA of each stream i64[3] (-1: none), CRC32C u32 of all but itself,
                then rows u32[rows, 2] and events i64[events, 4] (csd_device.ftl.changes)

PSA: physical sector address, counted over the whole NAND in sectors of 4096 bytes.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from csd_device.errors import DriveRefused, WriteFault
from csd_device.ftl.changes import Changes
from csd_device.ftl.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    Progress,
    encode_checkpoint,
    read_checkpoint,
)
from csd_device.ftl.folder import replace_file, sync_folder, write_all
from csd_protocol.crc32c import crc32c

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

JOURNAL_NAME = "mapping.journal"

_HEAD = struct.Struct("<8sQIIqq3q")
_CRC = struct.Struct("<I")
_MAGIC = b"CSDJRNL2"
_ROW_BYTES, _EVENT_BYTES = 8, 32
HEAD_BYTES = _HEAD.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Record:
    """What one commit made durable."""

    number: int
    progress: Progress
    rows: U32  # [n, 2]
    events: I64  # [m, 4]


class Journal:
    """Appends records; knows the number of the last one."""

    def __init__(self, path: Path, file: int, number: int, size_bytes: int) -> None:
        """Use `open`."""
        self._path = path
        self._file = file
        self._number = number
        self._size_bytes = size_bytes

    @classmethod
    def open(cls, directory: Path) -> tuple[Self, Checkpoint | None, list[Record]]:
        """The journal ready for appending, the checkpoint, and the records behind it.

        Raises DriveRefused when the checkpoint is damaged or the journal does not continue it.
        """
        checkpoint = read_checkpoint(directory / CHECKPOINT_NAME)
        number = checkpoint.number if checkpoint else 0
        path = directory / JOURNAL_NAME
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        sync_folder(directory)
        size_bytes, records = 0, []
        for record, end in _records(path.read_bytes()):
            size_bytes = end
            if record.number <= number:
                continue
            if record.number != number + 1:
                os.close(file)
                raise DriveRefused(
                    f"{path}: record {record.number} follows record {number}; one is lost"
                )
            number = record.number
            records.append(record)
        os.ftruncate(file, size_bytes)
        return cls(directory, file, number, size_bytes), checkpoint, records

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def number(self) -> int:
        """Of the last record."""
        return self._number

    def append(self, changes: Changes, progress: Progress) -> None:
        """One record, durable on return. Raises WriteFault; the journal then is as before."""
        data = _encode(self._number + 1, changes.rows(), changes.events(), progress)
        try:
            write_all(self._file, data)
            os.fdatasync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size_bytes)
            raise WriteFault(f"{self._path / JOURNAL_NAME} cannot be written: {error}") from error
        self._number += 1
        self._size_bytes += len(data)

    def replace_by(self, checkpoint: Checkpoint) -> None:
        """Replaces checkpoint and journal by this state. Raises WriteFault."""
        assert checkpoint.number == self._number
        try:
            replace_file(self._path / CHECKPOINT_NAME, encode_checkpoint(checkpoint))
            os.ftruncate(self._file, 0)
        except OSError as error:
            raise WriteFault(f"{self._path / CHECKPOINT_NAME}: {error}") from error
        self._size_bytes = 0

    def close(self) -> None:
        os.close(self._file)


def _encode(number: int, rows: U32, events: I64, progress: Progress) -> bytes:
    head = _HEAD.pack(_MAGIC, number, len(rows), len(events), *progress.numbers())
    payload = rows.tobytes() + events.tobytes()
    return head + _CRC.pack(crc32c(head + payload)) + payload


def _records(data: bytes) -> Iterator[tuple[Record, int]]:
    """Each valid record and its end offset, up to the first that is not."""
    at = 0
    while at + HEAD_BYTES <= len(data):
        magic, number, rows, events, *progress = _HEAD.unpack_from(data, at)
        events_at = at + HEAD_BYTES + rows * _ROW_BYTES
        end = events_at + events * _EVENT_BYTES
        if magic != _MAGIC or len(data) < end:
            return
        (checksum,) = _CRC.unpack_from(data, at + _HEAD.size)
        if crc32c(data[at : at + _HEAD.size] + data[at + HEAD_BYTES : end]) != checksum:
            return
        yield (
            Record(
                number,
                Progress.of(progress),
                np.frombuffer(data, np.uint32, rows * 2, at + HEAD_BYTES).reshape(-1, 2),
                np.frombuffer(data, np.int64, events * 4, events_at).reshape(-1, 4),
            ),
            end,
        )
        at = end
