"""A rollout as guide: it follows the text as the runtime's passes do, whatever those are."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from csd_protocol.units import MIB
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.driver import CommandFailed, Drive, Origin, Told
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

NAME, LAYERS, NEURONS, HIDDEN = "tied", 4, 160, 64
PROGRAM, KEPT = 3, 0.4
PROMPT, DECODED = 9, 6
CLOSE = 1e-5


def load(lab: Any, kind: Kind = Kind.ROLLOUT, name: str = NAME, number: int = PROGRAM) -> None:
    _, packed = lab.packed(name)
    data = build_predictor(lab.drive, packed, kind, lambda done, total: None)
    lab.drive.load_program(number, data)


def passes(model: Any, parts: list[torch.Tensor], cache: Any = None) -> torch.Tensor:
    """Logits of all parts, one pass each, over one cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.inference_mode():
        return torch.cat(
            [model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
        )


def prompt_and_tokens(ids: torch.Tensor, prompt: int = PROMPT) -> list[torch.Tensor]:
    return [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]


class Follower:
    """Another host of the same drive: tells the rollout what a dense model sees, and asks it."""

    def __init__(self, lab: Any, drive: Drive, lookahead: int) -> None:
        self._drive, self._lookahead = drive, lookahead
        self._model_id, self._packed = lab.packed(NAME)
        self.token = 0

    def watch(self, masked: Any) -> None:
        for number, layer in enumerate(masked.model.layers):
            layer.register_forward_pre_hook(self._noting(number), with_kwargs=True)

    def _noting(self, number: int) -> Any:
        def note(_: Any, arguments: Any, keywords: Any) -> None:
            hidden = (arguments[0] if arguments else keywords["hidden_states"])[0].numpy()
            self.token = int(keywords["position_ids"][0, 0])
            if hidden.shape[0] > 1:
                self._ask(number, hidden, 0.0, Origin(number))

        return note

    def choose(self, layer: int, asked: np.ndarray, scores: np.ndarray) -> np.ndarray:
        origin = Origin(max(0, layer - self._lookahead), behind_attention=True)
        if self._lookahead == 0 or layer == 0:
            origin = Origin(layer)
        return self._ask(layer, asked, KEPT, origin)

    def _ask(self, layer: int, hidden: np.ndarray, keep: float, origin: Origin) -> np.ndarray:
        pending = self._drive.execute_program(
            PROGRAM, self._model_id, layer, hidden, keep, Told(origin), self.token
        )
        return pending.result()


@pytest.fixture
def other_host(lab) -> Any:
    drive = Drive(lab.link)  # a queue pair and an identity of its own, over the same link
    yield drive
    drive._queue.close()


@pytest.mark.parametrize("lookahead", [0, 1, 2, 9])
def test_decoding_behind_a_prompt_leaves_out_what_the_rollout_left_out(
    lab, other_host, far_from, tokens_of, masked_dense, lookahead: int
) -> None:
    load(lab)
    follower = Follower(lab, other_host, lookahead)
    masked = masked_dense(lab.zoo.dense(NAME), follower.choose, lookahead).model
    follower.watch(masked)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT, lookahead=lookahead)
    for seed in range(2):  # the second text takes the place of the first
        parts = prompt_and_tokens(tokens_of(lab, NAME, PROMPT + DECODED, seed=seed))
        found, expected = passes(model, parts), passes(masked, parts)
        assert far_from(found, expected) <= CLOSE
    assert far_from(found, passes(lab.zoo.dense(NAME), parts)) > 100 * CLOSE


def test_a_prompt_in_parts_and_in_small_commands_is_the_same_prompt(
    lab, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = passes(model, prompt_and_tokens(ids))
    monkeypatch.setattr(lab.drive, "transfer_bytes_max", 2 * HIDDEN * 4)
    assert torch.equal(passes(model, prompt_and_tokens(ids)), expected)
    parts = [ids[:, :4], ids[:, 4:PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    assert torch.allclose(passes(model, parts)[:, PROMPT:], expected[:, PROMPT:], atol=1e-4)


def test_a_prompt_is_told_before_the_first_token_and_makes_the_choice_better(
    lab, tokens_of
) -> None:
    """Against the same program when it is told of nothing before the decoded tokens."""
    load(lab)
    ids = tokens_of(lab, NAME, 40)
    recalls = []
    for is_told in (True, False):
        model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT, audit=True)
        if not is_told:
            model.csd.engine._notes = None
        passes(model, prompt_and_tokens(ids, 20))
        recalls.append(model.csd.tally.recall)
        model.csd.close()
    assert recalls[0] > recalls[1]


def test_a_cropped_cache_goes_on_where_it_was_cropped(lab, tokens_of) -> None:
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    other = tokens_of(lab, NAME, 3, seed=5)
    straight = [ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1], *other.split(1, dim=1)]
    expected = passes(model, straight)[:, -3:]
    cache = DynamicCache(config=model.config)
    passes(model, prompt_and_tokens(ids), cache)
    cache.crop(1 - DECODED)
    assert torch.equal(passes(model, list(other.split(1, dim=1)), cache), expected)


def test_a_cache_that_the_program_was_not_told_of_begins_a_text_anew(lab, tokens_of) -> None:
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    first, second = (tokens_of(lab, NAME, PROMPT + DECODED, seed=seed) for seed in (1, 2))
    cache = DynamicCache(config=model.config)
    passes(model, prompt_and_tokens(first), cache)
    passes(model, prompt_and_tokens(second))
    text = model.csd.engine._text
    assert text._first == 0
    logits = passes(model, list(first[:, :2].split(1, dim=1)), cache)
    assert text._first == PROMPT + DECODED
    assert logits.isfinite().all()


def test_a_window_of_two_layers_does_for_a_long_lookahead(make_lab, tokens_of) -> None:
    logits = []
    for window_bytes in (4 * MIB, MIB // 4):
        lab = make_lab(window_bytes=window_bytes)
        load(lab)
        model = lab.open(NAME, lab.budget(NAME, 0.0), 0.77, lookahead=9)
        ids = tokens_of(lab, NAME, PROMPT + DECODED)
        logits.append(passes(model, prompt_and_tokens(ids)))
        assert model.csd.engine._ahead == (8 if window_bytes > MIB else 2)
    assert torch.equal(*logits)


def test_a_second_generation_is_as_the_first(lab, tokens_of, greedy) -> None:
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.2), KEPT)
    ids = tokens_of(lab, NAME, PROMPT)
    first = greedy(model, ids)
    greedy(model, tokens_of(lab, NAME, 5, seed=3))
    assert greedy(model, ids) == first


def test_padding_before_a_prompt_changes_nothing(lab, tokens_of, greedy) -> None:
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    ids = tokens_of(lab, NAME, PROMPT)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = (padded != 0).long()
    assert greedy(model, padded, attention_mask=mask) == greedy(model, ids)
    assert model.csd.engine._text._end == PROMPT + 5


def test_several_texts_at_once_are_swept_and_told_to_nobody(lab, far_from, tokens_of) -> None:
    load(lab)
    model, dense = lab.open(NAME, lab.budget(NAME, 0.3), KEPT), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, PROMPT)
    expected = passes(model, prompt_and_tokens(ids, 6))
    several = tokens_of(lab, NAME, PROMPT, batch=2)
    before = model.csd.tally.program_ns
    found = passes(model, prompt_and_tokens(several, 6))
    assert far_from(found, passes(dense, prompt_and_tokens(several, 6))) <= CLOSE
    assert model.csd.tally.program_ns == before
    assert torch.equal(passes(model, prompt_and_tokens(ids, 6)), expected)


def test_assisted_decoding_is_exact_where_it_sweeps(lab, tokens_of, greedy) -> None:
    """The assistant guides, crops and starts over; the model checks in passes over many rows."""
    load(lab)
    assistant = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    model = lab.open(NAME, lab.budget(NAME, 0.3))
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = tokens_of(lab, NAME, PROMPT)
    assisted = greedy(model, ids, assistant_model=assistant)
    assert assisted == greedy(lab.zoo.dense(NAME), ids)
    assert assistant.csd.tally.predicted_units > 0


def test_two_models_on_one_drive_do_not_mix_their_texts(lab, tokens_of) -> None:
    load(lab)
    one, two = (lab.open(NAME, lab.budget(NAME, 0.0), KEPT) for _ in range(2))
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = passes(one, prompt_and_tokens(ids))
    cache = DynamicCache(config=one.config)
    passes(one, [ids[:, :PROMPT]], cache)
    assert torch.equal(passes(two, prompt_and_tokens(ids)), expected)
    logits = passes(one, list(ids[:, PROMPT:].split(1, dim=1)), cache)
    assert one.csd.engine._text._first == PROMPT  # anew, for the other one has spoken
    assert logits.isfinite().all()
    assert torch.equal(passes(one, prompt_and_tokens(ids)), expected)


def test_a_host_that_reconnects_goes_on_with_its_text(lab, tokens_of) -> None:
    """Keys and values are gone with the queue pair: the choice is worse for a while, no more."""
    load(lab)
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = passes(model, prompt_and_tokens(ids))
    cache = DynamicCache(config=model.config)
    passes(model, [ids[:, :PROMPT]], cache)
    model.csd.engine.abandon()
    lab.drive.reconnect()
    assert passes(model, list(ids[:, PROMPT:].split(1, dim=1)), cache).isfinite().all()
    assert torch.equal(passes(model, prompt_and_tokens(ids)), expected)


def test_a_program_taken_away_in_a_prompt_fails_that_pass(lab, far_from, tokens_of) -> None:
    load(lab)
    model, dense = lab.open(NAME, lab.budget(NAME, 0.3), KEPT), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, PROMPT)
    expected = passes(model, prompt_and_tokens(ids, 5))
    lab.drive.activate_program(PROGRAM, active=False)
    with pytest.raises(CommandFailed, match="Program Not Activated"):
        passes(model, [ids])
    lab.drive.activate_program(PROGRAM)
    assert far_from(passes(model, [ids]), passes(dense, [ids])) <= CLOSE
    assert torch.equal(passes(model, prompt_and_tokens(ids, 5)), expected)


# ---- correction --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.ROLLOUT, Kind.SHADOW])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_correction_brings_the_logits_closer(lab, far_from, tokens_of, kind, share) -> None:
    load(lab, kind)
    parts = prompt_and_tokens(tokens_of(lab, NAME, PROMPT + DECODED))
    dense = passes(lab.zoo.dense(NAME), parts)[:, PROMPT:]
    left_out = lab.open(NAME, lab.budget(NAME, share), Quality(0.1))
    without = far_from(passes(left_out, parts)[:, PROMPT:], dense)
    assert left_out.csd.tally.corrections == 0
    left_out.csd.close()
    model = lab.open(NAME, lab.budget(NAME, share), "0.1+correct", audit=True)
    assert far_from(passes(model, parts)[:, PROMPT:], dense) < 0.6 * without
    assert model.csd.tally.corrections == LAYERS * DECODED
    assert 0 < model.csd.tally.recall <= model.csd.tally.covered < 1


def test_a_correction_is_of_what_was_not_computed(lab, far_from, tokens_of, masked_dense) -> None:
    """Asked by hand for the same input and units, it fills the dense model's gaps the same."""
    load(lab, Kind.SHADOW)
    model_id, packed = lab.packed(NAME)
    model = lab.open(NAME, lab.budget(NAME, 0.9), "0.2+correct", lookahead=0, recent=0)
    chosen: dict[int, np.ndarray] = {}

    def choose(layer: int, asked: np.ndarray, scores: np.ndarray) -> np.ndarray:
        units = lab.drive.execute_program(PROGRAM, model_id, layer, asked, 0.2).result()
        resident = model.csd.engine.resident[packed.find(Role.FFN, layer).site]
        assert 0 < resident.units.size < NEURONS
        chosen[layer] = np.union1d(units, resident.units)
        return chosen[layer]

    masked = masked_dense(lab.zoo.dense(NAME), choose, 0).model
    for number, layer in enumerate(masked.model.layers):
        layer.mlp.forward = corrected(lab, model_id, number, layer.mlp.forward, chosen)
    parts = prompt_and_tokens(tokens_of(lab, NAME, PROMPT + DECODED))
    assert far_from(passes(model, parts), passes(masked, parts)) <= CLOSE


def corrected(lab: Any, model_id: int, layer: int, forward: Any, chosen: Any) -> Any:
    def with_correction(x: torch.Tensor) -> torch.Tensor:
        out = forward(x)
        if x.shape[1] > 1:
            return out
        rows = x[0].detach().numpy()
        values = lab.drive.correct(PROGRAM, model_id, layer, rows, chosen[layer]).result()
        return out + torch.from_numpy(values.copy())

    return with_correction


def test_any_guide_may_have_a_shadow_correct(lab, tokens_of) -> None:
    load(lab, Kind.SHADOW)
    counts = np.arange(NEURONS)
    lab.drive.load_program(7, encode_frequency(NAME, dict.fromkeys(range(LAYERS), counts)))
    budget = lab.budget(NAME, 0.0)
    model = lab.open(NAME, budget, "0.1+correct", predictor="frequency")
    passes(model, prompt_and_tokens(tokens_of(lab, NAME, PROMPT + 1)))
    assert (model.csd.predictor, model.csd.tally.corrections) == ("frequency", LAYERS)


def test_what_cannot_correct_is_refused_before_the_first_token(lab) -> None:
    lab.packed(NAME)
    counts = np.arange(NEURONS)
    lab.drive.load_program(7, encode_frequency(NAME, dict.fromkeys(range(LAYERS), counts)))
    with pytest.raises(NoPredictor, match=r"csd predictor build rollout tied.*--quality 0\.1"):
        lab.open(NAME, "300%", "0.1+correct")


# ---- which program -----------------------------------------------------------------------------


def test_a_rollout_goes_before_a_shadow_unless_another_is_named(lab) -> None:
    load(lab, Kind.ROLLOUT)
    load(lab, Kind.SHADOW, number=8)
    model = lab.open(NAME, "300%", 0.5)
    assert (model.csd.predictor, model.csd.lookahead) == ("rollout", 1)
    assert lab.open(NAME, "300%", 0.5, predictor="shadow").csd.predictor == "shadow"
    with pytest.raises(NoPredictor, match=r"svd for tied.*active are rollout, shadow"):
        lab.open(NAME, "300%", 0.5, predictor="svd")
    with pytest.raises(RequestRefused, match="nothing to predict"):
        lab.open(NAME, "300%", predictor="rollout")


def test_a_rollout_without_room_for_its_text_leaves_the_choice_to_another(
    make_lab, tokens_of
) -> None:
    lab = make_lab()
    load(lab, Kind.ROLLOUT)
    load(lab, Kind.SHADOW, number=8)
    arena = lab.device._controller.arena
    arena.allot("taken", arena.free_bytes - 60_000)
    assert lab.open(NAME, "300%", 0.5).csd.predictor == "shadow"
    with pytest.raises(NoPredictor, match="On-Drive DRAM Exceeded"):
        lab.open(NAME, "300%", 0.5, predictor="rollout")
