"""Safetensors folders: rows, shards, and what a damaged folder says."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from host_client.model.errors import (
    InvalidConfig,
    MissingConfig,
    MissingShard,
    MissingTensor,
    ModelError,
    ModelNotFound,
    TornFile,
    UnsupportedModel,
)
from host_client.model.safetensors_folder import SafetensorsFolder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


@pytest.fixture
def shards(sharded_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_folder, tmp_path / "sharded"))


def test_every_tensor_by_rows(folder: Path, shards: Path, tiny_model: LlamaForCausalLM) -> None:
    for path in (folder, shards):
        with SafetensorsFolder(path) as checkpoint:
            assert sorted(checkpoint.names()) == sorted(tiny_model.state_dict())
            assert checkpoint.config["model_type"] == "llama"
            for name, expected in tiny_model.state_dict().items():
                middle = expected.shape[0] // 2
                first = checkpoint.read_rows(name, 0, middle)
                rest = checkpoint.read_rows(name, middle, expected.shape[0])
                assert torch.equal(torch.cat([first, rest]), expected)


def test_digest_ignores_places_and_sees_contents(folder: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        with SafetensorsFolder(path) as checkpoint:
            return checkpoint.digest()

    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert digest(folder) == digest(copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert digest(folder) != digest(copy)


def test_missing_shards_are_named(shards: Path) -> None:
    files = sorted(shards.glob("model-*.safetensors"))
    files[0].unlink()
    files[-1].unlink()
    with pytest.raises(MissingShard, match=f"lacks 2 of {len(files)} shards") as caught:
        SafetensorsFolder(shards)
    assert files[0].name in str(caught.value)
    assert files[-1].name in str(caught.value)


def test_a_missing_index_is_named(shards: Path) -> None:
    (shards / INDEX).unlink()
    with pytest.raises(MissingShard, match=r"index\.json"):
        SafetensorsFolder(shards)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_a_damaged_index(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(TornFile, match=r"index\.json"):
        SafetensorsFolder(shards)


def test_a_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(MissingConfig, match=r"config\.json is missing.*Copy it"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("text", ["", '{"model_type": "lla', "[1]", "\udcff"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidConfig, match=r"config\.json"):
        SafetensorsFolder(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"no weights as safetensors.*save_pretrained"):
        SafetensorsFolder(folder)


def test_a_file_cut_anywhere_is_torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [0, 7, 8, 100, 2000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(TornFile, match=r"model\.safetensors .* was not copied whole"):
            SafetensorsFolder(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99999]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "I8", "shape": [-2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_header_that_lies(folder: Path, header: bytes) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(TornFile):
        SafetensorsFolder(folder)


def test_an_absurd_header_length(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + bytes(64))
    with pytest.raises(TornFile, match=r"header claims"):
        SafetensorsFolder(folder)


def test_number_types_that_are_not_read(folder: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, folder / "model.safetensors")
    with SafetensorsFolder(folder) as checkpoint, pytest.raises(UnsupportedModel, match="I8"):
        checkpoint.read_rows("a", 0, 4)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with SafetensorsFolder(folder) as checkpoint, pytest.raises(MissingTensor, match="nothing"):
        checkpoint.shape("nothing")


def test_a_float64_scalar_and_an_empty_tensor(folder: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5, dtype=torch.float64), "empty": torch.empty(0, 3)}
    save_file(tensors, folder / "model.safetensors")
    with SafetensorsFolder(folder) as checkpoint:
        assert checkpoint.read_rows("scalar", 0, 1).tolist() == [2.5]
        assert checkpoint.shape("empty") == (0, 3)
        assert isinstance(checkpoint.digest(), str)


def test_files_are_closed_when_opening_fails(shards: Path) -> None:
    damaged = sorted(shards.glob("model-*.safetensors"))[-1]
    damaged.write_bytes(b"")
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ModelError):
        SafetensorsFolder(shards)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
