"""One compiled loop that gathers many byte ranges, at the rate of memcpy.

`gather(source, starts, lengths, targets, out)` copies `source[starts[i] : starts[i] + lengths[i]]`
to `out[targets[i] : ...]` for each i, without the GIL. The FTL reads the media through it and the
unit cache its slots.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


@intrinsic
def _copy(typing_context: Any, target: Any, source: Any, length: Any) -> Any:
    """memcpy between two addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = cgutils.voidptr_t
        to, at = (builder.inttoptr(argument, pointer) for argument in arguments[:2])
        cgutils.raw_memcpy(builder, to, at, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def _gather(source: Any, starts: Any, lengths: Any, targets: Any, out: Any) -> None:
    to = np.int64(out.ctypes.data)  # signed: numba adds mixed signs as floats
    at = np.int64(source.ctypes.data)
    for index in range(starts.shape[0]):
        _copy(to + targets[index], at + starts[index], lengths[index])


@njit(nogil=True, cache=True)
def _all_inside(starts: Any, lengths: Any, size: Any) -> Any:
    for index in range(starts.shape[0]):
        if starts[index] < 0 or lengths[index] < 0 or starts[index] + lengths[index] > size:
            return False
    return True


def gather(source: U8, starts: I64, lengths: I64, targets: I64, out: U8) -> None:
    """Copies each range of `source` to its place in `out`; both flat and contiguous.

    A range outside of either is a bug and fails an assertion before anything is copied.
    """
    assert starts.shape == lengths.shape == targets.shape
    assert source.ndim == out.ndim == 1
    assert source.flags.c_contiguous
    assert out.flags.c_contiguous
    assert _all_inside(starts, lengths, source.shape[0])
    assert _all_inside(targets, lengths, out.shape[0])
    _gather(source, starts, lengths, targets, out)
