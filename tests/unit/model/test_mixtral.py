"""Mixtral checkpoints in every layout that they come in pack to the same units."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from csd_protocol.packed import PackedModel, Role, decode_manifest, encode_manifest
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.model.catalog import read_units
from host_client.model.checkpoint import Checkpoint
from host_client.model.errors import InvalidConfig, MissingTensor, ShapeMismatch
from host_client.model.gguf_file import GgufFile
from host_client.model.packer import pack
from host_client.model.safetensors_folder import SafetensorsFolder

EXPERTS, HIDDEN, NEURONS, LAYERS = 4, 64, 48, 2


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(3)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=70,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config).to(torch.float16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def original(model: MixtralForCausalLM, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    return SafetensorsFolder(folder)


def sharded(model: MixtralForCausalLM, folder: Path) -> Checkpoint:
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return SafetensorsFolder(folder)


def fused(model: MixtralForCausalLM, folder: Path) -> Checkpoint:
    """As transformers' own modules have it: all experts of a layer in two tensors."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors")
    return SafetensorsFolder(folder)


def gguf(model: MixtralForCausalLM, folder: Path, stacked: bool = True) -> Checkpoint:
    """As llama.cpp's converter writes it; before 2024 each expert had tensors of its own."""
    folder.mkdir()
    config, state = model.config, {name: t.numpy() for name, t in model.state_dict().items()}
    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    for name, tensor in gguf_tensors(state, stacked).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(folder / "tiny.gguf")


def gguf_tensors(state: dict[str, np.ndarray], stacked: bool) -> dict[str, np.ndarray]:
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"].astype(np.float32),
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}", f"blk.{layer}"
        tensors |= {
            f"{ours}.attn_norm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.attn_q.weight": interleaved(state[f"{theirs}.self_attn.q_proj.weight"], 4),
            f"{ours}.attn_k.weight": interleaved(state[f"{theirs}.self_attn.k_proj.weight"], 2),
            f"{ours}.attn_v.weight": state[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attn_output.weight": state[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.ffn_gate_inp.weight": state[f"{theirs}.mlp.gate.weight"],
        }
        gate_up = state[f"{theirs}.mlp.experts.gate_up_proj"]
        stacks = {
            "gate": gate_up[:, :NEURONS],
            "up": gate_up[:, NEURONS:],
            "down": state[f"{theirs}.mlp.experts.down_proj"],
        }
        for name, stack in stacks.items():
            if stacked:
                tensors[f"{ours}.ffn_{name}_exps.weight"] = stack
            else:
                tensors |= {
                    f"{ours}.ffn_{name}.{expert}.weight": stack[expert] for expert in range(EXPERTS)
                }
    return tensors


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp makes of query and key rows: `LlamaModel.permute` of its converter."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


LAYOUTS: dict[str, Callable[[MixtralForCausalLM, Path], Checkpoint]] = {
    "original": original,
    "sharded": sharded,
    "fused": fused,
    "gguf": gguf,
    "gguf-apart": lambda model, folder: gguf(model, folder, stacked=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_packs_to_the_models_units(mixtral, make_drive, tmp_path, layout) -> None:
    drive = make_drive()
    with LAYOUTS[layout](mixtral, tmp_path / "m") as checkpoint:
        packed = pack(checkpoint, drive, "m", dtype="float16")
    state = {name: t.numpy().view(np.uint16) for name, t in mixtral.state_dict().items()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        router = read_units(drive, packed.find(Role.ROUTER, layer), 0, EXPERTS)
        assert np.array_equal(router[:, 0], state[f"{prefix}.gate.weight"])
        sites = packed.ffns(layer)
        assert [site.expert for site in sites] == list(range(EXPERTS))
        for site in sites:
            units = read_units(drive, site, 0, NEURONS)
            gate_up = state[f"{prefix}.experts.gate_up_proj"][site.expert]
            down = state[f"{prefix}.experts.down_proj"][site.expert]
            assert np.array_equal(units[:, 0], gate_up[:NEURONS])
            assert np.array_equal(units[:, 1], gate_up[NEURONS:])
            assert np.array_equal(units[:, 2], down.T)
        queries = read_units(drive, packed.find(Role.HEADS, layer), 0, 2)[:, :32]
        expected = state[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert np.array_equal(queries.reshape(expected.shape), expected)
    assert packed.config["num_local_experts"] == EXPERTS
    assert packed.config["model_type"] == packed.family == "mixtral"


@pytest.fixture
def packed(mixtral, ram_drive, tmp_path) -> PackedModel:
    with original(mixtral, tmp_path / "m") as checkpoint:
        return pack(checkpoint, ram_drive, "m")


def test_experts_are_counted_through(packed: PackedModel) -> None:
    assert packed.format_version == 3
    assert packed.experts == EXPERTS
    numbers = [packed.program_layer(site) for site in packed.ffns()]
    assert numbers == list(range(LAYERS * EXPERTS))
    assert packed.ffns(1)[2].name == "layers.1.experts.2"
    assert decode_manifest(encode_manifest(packed)) == packed
    with pytest.raises(KeyError, match="no site ffn in layer 0"):
        packed.find(Role.FFN, 0)


def test_what_was_packed_reads_back_as_a_checkpoint(mixtral, ram_drive, packed) -> None:
    checkpoint = PackedCheckpoint(ram_drive, packed)
    state = mixtral.state_dict()
    name = "model.layers.1.block_sparse_moe.experts.2"
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"][2]
    down = state["model.layers.1.mlp.experts.down_proj"][2]
    assert torch.equal(checkpoint.read_rows(f"{name}.w3.weight", 5, 9), gate_up[NEURONS + 5 :][:4])
    assert torch.equal(checkpoint.read_rows(f"{name}.w2.weight", 3, 40), down[3:40])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_local_experts": None}, "num_local_experts None"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 of num_local_experts 4"),
    ],
)
def test_experts_that_do_not_add_up_are_refused(
    mixtral, ram_drive, tmp_path, change, message
) -> None:
    original(mixtral, tmp_path / "m").close()
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with (
        SafetensorsFolder(tmp_path / "m") as checkpoint,
        pytest.raises(InvalidConfig, match=message),
    ):
        pack(checkpoint, ram_drive, "m")


@pytest.mark.parametrize("experts, error", [(3, ShapeMismatch), (6, ShapeMismatch)])
def test_a_config_of_other_experts_is_refused(mixtral, ram_drive, tmp_path, experts, error) -> None:
    fused(mixtral, tmp_path / "m").close()
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": experts}))
    with SafetensorsFolder(tmp_path / "m") as checkpoint, pytest.raises((error, MissingTensor)):
        pack(checkpoint, ram_drive, "m")
