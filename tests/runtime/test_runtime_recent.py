"""Neurons of the last tokens: computed like resident ones, staged once, within the budget."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from csd_protocol.packed import Role
from csd_protocol.program_file import ProgramKind as Kind
from csd_protocol.program_file import encode_frequency
from csd_protocol.units import MIB
from host_client.calibrate.preparation import build_predictor
from host_client.runtime.refusals import RequestRefused
from tests.runtime.decoding import PROMPT, decode

NAME, LAYERS, NEURONS = "tied", 4, 160
PROGRAM, OTHER = 5, 6
KEPT, SHARE = 0.3, 0.9  # of the neurons; of what the budget may be
DECODED = 10
CLOSE = 1e-5


def load(lab: Any, *kinds: str) -> None:
    _, packed = lab.packed(NAME)
    for number, kind in enumerate(kinds, PROGRAM):
        if kind == "frequency":
            rng = np.random.default_rng(1)
            counts = {layer: rng.integers(0, 1000, NEURONS) for layer in range(LAYERS)}
            data = encode_frequency(NAME, counts)
        else:
            data = build_predictor(lab.drive, packed, Kind(kind), lambda done, total: None)
        lab.drive.load_program(number, data)


def opened(lab: Any, quality: Any = KEPT, recent: Any = "50%", **settings: Any) -> Any:
    return lab.open(NAME, lab.budget(NAME, SHARE), quality, recent=recent, **settings)


def repeating(ids: torch.Tensor) -> torch.Tensor:
    """The first two of some tokens, over and over."""
    return ids[:, :2].repeat(1, ids.shape[1] // 2)


class Watch:
    """What an engine computed each FFN with in guided passes, in order."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, np.ndarray, np.ndarray]] = []  # layer, computed, held before
        engine = model.csd.engine
        genuine = engine.choose_recent

        def choose_recent(site: Any) -> None:
            if engine.guided:
                held = np.sort(engine.recent(site).units.copy())
                staged, resident = engine.chosen(site).units, engine.resident[site.site].units
                computed = np.concatenate([held, staged, resident])
                assert np.unique(computed).size == computed.size  # nothing twice
                self.seen.append((site.layer, np.sort(computed), held))
            genuine(site)

        engine.choose_recent = choose_recent

    def chooser(self, lab: Any, model: Any, kept: float) -> Any:
        """For `MaskedDense`: the same units once more, each set looked at."""
        model_id, packed = lab.packed(NAME)
        seen: Iterator[tuple[int, np.ndarray, np.ndarray]] = iter(self.seen)
        chosen_before: dict[int, set[int]] = {layer: set() for layer in range(LAYERS)}

        def choose(layer: int, asked: np.ndarray, scores: np.ndarray) -> np.ndarray:
            at, computed, held = next(seen)
            resident = model.csd.engine.resident[packed.find(Role.FFN, layer).site].units
            units = lab.drive.execute_program(PROGRAM, model_id, layer, asked, kept).result()
            assert at == layer
            assert computed.tolist() == sorted({*units, *resident, *held})
            assert set(held.tolist()) <= chosen_before[layer] - {*resident.tolist()}
            assert held.size <= model.csd.plan.recent_units
            chosen_before[layer] |= {*units.tolist()}
            return computed.astype(np.uint32)

        return choose


@pytest.mark.parametrize("kept", [0.1, 0.5])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_the_logits_are_those_of_what_is_resident_chosen_or_held(
    lab, far_from, tokens_of, masked_dense, lookahead: int, kept: float
) -> None:
    load(lab, "shadow")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    model = opened(lab, kept, lookahead=lookahead)
    watch = Watch(model)
    found = decode(model, ids)
    assert len(watch.seen) == LAYERS * DECODED
    assert any(held.size for _, _, held in watch.seen)
    choose = watch.chooser(lab, model, kept)
    masked = masked_dense(lab.zoo.dense(NAME), choose, lookahead).model
    assert far_from(found, decode(masked, ids)) <= CLOSE
    assert model.csd.tally.recent_units > 0


def test_a_choice_that_comes_again_is_staged_once(lab, tokens_of) -> None:
    load(lab, "frequency")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    staged, sites = {}, {}
    for recent in (0, "100%"):
        model = opened(lab, 0.1, recent=recent)
        sites[recent] = model.csd.engine.resident[model.csd.packed.find(Role.FFN, 0).site]
        decode(model, ids, PROMPT + 1)
        before = model.csd.tally.snapshot()
        decode(model, ids, PROMPT + 1)
        staged[recent] = model.csd.tally.since(before)
        if recent:
            # A new text stages its first token's choice, and nothing of an FFN after that.
            unit_bytes = sites[recent].site.unit_bytes
            once = model.csd.tally.since(before).predicted_units // (DECODED - 1)
            sweep = LAYERS * sites[recent].missing.size * unit_bytes
            assert staged[recent].staged_bytes - sweep <= once * unit_bytes
            assert staged[recent].recent_units == once * (DECODED - 2)
        model.csd.close()
    assert staged[0].recent_units == 0


def test_less_is_staged_of_a_text_that_repeats_itself(lab, tokens_of) -> None:
    """At the same budget, in decode alone: a sweep stages more, for fewer are resident."""
    load(lab, "shadow")
    ids = repeating(tokens_of(lab, NAME, 30))
    staged = []
    for recent in (0, "50%"):
        model = opened(lab, 0.2, recent=recent)
        decode(model, ids[:, : PROMPT + 1])
        before = model.csd.tally.units_staged
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            for token in ids.split(1, dim=1):
                model(token, past_key_values=cache, use_cache=True)
        staged.append(model.csd.tally.units_staged - before)
        model.csd.close()
    assert staged[1] < staged[0]


def test_an_output_does_not_depend_on_what_was_decoded_before(lab, tokens_of) -> None:
    load(lab, "shadow")
    first, second = (tokens_of(lab, NAME, PROMPT + DECODED, seed=seed) for seed in (1, 2))
    model = opened(lab)
    expected = decode(model, first)
    decode(model, second)
    assert torch.equal(decode(model, first), expected)
    with torch.inference_mode():
        one = model(first[:, :1]).logits
        decode(model, second)
        assert torch.equal(model(first[:, :1]).logits, one)
        without = model(first[:, :1], use_cache=False).logits
        assert torch.equal(model(first[:, :1], use_cache=False).logits, without)


def test_a_sweep_in_the_middle_of_a_text_is_exact_and_leaves_it_be(lab, tokens_of) -> None:
    load(lab, "shadow")
    ids, dense = tokens_of(lab, NAME, 4), lab.zoo.dense(NAME)
    model = opened(lab)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for token in ids.split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
        site = model.csd.packed.find(Role.FFN, 0)
        engine = model.csd.engine
        before = engine._recent.of(site).units.copy()
        assert before.size
        found, expected = model(ids).logits, dense(ids).logits
        assert float((found - expected).abs().max() / expected.abs().max()) <= CLOSE
        assert np.array_equal(engine._recent.of(site).units, before)


@pytest.mark.parametrize("far", ["frequency@2", "shadow"])
def test_a_far_level_changes_nothing(make_lab, tokens_of, far: str) -> None:
    """On drives that were never read from, and no sweep: so there is something to bring."""
    labs = make_lab(unit_cache_bytes=MIB), make_lab(unit_cache_bytes=MIB)
    found = []
    for lab, level in zip(labs, ("none", far), strict=True):
        load(lab, "shadow", "frequency")
        model = opened(lab, predictor="shadow", far=level)
        found.append(decode(model, tokens_of(lab, NAME, PROMPT + DECODED), 1))
        assert (model.csd.tally.brought_units > 0) == (level != "none")
        assert model.csd.tally.recent_units > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("quality", ["0.3", "0.2+correct"])
def test_an_audit_changes_nothing_but_what_is_staged(lab, tokens_of, quality: str) -> None:
    load(lab, "shadow")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    plain = opened(lab, quality)
    logits = decode(plain, ids)
    staged = plain.csd.tally.staged_bytes
    plain.csd.close()
    audited = opened(lab, quality, audit=True)
    assert torch.equal(decode(audited, ids), logits)
    tally = audited.csd.tally
    unit_bytes = audited.csd.packed.find(Role.FFN, 0).unit_bytes
    assert tally.staged_bytes == staged + tally.late_units * unit_bytes > staged
    assert 1 >= tally.covered > tally.recall > 0


def test_a_correction_is_of_what_is_neither_resident_nor_chosen_nor_held(
    lab, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(lab, "shadow")
    model = opened(lab, "0.2+correct")
    watch, asked = Watch(model), []
    genuine = lab.drive.correct

    def correct(program: int, model_id: int, layer: int, x: Any, units: np.ndarray) -> Any:
        asked.append((layer, units))
        return genuine(program, model_id, layer, x, units)

    monkeypatch.setattr(lab.drive, "correct", correct)
    decode(model, tokens_of(lab, NAME, PROMPT + DECODED))
    assert len(asked) == LAYERS * DECODED
    for (layer, units), (at, computed, _) in zip(asked, watch.seen, strict=True):
        assert (layer, units.tolist()) == (at, computed.tolist())


def test_two_models_on_one_drive_do_not_mix_what_they_hold(lab, tokens_of) -> None:
    load(lab, "shadow")
    texts = [tokens_of(lab, NAME, PROMPT + DECODED, seed=seed) for seed in (1, 2)]
    models = [opened(lab), opened(lab, recent="20%")]
    expected = [decode(model, ids, 1) for model, ids in zip(models, texts, strict=True)]
    caches = [DynamicCache(config=model.config) for model in models]
    found: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for token in range(PROMPT + DECODED):
            for number, model in enumerate(models):
                part = texts[number][:, token : token + 1]
                made = model(part, past_key_values=caches[number], use_cache=True)
                found[number].append(made.logits)
    for number in range(2):
        assert torch.equal(torch.cat(found[number], dim=1), expected[number])


def test_a_pass_that_was_broken_off_does_no_harm(lab, tokens_of) -> None:
    load(lab, "shadow")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    model = opened(lab)
    expected = decode(model, ids)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        model(ids[:, :1])
    hook.remove()
    model.csd.engine.abandon()
    assert lab.leases == 0
    assert torch.equal(decode(model, ids), expected)


def test_memory_is_what_the_plan_said(lab) -> None:
    load(lab, "shadow")
    model = opened(lab)
    runtime, plan = model.csd, model.csd.plan
    assert plan.recent_units > 0
    assert runtime.engine._recent.size_bytes == plan.recent_bytes
    planned = plan.resident_bytes + plan.staging_bytes + plan.fetch_buffer_bytes
    assert runtime.weights_bytes == planned + plan.recent_bytes
    assert plan.total_bytes <= plan.budget_bytes


def test_nothing_grows_with_the_tokens(lab, tokens_of, greedy, process_state) -> None:
    load(lab, "shadow")
    model = opened(lab)
    ids = tokens_of(lab, NAME, 6)
    first, states = greedy(model, ids, new=40), set()
    for _ in range(9):
        assert greedy(model, ids, new=40) == first
        model.csd.engine.abandon()
        gc.collect()
        states.add((process_state(), lab.leases, model.csd.engine._recent.size_bytes))
    assert states == {(process_state(), 0, model.csd.plan.recent_bytes)}


def test_a_quarter_of_what_neurons_have_is_the_default(lab) -> None:
    load(lab, "shadow")
    neurons = opened(lab, recent=0).csd.plan
    ffn = lab.packed(NAME)[1].find(Role.FFN, 0).site
    plan = lab.open(NAME, lab.budget(NAME, SHARE), KEPT).csd.plan
    assert plan.recent_units == neurons.resident_units[ffn] // 4 > 0
    assert lab.open(NAME, lab.budget(NAME, SHARE)).csd.plan.recent_units == 0
    assert lab.open(NAME, lab.budget(NAME, 0.0), KEPT).csd.plan.recent_units == 0


def test_exact_quality_has_no_use_for_them(lab) -> None:
    with pytest.raises(RequestRefused, match=r"recent units of 10%: quality exact keeps every"):
        opened(lab, "exact", "10%")
    assert opened(lab, "exact", 0).csd.plan.recent_units == 0
