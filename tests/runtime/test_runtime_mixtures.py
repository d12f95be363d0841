"""Mixtures of experts: transformers' output, whatever a gate says; and what a gate saves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from csd_protocol.units import KIB, MIB
from host_client.calibrate.builders import Recipe
from host_client.calibrate.gate_builder import build_gate
from host_client.calibrate.predictor import load_predictor, read_down_norms
from host_client.calibrate.preparation import build_predictor, load_predictors, recalibrate
from host_client.calibrate.shadow_builder import build_shadow
from host_client.calibrate.statistics import measure_frequencies
from host_client.model.catalog import store_frequencies
from host_client.model.errors import UnsupportedModel
from host_client.runtime import plan
from host_client.runtime.refusals import NoPredictor, RequestRefused
from tests.runtime.decoding import decode

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
def mixture_zoo(tmp_path_factory: pytest.TempPathFactory) -> MixtureZoo:
    return MixtureZoo(tmp_path_factory.mktemp("mixtures"))


@pytest.fixture(scope="module")
def shared_mixture_lab(
    mixture_zoo: MixtureZoo, open_lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    lab = open_lab(mixture_zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(shared_mixture_lab) -> Iterator[Any]:
    yield shared_mixture_lab
    shared_mixture_lab.put_back()
    assert shared_mixture_lab.leases == 0
    assert shared_mixture_lab.drive.release_errors == 0


def silent(*_: int) -> None:
    """Progress that nobody looks at."""


def load_gate(lab: Any, name: str) -> None:
    _, packed = lab.packed(name)
    load_predictor(lab.drive, packed, "gate", build_gate(lab.drive, packed, silent))


def load_shadow(lab: Any, name: str) -> None:
    _, packed = lab.packed(name)
    load_predictor(lab.drive, packed, "shadow", build_shadow(lab.drive, packed, Recipe(), silent))


def load_constant_gate(lab: Any, name: str) -> None:
    """Says of every layer and token that the first experts will be chosen."""
    _, packed = lab.packed(name)
    counts = {layer: -np.arange(packed.experts) for layer in range(packed.layer_count)}
    data = encode_frequency(packed.name, counts, role=Role.ROUTER)
    load_predictor(lab.drive, packed, "frequency", data)


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
def test_experts_larger_than_a_staging_buffer(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch, gate
) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8 * KIB)
    name = next(iter(SHAPES))
    if GATES[gate] is not None:
        GATES[gate](lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.2)), lab.zoo.dense(name)
    (site, *_) = model.csd.packed.ffns(0)
    assert site.count * site.unit_bytes > 8 * KIB >= model.csd.plan.expert_buffer_bytes
    ids = tokens_of(lab, name, 10)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE


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


def test_a_gate_brings_experts_before_the_router_asks(lab, tokens_of) -> None:
    """And not all of them: what decoding stages is less than the experts that there are."""
    name, new = "eight", 10
    load_gate(lab, name)
    model = lab.open(name, lab.budget(name, 0.0))
    ids = tokens_of(lab, name, 4 + new)
    staged = staged_in_decode(model, ids, prompt=4)
    packed = model.csd.packed
    experts = sum(site.length_bytes for site in packed.ffns())
    assert staged.wanted_experts == new * 2 * packed.layer_count
    assert staged.foreseen_experts > 1.4 * 2 / 8 * staged.wanted_experts  # chance: 2 of 8
    needed = new * model.csd.plan.staged_bytes_per_token
    wrong = (staged.wanted_experts - staged.foreseen_experts) * packed.ffns()[0].length_bytes
    attention_again = 2 * model.csd.plan.staged_bytes_per_token  # asked for a token never decoded
    embedding = new * packed.find(Role.EMBED).unit_bytes
    assert needed <= staged.staged_bytes <= needed + wrong + attention_again + embedding
    assert staged.staged_bytes < 0.6 * new * experts
    assert staged.late_units == wrong // packed.ffns()[0].unit_bytes


def staged_in_decode(model: Any, ids: torch.Tensor, prompt: int) -> Any:
    """The tally of what comes behind the prompt."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        before = model.csd.tally.snapshot()
        for part in ids[:, prompt:].split(1, dim=1):
            model(part, past_key_values=cache, use_cache=True)
    return model.csd.tally.since(before)


@pytest.mark.parametrize("gate", GATES)
def test_without_a_gate_that_is_right_experts_come_late(lab, tokens_of, gate) -> None:
    name = "eight"
    if GATES[gate] is not None:
        GATES[gate](lab, name)
    model = lab.open(name, lab.budget(name, 0.0))
    staged = staged_in_decode(model, tokens_of(lab, name, 12), prompt=4)
    predictor = {"none": None, "gate": "gate", "constant": "frequency"}[gate]
    assert model.csd.predictor == predictor
    assert (staged.expert_recall is None) == (gate == "none")
    if gate == "constant":
        assert staged.expert_recall < 0.6
        assert staged.late_units > 0


def test_the_gate_sees_what_the_next_router_will_see_about(lab, tokens_of) -> None:
    """Its recall is that of the next layer's router on the state behind this layer's attention."""
    name = "eight"
    load_gate(lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.0)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 20)
    staged = staged_in_decode(model, ids, prompt=4)
    assert staged.foreseen_experts == foreseen_by_hand(dense, ids, prompt=4)


def foreseen_by_hand(dense: Any, ids: torch.Tensor, prompt: int) -> int:
    layers, seen, chosen = dense.model.layers, {}, {}
    hooks = [layers[0].register_forward_pre_hook(lambda _, a: seen.update({0: a[0]}))]
    for number, layer in enumerate(layers):
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, a, number=number: seen.update({number + 1: a[0]})
            )
        )
        hooks.append(
            layer.mlp.gate.register_forward_hook(
                lambda _, a, out, number=number: chosen.update({number: out[2]})
            )
        )
    with torch.inference_mode():
        dense(ids)
        for hook in hooks:
            hook.remove()
        found = 0
        for number, layer in enumerate(layers):
            state = layer.post_attention_layernorm(seen[number])[0]
            guess = (state @ layer.mlp.gate.weight.t()).topk(2).indices
            both = (guess[:, :, None] == chosen[number].reshape(-1, 2)[:, None]).any(2)
            found += int(both[prompt:].sum())
    return found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_within_experts_a_kept_fraction_is_staged(lab, tokens_of, share) -> None:
    name = "eight"
    budget = lab.budget(name, share)
    load_gate(lab, name)
    load_shadow(lab, name)
    ids = tokens_of(lab, name, 12)
    whole = staged_in_decode(lab.open(name, budget), ids, prompt=4)
    model = lab.open(name, budget, 0.25)
    kept = staged_in_decode(model, ids, prompt=4)
    assert model.csd.predictor == "gate+shadow"
    assert 0 < kept.staged_bytes < whole.staged_bytes
    neurons = -(-72 // 4)
    assert kept.predicted_units % neurons == 0
    chosen = kept.predicted_units // neurons
    assert 8 * 2 * 3 >= kept.foreseen_experts > 0
    assert chosen >= kept.wanted_experts


@pytest.mark.parametrize("kept", [0.25, 0.6])
def test_a_kept_fraction_is_of_the_experts_that_the_router_chose(
    lab, far_from, tokens_of, kept
) -> None:
    """Without a gate the neurons are chosen with the state behind the layer's own attention."""
    name = "eight"
    load_shadow(lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.0), kept), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 12)
    found, expected = decode(model, ids, prompt=5), decode(dense, ids, prompt=5)
    assert far_from(found[:, :5], expected[:, :5]) <= CLOSE  # the prompt is exact
    assert far_from(found[:, 5:], expected[:, 5:]) > CLOSE
    assert model.csd.predictor == "shadow"
    correlation = np.corrcoef(found[0, 5:].reshape(-1), expected[0, 5:].reshape(-1))[0, 1]
    assert correlation > (0.8 if kept > 0.5 else 0.5)


def test_whole_experts_where_nothing_chooses_within(lab, far_from, tokens_of) -> None:
    name = "eight"
    load_gate(lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.0), 0.25), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 10)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert model.csd.predictor == "gate"


def test_qualities_that_mixtures_do_not_have_are_refused(lab) -> None:
    with pytest.raises(NoPredictor, match="csd predictor build gate eight"):
        lab.open("eight", "100%", 0.5)
    load_gate(lab, "eight")
    for quality in ("0.5+correct", "0.5+heads=0.5"):
        with pytest.raises(RequestRefused, match="mixture of experts"):
            lab.open("eight", "100%", quality)
    with pytest.raises(RequestRefused, match="Leave the predictor out"):
        lab.open("eight", "100%", predictor="shadow")


def test_experts_that_are_chosen_often_are_resident(make_mixture_lab, far_from, tokens_of) -> None:
    lab, name = make_mixture_lab(), "eight"
    model = lab.open(name, "150%")
    packed = model.csd.packed
    windows = [tokens_of(lab, name, 60, seed=seed) for seed in range(3)]
    counts = measure_frequencies(model, windows, read_down_norms(lab.drive, packed), silent)
    routed = counts.sum(axis=1).reshape(packed.layer_count, packed.experts)
    wanted = round(72 / 3)
    assert (routed.sum(axis=1) == 3 * 60 * 2 * wanted).all()
    lab.put_back()
    store_frequencies(lab.drive, name, counts, 180)
    model, dense = lab.open(name, lab.budget(name, 0.4)), lab.zoo.dense(name)
    for layer in range(packed.layer_count):
        kept = [model.csd.plan.resident_units[site.site] for site in packed.ffns(layer)]
        assert sum(kept) > 0
        assert kept[int(routed[layer].argmax())] > kept[int(routed[layer].argmin())]
        for site in packed.ffns(layer):
            entry = model.csd.engine.resident[site.site]
            of_site = counts[packed.program_layer(site)]
            if 0 < entry.units.size < site.count:
                assert of_site[entry.units].min() >= of_site[entry.missing].max()
    ids = tokens_of(lab, name, 12)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE


@pytest.fixture
def make_mixture_lab(mixture_zoo: MixtureZoo, open_lab, tmp_path: Path) -> Iterator[Any]:
    """Drives of a test's own."""
    made: list[Any] = []

    def make(window_bytes: int = 4 * MIB) -> Any:
        folder = tmp_path / f"lab-{len(made)}"
        folder.mkdir()
        made.append(open_lab(mixture_zoo, folder, window_bytes, 0))
        return made[-1]

    yield make
    for lab in made:
        lab.put_back()
        lab.drive.close()
        lab.device.close()


def test_a_small_window_only_slows_down(make_mixture_lab, far_from, tokens_of, greedy) -> None:
    lab, name = make_mixture_lab(window_bytes=192 * KIB), "eight"
    load_gate(lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.0)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 12)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert greedy(model, ids, new=8) == greedy(dense, ids, new=8)


@pytest.mark.parametrize("window_kib", [192, 1024])
def test_experts_in_parts_are_foreseen_as_whole_ones(
    make_mixture_lab, tokens_of, monkeypatch: pytest.MonkeyPatch, window_kib: int
) -> None:
    found = []
    for part_bytes in (plan.PART_BYTES, 8 * KIB):
        monkeypatch.setattr(plan, "PART_BYTES", part_bytes)
        lab, name = make_mixture_lab(window_bytes=window_kib * KIB), "eight"
        load_gate(lab, name)
        model = lab.open(name, lab.budget(name, 0.0))
        staged = staged_in_decode(model, tokens_of(lab, name, 14), prompt=4)
        found.append((staged.wanted_experts, staged.foreseen_experts, staged.late_units))
    assert found[0] == found[1]


class Interrupted(Exception):
    """What a test throws into the middle of a pass."""


@pytest.mark.parametrize("place", ["attention", "router", "experts", "norm"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_pass_broken_off_is_followed_by_a_good_one(
    lab, far_from, tokens_of, place, tokens
) -> None:
    name = "eight"
    load_gate(lab, name)
    model, dense = lab.open(name, lab.budget(name, 0.2)), lab.zoo.dense(name)
    layer = model.model.layers[1]
    module = {
        "attention": layer.self_attn.o_proj,
        "router": layer.mlp.gate,
        "experts": layer.mlp.experts,
        "norm": model.model.norm,
    }[place]
    ids = tokens_of(lab, name, tokens)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    with torch.inference_mode():
        for _ in range(3):
            hook = module.register_forward_pre_hook(interrupt)
            with pytest.raises(Interrupted):
                model(ids)
            hook.remove()
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


def test_what_packing_loads_for_a_mixture(lab) -> None:
    _, packed = lab.packed("four")
    assert load_predictors(lab.drive, packed, silent).kinds == ["gate", "shadow"]
    loaded = {entry["kind"]: entry for entry in lab.drive.programs()}
    assert loaded["gate"]["role"] == "router"
    assert loaded["gate"]["layers"] == [0, 1]
    assert loaded["shadow"]["layers"] == list(range(2 * 4))
    assert lab.open("four", "100%", 0.5).csd.predictor == "gate+shadow"


def test_what_walks_dense_models_says_that_this_is_a_mixture(lab) -> None:
    _, packed = lab.packed("four")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UnsupportedModel, match="is of the family mixtral: what measures text"):
        recalibrate(lab.drive, packed, ids, silent)
    with pytest.raises(UnsupportedModel, match="knows dense LLaMA models only"):
        build_predictor(lab.drive, packed, "rollout", silent)


def test_a_dense_model_has_no_gate(shared_lab) -> None:
    _, packed = shared_lab.packed("tied")
    with pytest.raises(UnsupportedModel, match="no mixture of experts"):
        build_predictor(shared_lab.drive, packed, "gate", silent)
