"""Units at 12, 8 and 4 bits: transformers' output with the weights that they stand for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from csd_protocol.packed import Bits, PackedModel, Role
from csd_protocol.program_file import encode_window
from csd_protocol.units import MIB
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.calibrate.predictor import read_down_norms
from host_client.calibrate.preparation import Kind, build_predictor, load_predictors
from host_client.runtime.plan import make_plan, parse_budget
from host_client.runtime.quality import Quality
from host_client.runtime.token_time import volumes_of
from tests.runtime.decoding import decode

CLOSE = 1e-5
MOST = {12: 1.0, 8: 0.56, 4: 0.45}  # of the bytes at 16 bits, of rows of 96 values
SHARES = (0.0, 0.4, 1.2)  # of the way from the smallest budget to the whole model
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


class LowBitZoo:
    """Random models as folders; and, once packed, as transformers models of what was packed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._dense: dict[tuple[str, int], Any] = {}

    def folder(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            torch.manual_seed(sorted(CONFIGS).index(name))
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "norm" in parameter_name:
                        parameter.uniform_(0.5, 1.5)
                    elif "bias" in parameter_name:
                        parameter.uniform_(-0.5, 0.5)
            model.to(torch.bfloat16).save_pretrained(path)
        return path

    def dequantised(self, lab: Any, name: str) -> Any:
        """In float32, with each value that the drive's rows stand for."""
        key = (name, lab.bits)
        if key not in self._dense:
            _, packed = lab.packed(name)
            checkpoint = PackedCheckpoint(lab.drive, packed)
            tensors = {
                tensor: checkpoint.read_rows(tensor, 0, checkpoint.shape(tensor)[0])
                .float()
                .contiguous()
                for tensor in checkpoint.names()
            }
            path = self._root / f"{name}-{lab.bits}"
            path.mkdir()
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            (path / "config.json").write_text(json.dumps(packed.config))
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            self._dense[key] = loaded.eval()
        return self._dense[key]

    def original(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder(name), dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[12, 8, 4], ids=["12-bit", "8-bit", "4-bit"])
def shared_low_bit_lab(
    request: pytest.FixtureRequest, open_lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    zoo = LowBitZoo(tmp_path_factory.mktemp("low-bit-zoo"))
    lab = open_lab(zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    lab.bits = request.param
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(shared_low_bit_lab) -> Iterator[Any]:
    yield shared_low_bit_lab
    shared_low_bit_lab.put_back()
    assert shared_low_bit_lab.leases == 0


def ids_of(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 131, (batch, count), generator=torch.Generator().manual_seed(count))


def silent(*_: int) -> None:
    """Progress that nobody looks at."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", SHARES)
def test_logits_are_those_of_the_dequantised_weights(lab, far_from, greedy, name, share) -> None:
    model, dense = lab.open(name, lab.budget(name, share)), lab.zoo.dequantised(lab, name)
    ids = ids_of(14)
    assert far_from(decode(model, ids, prompt=11), decode(dense, ids, prompt=11)) <= CLOSE
    assert greedy(model, ids) == greedy(dense, ids)
    assert model.csd.plan.total_bytes <= lab.budget(name, share)


def test_a_batch_with_left_padding(lab, far_from) -> None:
    model, dense = lab.open("qwen2", lab.budget("qwen2", 0.3)), lab.zoo.dequantised(lab, "qwen2")
    ids = ids_of(9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.inference_mode():
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        expected = dense(ids, attention_mask=mask).logits[mask.bool()]
    assert far_from(found, expected) <= CLOSE


def test_levels_are_close_to_the_original_and_12_bits_are_it(lab, far_from) -> None:
    """So that the reference of the other tests is not any model."""
    found, expected = lab.zoo.dequantised(lab, "llama"), lab.zoo.original("llama")
    with torch.inference_mode():
        error = far_from(found(ids_of(12)).logits, expected(ids_of(12)).logits)
    if lab.bits == 12:
        assert error == 0
    else:
        assert 1e-4 < error < {8: 0.05, 4: 0.5}[lab.bits]


def test_what_is_staged_and_kept_counts_in_real_bytes(lab) -> None:
    model = lab.open("llama", lab.budget("llama", 0.3))
    packed: PackedModel = model.csd.packed
    ffn = packed.find(Role.FFN, 0)
    assert ffn.unit_bytes == 3 * {12: 144 + 48, 8: 96 + 6, 4: 48 + 12}[lab.bits]
    of_rows = 12 if lab.bits == 12 else 8
    assert packed.find(Role.EMBED).bits == packed.find(Role.LM_HEAD).bits == of_rows
    assert packed.find(Role.NORMS, 0).bits == 16
    with torch.inference_mode():
        model(ids_of(1))
        before = model.csd.tally.staged_bytes
        model(ids_of(1))
    plan = model.csd.plan
    assert plan.resident_bytes == sum(
        plan.resident_units[site.site] * site.unit_bytes for site in packed.sites
    )
    rows = packed.find(Role.EMBED).unit_bytes  # of the one token
    assert model.csd.tally.staged_bytes - before <= plan.staged_bytes_per_token + rows


def test_a_share_is_of_the_16_bit_weights(lab) -> None:
    _, packed = lab.packed("llama")
    values = sum(site.count * site.values for site in packed.sites)
    assert packed.weights_bytes_16bit == 2 * values
    assert packed.weights_bytes <= packed.weights_bytes_16bit * MOST[lab.bits]
    assert parse_budget("50%", packed) == values
    assert make_plan(packed, 1 << 30, 8).weights_bytes == 2 * values


@pytest.mark.parametrize("quality", ["0.5", "0.5+correct"])
def test_programs_are_built_from_levels_and_choose(lab, far_from, quality) -> None:
    _, packed = lab.packed("llama")
    kinds = load_predictors(lab.drive, packed, silent).kinds
    assert {"rollout", "shadow"} & set(kinds)
    model = lab.open("llama", lab.budget("llama", 0.2), quality)
    dense = lab.zoo.dequantised(lab, "llama")
    found, expected = decode(model, ids_of(10), 6), decode(dense, ids_of(10), 6)
    assert torch.isfinite(found).all()
    assert far_from(found[:, :6], expected[:, :6]) <= CLOSE  # a prompt leaves nothing out
    assert 1e-4 < far_from(found, expected) < 0.7


def test_a_mixtures_gate_and_shadow_are_built_from_levels(lab) -> None:
    _, packed = lab.packed("mixtral")
    for kind in ("gate", "shadow"):
        assert build_predictor(lab.drive, packed, kind, silent)
    assert packed.find(Role.ROUTER, 0).bits == 16


def test_down_norms_are_of_the_dequantised_columns(lab) -> None:
    _, packed = lab.packed("llama")
    dense = lab.zoo.dequantised(lab, "llama")
    expected = [
        layer.mlp.down_proj.weight.detach().norm(dim=0).numpy() for layer in dense.model.layers
    ]
    assert np.allclose(read_down_norms(lab.drive, packed), expected, rtol=1e-5)


@pytest.mark.parametrize("bits", [12, 8, 4])
def test_a_far_level_brings_levels_and_is_told_what_was_active(
    make_lab, monkeypatch, bits: Bits
) -> None:
    lab = make_lab(unit_cache_bytes=MIB)
    lab.bits = bits
    _, packed = lab.packed("untied")
    norms = read_down_norms(lab.drive, packed)
    counts = {layer: np.arange(norms.shape[1]) for layer in range(norms.shape[0])}
    lab.drive.load_program(1, build_predictor(lab.drive, packed, Kind.SHADOW, silent))
    lab.drive.load_program(2, encode_window("untied", counts, tokens=2, decay=0.5))
    logits, scores, told = [], {}, {}

    def note(layer: int, units: np.ndarray, activity: np.ndarray) -> None:
        if activity.shape[0] == 1:
            found = activity[0] * norms[layer][units]
            scores.setdefault(layer, {}).update(zip(units, found, strict=True))

    for far in ("window", "none"):
        model = lab.open("untied", lab.budget("untied", 0.4), "0.3", predictor="shadow", far=far)
        if far == "window":
            for layer in model.model.layers:
                layer.mlp.observer = note
            monkeypatch.setattr(
                model.csd.engine, "observe", lambda site, units: told.update({site.layer: units})
            )
        logits.append(decode(model, ids_of(8), 7))
        assert (model.csd.tally.brought_units > 0) == (far == "window")
    assert torch.equal(*logits)
    assert sorted(told) == list(range(norms.shape[0]))
    for layer, units in told.items():
        best = sorted(scores[layer], key=scores[layer].__getitem__)[-units.size :]
        assert np.array_equal(units, np.sort(best))


def test_a_token_moves_the_bytes_of_its_levels_and_its_program_as_many_as_ever(lab) -> None:
    _, packed = lab.packed("llama")
    sites = tuple(site.model_copy(update={"bits": 16}) for site in packed.sites)
    of_levels, of_16_bits = (
        volumes_of(model, make_plan(model, 1 << 30, 8), Quality.parse("0.5"))
        for model in (packed, packed.model_copy(update={"sites": sites}))
    )
    assert of_levels[-1].host_bytes == packed.find(Role.LM_HEAD).length_bytes
    passed = [Role.NORMS, Role.KV, Role.HEADS, Role.FFN]  # of which all is resident
    assert of_levels[0].host_bytes == sum(packed.find(role, 0).length_bytes for role in passed)
    for levels, values in zip(of_levels, of_16_bits, strict=True):
        assert levels.host_bytes <= max(0.6, MOST[lab.bits]) * values.host_bytes
        assert levels.program_bytes == values.program_bytes
