"""GGUF files: values as transformers loads them, and what a damaged file says."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation
from gguf import GGUFWriter, quants
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from csd_protocol.low_bit_units import decode_rows
from csd_protocol.packed import Role
from host_client.model.catalog import read_units
from host_client.model.errors import (
    InvalidConfig,
    MissingTensor,
    ModelError,
    TornFile,
    UnknownFamily,
    UnsupportedModel,
)
from host_client.model.gguf_file import GgufFile
from host_client.model.packer import pack

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


def gguf_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    quantisation: Quantisation = Quantisation.F32,
    architecture: str = "llama",
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The tiny model as llama.cpp would lay it out, but for the order of query and key rows."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    extra(writer)
    for name, tensor in model.state_dict().items():
        kind = Quantisation.F32 if tensor.ndim == 1 else quantisation
        data = quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model)


@pytest.mark.parametrize(
    "quantisation",
    [Quantisation.F32, Quantisation.F16, Quantisation.BF16, Quantisation.Q8_0, Quantisation.Q4_1],
)
def test_tensors_equal_what_transformers_loads(
    quantisation: Quantisation, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model, quantisation)
    reference = load_gguf_checkpoint(path, return_tensors=True, model_to_load=tiny_model)
    with GgufFile(path) as checkpoint:
        assert checkpoint.config == reference["config"]
        assert sorted(checkpoint.names()) == sorted(reference["tensors"])
        for name, expected in reference["tensors"].items():
            assert checkpoint.shape(name) == tuple(expected.shape)
            rows = checkpoint.read_rows(name, 0, expected.shape[0])
            assert torch.equal(rows.float(), expected.float()), name


@pytest.mark.parametrize("quantisation, bits", [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4)])
def test_levels_stand_for_the_very_values(
    quantisation: str, bits: int, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model, Quantisation[quantisation])
    with GgufFile(path) as checkpoint:
        for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"):
            tensor = f"model.layers.1.{name}.weight"
            levels = checkpoint.levels(tensor)
            assert levels is not None
            assert levels.bits == bits
            values = checkpoint.read_rows(tensor, 3, 21)
            rows = levels.read(3, 21)
            assert np.array_equal(decode_rows(rows, values.shape[1], bits), values.numpy())
        assert checkpoint.levels("model.norm.weight") is None


def test_units_keep_the_files_own_levels(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model, Quantisation.Q4_1)
    with GgufFile(path) as checkpoint:
        packed = pack(checkpoint, ram_drive, "tiny", bits=4)
        for role, tensor, row in (
            (Role.FFN, "mlp.gate_proj", 0),
            (Role.FFN, "mlp.up_proj", 1),
            (Role.HEADS, "self_attn.q_proj", 0),
        ):
            site = packed.find(role, 1)
            units = read_units(ram_drive, site, 0, site.count).view(np.uint8)[:, row]
            rows = checkpoint.shape(f"model.layers.1.{tensor}.weight")[0] // site.count
            values = checkpoint.read_rows(f"model.layers.1.{tensor}.weight", 0, rows * site.count)
            assert np.array_equal(
                decode_rows(np.ascontiguousarray(units), site.cols, 4), values[::rows].numpy()
            )


@pytest.mark.parametrize("start, stop", [(0, 1), (3, 21), (16, 32), (63, 64), (0, 64)])
def test_any_rows_of_interleaved_heads(tiny_gguf: Path, start: int, stop: int) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    with GgufFile(tiny_gguf) as checkpoint:
        whole = checkpoint.read_rows(name, 0, 64)
        assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop])


def test_the_type_to_pack_to(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    for quantisation, dtype in (("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "float16")):
        path = write_gguf(tmp_path / f"{quantisation}.gguf", tiny_model, Quantisation[quantisation])
        with GgufFile(path) as checkpoint:
            assert checkpoint.dtype == dtype


def test_digest_is_of_contents(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        with GgufFile(path) as checkpoint:
            return checkpoint.digest()

    first = write_gguf(tmp_path / "first.gguf", tiny_model)
    other = write_gguf(tmp_path / "other.gguf", tiny_model)
    assert digest(first) == digest(other)
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert digest(first) != digest(other)


def test_a_file_cut_anywhere_is_torn(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for length in [*range(0, 4000, 37), len(whole) // 2, len(whole) - 1]:
        tiny_gguf.write_bytes(whole[:length])
        with pytest.raises(TornFile, match=r"tiny\.gguf .* was not copied whole: .*again"):
            GgufFile(tiny_gguf)


def test_a_file_that_shrinks_while_open_is_torn(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as checkpoint:
        tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:5000])
        with pytest.raises(TornFile, match=r"tensor output\.weight needs"):
            checkpoint.read_rows("lm_head.weight", 0, 130)


def test_random_damage_to_the_header_is_an_error_of_ours(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    generator = np.random.default_rng(5)
    for _ in range(300):
        data = bytearray(whole)
        for position in generator.integers(4, 1200, 3):
            data[position] = generator.integers(256)
        tiny_gguf.write_bytes(data)
        try:
            GgufFile(tiny_gguf).close()
        except ModelError:
            continue


@pytest.mark.parametrize(
    "position, layout, value, message",
    [
        (0, "<I", 1, "magic"),
        (8, "<Q", 1 << 60, "not copied whole"),
        (16, "<Q", 1 << 60, "not copied whole"),
        (24, "<Q", 1 << 63, "not copied whole"),
    ],
)
def test_absurd_counts_are_refused_at_once(
    tiny_gguf: Path, position: int, layout: str, value: int, message: str
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    struct.pack_into(layout, data, position, value)
    tiny_gguf.write_bytes(data)
    with pytest.raises(TornFile, match=message):
        GgufFile(tiny_gguf)


def test_version_and_byte_order(tiny_gguf: Path) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[4:8] = (3).to_bytes(4, "big")
    tiny_gguf.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"big endian.*2, 3"):
        GgufFile(tiny_gguf)


def test_another_family(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_model, architecture="falcon")
    with pytest.raises(UnknownFamily, match=r"'falcon'; GGUF files are read for: llama"):
        GgufFile(path)


def test_a_split_file(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny-00001-of-00003.gguf",
        tiny_model,
        extra=lambda writer: writer.add_uint16("split.count", 3),
    )
    with pytest.raises(UnsupportedModel, match=r"one of 3 parts.*merge"):
        GgufFile(path)


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(InvalidConfig, match=r"general\.architecture"):
        GgufFile(path)


def test_an_unknown_tensor_is_named(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as checkpoint, pytest.raises(MissingTensor, match=r"model\.x"):
        checkpoint.read_rows("model.x", 0, 1)


def test_a_number_type_without_dequantisation(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: Any, kind: Quantisation) -> None:
        raise NotImplementedError

    data = bytearray(tiny_gguf.read_bytes())
    name = struct.pack("<Q", 13) + b"output.weight"
    kind_at = data.index(name) + len(name) + 4 + 16
    struct.pack_into("<I", data, kind_at, Quantisation.Q8_1)
    tiny_gguf.write_bytes(data)
    monkeypatch.setattr(quants, "dequantize", refuse)
    with GgufFile(tiny_gguf) as checkpoint, pytest.raises(UnsupportedModel, match="Q8_1"):
        checkpoint.read_rows("lm_head.weight", 0, 1)
