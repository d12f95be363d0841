"""Host memory that reads land in."""

import contextlib
import mmap

import numpy as np
import numpy.typing as npt


class Buffer:
    """`size` bytes of anonymous memory, page aligned and zeroed.

    Memory is taken page by page as it is first written, and goes back to the system when the
    last view is gone. What a later read writes shows in `array` (uint8 [size]) and in every
    slice, retyped view or tensor made of it.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"a buffer of {size} bytes")
        self.size = size
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # kernels without transparent huge pages refuse
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, size)
        self.address = int(self.array.ctypes.data)
