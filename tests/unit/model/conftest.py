"""A drive made of memory, and tiny LLaMA models on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CAPACITY_BYTES = 8 << 20
MakeDrive = Callable[..., "RamDrive"]


class RamDrive:
    """A `BlockStorage` in memory that holds its callers to whole blocks and counts writes.

    After `writes_left` writes, where that is set, it answers like a drive that went away.
    """

    block_bytes = 4096

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.data = bytearray(capacity_bytes)
        self.writes_left: int | None = None
        self.written: list[tuple[int, int]] = []  # offset, length
        self._patterns = np.empty((0, self.block_bytes), np.uint8)

    def read(self, offset_bytes: int, length_bytes: int, /) -> bytes:
        self._check(offset_bytes, length_bytes)
        return bytes(self.data[offset_bytes : offset_bytes + length_bytes])

    def write(self, offset_bytes: int, data: bytes | memoryview, /) -> None:
        length = memoryview(data).nbytes
        self._check(offset_bytes, length)
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise ConnectionError("the drive is gone")
            self.writes_left -= 1
        self.data[offset_bytes : offset_bytes + length] = memoryview(data).cast("B")
        self.written.append((offset_bytes, length))

    def copy(self, from_bytes: int, to_bytes: int, length_bytes: int, /) -> None:
        assert abs(from_bytes - to_bytes) >= length_bytes
        self.write(to_bytes, self.read(from_bytes, length_bytes))

    def define_patterns(self, data: bytes, /) -> npt.NDArray[np.uint16]:
        fresh = np.frombuffer(data, np.uint8).reshape(-1, self.block_bytes)
        first = len(self._patterns)
        self._patterns = np.concatenate([self._patterns, fresh])
        return np.arange(first, len(self._patterns), dtype=np.uint16)

    def write_patterns(self, offset_bytes: int, numbers: npt.NDArray[np.uint16], /) -> None:
        self.write(offset_bytes, self._patterns[numbers].tobytes())

    def flush(self) -> None:
        pass

    def deallocate(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._check(offset_bytes, length_bytes)
        self.data[offset_bytes : offset_bytes + length_bytes] = bytes(length_bytes)

    @property
    def written_bytes(self) -> int:
        return sum(length for _, length in self.written)

    def forget(self) -> None:
        """Starts counting writes anew, without a limit."""
        self.written.clear()
        self.writes_left = None

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        assert offset_bytes % self.block_bytes == 0
        assert length_bytes % self.block_bytes == 0
        assert offset_bytes >= 0
        assert offset_bytes + length_bytes <= self.capacity_bytes


def tiny_config(**changes: object) -> LlamaConfig:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 130,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(fields | changes))


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Random weights in float32; norms are random too, so that a mix-up shows."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_folder(tiny_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def ram_drive() -> RamDrive:
    return RamDrive()


@pytest.fixture
def make_drive() -> MakeDrive:
    return RamDrive
