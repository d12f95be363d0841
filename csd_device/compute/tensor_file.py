"""Reading a safetensors file that a host sent: every claim in it is checked before it is used.

The tensors are views of the file's own buffer: a loaded program costs its file's size and no more.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from csd_device.errors import CommandError
from csd_protocol.status import Status

U8 = npt.NDArray[np.uint8]

HEADER_BYTES_MAX = 16 << 20
_DETAIL_MAX = 400  # a hostile name may be as long as a header
_LENGTH_BYTES = 8
_DTYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32,
    "F16": np.float16,
    "U8": np.uint8,
}


def invalid(detail: str) -> CommandError:
    """The error for program data that is not what it should be."""
    return CommandError(Status.INVALID_PROGRAM_DATA, detail[:_DETAIL_MAX])


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # relative to the data section
    end: int


class TensorFile:
    """A checked safetensors file over `data` uint8 [file bytes], which it keeps."""

    def __init__(self, data: U8) -> None:
        """Raises CommandError (Invalid Program Data) naming what is wrong."""
        header, start = _read_header(data)
        self._payload = data[start:]
        self.size_bytes = data.size
        self.metadata = _read_metadata(header.pop("__metadata__", {}))
        self._entries = {name: self._read_entry(name, value) for name, value in header.items()}
        self._check_filled()
        self._unread = set(self._entries)

    def names(self) -> list[str]:
        return list(self._entries)

    def tensor(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The tensor, which must have this dtype and shape.

        Raises CommandError (Invalid Program Data) when it is missing or another.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise invalid(f"tensor {name} is missing")
        if np.dtype(_DTYPES[entry.dtype]) != np.dtype(dtype) or entry.shape != shape:
            raise invalid(
                f"tensor {name} is {entry.dtype} {list(entry.shape)}; "
                f"wanted {np.dtype(dtype).name} {list(shape)}"
            )
        self._unread.discard(name)
        view = self._payload[entry.begin : entry.end]
        aligned = view if view.ctypes.data % np.dtype(dtype).itemsize == 0 else view.copy()
        return aligned.view(dtype).reshape(shape)

    def finite(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """As `tensor`, and no value may be NaN or infinite."""
        values = self.tensor(name, dtype, shape)
        if not np.isfinite(values).all():
            raise invalid(f"tensor {name} has values that are not finite")
        return values

    def half(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
        """A float16 tensor of this shape, all finite, as its bits."""
        return self.finite(name, np.float16, shape).view(np.uint16)

    def optional(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
        """A float32 tensor as `finite` gives it; None when the file does not have it."""
        return self.finite(name, np.float32, shape) if self.has(name) else None

    def has(self, name: str) -> bool:
        return name in self._entries

    def check_all_read(self) -> None:
        """Raises CommandError (Invalid Program Data) naming a tensor that nobody asked for."""
        if self._unread:
            raise invalid(f"tensor {min(self._unread)} is none that this kind of program has")

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns. Raises CommandError when it is missing, no matrix or has no values."""
        entry = self._entries.get(name)
        if entry is None or len(entry.shape) != 2 or 0 in entry.shape:
            raise invalid(f"tensor {name} is missing or not a matrix")
        return entry.shape[0], entry.shape[1]

    def length(self, name: str) -> int:
        """Elements of a one-dimensional tensor. Raises CommandError when it is missing or not."""
        entry = self._entries.get(name)
        if entry is None or len(entry.shape) != 1 or entry.shape[0] == 0:
            raise invalid(f"tensor {name} is missing or not a vector")
        return entry.shape[0]

    def _read_entry(self, name: str, value: Any) -> _Entry:
        if not isinstance(value, dict):
            raise invalid(f"tensor {name}: its header entry is not an object")
        dtype = value.get("dtype")
        shape, offsets = value.get("shape"), value.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise invalid(f"tensor {name}: dtype {dtype!r} is not one of {sorted(_DTYPES)}")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise invalid(f"tensor {name}: shape or offsets are not sizes")
        begin, end = offsets
        wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if not 0 <= begin <= end <= self._payload.size or end - begin != wanted:
            raise invalid(
                f"tensor {name} lies at bytes {begin} to {end} of {self._payload.size}; "
                f"its shape takes {wanted}"
            )
        return _Entry(dtype, tuple(shape), begin, end)

    def _check_filled(self) -> None:
        """Raises CommandError unless the tensors fill the data section, each byte once."""
        end = 0
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                raise invalid(f"byte {min(entry.begin, end)} is of no tensor, or of two")
            end = entry.end
        if end != self._payload.size:
            raise invalid(f"{self._payload.size} bytes of tensors; the header tells of {end}")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_header(data: U8) -> tuple[dict[str, Any], int]:
    """The header as an object, and where the tensors' bytes start."""
    if data.size < _LENGTH_BYTES:
        raise invalid(f"a program file of {data.size} bytes has no header")
    length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
    if length > min(HEADER_BYTES_MAX, data.size - _LENGTH_BYTES):
        raise invalid(f"header of {length} bytes in a program file of {data.size}")
    start = _LENGTH_BYTES + length
    try:
        text = data[_LENGTH_BYTES:start].tobytes()
        header = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise invalid(f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise invalid("header is not a JSON object")
    return header, start


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names something twice")
    return found


def _read_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise invalid("metadata is not an object of texts")
    return value
