"""A far level brings units into on-drive DRAM before their turn; it never changes what comes out.

The model is larger than the drive's unit cache, so that what is not brought ahead is not there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from csd_protocol.program_file import (
    AttentionShape,
    FarsightBlock,
    FarsightBody,
    FarsightHead,
    encode_farsight,
    encode_frequency,
    encode_window,
)
from csd_protocol.units import MIB
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.driver import CommandFailed
from host_client.runtime.far_level import IN_FLIGHT_MAX
from host_client.runtime.refusals import NoPredictor, RequestRefused
from tests.runtime import decoding

NAME, LAYERS, NEURONS, HIDDEN = "deep", 8, 1024, 64
KEPT, PROMPT, DECODED = 0.25, 6, 4
NEAR, FAR = 1, 2  # program numbers
decode = partial(decoding.decode, prompt=PROMPT)


class DeepZoo:
    """One random model, as a folder and as a transformers model in float32."""

    def __init__(self, root: Path) -> None:
        self._folder = root / NAME

    def folder(self, name: str) -> Path:
        if not self._folder.exists():
            torch.manual_seed(5)
            config = LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=NEURONS,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=131,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                initializer_range=0.12,
                bos_token_id=None,
                eos_token_id=None,
            )
            LlamaForCausalLM(config).half().save_pretrained(self._folder)
        return self._folder

    def dense(self, name: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folder(name), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared_deep_lab(open_lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    zoo = DeepZoo(tmp_path_factory.mktemp("zoo"))
    lab = open_lab(zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(shared_deep_lab) -> Iterator[Any]:
    yield shared_deep_lab
    shared_deep_lab.put_back()
    assert shared_deep_lab.leases == 0
    assert shared_deep_lab.drive.release_errors == 0


def counts() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(3)
    return {layer: rng.uniform(0, 1, NEURONS).astype(np.float32) for layer in range(LAYERS)}


def farsight() -> bytes:
    rng = np.random.default_rng(4)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * 0.2

    one = np.ones(16, np.float32)
    square = matrix(16, 16)
    block = FarsightBlock(
        attn_norm=one, q=square, k=square, v=square, o=square, ffn_norm=one, gate=square,
        up=square, down=square,
    )  # fmt: skip
    body = FarsightBody(np.ones(HIDDEN, np.float32), matrix(16, HIDDEN), (block,), one)
    heads = {layer: FarsightHead(matrix(NEURONS, 16), None) for layer in range(LAYERS)}
    shape = AttentionShape(heads=1, kv_heads=1, head_dim=16, rope_theta=1e4, context=4)
    return encode_farsight(NAME, body, heads, shape, rms_eps=1e-5)


def built(lab: Any, kind: Kind) -> bytes:
    _, packed = lab.packed(NAME)
    return build_predictor(lab.drive, packed, kind, lambda done, total: None)


FILES: dict[str, Callable[[Any], bytes]] = {
    "rollout": lambda lab: built(lab, Kind.ROLLOUT),
    "shadow": lambda lab: built(lab, Kind.SHADOW),
    "frequency": lambda lab: encode_frequency(NAME, counts()),
    "window": lambda lab: encode_window(NAME, counts(), tokens=2, decay=0.5),
    "farsight": lambda lab: farsight(),
}


def load(lab: Any, near: str, far: str = "") -> None:
    lab.packed(NAME)
    lab.drive.load_program(NEAR, FILES[near](lab))
    if far not in ("", near):
        lab.drive.load_program(FAR, FILES[far](lab))


def opened(lab: Any, near: str, far: str = "none", quality: Any = KEPT, **settings: Any) -> Any:
    return lab.open(NAME, lab.budget(NAME, 0.0), quality, predictor=near, far=far, **settings)


@pytest.mark.parametrize("far", [*FILES, "rollout@3"])
@pytest.mark.parametrize("near", ["rollout", "frequency"])
def test_the_output_is_the_same_and_less_is_waited_for(lab, tokens_of, near: str, far: str) -> None:
    load(lab, near, far.partition("@")[0])
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    alone = opened(lab, near)
    expected = decode(alone, ids)
    without = alone.csd.tally.snapshot()
    assert (without.brought_units, alone.csd.far) == (0, None)
    alone.csd.close()
    model = opened(lab, near, far)
    used = model.csd.brought_units_used()
    assert torch.equal(decode(model, ids), expected)
    tally = model.csd.tally
    used = model.csd.brought_units_used() - used
    assert model.csd.far.kind == far.partition("@")[0]
    assert 0 < used <= tally.brought_units
    assert tally.units_from_dram > without.units_from_dram
    assert (tally.units_staged, tally.predicted_units) == (
        without.units_staged,
        without.predicted_units,
    )


def test_where_one_program_serves_both_levels_there_is_no_command_more(lab, tokens_of) -> None:
    load(lab, "rollout")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    commands = []
    for far in ("none", "rollout@3"):
        model = opened(lab, "rollout", far)
        decode(model, ids)
        model.csd.engine.abandon()
        commands.append(model.csd.tally.commands)
        assert (model.csd.tally.brought_units > 0) == (far != "none")
        model.csd.close()
    assert commands[0] == commands[1]


@pytest.mark.parametrize("quality", [KEPT, "0.1+correct"])
def test_what_the_near_program_foretells_is_all_there(lab, tokens_of, quality) -> None:
    """A frequency program says the same near and far, so every guess is right."""
    load(lab, "shadow", "frequency")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    alone = opened(lab, "frequency", quality=quality)
    decode(alone, ids)
    waited_ns = alone.csd.tally.nand_wait_ns
    alone.csd.close()
    model = opened(lab, "frequency", "frequency@2", quality=quality)
    used = model.csd.brought_units_used()
    decode(model, ids)
    assert model.csd.brought_units_used() - used == model.csd.tally.brought_units > 0
    assert model.csd.tally.nand_wait_ns < waited_ns


@pytest.mark.parametrize("lookahead", [0, 3, 9])
def test_it_is_beyond_whatever_the_near_program_is_asked(lab, tokens_of, lookahead: int) -> None:
    load(lab, "rollout")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = decode(opened(lab, "rollout", lookahead=lookahead), ids)
    lab.opened.pop().csd.close()
    model = opened(lab, "rollout", "rollout", lookahead=lookahead)
    assert torch.equal(decode(model, ids), expected)
    assert model.csd.far_lookahead > lookahead
    assert (model.csd.tally.brought_units > 0) == (lookahead < 9)  # 9: all layers are near


# ---- how far ahead -------------------------------------------------------------------------------


def test_a_far_level_learns_how_far_and_a_named_one_does_not(lab, tokens_of) -> None:
    """Time stands still for this host, so the drive is slower than anything it computes."""
    load(lab, "frequency")
    ids = tokens_of(lab, NAME, PROMPT + 8)
    for far, layers in (("frequency@3", 3), ("frequency", 9)):
        model = opened(lab, "frequency", far)
        model.csd.engine._pace._now_ns = lambda: 0
        model.csd.far.ahead.note_room = lambda was_enough: None  # this cache has little
        decode(model, ids)
        assert model.csd.far_lookahead == layers
        model.csd.close()


def test_where_there_is_no_room_for_more_it_looks_less_far(lab, tokens_of) -> None:
    load(lab, "frequency")
    model = opened(lab, "frequency", "frequency", quality=0.9)
    model.csd.engine._pace._now_ns = lambda: 0
    decode(model, tokens_of(lab, NAME, PROMPT + 8))
    assert model.csd.far.ahead.lead <= 3  # a layer of 9/10 takes 350 KiB of 1 MiB


def test_a_near_lookahead_settles_when_it_is_to(lab, tokens_of) -> None:
    load(lab, "frequency")
    model = opened(lab, "frequency", lookahead="auto")
    assert model.csd.lookahead == 1
    model.csd.engine._pace._now_ns = lambda: 0
    decode(model, tokens_of(lab, NAME, PROMPT + DECODED))
    assert model.csd.lookahead == 8
    with pytest.raises(RequestRefused, match="lookahead of soon"):
        opened(lab, "frequency", lookahead="soon")


# ---- where it is not to be, or cannot ------------------------------------------------------------


def test_by_itself_it_is_there_where_the_unit_cache_is_too_small(lab, make_lab) -> None:
    load(lab, "shadow", "rollout")
    model = lab.open(NAME, lab.budget(NAME, 0.0), KEPT)
    assert (model.csd.predictor, model.csd.far.kind, model.csd.no_far) == (
        *("rollout", "rollout"),
        None,
    )
    roomy = make_lab(unit_cache_bytes=8 * MIB)
    small = "tied"
    _, packed = roomy.packed(small)
    data = build_predictor(roomy.drive, packed, Kind.SHADOW, lambda done, total: None)
    roomy.drive.load_program(NEAR, data)
    model = roomy.open(small, roomy.budget(small, 0.0), KEPT)
    assert model.csd.far is None
    assert "holds all that is staged" in model.csd.no_far


def test_a_drive_without_a_unit_cache_has_none_and_says_so(make_lab, tokens_of) -> None:
    lab, name = make_lab(unit_cache_bytes=0), "tied"
    _, packed = lab.packed(name)
    data = build_predictor(lab.drive, packed, Kind.ROLLOUT, lambda done, total: None)
    lab.drive.load_program(NEAR, data)
    for far in ("auto", "rollout"):
        model = lab.open(name, lab.budget(name, 0.0), KEPT, far=far)
        assert decode(model, tokens_of(lab, name, 8)).isfinite().all()
        assert (model.csd.far, model.csd.no_far) == (
            None,
            "the drive has no unit cache to bring units into",
        )


def test_a_program_without_room_for_its_text_is_no_far_level(lab, tokens_of) -> None:
    load(lab, "frequency", "rollout")
    arena = lab.device._controller.arena
    arena.allot("taken", arena.free_bytes - 60_000)
    try:
        model = opened(lab, "frequency", "rollout")
        assert decode(model, tokens_of(lab, NAME, 8)).isfinite().all()
        assert model.csd.far is None
        assert "no room for it. rollout: " in model.csd.no_far
        assert lab.open(NAME, "300%", KEPT, predictor="frequency").csd.no_far
    finally:
        arena.free("taken")


@pytest.mark.parametrize("when", ["before", "decoding"])
def test_a_far_program_taken_away_ends_the_level_and_not_the_pass(lab, tokens_of, when) -> None:
    load(lab, "frequency", "rollout")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = decode(opened(lab, "frequency"), ids)
    lab.opened.pop().csd.close()
    model = opened(lab, "frequency", "rollout")
    if when == "decoding":
        decode(model, ids[:, : PROMPT + 1])
    lab.drive.unload_program(FAR)
    assert torch.equal(decode(model, ids), expected)
    assert model.csd.far is None
    assert "No Program" in model.csd.no_far
    brought = model.csd.tally.brought_units
    assert torch.equal(decode(model, ids), expected)
    assert model.csd.tally.brought_units == brought


def test_a_drive_that_is_behind_is_not_asked_for_more(lab, tokens_of, monkeypatch) -> None:
    load(lab, "frequency", "rollout")
    model = opened(lab, "frequency", "rollout@3")
    monkeypatch.setattr(type(model.csd.engine.far), "settle", lambda self: None)
    decode(model, tokens_of(lab, NAME, PROMPT + 8))
    assert len(model.csd.engine.far._pending) == IN_FLIGHT_MAX
    model.csd.engine.abandon()
    assert not model.csd.engine.far._pending


def test_who_names_what_cannot_be_is_told(lab) -> None:
    load(lab, "frequency")
    with pytest.raises(NoPredictor, match=r"far level of rollout.*active are frequency"):
        opened(lab, "frequency", "rollout")
    with pytest.raises(RequestRefused, match="far frequency: quality exact needs every neuron"):
        lab.open(NAME, "300%", far="frequency")
    with pytest.raises(RequestRefused, match="lookahead of near"):
        opened(lab, "frequency", "frequency@near")
    assert lab.open(NAME, "300%", far="none").csd.far is None


# ---- what programs are told ----------------------------------------------------------------------


def told_in(lab: Any, model: Any, ids: torch.Tensor, program: int, monkeypatch: Any) -> list[Any]:
    """What each staging command tells a program, with the layers that it is asked for."""
    seen: list[Any] = []
    send = lab.drive.predict_and_stage

    def note(model_id, number, token, hidden, targets, release, told):
        if number == program:
            seen.append((told, hidden.copy(), token))
        return send(model_id, number, token, hidden, targets, release, told)

    monkeypatch.setattr(lab.drive, "predict_and_stage", note)
    decode(model, ids)
    return seen


@pytest.mark.parametrize(
    "near, far, program", [("window", "none", NEAR), ("shadow", "window", FAR)]
)
def test_a_window_is_told_once_what_was_active(
    lab, tokens_of, monkeypatch, near: str, far: str, program: int
) -> None:
    load(lab, near, far if far != "none" else "")
    model = opened(lab, near, far)
    active: dict[int, list[np.ndarray]] = {layer: [] for layer in range(LAYERS)}
    observe = model.csd.engine.observe

    def note(site: Any, units: np.ndarray) -> None:
        active[site.layer].append(units)
        observe(site, units)

    monkeypatch.setattr(model.csd.engine, "observe", note)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    seen = told_in(lab, model, ids, program, monkeypatch)
    sites = {site.layer: site.site for site in model.csd.packed.ffns()}
    for layer in range(LAYERS - 1):  # the last layer's go with the token that does not come
        told = [entry[0].observed.get(sites[layer]) for entry in seen]
        places = [
            next(at for at, one in enumerate(active[layer]) if one is units)
            for units in told
            if units is not None
        ]
        assert places == sorted(set(places))
        assert DECODED - 1 <= len(places) <= len(active[layer]) == DECODED
        assert all(units.size == NEURONS * KEPT for units in active[layer])


def test_what_is_told_as_active_has_the_best_true_scores_of_what_was_computed(
    lab, tokens_of, monkeypatch
) -> None:
    load(lab, "window")
    budget = lab.budget(NAME, 0.5)
    model = lab.open(NAME, budget, KEPT, predictor="window", far="none")
    computed: dict[int, dict[int, float]] = {}
    norms = [
        layer.mlp.down_proj.weight.detach().norm(dim=0).numpy()
        for layer in lab.zoo.dense(NAME).model.layers
    ]

    def note(layer: int, units: np.ndarray, activity: np.ndarray) -> None:
        if activity.shape[0] == 1:
            scores = activity[0] * norms[layer][units]
            computed.setdefault(layer, {}).update(zip(units.tolist(), scores.tolist(), strict=True))

    for layer in model.model.layers:
        layer.mlp.observer = note
    active: dict[int, np.ndarray] = {}
    monkeypatch.setattr(
        model.csd.engine, "observe", lambda site, units: active.update({site.layer: units})
    )
    decode(model, tokens_of(lab, NAME, PROMPT + 1))
    for layer, units in active.items():
        scores = computed[layer]
        assert len(scores) > NEURONS * KEPT  # resident ones as well
        best = sorted(scores, key=scores.__getitem__)[-units.size :]
        assert np.array_equal(units, np.sort(best))


def test_a_farsight_is_shown_what_enters_the_first_layer_and_nothing_else(
    lab, tokens_of, monkeypatch
) -> None:
    """Also of a prompt that is longer than its context."""
    load(lab, "farsight")
    model = opened(lab, "farsight")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    seen = told_in(lab, model, ids, NEAR, monkeypatch)
    rows = lab.zoo.dense(NAME).model.embed_tokens(ids)[0].detach().numpy()
    assert [entry[2] for entry in seen] == sorted(entry[2] for entry in seen)
    for told, hidden, token in seen:
        assert (told.origin.layer, told.origin.behind_attention) == (0, False)
        assert np.allclose(hidden[0], rows[token], atol=1e-6)
    assert {entry[2] for entry in seen} == set(range(PROMPT, PROMPT + DECODED))


def test_a_far_farsight_hears_the_prompt_once(lab, tokens_of, monkeypatch) -> None:
    load(lab, "frequency", "farsight")
    model = opened(lab, "frequency", "farsight")
    sent: list[tuple[int, int]] = []
    execute = lab.drive.execute_program

    def note(program, model_id, layer, hidden, keep, told, token=0):
        sent.append((program, layer))
        return execute(program, model_id, layer, hidden, keep, told, token)

    monkeypatch.setattr(lab.drive, "execute_program", note)
    decode(model, tokens_of(lab, NAME, PROMPT + DECODED))
    assert sent == [(FAR, 0)]


def test_a_pass_broken_off_is_followed_by_a_good_one(lab, tokens_of, monkeypatch) -> None:
    load(lab, "frequency", "rollout")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    expected = decode(opened(lab, "frequency"), ids)
    lab.opened.pop().csd.close()
    model = opened(lab, "frequency", "rollout")
    monkeypatch.setattr(model.csd.engine, "kept_of", None)
    leave = model.csd.engine.leave

    def fail(layer: int) -> None:
        leave(layer)
        if layer == 3:
            raise CommandFailed("a test", 0, 6, "broken off", False)

    monkeypatch.setattr(model.csd.engine, "leave", fail)
    with pytest.raises(CommandFailed), torch.inference_mode():
        model(ids[:, :1])
    monkeypatch.setattr(model.csd.engine, "leave", leave)
    model.csd.engine.abandon()
    assert torch.equal(decode(model, ids), expected)
