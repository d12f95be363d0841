"""The header of a GGUF file: metadata and where each tensor lies.

The gguf package's own reader takes seconds over a tokenizer's hundred thousand strings and reads
past a torn end without notice; this one skips the strings and checks every length. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from host_client.model.checkpoint import StoredTensor, TensorFile
from host_client.model.errors import UnsupportedModel

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_WINDOW_BYTES = 1 << 20
_DIMENSIONS_MAX = 4


@dataclass(frozen=True, slots=True)
class ArrayLength:
    """Stands for an array in the metadata; its items are not kept."""

    count: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`fields` by key: numbers, strings and `ArrayLength`. `raw` is the header's own bytes."""

    raw: bytes
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Cursor:
    """Reads a file from its start, a window at a time."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._window = b""
        self._window_offset = 0
        self.offset = 0

    def take(self, length: int, what: str) -> bytes:
        start = self.offset - self._window_offset
        if start + length > len(self._window):
            size = min(max(length, _WINDOW_BYTES), self._file.size_bytes - self.offset)
            if size < length:
                raise self._file.torn(f"{what} needs bytes up to {self.offset + length}")
            self._window = bytes(self._file.read(self.offset, size, what))
            self._window_offset, start = self.offset, 0
        self.offset += length
        return self._window[start : start + length]

    def skip(self, length: int, what: str) -> None:
        if self.offset + length > self._file.size_bytes:
            raise self._file.torn(f"{what} needs bytes up to {self.offset + length}")
        self.offset += length
        if self.offset > self._window_offset + len(self._window):
            self._window, self._window_offset = b"", self.offset

    def scalar(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.scalar("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._file.torn(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Any:
        """The value of a metadata field, of whatever type it says."""
        kind = self.scalar("<I", key)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], key)
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._skip_array(key)
        raise self._file.torn(f"field {key} has the unknown type {kind}")

    def _skip_array(self, key: str) -> ArrayLength:
        kind, count = self.scalar("<I", key), self.scalar("<Q", key)
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]), key)
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.scalar("<Q", key), key)
        else:
            raise self._file.torn(f"field {key} is an array of the unknown type {kind}")
        return ArrayLength(count)


def read_header(file: TensorFile) -> GgufHeader:
    """The header of an open GGUF file, checked to lie whole in it, as all its tensors are.

    Raises TornFile, or UnsupportedModel for versions, byte orders and tensor formats unknown here.
    """
    cursor = _Cursor(file)
    if cursor.take(4, "the magic") != _MAGIC:
        raise file.torn("it does not start with GGUF's magic")
    version = cursor.scalar("<I", "the version")
    if version not in _VERSIONS:
        raise UnsupportedModel(
            f"{file.path} is GGUF version {version} (or big endian); supported are "
            f"{', '.join(map(str, _VERSIONS))}, little endian. Convert it again with llama.cpp"
        )
    tensor_count = cursor.scalar("<Q", "the tensor count")
    field_count = cursor.scalar("<Q", "the field count")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text("a field's key")
        fields[key] = cursor.value(key)
    entries = [_read_tensor_entry(cursor, file) for _ in range(tensor_count)]
    data_start = _align(cursor.offset, fields.get("general.alignment", _DEFAULT_ALIGNMENT), file)
    tensors = {entry[0]: _place(file, data_start, *entry) for entry in entries}
    raw = bytes(file.read(0, cursor.offset, "the header"))
    return GgufHeader(raw, fields, tensors)


def _align(offset: int, alignment: Any, file: TensorFile) -> int:
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise file.torn(f"general.alignment is {alignment}, not a power of two")
    return -(-offset // alignment) * alignment


_Entry = tuple[str, tuple[int, ...], int, int]  # name, shape (rows first), type, offset


def _read_tensor_entry(cursor: _Cursor, file: TensorFile) -> _Entry:
    name = cursor.text("a tensor's name")
    dimensions = cursor.scalar("<I", name)
    if not 1 <= dimensions <= _DIMENSIONS_MAX:
        raise file.torn(f"tensor {name} has {dimensions} dimensions")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))
    return name, sizes[::-1], cursor.scalar("<I", name), cursor.scalar("<Q", name)


def _place(
    file: TensorFile, data_start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> StoredTensor:
    try:
        number_type = GGMLQuantizationType(kind)
    except ValueError as error:
        raise UnsupportedModel(
            f"{file.path}: tensor {name} has the unknown number type {kind}. "
            "Upgrade the gguf package, or convert the model to Q8_0 or F16"
        ) from error
    block_values, block_bytes = GGML_QUANT_SIZES[number_type]
    row_values = math.prod(shape[1:])
    if row_values % block_values:
        raise file.torn(f"tensor {name} has rows of {row_values}, not whole {number_type.name}")
    row_bytes = row_values // block_values * block_bytes
    tensor = StoredTensor(name, shape, number_type.name, file, data_start + offset, row_bytes)
    end = tensor.offset_bytes + tensor.length_bytes
    if end > file.size_bytes:
        raise file.torn(f"tensor {name} needs bytes up to {end}")
    return tensor
