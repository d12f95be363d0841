"""Tables as large as a drive that take memory only where something was written."""

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

_MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it


def lazy_zeroes(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Anonymous memory that is taken a small page at a time, when it is written."""
    kind = np.dtype(dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, max(count, 1) * kind.itemsize, flags)
    with suppress(OSError):  # a kernel without huge pages does not know the advice
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind, count)
