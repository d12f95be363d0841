"""A Hugging Face folder: config.json and weights as safetensors, one file or several with an index.

A file is eight bytes of header length, a JSON header, and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from host_client.model.checkpoint import (
    Dtype,
    StoredTensor,
    TensorFile,
    prevailing_dtype,
    sample_digest,
)
from host_client.model.errors import (
    InvalidConfig,
    MissingConfig,
    MissingShard,
    MissingTensor,
    ModelNotFound,
    TornFile,
    UnsupportedModel,
)
from host_client.model.foreign_configs import as_transformers
from host_client.model.naming import by_table

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEADER_BYTES_MAX = 100_000_000  # the format's own limit
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsFolder:
    """A `Checkpoint` over a folder. Raises a ModelError on opening when a file is not right."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        own_config = _read_config(folder)
        self.config = as_transformers(own_config)
        self._files: list[TensorFile] = []
        self._headers: list[bytes] = []
        self._stored: dict[str, StoredTensor] = {}
        try:
            for path in _weight_files(folder):
                self._add(path)
        except BaseException:
            self.close()
            raise
        self._tensors = by_table(self._stored, own_config)

    def _add(self, path: Path) -> None:
        file = TensorFile(path)
        self._files.append(file)
        header, tensors = _read_header(file)
        self._headers.append(header)
        self._stored.update(tensors)

    @property
    def source(self) -> str:
        return str(self._folder)

    @property
    def dtype(self) -> Dtype:
        return prevailing_dtype(self._tensors.values())

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._find(name)
        dtype = _TYPES.get(tensor.format)
        if dtype is None:
            raise UnsupportedModel(
                f"{tensor.file.path}: tensor {name} is {tensor.format}; supported are "
                f"{', '.join(_TYPES)}. Use a checkpoint that is not quantised, or a GGUF file"
            )
        data = torch.frombuffer(tensor.read(start, stop), dtype=dtype)
        return data.reshape(stop - start, *tensor.shape[1:])

    def levels(self, name: str) -> None:
        """No tensor is kept as levels."""

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensor(f"{self._folder} has no tensor {name}") from None

    def digest(self) -> str:
        return sample_digest(self._headers, self._stored.values())

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise MissingConfig(
            f"{path} is missing: a model folder needs config.json beside its weights. "
            "Copy it from where the model came from"
        )
    return _read_json(path, InvalidConfig)


def _read_json(path: Path, failure: type[InvalidConfig] | type[TornFile]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise failure(f"{path} is not valid JSON: {error}. Download or copy it again") from error
    if not isinstance(value, dict):
        raise failure(f"{path} does not hold a JSON object. Download or copy it again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights, in order of their names."""
    if (folder / _INDEX).is_file():
        return _shards(folder)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(folder.glob("*.safetensors")):
        raise MissingShard(
            f"{folder} has *.safetensors files but neither {_SINGLE} nor {_INDEX}. "
            "Copy the index from where the model came from"
        )
    raise ModelNotFound(
        f"{folder} holds no weights as safetensors (looked for {_SINGLE} and {_INDEX}). "
        "Convert other formats with transformers' save_pretrained, or give a .gguf file"
    )


def _shards(folder: Path) -> list[Path]:
    weight_map = _read_json(folder / _INDEX, TornFile).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TornFile(f"{folder / _INDEX} has no weight_map. Download or copy it again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise MissingShard(
            f"{folder} lacks {len(missing)} of {len(shards)} shards that {_INDEX} names: "
            f"{', '.join(missing)}. Download or copy them"
        )
    return [folder / shard for shard in shards]


def _read_header(file: TensorFile) -> tuple[bytes, dict[str, StoredTensor]]:
    (length,) = struct.unpack("<Q", file.read(0, 8, "the header length"))
    if length > _HEADER_BYTES_MAX:
        raise file.torn(f"its header claims {length} bytes")
    header = bytes(file.read(8, length, "the header"))
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, name, entries[name]) for name in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise file.torn(f"its header is not a table of tensors ({error})") from error
    return header, tensors


def _stored(file: TensorFile, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    shape = tuple(int(size) for size in entry["shape"]) or (1,)
    begin, end = entry["data_offsets"]
    if min(shape) < 0:
        raise file.torn(f"tensor {name} has the shape {shape}")
    if not 0 <= begin <= end or data_start + end > file.size_bytes:
        raise file.torn(f"tensor {name} needs bytes up to {data_start + end}")
    row_bytes = (end - begin) // max(shape[0], 1)
    tensor = StoredTensor(name, shape, entry["dtype"], file, data_start + begin, row_bytes)
    dtype = _TYPES.get(tensor.format)
    if dtype is not None and torch.Size(shape).numel() * dtype.itemsize != end - begin:
        raise file.torn(f"tensor {name} has {end - begin} bytes for shape {shape}")
    return tensor
