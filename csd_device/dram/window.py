"""The window: on-drive DRAM that the host may read, exported as a file on shared memory.

Leases are first fit over a list of free pieces, ordered by offset and coalesced on release; offsets
are multiples of 64 bytes. The memory is reserved when the window opens, so that a full tmpfs is a
message then and not a bus error later, and is in huge pages where the kernel has them to give.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from csd_device.dram.huge_pages import collapse
from csd_device.errors import DriveRefused, NoLease, WindowFull, WindowGone
from csd_protocol.units import format_size

U8 = npt.NDArray[np.uint8]

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Lease:
    """A host's hold on `length` bytes of the window at `offset`."""

    id: int
    offset: int
    length: int


class Window:
    """A file of `size_bytes` that this process writes and the host maps or reads."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Replaces a file that a dead daemon left. Raises DriveRefused for one still in use."""
        assert size_bytes > 0
        assert size_bytes % ALIGN_BYTES == 0
        self.path = path
        self.size_bytes = size_bytes
        self.is_gone = False
        self._bytes: U8 = np.empty(0, np.uint8)
        self._ids = count(1)
        self._forget_leases()
        self._open()

    def lose(self) -> None:
        """The window is gone: all leases end, and its file is empty and unlinked.

        A host that reads the file that it has open finds its end. Until `come_back` nothing can be
        leased.
        """
        file = os.dup(self._file)
        self.close()
        os.ftruncate(file, 0)
        os.close(file)
        self.is_gone = True
        self._forget_leases()

    def come_back(self) -> None:
        """A new file at the same path. Raises DriveRefused when it cannot be made."""
        self._open()
        self.is_gone = False

    def lease(self, length_bytes: int, owner: str) -> Lease:
        """The first free piece that is long enough. Raises WindowGone; WindowFull with figures."""
        assert length_bytes > 0
        if self.is_gone:
            raise WindowGone
        offset = self._free.take(_align(length_bytes))
        if offset is None:
            raise WindowFull(
                length_bytes, self.free_bytes, self.largest_free_bytes, self.size_bytes
            )
        lease = Lease(next(self._ids), offset, length_bytes)
        self._leases[lease.id] = (owner, lease)
        self._by_owner.setdefault(owner, {})[lease.id] = lease
        return lease

    def view(self, offset: int, length: int) -> U8:
        """The window's own bytes, writable. Drop it before `close`."""
        assert offset >= 0
        assert length >= 0
        assert offset + length <= self.size_bytes
        return self._bytes[offset : offset + length]

    def release(self, lease_id: int, owner: str) -> None:
        """Gives one lease back. Raises NoLease when `owner` does not hold it."""
        holder, lease = self._leases.get(lease_id, ("", None))
        if lease is None or holder != owner:
            raise NoLease(lease_id, owner)
        del self._leases[lease_id]
        held = self._by_owner[owner]
        del held[lease_id]
        if not held:
            del self._by_owner[owner]
        self._free.give(lease.offset, _align(lease.length))

    def release_owner(self, owner: str) -> int:
        """Gives all of this host's leases back; how many those were."""
        held = self.leases_of(owner)
        for lease in held:
            self.release(lease.id, owner)
        return len(held)

    def leases_of(self, owner: str) -> list[Lease]:
        """What this host holds, oldest first."""
        return list(self._by_owner.get(owner, {}).values())

    def leases(self) -> dict[int, tuple[str, Lease]]:
        """Owner and lease of all that is held, by identifier."""
        return dict(self._leases)

    @property
    def lease_count(self) -> int:
        return len(self._leases)

    @property
    def free_bytes(self) -> int:
        return self._free.total_bytes

    @property
    def leased_bytes(self) -> int:
        """Bytes under lease, alignment included."""
        return self.size_bytes - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        return self._free.largest_bytes

    def close(self) -> None:
        """Unlinks the file. A host that has it open keeps what it sees."""
        if self.is_gone:
            return
        self.path.unlink(missing_ok=True)
        self._bytes = np.empty(0, np.uint8)
        with suppress(BufferError):  # a view is still held; the memory goes with it
            self._map.close()
        os.close(self._file)

    def _open(self) -> None:
        self._file = _create(self.path, self.size_bytes)
        collapse(self._file, self.size_bytes)
        self._map = mmap.mmap(self._file, self.size_bytes)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def _forget_leases(self) -> None:
        self._free = _FreePieces(self.size_bytes)
        self._leases: dict[int, tuple[str, Lease]] = {}
        self._by_owner: dict[str, dict[int, Lease]] = {}


class _FreePieces:
    """Free pieces [offset, length], ascending, never adjacent."""

    def __init__(self, size_bytes: int) -> None:
        self._pieces: list[tuple[int, int]] = [(0, size_bytes)]
        self.total_bytes = size_bytes

    @property
    def largest_bytes(self) -> int:
        return max((length for _, length in self._pieces), default=0)

    def take(self, length: int) -> int | None:
        """Offset of the first piece long enough, shortened by `length`; None when there is none."""
        for index, (offset, piece) in enumerate(self._pieces):
            if piece >= length:
                rest = [(offset + length, piece - length)] if piece > length else []
                self._pieces[index : index + 1] = rest
                self.total_bytes -= length
                return offset
        return None

    def give(self, offset: int, length: int) -> None:
        """Puts a piece back and joins it with its neighbours."""
        self.total_bytes += length
        index = sum(1 for start, _ in self._pieces if start < offset)
        if index < len(self._pieces) and self._pieces[index][0] == offset + length:
            length += self._pieces.pop(index)[1]
        if index > 0 and sum(self._pieces[index - 1]) == offset:
            before, before_length = self._pieces.pop(index - 1)
            offset, length, index = before, before_length + length, index - 1
        self._pieces.insert(index, (offset, length))


def _align(length: int) -> int:
    return -(-length // ALIGN_BYTES) * ALIGN_BYTES


def _create(path: Path, size_bytes: int) -> int:
    """A locked file with its memory reserved; the file descriptor."""
    try:
        _remove_stale(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DriveRefused(f"window {path} cannot be created: {error}") from error
    try:
        os.fchmod(file, 0o644)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(file, 0, size_bytes)
    except OSError as error:
        os.close(file)
        path.unlink(missing_ok=True)
        raise DriveRefused(_no_room(path, size_bytes, error)) from error
    return file


def _no_room(path: Path, size_bytes: int, error: OSError) -> str:
    if error.errno != errno.ENOSPC:
        return f"window {path} cannot be set up: {error}"
    state = os.statvfs(path.parent)
    free = format_size(state.f_bavail * state.f_frsize)
    return (
        f"window of {format_size(size_bytes)} does not fit: {path.parent} has {free} left. "
        "Give it more (docker: --shm-size) or set dram.window_bytes lower"
    )


def _remove_stale(path: Path) -> None:
    """Unlinks a window that nobody holds locked."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        raise DriveRefused(f"window {path} is in use by another daemon") from None
    finally:
        os.close(file)
