"""Exact quality: the dense model's logits, whatever the budget, and whatever came before."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from csd_protocol.units import KIB
from host_client.runtime.plan import BUFFERS
from tests.runtime.decoding import decode

NAMES = ("tied", "untied", "slices", "scaled")
SHARES = (0.0, 0.3, 0.7, 1.2)  # of the way from the smallest budget to the whole model
CLOSE = 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", SHARES)
def test_logits_are_the_dense_models(lab, far_from, tokens_of, greedy, name, share) -> None:
    model, dense = lab.open(name, lab.budget(name, share)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 8)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert greedy(model, ids) == greedy(dense, ids)
    assert model.csd.plan.total_bytes <= lab.budget(name, share)


@pytest.mark.parametrize("name", NAMES)
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
    rows = greedy(model, ids, attention_mask=mask)
    assert rows == greedy(dense, ids, attention_mask=mask)
    alone = ids[:1, 4:]
    assert rows[0] == greedy(model, alone)[0]


@pytest.mark.parametrize("window_kib, reader", [(256, "threads"), (384, "auto")])
def test_a_small_window_only_slows_down(
    make_lab, far_from, tokens_of, greedy, window_kib, reader
) -> None:
    lab = make_lab(window_bytes=window_kib * KIB)
    model = lab.open("tied", lab.budget("tied", 0.0), reader=reader)
    dense = lab.zoo.dense("tied")
    ids = tokens_of(lab, "tied", 6)
    with torch.inference_mode():
        assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE
    assert greedy(model, ids, new=8) == greedy(dense, ids, new=8)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_token_stages_what_the_plan_names(lab, tokens_of, share: float) -> None:
    """Besides its row of the embedding, and what is prefetched for a token that never comes."""
    model, tokens = lab.open("scaled", lab.budget("scaled", share)), 4
    plan, packed = model.csd.plan, model.csd.packed
    ids = tokens_of(lab, "scaled", tokens)
    model.csd.engine.abandon()
    before = model.csd.tally.snapshot()
    with torch.inference_mode():
        for token in ids.split(1, dim=1):
            model(token)
    model.csd.engine.abandon()
    staged = model.csd.tally.since(before)
    embedding = tokens * packed.find(Role.EMBED).unit_bytes
    needed = tokens * plan.staged_bytes_per_token
    assert needed <= staged.staged_bytes <= needed + embedding + 2 * plan.staged_bytes_per_token
    assert staged.late_units == 0


# ---- passes that are not a plain one -----------------------------------------------------------


@pytest.mark.parametrize("name, share", [("tied", 0.5), ("tied", 1.0), ("slices", 0.0)])
def test_passes_without_the_head_are_followed_by_good_ones(
    lab, far_from, tokens_of, name, share
) -> None:
    model, dense = lab.open(name, lab.budget(name, share)), lab.zoo.dense(name)
    ids = tokens_of(lab, name, 6)
    with torch.inference_mode():
        for _ in range(2):
            found = model(ids, output_hidden_states=True)
            expected = dense(ids, output_hidden_states=True)
            pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
            assert max(far_from(ours, theirs) for ours, theirs in pairs) <= CLOSE
            body = model.model(ids).last_hidden_state
            assert far_from(body, dense.model(ids).last_hidden_state) <= CLOSE
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE
            last = model(ids, logits_to_keep=1).logits
            assert far_from(last, dense(ids, logits_to_keep=1).logits) <= CLOSE


class Interrupted(Exception):
    """What a test throws into the middle of a pass."""


def broken_at(module: torch.nn.Module) -> Any:
    """A hook that ends the pass when this module is reached."""

    def interrupt(*_: Any) -> None:
        raise Interrupted

    return module.register_forward_pre_hook(interrupt)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("place", ["attention", "FFN", "norm", "head"])
def test_a_pass_broken_off_is_followed_by_a_good_one(
    lab, far_from, tokens_of, share, place
) -> None:
    model, dense = lab.open("tied", lab.budget("tied", share)), lab.zoo.dense("tied")
    module = {
        "attention": model.model.layers[1].self_attn.o_proj,
        "FFN": model.model.layers[2].mlp,
        "norm": model.model.norm,
        "head": model.lm_head,
    }[place]
    ids = tokens_of(lab, "tied", 4)
    with torch.inference_mode():
        for _ in range(4):
            hook = broken_at(module)
            with pytest.raises(Interrupted):
                model(ids)
            hook.remove()
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


def test_a_failure_between_slices_of_the_head_breaks_only_its_pass(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as there are staging buffers, and once more: each of them must come back."""
    model, dense = lab.open("slices", lab.budget("slices", 0.0)), lab.zoo.dense("slices")
    ids = tokens_of(lab, "slices", 3)

    def fail(*_: Any) -> None:
        raise Interrupted

    with torch.inference_mode():
        for _ in range(BUFFERS + 1):
            with monkeypatch.context() as patch:
                patch.setattr(model.lm_head, "_fill", fail)
                with pytest.raises(Interrupted):
                    model(ids)
        assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


def test_an_observer_that_fails_breaks_only_its_pass(lab, far_from, tokens_of) -> None:
    model, dense = lab.open("tied", lab.budget("tied", 0.3)), lab.zoo.dense("tied")
    ids = tokens_of(lab, "tied", 4)

    def fail(*_: Any) -> None:
        raise Interrupted

    with torch.inference_mode():
        for layer in model.model.layers:
            layer.mlp.observer = fail
            with pytest.raises(Interrupted):
                model(ids)
            layer.mlp.observer = None
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


class Collector(BaseStreamer):
    def __init__(self, most: int = 1000) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._most = most

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()
        if len(self.tokens) >= self._most:
            raise Interrupted

    def end(self) -> None:
        self.ended = True


def test_streamers_hear_every_token(lab, tokens_of, greedy) -> None:
    model = lab.open("tied", lab.budget("tied", 0.4))
    ids = tokens_of(lab, "tied", 5)
    collector = Collector()
    (row,) = greedy(model, ids, streamer=collector)
    assert collector.tokens == ids[0].tolist() + row
    assert collector.ended


def test_a_streamer_that_breaks_off_leaves_the_model_usable(lab, tokens_of, greedy) -> None:
    model = lab.open("tied", lab.budget("tied", 0.4))
    ids = tokens_of(lab, "tied", 5)
    with pytest.raises(Interrupted):
        greedy(model, ids, streamer=Collector(most=8))
    assert greedy(model, ids) == greedy(lab.zoo.dense("tied"), ids)


def test_nothing_of_the_model_is_on_the_meta_device_or_trainable(lab) -> None:
    model = lab.open("untied")
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


# ---- a program that lies -----------------------------------------------------------------------


def test_programs_have_no_say_at_exact_quality(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Active, for this model, and naming arbitrary units: nobody asks it."""
    _, packed = lab.packed("tied")
    rng = np.random.default_rng(5)
    counts = {layer: rng.standard_normal(160) for layer in range(packed.layer_count)}
    lab.drive.load_program(3, encode_frequency(packed.name, counts))
    asked: list[int] = []
    monkeypatch.setattr(lab.drive, "predict_and_stage", lambda *_: asked.append(1))
    model, dense = lab.open("tied", lab.budget("tied", 0.3)), lab.zoo.dense("tied")
    ids = tokens_of(lab, "tied", 7)
    assert far_from(decode(model, ids, prompt=2), decode(dense, ids, prompt=2)) <= CLOSE
    assert model.csd.predictor is None
    assert model.csd.tally.predicted_units == 0
    assert not asked
