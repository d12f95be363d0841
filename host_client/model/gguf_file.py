"""A GGUF file as a checkpoint: Hugging Face's names and row order, dequantised by rows.

llama.cpp keeps query and key rows of each head interleaved (its rotary embedding pairs neighbours
where transformers pairs halves); rows are put back here as transformers itself does when it loads
`gguf_file=`. Config fields carry the names transformers gives them, so that its config classes and
tokenizers agree with what was packed.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType

from csd_protocol.low_bit_units import GROUP, join_rows
from csd_protocol.packed import Bits
from host_client.model.checkpoint import (
    U8,
    Dtype,
    StoredLevels,
    StoredTensor,
    TensorFile,
    prevailing_dtype,
    sample_digest,
)
from host_client.model.errors import InvalidConfig, MissingTensor, UnknownFamily, UnsupportedModel
from host_client.model.gguf_header import ArrayLength, GgufHeader, read_header
from host_client.model.naming import by_table

_CONFIG_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope.dimension_count": "head_dim",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_ROPE_THETA = 10000.0  # what llama.cpp takes for a file that does not say
_TOKEN_FIELDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}
_KEPT: dict[str, Bits] = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}  # levels in groups of 32
_MINIMUM_OF_Q4_0 = np.float16(-8)  # in scales
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}
_EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")
_INTERLEAVED = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)")


class GgufFile:
    """A `Checkpoint` over one GGUF file. Raises a ModelError on opening when it is not right."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        try:
            header = read_header(self._file)
            _refuse_split(path, header)
            self.config = _config(path, header)
        except BaseException:
            self._file.close()
            raise
        self._raw_header = header.raw
        self._stored = tuple(header.tensors.values())
        named = {_rename(name): tensor for name, tensor in header.tensors.items()}
        self._tensors = by_table(named, self.config)

    @property
    def source(self) -> str:
        return str(self._file.path)

    @property
    def dtype(self) -> Dtype:
        return prevailing_dtype(self._tensors.values())

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._in_order(name, start, stop, _dequantise)

    def levels(self, name: str) -> StoredLevels | None:
        bits = _KEPT.get(self._find(name).format)
        if bits is None:
            return None

        def read(start: int, stop: int) -> U8:
            rows: U8 = self._in_order(name, start, stop, _levels).numpy()
            return rows

        return StoredLevels(bits, read)

    def _in_order(
        self, name: str, start: int, stop: int, read: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Rows [start, stop) of a tensor by `read`, in the order that transformers has."""
        tensor = self._find(name)
        heads = self._interleaved_heads(name)
        if heads is None:
            return read(tensor, start, stop)
        head_rows = tensor.shape[0] // heads
        first, last = start // head_rows, -(-stop // head_rows)
        rows = read(tensor, first * head_rows, last * head_rows)
        return _halves(rows, last - first)[start - first * head_rows : stop - first * head_rows]

    def _interleaved_heads(self, name: str) -> int | None:
        """How many heads' rows are interleaved in this tensor; None: its rows are in order."""
        match = _INTERLEAVED.fullmatch(name)
        if match is None:
            return None
        heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        return int(heads)

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensor(f"{self._file.path} has no tensor for {name}") from None

    def digest(self) -> str:
        return sample_digest([self._raw_header], self._stored)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _rename(name: str) -> str:
    """Hugging Face's name for one of llama.cpp's; names without one are kept."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match is not None and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    expert = _EXPERT_TENSOR.fullmatch(name)  # files of before experts were stacked
    if expert is not None:
        which = _EXPERT_NAMES[expert[2]]
        return f"model.layers.{expert[1]}.block_sparse_moe.experts.{expert[3]}.{which}.weight"
    return _GLOBAL_NAMES.get(name, name)


def _refuse_split(path: Path, header: GgufHeader) -> None:
    parts = header.fields.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{path} is one of {parts} parts of a split model. Join them with "
            "llama.cpp's `llama-gguf-split --merge` first"
        )


def _config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The config that transformers derives from the same file."""
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise InvalidConfig(f"{path} does not say its general.architecture. Convert it again")
    if architecture != "llama":
        raise UnknownFamily(
            f"{path} is of the family {architecture!r}; GGUF files are read for: llama. "
            "Use the model's safetensors folder"
        )
    config: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "model_type": "mixtral" if _is_mixture(header) else architecture,
    }
    prefixed = [(f"{architecture}.{key}", name) for key, name in _CONFIG_FIELDS.items()]
    prefixed += [(f"tokenizer.ggml.{key}", name) for key, name in _TOKEN_FIELDS.items()]
    prefixed.append(("general.name", "_model_name_or_path"))
    config.update({name: header.fields[key] for key, name in prefixed if key in header.fields})
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if "vocab_size" not in config and isinstance(tokens, ArrayLength):
        config["vocab_size"] = tokens.count
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int):
        raise InvalidConfig(f"{path} does not say {architecture}.attention.head_count")
    config.setdefault("num_key_value_heads", heads)
    if _is_mixture(header):
        config.setdefault("rope_theta", _ROPE_THETA)  # transformers has another default for them
    return config


def _is_mixture(header: GgufHeader) -> bool:
    """llama.cpp calls Mixtral a `llama` with experts."""
    return bool(header.fields.get("llama.expert_count"))


def _dequantise(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor: 16-bit as they are, all else as float32."""
    data = tensor.read(start, stop)
    shape = (stop - start, *tensor.shape[1:])
    if tensor.format in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.format]
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
    number_type = GGMLQuantizationType[tensor.format]
    packed: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
    try:
        values = quants.dequantize(packed, number_type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{tensor.file.path}: tensor {tensor.name} is {tensor.format}, which cannot be "
            "dequantised. Convert the model to Q8_0 or F16"
        ) from error
    return torch.from_numpy(values).reshape(shape)


def _levels(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of groups, each a float16 or two and its levels, as rows of units."""
    data: U8 = np.frombuffer(tensor.read(start, stop), np.uint8)
    level_bytes = GROUP * _KEPT[tensor.format] // 8
    groups = data.reshape(stop - start, tensor.shape[-1] // GROUP, -1)
    numbers = np.ascontiguousarray(groups[:, :, :-level_bytes]).view("<f2")
    if tensor.format == "Q4_0":
        numbers = np.concatenate([numbers, numbers * _MINIMUM_OF_Q4_0], axis=2)
    levels = groups[:, :, -level_bytes:].reshape(stop - start, -1)
    return torch.from_numpy(join_rows(levels, *np.moveaxis(numbers, 2, 0)))


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from interleaved pairs to two halves; `rows` [heads * head_rows, ...]."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
