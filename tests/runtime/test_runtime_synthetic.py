"""Synthetic models on a drive: what is computed on them is real, and so is the traffic."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from csd_protocol.packed import Bits, Role
from csd_protocol.units import MIB
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.calibrate.planting import OVERLAP, TOKENS, load_router, plant, planted_counts
from host_client.model.catalog import open_model, read_frequencies, remove_model
from host_client.model.packer import pack
from host_client.model.synthetic import SyntheticCheckpoint
from host_client.runtime.generate import generate, random_ids
from host_client.runtime.plain_reads import PlainReads

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 600,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
MIXTURE = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
ACTIVE = 0.1


def _pack(lab: Any, config: dict[str, Any] = CONFIG, bits: Bits = 16) -> Any:
    """On a new drive, with a planted predictor; its number on the drive, and its manifest."""
    packed = pack(SyntheticCheckpoint("s", config), lab.drive, "s", bits=bits)
    packed = plant(lab.drive, packed, ACTIVE, seed=5)
    return open_model(lab.drive, "s")[0], packed


def _dense(lab: Any, packed: Any) -> LlamaForCausalLM:
    """transformers' own model with what lies on the drive."""
    checkpoint = PackedCheckpoint(lab.drive, packed)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k[:5] != "torch"}))
    state = {
        name: checkpoint.read_rows(name, 0, checkpoint.shape(name)[0]).float()
        for name in model.state_dict()
    }
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_exact_is_what_transformers_makes_of_the_same_values(
    make_lab: Any, far_from: Any, bits: Bits
) -> None:
    lab = make_lab()
    _, packed = _pack(lab, bits=bits)
    ids = random_ids(CONFIG["vocab_size"], 7)
    with torch.inference_mode():
        found = lab.open("s")(ids).logits.float()
        expected = _dense(lab, packed)(ids).logits
    assert far_from(found, expected) < 2e-2  # computed in bfloat16
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("bits", [16, 4])
def test_a_drive_stores_next_to_nothing_and_verifies(make_lab: Any, bits: Bits) -> None:
    lab = make_lab()
    _, packed = _pack(lab, bits=bits)
    lab.drive.flush()
    assert not list(PlainReads(lab.drive, packed).verify(lambda done, total: None))
    stored = lab.image.stat().st_blocks * 512
    assert stored < packed.weights_bytes / 2  # directory, manifest, tables, norms, program
    remove_model(lab.drive, "s")
    _pack(lab)


def _chosen(lab: Any, model_id: int, packed: Any, token: int, layer: int = 1) -> set[int]:
    (program,) = (entry["program"] for entry in lab.drive.programs() if entry["kind"] == "planted")
    hidden = np.zeros((1, packed.find(Role.FFN, 0).cols), np.float32)
    execute = lab.drive.execute_program
    return set(execute(program, model_id, layer, hidden, ACTIVE, token=token).result().tolist())


def test_units_are_drawn_by_popularity_and_neighbours_share_more_than_chance(make_lab: Any) -> None:
    lab = make_lab()
    model_id, packed = _pack(lab)
    chosen = [_chosen(lab, model_id, packed, token) for token in range(40)]
    assert chosen[3] == _chosen(lab, model_id, packed, 3)
    assert {len(units) for units in chosen} == {round(ACTIVE * 600)}
    assert chosen[3] != _chosen(lab, model_id, packed, 3, layer=2)
    near = np.mean([len(a & b) for a, b in pairwise(chosen)]) / 60
    far = np.mean([len(a & b) for a, b in zip(chosen, chosen[20:], strict=False)]) / 60
    assert far + OVERLAP / 2 < near < far + 2 * OVERLAP
    frequencies = read_frequencies(lab.drive, packed)
    assert frequencies is not None
    hottest = set(np.argsort(frequencies[1])[-200:].tolist())
    share = np.mean([len(units & hottest) for units in chosen]) / 60
    assert 0.42 < share < 0.62  # of a third of the units; chance is 0.33


def test_counts_are_of_the_share_that_is_active(make_lab: Any) -> None:
    lab = make_lab()
    _, packed = _pack(lab)
    counts = planted_counts(packed, ACTIVE, seed=5)
    assert counts.sum(axis=1) / TOKENS == pytest.approx(ACTIVE * 600, rel=1e-3)
    assert not (counts[0] == counts[1]).all()


def test_a_kept_fraction_stages_what_was_drawn_and_no_more(make_lab: Any) -> None:
    lab = make_lab()
    _pack(lab)
    budget = lab.budget("s", 0.0)
    ids = random_ids(CONFIG["vocab_size"], 4)
    reports = []
    for quality in ("exact", f"{ACTIVE}"):
        made = lab.open("s", budget, quality)
        reports.append(generate(made, None, ids, 6, iter(range(0, 10**9, 10**6)).__next__))
        made.csd.close()
    whole, part = reports
    assert part.predictor == "planted"
    assert len(part.token_ids) == 6
    assert (part.text, part.prompt_tokens) == ("", 4)
    assert part.staged_bytes_per_token < whole.staged_bytes_per_token / 1.5


def test_a_mixture_is_routed_by_its_own_router(make_lab: Any) -> None:
    lab = make_lab(window_bytes=16 * MIB)
    _, packed = _pack(lab, MIXTURE)
    load_router(lab.drive, packed)
    made = lab.open("s", lab.budget("s", 0.1), f"{ACTIVE}")
    ids = random_ids(MIXTURE["vocab_size"], 4)
    report = generate(made, None, ids, 5, iter(range(0, 10**9, 10**6)).__next__)
    assert report.predictor == "gate+planted"
    assert len(report.token_ids) == 5
    assert report.expert_recall is not None
