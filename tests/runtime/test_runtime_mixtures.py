"""Mixtures of experts: transformers' output to rounding, whatever a gate says, and what it saves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from csd_protocol.units import MIB
from host_client.calibrate.gate_builder import build_gate
from host_client.calibrate.predictor import build_shadow, load_predictor, read_down_norms
from host_client.calibrate.statistics import measure_frequencies
from host_client.model.catalog import store_frequencies
from host_client.runtime.refusals import NoPredictor, RequestRefused

CLOSE = 1e-5
SHARES = (0.0, 0.4, 1.2)  # of the way from the smallest budget to the whole model

SHAPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "eight": (torch.bfloat16, {"num_local_experts": 8, "num_hidden_layers": 3}),
    "four": (
        torch.float16,
        {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "near": (torch.float16, {"sliding_window": 6, "num_local_experts": 5}),
}


def make_mixtral(name: str) -> MixtralForCausalLM:
    dtype, changes = SHAPES[name]
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "initializer_range": 0.12,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(sorted(SHAPES).index(name))
    model = MixtralForCausalLM(MixtralConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


class MixtureZoo:
    """Mixtral models as folders, and as transformers models in float32."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._dense: dict[str, MixtralForCausalLM] = {}

    def folder(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            make_mixtral(name).save_pretrained(path)
        return path

    def dense(self, name: str) -> MixtralForCausalLM:
        if name not in self._dense:
            loaded = MixtralForCausalLM.from_pretrained(self.folder(name), dtype=torch.float32)
            self._dense[name] = loaded.eval()
        return self._dense[name]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> MixtureZoo:
    return MixtureZoo(tmp_path_factory.mktemp("mixtures"))


@pytest.fixture(scope="module")
def mixture_lab(
    zoo: MixtureZoo, open_lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    lab = open_lab(zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(mixture_lab) -> Iterator[Any]:
    yield mixture_lab
    mixture_lab.put_back()
    assert mixture_lab.leases == 0
    assert mixture_lab.drive.release_errors == 0


def silent(*_: int) -> None:
    """Progress that nobody looks at."""


def load_gate(lab: Any, name: str) -> None:
    _, packed = lab.packed(name)
    load_predictor(lab.drive, packed, "gate", build_gate(lab.drive, packed, silent))


def load_shadow(lab: Any, name: str) -> None:
    _, packed = lab.packed(name)
    load_predictor(lab.drive, packed, "shadow", build_shadow(lab.drive, packed, silent))


def load_constant_gate(lab: Any, name: str) -> None:
    """Says of every layer and token that the first experts will be chosen."""
    _, packed = lab.packed(name)
    counts = {layer: -np.arange(packed.experts) for layer in range(packed.layer_count)}
    data = encode_frequency(packed.name, counts, role=Role.ROUTER)
    load_predictor(lab.drive, packed, "gate", data)


def decode(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a pass over the prompt, then of one a token, a cache behind them."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    with torch.inference_mode():
        return torch.cat(
            [model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
        )


GATES = {"none": None, "gate": load_gate, "constant": load_constant_gate}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", SHARES)
def test_logits_are_transformers_own(lab, far_from, tokens_of, greedy, name, share, gate) -> None:
    budget = lab.budget(name, share)
    if GATES[gate] is not None:
        GATES[gate](lab, name)
    model, dense = lab.open(name, budget), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 12)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert greedy(model, ids) == greedy(dense, ids)
    assert model.csd.plan.total_bytes <= budget


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_batch_with_left_padding(lab, far_from, tokens_of, greedy, name, gate) -> None:
    if GATES[gate] is not None:
        GATES[gate](lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.3)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    with torch.inference_mode():
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        expected = dense(ids, attention_mask=mask).logits[mask.bool()]
    assert far_from(found, expected) <= CLOSE
    rows = greedy(model, ids, attention_mask=mask)
    assert rows == greedy(dense, ids, attention_mask=mask)
    assert rows[0] == greedy(model, ids[:1, 4:])[0]
