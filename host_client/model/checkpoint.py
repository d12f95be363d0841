"""What a checkpoint on disk looks like to the packer, whatever its file format.

Files are read with `pread` by row ranges, never mapped: mapped pages would count as this process's
memory, and a file that ends early would be a SIGBUS instead of an error.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Bits
from host_client.model.errors import TornFile

if TYPE_CHECKING:
    import torch

U8 = npt.NDArray[np.uint8]

Dtype = Literal["float16", "bfloat16"]

_SAMPLE_BYTES = 4096
_SAMPLES = 3  # of each tensor: its first, middle and last bytes


@dataclass(frozen=True, slots=True)
class StoredLevels:
    """Rows that are levels in groups, as `low_bit_units` has them.

    read: rows [start, stop) as uint8 [rows, row bytes]; no value changes.
    """

    bits: Bits
    read: Callable[[int, int], U8]


class Checkpoint(Protocol):
    """Named tensors with Hugging Face's names, shapes and row order, and the model's config."""

    @property
    def config(self) -> dict[str, Any]:
        """As in config.json: `model_type`, `hidden_size`, ..."""

    @property
    def source(self) -> str:
        """What was opened, for people."""

    @property
    def dtype(self) -> Dtype:
        """The 16-bit type to pack to: the checkpoint's own, else float16."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the tensor, [stop - start, ...], in a floating type.

        Raises TornFile when the file ends early, UnsupportedModel for a number format.
        """

    def levels(self, name: str) -> StoredLevels | None:
        """A tensor's own levels, where its rows are stored as those of units can be."""

    def digest(self) -> str:
        """Hex digest of headers, sizes and a sample of each tensor's bytes; see `sample_digest`."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie in a file. Rows are of equal length and follow each other."""

    name: str
    shape: tuple[int, ...]
    format: str  # the file format's own name of the number type
    file: "TensorFile"
    offset_bytes: int
    row_bytes: int

    @property
    def length_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes of rows [start, stop)."""
        offset = self.offset_bytes + start * self.row_bytes
        return self.file.read(offset, (stop - start) * self.row_bytes, f"tensor {self.name}")

    def part(self, name: str, start: int, rows: int) -> "StoredTensor":
        """Rows of the last dimension, [rows, columns] from number `start` on, as a tensor.

        Of a vector, so many values.
        """
        row_bytes = self.row_bytes // prod(self.shape[1:-1])
        offset_bytes = self.offset_bytes + start * row_bytes
        shape = (rows, *self.shape[-1:]) if len(self.shape) > 1 else (rows,)
        return replace(self, name=name, shape=shape, offset_bytes=offset_bytes, row_bytes=row_bytes)


class TensorFile:
    """One open file of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._file).st_size

    def read(self, offset_bytes: int, length_bytes: int, what: str) -> bytearray:
        """Exactly these bytes. Raises TornFile naming `what` when the file ends before."""
        if offset_bytes + length_bytes > self.size_bytes:
            raise self.torn(f"{what} needs bytes up to {offset_bytes + length_bytes}")
        data = bytearray(length_bytes)
        view = memoryview(data)
        done = 0
        while done < length_bytes:
            count = os.preadv(self._file, [view[done:]], offset_bytes + done)
            if count == 0:
                raise self.torn(f"{what} needs bytes up to {offset_bytes + length_bytes}")
            done += count
        return data

    def torn(self, detail: str) -> TornFile:
        """The error for this file: what is wrong with it, and what to do."""
        return TornFile(
            f"{self.path} ({self.size_bytes} bytes) is damaged or was not copied whole: {detail}. "
            "Download or copy it again"
        )

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def sample_digest(headers: Iterable[bytes], tensors: Iterable[StoredTensor]) -> str:
    """SHA-256 over whole headers, and over each tensor's name, shape, size and three samples.

    Headers hold every name, shape and number type; training changes all of a tensor, so 4 KiB of
    its start, middle and end show it. Names of files and times are left out: a copy is the same.
    """
    state = hashlib.sha256()
    for header in headers:
        state.update(hashlib.sha256(header).digest())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        length = min(_SAMPLE_BYTES, tensor.length_bytes)
        state.update(f"{tensor.name} {tensor.shape} {tensor.format}\n".encode())
        for sample in range(_SAMPLES):
            start = (tensor.length_bytes - length) * sample // (_SAMPLES - 1)
            offset = tensor.offset_bytes + start
            state.update(tensor.file.read(offset, length, f"tensor {tensor.name}"))
    return state.hexdigest()


def prevailing_dtype(tensors: Iterable[StoredTensor]) -> Dtype:
    """The 16-bit type that holds most bytes of a checkpoint; float16 where none does."""
    half_bytes = bfloat_bytes = 0
    for tensor in tensors:
        if tensor.format == "F16":
            half_bytes += tensor.length_bytes
        elif tensor.format == "BF16":
            bfloat_bytes += tensor.length_bytes
    return "bfloat16" if bfloat_bytes > half_bytes else "float16"
