"""Host memory that reads land in: page-aligned buffers, and a pool with a budget in bytes."""

import math
import mmap
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from host_client.io.errors import BuffersExhausted

ALIGN_BYTES = mmap.PAGESIZE


class Buffer:
    """`size_bytes` of anonymous memory, page aligned and zeroed.

    Memory is taken page by page as it is first written, and goes back to the system when the
    last view is gone. Views share the memory: what a later read writes shows in all of them.
    """

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            raise ValueError(f"a buffer needs at least one byte, not {size_bytes}")
        self.size_bytes = size_bytes
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def memory(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """The bytes of one range. Raises ValueError when it reaches beyond the buffer."""
        self._check(offset_bytes, length_bytes)
        return self._bytes[offset_bytes : offset_bytes + length_bytes].data

    def array(
        self, offset_bytes: int, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint16
    ) -> npt.NDArray[Any]:
        """A numpy view. Raises ValueError when it reaches beyond the buffer."""
        length_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._check(offset_bytes, length_bytes)
        return self._bytes[offset_bytes : offset_bytes + length_bytes].view(dtype).reshape(shape)

    def tensor(
        self, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float16
    ) -> torch.Tensor:
        """A torch view. Raises ValueError when it reaches beyond the buffer."""
        raw = self.array(offset_bytes, (math.prod(shape) * dtype.itemsize,), np.uint8)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            raise ValueError(
                f"{length_bytes} bytes at {offset_bytes} do not lie in a buffer "
                f"of {self.size_bytes}"
            )


class BufferPool:
    """Buffers up to `budget_bytes` in all, kept for reuse. Safe from several threads.

    Sizes are rounded up to `GRAIN_BYTES`. A buffer that lies idle is reused for anything that
    fills at least half of it; when the budget is short, idle buffers go before a request fails.
    """

    GRAIN_BYTES = 64 * 1024

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.in_use_bytes = 0
        self.peak_bytes = 0
        self._idle: list[Buffer] = []
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers, in use or idle; never above the budget."""
        return self.in_use_bytes + sum(buffer.size_bytes for buffer in self._idle)

    def take(self, size_bytes: int) -> Buffer:
        """A buffer of at least `size_bytes`. Raises BuffersExhausted with the figures."""
        rounded = -(-size_bytes // self.GRAIN_BYTES) * self.GRAIN_BYTES
        with self._lock:
            buffer = self._reuse(rounded) or self._allocate(rounded)
            self.in_use_bytes += buffer.size_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            return buffer

    def give_back(self, buffer: Buffer) -> None:
        """The caller must hold no view that it still reads."""
        with self._lock:
            assert buffer not in self._idle, "a buffer was given back twice"
            self.in_use_bytes -= buffer.size_bytes
            self._idle.append(buffer)

    def _reuse(self, size_bytes: int) -> Buffer | None:
        fitting = [b for b in self._idle if size_bytes <= b.size_bytes <= 2 * size_bytes]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda candidate: candidate.size_bytes)
        self._idle.remove(buffer)
        return buffer

    def _allocate(self, size_bytes: int) -> Buffer:
        if self.in_use_bytes + size_bytes > self.budget_bytes:
            raise BuffersExhausted(size_bytes, self.in_use_bytes, self.budget_bytes)
        while self.held_bytes + size_bytes > self.budget_bytes:
            self._idle.pop(0)
        return Buffer(size_bytes)
