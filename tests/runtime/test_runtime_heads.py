"""KV groups that the drive leaves out: what the rest computes, what is staged, and who may say."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from csd_device.firmware.selection import kept_count
from csd_protocol.packed import PackedModel, Role
from csd_protocol.program_file import encode_frequency
from host_client.calibrate.builders import Recipe
from host_client.calibrate.calibration import walk
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.driver import CommandFailed
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime import causal_lm, engine
from host_client.runtime.head_groups import kept_by_layer, kept_fraction
from host_client.runtime.plan import Plan, make_plan
from host_client.runtime.refusals import NoPredictor, RequestRefused
from tests.runtime.decoding import PROMPT, decode

NAME, LAYERS, GROUPS, NEURONS = "tied", 4, 2, 160
FEWER = [2, 3]  # layers that leave groups out: all but the first two
PROGRAM, HIDDEN = 5, 64
DECODED = 6
CLOSE = 1e-5


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def load_norms(lab: Any, left_out: int, name: str = NAME, number: int = PROGRAM) -> None:
    """A frequency of heads that finds one KV group the least, and the others equal."""
    _, packed = lab.packed(name)
    norms = np.ones(packed.find(Role.HEADS, 0).count)
    norms[left_out] = 0
    norms = dict.fromkeys(range(packed.layer_count), norms)
    lab.drive.load_program(number, encode_frequency(name, norms, role=Role.HEADS))


def without_group(dense: Any, group: int, layers: list[int], groups: int = GROUPS) -> Any:
    """The dense model, of which one KV group of these layers adds nothing to single tokens."""
    model = copy.deepcopy(dense)

    def leave_out(module: torch.nn.Module, arguments: tuple) -> tuple:
        mixed = arguments[0].unflatten(-1, (groups, -1)).clone()
        if mixed.shape[1] == 1:
            mixed[..., group, :] = 0
        return (mixed.flatten(-2),)

    for layer in layers:
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(leave_out)
    return model


def staged_by_one_token(lab: Any, ids: torch.Tensor, quality: str) -> tuple[int, int]:
    """Bytes and commands."""
    model = lab.open(NAME, lab.budget(NAME, 0.0), quality)
    before = model.csd.tally.snapshot()
    with torch.inference_mode():
        model(ids[:, :1])
    model.csd.engine.abandon()
    spent = model.csd.tally.since(before)
    model.csd.close()
    return spent.staged_bytes, spent.commands


@pytest.mark.parametrize("left_out", range(GROUPS))
def test_what_is_left_out_adds_nothing_and_keys_and_values_stay_whole(
    lab, far_from, tokens_of, left_out: int
) -> None:
    load_norms(lab, left_out)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    dense = lab.zoo.dense(NAME)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.5")
    found = decode(model, ids)
    assert far_from(found, decode(without_group(dense, left_out, FEWER), ids)) <= CLOSE
    assert far_from(found, decode(dense, ids)) > 100 * CLOSE
    with torch.inference_mode():
        assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


def test_three_of_four_groups_need_not_lie_side_by_side(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "DENSE_LAYERS_DEFAULT", 1)
    load_norms(lab, 1, "slices")
    model = lab.open("slices", lab.budget("slices", 0.0), "1+heads=0.75")
    ids = tokens_of(lab, "slices", PROMPT + 2)
    expected = decode(without_group(lab.zoo.dense("slices"), 1, [1], groups=4), ids)
    assert far_from(decode(model, ids), expected) <= CLOSE


def test_groups_that_are_resident_are_always_computed(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two in a layer, which no plan comes to; and all of them."""
    load_norms(lab, 0)

    def plan_with_a_group(packed: PackedModel, *given: Any) -> Plan:
        plan = make_plan(packed, *given)
        more = {packed.find(Role.HEADS, FEWER[0]).site: 1}
        return replace(plan, resident_units=plan.resident_units | more)

    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    dense = lab.zoo.dense(NAME)
    whole = lab.open(NAME, "300%", "1+heads=0.5")
    assert far_from(decode(whole, ids), decode(dense, ids)) <= CLOSE
    assert whole.csd.tally.program_ns == 0
    monkeypatch.setattr(causal_lm, "make_plan", plan_with_a_group)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.5")
    expected = decode(without_group(dense, 0, FEWER[1:]), ids)
    assert far_from(decode(model, ids), expected) <= CLOSE
    model.csd.close()
    exact = lab.open(NAME, lab.budget(NAME, 0.0))
    assert far_from(decode(exact, ids), decode(dense, ids)) <= CLOSE


def test_a_share_that_leaves_no_group_out_is_exact(lab, far_from, tokens_of) -> None:
    load_norms(lab, 0)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.9")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    assert far_from(decode(model, ids), decode(lab.zoo.dense(NAME), ids)) <= CLOSE
    assert model.csd.tally.program_ns == 0


def test_what_is_left_out_is_not_staged_and_costs_no_command(lab, tokens_of) -> None:
    load_norms(lab, 1)
    counts = dict.fromkeys(range(LAYERS), np.arange(NEURONS))
    lab.drive.load_program(7, encode_frequency(NAME, counts))
    ids = tokens_of(lab, NAME, 1)
    _, packed = lab.packed(NAME)
    group_bytes = packed.find(Role.HEADS, 0).unit_bytes
    for more, fewer in (("1+heads=0.9", "1+heads=0.5"), ("0.5", "0.5+heads=0.5")):
        all_bytes, commands = staged_by_one_token(lab, ids, more)
        staged_bytes, commands_of_fewer = staged_by_one_token(lab, ids, fewer)
        assert all_bytes - staged_bytes == len(FEWER) * group_bytes
        if more == "0.5":
            assert commands_of_fewer == commands


@pytest.mark.parametrize(
    "share, groups, kept", [(0.67, 3, 2), (0.33, 3, 1), (0.01, 8, 1), (0.5, 8, 4), (1.0, 8, 8)]
)
def test_a_share_is_rounded_to_whole_groups_and_the_drive_counts_the_same(
    share: float, groups: int, kept: int
) -> None:
    assert kept_by_layer(share, groups, 4, 2) == [groups, groups, kept, kept]
    assert kept_by_layer(share, groups, 2, 0) == [groups, kept]
    assert kept_count(kept_fraction(kept, groups), groups) == kept


# ---- which program ------------------------------------------------------------------------------


def load(lab: Any, kind: Kind, number: int, recipe: Recipe | None = None) -> None:
    _, packed = lab.packed(NAME)
    lab.drive.load_program(number, build_predictor(lab.drive, packed, kind, silent, recipe))


def test_a_rollout_speaks_for_neurons_and_heads_in_one_run(lab, tokens_of) -> None:
    load(lab, Kind.ROLLOUT, 3)
    load_norms(lab, 0)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    for quality in ("0.5+heads=0.5", "1+heads=0.5"):
        model = lab.open(NAME, lab.budget(NAME, 0.0), quality)
        assert (model.csd.predictor, model.csd.heads_predictor) == ("rollout", "rollout")
        assert decode(model, ids).isfinite().all()
        model.csd.close()


def test_another_program_speaks_for_heads_beside_one_that_does_not(lab, tokens_of) -> None:
    load(lab, Kind.ROLLOUT, 3)
    load(lab, Kind.SHADOW, 4)
    load_norms(lab, 0)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "0.5+heads=0.5", predictor="shadow")
    assert (model.csd.predictor, model.csd.heads_predictor) == ("shadow", "frequency")
    assert decode(model, ids).isfinite().all()
    alone = lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.5", predictor="frequency")
    assert (alone.csd.predictor, alone.csd.heads_predictor) == ("frequency", "frequency")
    assert lab.open(NAME, "300%", 0.5).csd.heads_predictor is None


def test_without_a_program_for_heads_they_are_refused(lab) -> None:
    load(lab, Kind.SHADOW, 4)
    hint = r"scores KV groups, and of such none is active.*csd predictor build rollout tied"
    for quality in ("0.5+heads=0.5", "1+heads=0.5"):
        with pytest.raises(NoPredictor, match=hint):
            lab.open(NAME, "300%", quality)
    load_norms(lab, 0)
    with pytest.raises(NoPredictor, match="active are frequency"):
        lab.open(NAME, "300%", "1+heads=0.5", predictor="shadow")
    with pytest.raises(RequestRefused, match="lookahead of 1 or more"):
        lab.open(NAME, "300%", "1+heads=0.5", lookahead=0)


def test_a_program_of_other_heads_is_refused_and_the_drive_goes_on(
    lab, far_from, tokens_of
) -> None:
    lab.packed(NAME)
    norms = dict.fromkeys(range(LAYERS), np.ones(GROUPS + 1))
    lab.drive.load_program(PROGRAM, encode_frequency(NAME, norms, role=Role.HEADS))
    with pytest.raises(CommandFailed, match=r"does not score the 2 units of .*heads"):
        lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.5")
    model, ids = lab.open(NAME, lab.budget(NAME, 0.0)), tokens_of(lab, NAME, PROMPT)
    with torch.inference_mode():
        assert far_from(model(ids).logits, lab.zoo.dense(NAME)(ids).logits) <= CLOSE


def test_a_program_taken_away_fails_the_pass_and_nothing_else(lab, far_from, tokens_of) -> None:
    load(lab, Kind.SHADOW, 4)
    load_norms(lab, 0)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "0.5+heads=0.5")
    ids = tokens_of(lab, NAME, PROMPT)
    lab.drive.unload_program(PROGRAM)
    with torch.inference_mode():
        with pytest.raises(CommandFailed, match="No Program"):
            model(ids[:, :1])
        assert far_from(model(ids).logits, lab.zoo.dense(NAME)(ids).logits) <= CLOSE


# ---- what is built for heads --------------------------------------------------------------------


@pytest.fixture
def text(lab, tokens_of) -> torch.Tensor:
    return torch.cat([tokens_of(lab, NAME, 32, seed=seed) for seed in range(10)])


def test_what_is_fitted_to_heads_knows_more_than_their_means(lab, text) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    model_id, packed = lab.packed(NAME)
    walked = list(walk(model, text, (1,)))
    found = {}
    for kind in (Kind.FREQUENCY, Kind.LOWRANK, Kind.MLP):
        recipe = Recipe(rank=HIDDEN, windows=text, role=Role.HEADS)
        data = build_predictor(lab.drive, packed, kind, silent, recipe)
        number = load_predictor(lab.drive, packed, kind, data)
        found[kind] = sum(
            int(lab.drive.execute_program(number, model_id, layer, state[None], 0.5).result()[0])
            == int(norms.argmax())
            for layer in FEWER
            for state, norms in zip(
                walked[layer].seen[1].flatten(0, 1)[:80].numpy(),
                walked[layer].head_norms.flatten(0, 1)[:80],
                strict=True,
            )
        )
    assert found[Kind.FREQUENCY] >= 80
    assert min(found[Kind.LOWRANK], found[Kind.MLP]) > found[Kind.FREQUENCY]


def test_a_program_of_heads_stands_beside_the_same_kind_of_neurons(lab, text) -> None:
    _, packed = lab.packed(NAME)
    counts = dict.fromkeys(range(LAYERS), np.arange(NEURONS))
    load_predictor(lab.drive, packed, "frequency", encode_frequency(NAME, counts))
    recipe = Recipe(windows=text, role=Role.HEADS)
    for _ in range(2):
        data = build_predictor(lab.drive, packed, Kind.FREQUENCY, silent, recipe)
        load_predictor(lab.drive, packed, "frequency", data)
    assert sorted(entry["role"] for entry in lab.drive.programs()) == ["ffn", "heads"]


def test_kinds_that_cannot_score_heads_say_so(lab, text) -> None:
    _, packed = lab.packed(NAME)
    recipe = Recipe(windows=text, role=Role.HEADS)
    with pytest.raises(RequestRefused, match="frequency, lowrank, mlp, and by a rollout"):
        build_predictor(lab.drive, packed, Kind.SHADOW, silent, recipe)
