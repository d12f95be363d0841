"""Media: where the bytes of the cells lie. No headers, no mapping, only pages side by side.

`Media` is the seam for faults: a decorator sees every byte range that is read (`Pieces`), written
or erased, and passes it on, changes it or raises. Bytes that were never written, or erased since,
read as zeroes.

`FileMedia` writes with pwrite, so that a full disk is an error and not a signal, and reads through
a read-only map of the same sparse file. Pages of the file that a process has mapped count as its
memory, so the map is let go when it holds more than MAPPED_BYTES_MAX: that much is part of the
daemon's stated overhead. The page cache keeps the bytes; they are mapped again when read again.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from csd_device.checked_copy import Keep, copy_checked
from csd_device.errors import DriveRefused, WriteFault
from csd_device.gather import gather
from csd_protocol.units import format_size

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_ZEROES = bytes(1 << 20)

MAPPED_BYTES_MAX = 256 << 20
_CHECK_BYTES = 64 << 20  # that reads may have mapped since the last look
_FAULT_BYTES = 64 << 10  # that one page fault maps (Linux: fault_around_bytes)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Byte ranges of the media and where each goes in a buffer."""

    starts: I64  # [n] media address
    lengths: I64  # [n] bytes
    targets: I64  # [n] offset in the buffer


@dataclass(frozen=True, slots=True)
class Retries:
    """Sectors that took the array longer than one tR, and how much longer."""

    psas: I64  # [n] physical sectors, ascending, each once
    extra_ns: I64  # [n]


class Media(Protocol):
    """`size_bytes` of cells. Ranges outside of them are bugs and fail assertions."""

    @property
    def size_bytes(self) -> int: ...

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        """Reads each piece into the flat `out`; None: each at once. Raises UnrecoveredRead."""
        ...

    def write(self, start: int, data: U8) -> None:
        """Raises WriteFault when the bytes cannot be kept."""
        ...

    def erase(self, start: int, length: int) -> None:
        """The range reads as zeroes from here on. Raises WriteFault."""
        ...

    def sync(self) -> None:
        """Returns when what was written lies on stable storage. Raises WriteFault."""
        ...

    def close(self) -> None: ...


CopyUnits = Callable[[I64, U8, I64, Keep], U32]


def direct_copy(media: Media) -> CopyUnits | None:
    """`copy_checked` from media addresses; None where a read is more than a copy out of memory."""
    copy: CopyUnits | None = getattr(media, "copy_units", None)
    return copy


class RamMedia:
    """Cells in memory, touched as they are written."""

    def __init__(self, size_bytes: int) -> None:
        self._cells: U8 = np.zeros(size_bytes, np.uint8)

    @property
    def size_bytes(self) -> int:
        return int(self._cells.size)

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        gather(self._cells, pieces.starts, pieces.lengths, pieces.targets, out)
        return None

    def copy_units(self, starts: I64, out: U8, rows: I64, keep: Keep) -> U32:
        return copy_checked(self._cells, starts, out, rows, keep)

    def write(self, start: int, data: U8) -> None:
        _check_range(self, start, data.size)
        self._cells[start : start + data.size] = data

    def erase(self, start: int, length: int) -> None:
        _check_range(self, start, length)
        self._cells[start : start + length] = 0

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class HollowMedia:
    """Cells that keep no bytes: everything reads as zeroes.

    For runs where only times count, on drives larger than any disk at hand. Put around media that
    stay empty and are closed with these.
    """

    def __init__(self, inner: Media) -> None:
        self._inner = inner

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        for target, length in zip(pieces.targets.tolist(), pieces.lengths.tolist(), strict=True):
            out[target : target + length] = 0
        return None

    def write(self, start: int, data: U8) -> None:
        _check_range(self, start, data.size)

    def erase(self, start: int, length: int) -> None:
        _check_range(self, start, length)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._inner.close()


class FileMedia:
    """Cells in a sparse file of `size_bytes`, made if it is not there."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Raises DriveRefused when the file cannot be opened or has another size."""
        self._path = path
        self._size_bytes = size_bytes
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._set_size()
            self._map = mmap.mmap(self._file, size_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise DriveRefused(f"media {path} cannot be opened: {error}") from error
        self._cells: U8 = np.frombuffer(self._map, np.uint8)
        self._unchecked_bytes = 0
        self._others_bytes = _mapped_file_bytes()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        gather(self._cells, pieces.starts, pieces.lengths, pieces.targets, out)
        self._bound_mapped(int(pieces.lengths.sum()) + pieces.lengths.size * _FAULT_BYTES)
        return None

    def copy_units(self, starts: I64, out: U8, rows: I64, keep: Keep) -> U32:
        checksums = copy_checked(self._cells, starts, out, rows, keep)
        runs = 1 + int(np.count_nonzero(np.diff(starts) != out.shape[1]))
        self._bound_mapped(starts.size * out.shape[1] + runs * _FAULT_BYTES)
        return checksums

    def write(self, start: int, data: U8) -> None:
        _check_range(self, start, data.size)
        rest = np.ascontiguousarray(data).data
        try:
            while rest:
                written = os.pwrite(self._file, rest, start)
                start, rest = start + written, rest[written:]
        except OSError as error:
            raise self._fault("written", error) from error

    def erase(self, start: int, length: int) -> None:
        """Punches a hole; where the filesystem cannot, writes zeroes."""
        _check_range(self, start, length)
        try:
            _punch_hole(self._file, start, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise self._fault("erased", error) from error
            self._write_zeroes(start, length)

    def sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._fault("synced", error) from error

    def close(self) -> None:
        self._cells = np.empty(0, np.uint8)
        self._map.close()
        os.close(self._file)

    def _set_size(self) -> None:
        found = os.fstat(self._file).st_size
        if found == 0:
            os.ftruncate(self._file, self._size_bytes)
        elif found != self._size_bytes:
            os.close(self._file)
            raise DriveRefused(
                f"media {self._path} is {format_size(found)}; the drive's NAND is "
                f"{format_size(self._size_bytes)}"
            )

    def _bound_mapped(self, read_bytes: int) -> None:
        """Lets the map go when it holds too much."""
        self._unchecked_bytes += read_bytes
        if self._unchecked_bytes < _CHECK_BYTES:
            return
        self._unchecked_bytes = 0
        if _mapped_file_bytes() - self._others_bytes > MAPPED_BYTES_MAX:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._others_bytes = _mapped_file_bytes()  # libraries come in as they are used

    def _write_zeroes(self, start: int, length: int) -> None:
        for at in range(start, start + length, len(_ZEROES)):
            count = min(len(_ZEROES), start + length - at)
            self.write(at, np.frombuffer(_ZEROES, np.uint8, count))

    def _fault(self, what: str, error: OSError) -> WriteFault:
        return WriteFault(f"{self._path} cannot be {what}: {error}")


def _check_range(media: Media, start: int, length: int) -> None:
    assert start >= 0
    assert length >= 0
    assert start + length <= media.size_bytes


def _mapped_file_bytes() -> int:
    """Bytes of files that this process has mapped and resident; 0 where /proc does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("RssFile:"))
    return sum(int(words[1]) << 10 for words in lines)


def _punch_hole(file: int, start: int, length: int) -> None:
    """fallocate(2), which Python's os module does not offer with flags."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    offset, size = ctypes.c_int64(start), ctypes.c_int64(length)
    if libc.fallocate64(file, mode, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
