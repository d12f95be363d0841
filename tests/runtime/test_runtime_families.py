"""Families beside LLaMA: transformers' own logits, from the layouts that checkpoints have."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GlmConfig, Qwen2Config, Qwen3Config

from csd_protocol.packed import Role
from csd_protocol.units import MIB
from host_client.calibrate.preparation import build_predictor, load_predictors
from host_client.model.errors import UnsupportedModel
from tests.runtime.decoding import decode

CLOSE = 1e-5
SHARES = (0.0, 0.4, 1.2)  # of the way from the smallest budget to the whole model
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen2-sliding": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=24),
    "glm": lambda: GlmConfig(**SIZES, head_dim=32),
    "glm-unbiased": lambda: GlmConfig(**SIZES, head_dim=16, attention_bias=False),
    "chatglm3": lambda: GlmConfig(**SIZES, head_dim=32, rms_norm_eps=1e-5),
    "qwen1": lambda: Qwen2Config(**SIZES | {"num_key_value_heads": 4}, rms_norm_eps=1e-6),
}


def make_dense(name: str) -> Any:
    """Random weights; vectors too, so that a mix-up shows."""
    torch.manual_seed(sorted(CONFIGS).index(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in parameter_name:
                parameter.uniform_(-0.5, 0.5)
    return model.to(torch.bfloat16 if name.startswith("qwen3") else torch.float16)


def save_chatglm(model: Any, folder: Path) -> None:
    """As ChatGLM 3 names and fuses its weights, with the fields of its config."""
    config, state, theirs = model.config, dict(model.state_dict()), {}
    theirs["transformer.embedding.word_embeddings.weight"] = state["model.embed_tokens.weight"]
    theirs["transformer.encoder.final_layernorm.weight"] = state["model.norm.weight"]
    theirs["transformer.output_layer.weight"] = state["lm_head.weight"]
    theirs["transformer.rotary_pos_emb.inv_freq"] = torch.ones(8)
    for layer in range(config.num_hidden_layers):
        ours, prefix = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            theirs[f"{prefix}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for a, b in {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
            "self_attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.gate_up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        }.items():
            theirs[f"{prefix}.{a}.weight"] = state[f"{ours}.{b}.weight"]
    save(folder, theirs, {
        "model_type": "chatglm",
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "layernorm_epsilon": config.rms_norm_eps,
        "padded_vocab_size": config.vocab_size,
        "seq_length": 128,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "original_rope": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
    })  # fmt: skip


def save_first_qwen(model: Any, folder: Path) -> None:
    config, state, theirs = model.config, dict(model.state_dict()), {}
    theirs["transformer.wte.weight"] = state["model.embed_tokens.weight"]
    theirs["transformer.ln_f.weight"] = state["model.norm.weight"]
    theirs["lm_head.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        ours, prefix = f"model.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            theirs[f"{prefix}.attn.c_attn.{kind}"] = torch.cat(parts)
        for a, b in {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            theirs[f"{prefix}.{a}.weight"] = state[f"{ours}.{b}.weight"]
    save(folder, theirs, {
        "model_type": "qwen",
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "num_attention_heads": config.num_attention_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "seq_length": 128,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
    })  # fmt: skip


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "chatglm3": save_chatglm,
    "qwen1": save_first_qwen,
}


class FamilyZoo:
    """Models as folders in their own layouts, and as transformers models in float32."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._dense: dict[str, Any] = {}

    def folder(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            SAVERS.get(name, lambda model, folder: model.save_pretrained(folder))(
                make_dense(name), path
            )
        return path

    def dense(self, name: str) -> Any:
        if name not in self._dense:
            dense = AutoModelForCausalLM.from_config(CONFIGS[name]())  # rotary tables in float32
            dense.load_state_dict(make_dense(name).state_dict())
            self._dense[name] = dense.eval()
        return self._dense[name]


@pytest.fixture(scope="module")
def shared_family_lab(open_lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    zoo = FamilyZoo(tmp_path_factory.mktemp("families"))
    lab = open_lab(zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(shared_family_lab) -> Iterator[Any]:
    yield shared_family_lab
    shared_family_lab.put_back()
    assert shared_family_lab.leases == 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", SHARES)
def test_logits_are_transformers_own(lab, far_from, tokens_of, greedy, name, share) -> None:
    model, dense = lab.open(name, lab.budget(name, share)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 12)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert greedy(model, ids) == greedy(dense, ids)
    assert model.csd.plan.total_bytes <= lab.budget(name, share)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_with_left_padding(lab, far_from, tokens_of, greedy, name) -> None:
    model, dense = lab.open(name, lab.budget(name, 0.3)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    with torch.inference_mode():
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        expected = dense(ids, attention_mask=mask).logits[mask.bool()]
    assert far_from(found, expected) <= CLOSE
    assert greedy(model, ids, attention_mask=mask) == greedy(dense, ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "chatglm3"])
def test_a_shadow_chooses_and_corrects(lab, far_from, tokens_of, name) -> None:
    _, packed = lab.packed(name)
    loaded = load_predictors(lab.drive, packed, lambda done, total: None)
    assert loaded.kinds == ["shadow"]
    assert "knows dense LLaMA models only" in loaded.skipped[0]
    dense = lab.zoo.dense(name)
    ids = tokens_of(lab, name, 16)
    expected = decode(dense, ids, prompt=5)
    corrected = lab.open(name, lab.budget(name, 0.0), "0.3+correct")
    assert corrected.csd.predictor == "shadow"
    with_correction = far_from(decode(corrected, ids, prompt=5), expected)
    corrected.csd.close()
    left_out = lab.open(name, lab.budget(name, 0.0), 0.3)
    assert CLOSE < with_correction < far_from(decode(left_out, ids, prompt=5), expected)


def test_what_walks_llama_models_refuses_others(lab) -> None:
    _, packed = lab.packed("qwen2")
    with pytest.raises(UnsupportedModel, match="is of the family qwen2"):
        build_predictor(lab.drive, packed, "rollout", lambda done, total: None)


def test_biases_and_head_norms_are_resident_vectors(lab) -> None:
    names = {
        "qwen2": ["q_bias", "k_bias", "v_bias"],
        "qwen3": ["q_norm", "k_norm"],
        "glm-unbiased": [],
    }
    for name, extra in names.items():
        _, packed = lab.packed(name)
        parts = [part.name for part in packed.find(Role.NORMS, 1).parts]
        assert parts == ["input_norm", "post_attention_norm", *extra]
        assert packed.format_version == 1
