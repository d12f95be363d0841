"""The lab: the same arithmetic as transformers' and as the drive's, on whole windows of text."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from csd_protocol.low_bit import LowBitRows
from csd_protocol.packed import Role
from csd_protocol.program_file import AttentionShape, encode_rollout, encode_shadow
from host_client.calibrate.calibration import carrying_map, walk
from host_client.calibrate.choosers import (
    AT_FFN,
    Frequency,
    LayerViews,
    Oracle,
    Rollout,
    Shadow,
    Window,
)
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.lab import Lab, Setting
from host_client.calibrate.low_bit_layers import group_of, round_layer, values_of
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.calibrate.quality import decoded_losses, dense_truths
from host_client.calibrate.selection import count_top, top, top_by_sorting
from host_client.model.errors import MissingTensor
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime.head_groups import DENSE_LAYERS_DEFAULT, kept_by_layer
from host_client.runtime.quality import Quality

NAME = "tied"
WINDOWS, TOKENS = 3, 12
BITS = 4
Open = Callable[[str], DenseModel]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The lab deals its windows out to as many threads as torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def open_dense(lab) -> Open:
    return lambda name: DenseModel(SafetensorsFolder(lab.zoo.folder(name)))


@pytest.fixture
def windows(lab, tokens_of) -> torch.Tensor:
    return torch.cat([tokens_of(lab, NAME, TOKENS, seed=seed) for seed in range(WINDOWS)])


def views_of(model: DenseModel, bits: int = BITS) -> Callable[[int], LayerViews]:
    group = group_of(model.shape.hidden, model.shape.heads * model.shape.head_dim)

    def views(number: int) -> LayerViews:
        layer = model.layer(number)
        low = values_of(layer, round_layer(layer, bits, group), bits)
        return LayerViews(layer, {"low": low, "exact": layer})

    return views


def kept(model: DenseModel, share: float) -> list[int]:
    return [math.ceil(share * model.shape.ffn)] * model.shape.layers


def through_all_layers(model: DenseModel, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    for number in range(model.shape.layers):
        layer = model.layer(number)
        attended = hidden + model.attention(layer, hidden)
        x = model.ffn_input(layer, attended)
        hidden = attended + model.summed(layer, model.activity(layer, x))
    return model.logits(hidden)


@pytest.mark.parametrize("name", ["tied", "untied", "slices", "scaled"])
def test_the_dense_model_is_transformers_own(lab, open_dense, tokens_of, name: str) -> None:
    ids = tokens_of(lab, name, 16)
    with torch.inference_mode():
        expected = lab.zoo.dense(name)(ids).logits
        found = through_all_layers(open_dense(name), ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_keeping_everything_loses_nothing(open_dense, windows) -> None:
    model = open_dense(NAME)
    setting = Setting("oracle", Oracle, kept(model, 1.0))
    report = Lab(model, views_of(model), windows).measure([setting])
    (outcome,) = report.outcomes
    assert report.scored == WINDOWS * (TOKENS - 1)
    assert outcome.perplexity == pytest.approx(report.dense_perplexity, rel=1e-6)
    assert (outcome.agreement, outcome.recall, outcome.precision) == (1, 1, 1)
    assert abs(outcome.kl_nats) < 1e-6
    assert outcome.staged_bytes_per_token == report.dense_bytes_per_token


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("correction", [None, "low"])
@pytest.mark.parametrize("chooser, file_of", [(Shadow, "shadow_file"), (Rollout, "rollout_file")])
def test_a_program_costs_in_the_lab_what_it_costs_through_the_drive(
    lab, open_dense, windows, chooser, file_of, correction, lookahead: int
) -> None:
    model, share = open_dense(NAME), 0.5 if correction is None else 0.2
    setting = Setting(
        "", lambda: chooser(model, "low", lookahead), kept(model, share), correction=correction
    )
    (outcome,) = Lab(model, views_of(model), windows).measure([setting]).outcomes
    lab.drive.load_program(5, globals()[file_of](model))
    quality = Quality(share, corrected=correction is not None)
    runtime = lab.open(NAME, lab.budget(NAME, 0.0), quality, lookahead=lookahead)
    assert not runtime.csd.plan.resident_units[runtime.csd.packed.find(Role.FFN, 0).site]
    split = [window[None] for window in windows]
    truths = dense_truths(lab.zoo.dense(NAME), split, lambda done, total: None)
    through_drive = decoded_losses(runtime, split, truths, lambda done, total: None)
    assert outcome.perplexity == pytest.approx(through_drive.perplexity, rel=1e-3)
    assert outcome.kl_nats == pytest.approx(through_drive.kl / through_drive.scored, rel=0.02)
    assert outcome.agreement == pytest.approx(through_drive.agreed / through_drive.scored, abs=0.04)
    assert abs(outcome.against_dense) > (0.01 if correction is None else 0.002)


@pytest.mark.parametrize("share, lookahead", [(1.0, 1), (0.5, 1), (0.5, 2)])
def test_leaving_heads_out_costs_in_the_lab_what_it_costs_through_the_drive(
    lab, open_dense, windows, share: float, lookahead: int
) -> None:
    model = open_dense(NAME)
    groups, layers = model.shape.kv_heads, model.shape.layers
    fewer = kept_by_layer(0.5, groups, layers, DENSE_LAYERS_DEFAULT)
    assert fewer == [2, 2, 1, 1]
    setting = Setting("", lambda: Rollout(model, "low", lookahead), kept(model, share), heads=fewer)
    (outcome,) = Lab(model, views_of(model), windows).measure([setting]).outcomes
    lab.drive.load_program(5, rollout_file(model))
    quality = Quality(share, heads=0.5)
    runtime = lab.open(NAME, lab.budget(NAME, 0.0), quality, lookahead=lookahead)
    split = [window[None] for window in windows]
    truths = dense_truths(lab.zoo.dense(NAME), split, lambda done, total: None)
    through_drive = decoded_losses(runtime, split, truths, lambda done, total: None)
    assert outcome.perplexity == pytest.approx(through_drive.perplexity, rel=1e-3)
    assert abs(outcome.against_dense) > 0.002
    assert outcome.groups_recall > 0.7


def shadow_file(model: DenseModel) -> bytes:
    group = group_of(model.shape.hidden, model.shape.heads * model.shape.head_dim)
    layers = {
        number: round_layer(model.layer(number), BITS, group).ffn
        for number in range(model.shape.layers)
    }
    return encode_shadow(NAME, layers, bits=BITS, group=group, rms_eps=model.rms_eps)


def rollout_file(model: DenseModel) -> bytes:
    shape = model.shape
    group = group_of(shape.hidden, shape.heads * shape.head_dim)
    layers = {number: round_layer(model.layer(number), BITS, group) for number in range(4)}
    attention = AttentionShape(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_theta=model.rope_theta,
        context=2 * TOKENS,
    )
    return encode_rollout(NAME, layers, attention, bits=BITS, group=group, rms_eps=model.rms_eps)


def test_better_informed_choosers_choose_better(open_dense, windows) -> None:
    """The oracle, the true input, a state carried forward, the same state raw, in this order."""
    model = open_dense(NAME)
    keep = kept(model, 1 / 3)
    settings = [
        Setting("oracle", Oracle, keep),
        Setting("shadow", lambda: Shadow(model, "low", AT_FFN), keep),
        Setting("rollout", lambda: Rollout(model, "low", 1), keep),
        Setting("shadow", lambda: Shadow(model, "low", 1), keep),
    ]
    outcomes = Lab(model, views_of(model), windows).measure(settings).outcomes
    recalls = [outcome.recall for outcome in outcomes]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] == 1
    assert recalls[2] > recalls[3] + 0.05


@pytest.mark.parametrize("kept_groups", [1, 2])
def test_heads_that_are_left_out_are_those_of_the_least_norm(
    lab, open_dense, tokens_of, kept_groups: int
) -> None:
    """Against transformers' own attention, its output projection less the columns left out."""
    model = open_dense("slices")
    groups, layers = model.shape.kv_heads, model.shape.layers
    ids = tokens_of(lab, "slices", TOKENS)
    dense = lab.zoo.dense("slices")

    def leave_out(module: torch.nn.Module, arguments: tuple, number: int) -> tuple:
        by_group = arguments[0].unflatten(-1, (groups, -1))  # [1, tokens, groups, rows]
        columns = module.weight.unflatten(1, (groups, -1))  # [hidden, groups, rows]
        norms = torch.einsum("btgr,hgr->btgh", by_group, columns).norm(dim=-1)
        mask = top(norms, groups if number == 0 else kept_groups)
        return ((by_group * mask[..., None]).flatten(-2),)

    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, given, number=number: leave_out(module, given, number)
        )
        for number, layer in enumerate(dense.model.layers)
    ]
    with torch.inference_mode():
        log_p = dense(ids).logits[0, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    expected = math.exp(-float(log_p.gather(1, ids[0, 1:, None]).mean()))
    heads = [groups] + [kept_groups] * (layers - 1)
    setting = Setting("oracle", Oracle, kept(model, 1.0), heads=heads)
    (outcome,) = Lab(model, views_of(model), ids).measure([setting]).outcomes
    assert outcome.perplexity == pytest.approx(expected, rel=1e-4)
    assert abs(outcome.against_dense) > 1e-4
    assert outcome.groups_recall == 1
    group_bytes = 2 * model.shape.group_rows * model.shape.hidden * 2
    assert outcome.heads_bytes_per_token == sum(heads) * group_bytes


def test_choosers_of_heads_differ_by_what_they_know(open_dense, windows) -> None:
    model = open_dense(NAME)
    groups, layers = model.shape.kv_heads, model.shape.layers
    fewer = [groups] + [1] * (layers - 1)
    norms = torch.arange(groups).expand(layers, -1).float()
    shares = torch.ones(layers, model.shape.ffn)
    settings = [
        Setting("rollout", lambda: Rollout(model, "exact", 1), kept(model, 1.0), heads=fewer),
        Setting("rollout", lambda: Rollout(model, "low", 1), kept(model, 1.0), heads=fewer),
        Setting("frequency", lambda: Frequency(shares, norms), kept(model, 1.0), heads=fewer),
    ]
    outcomes = Lab(model, views_of(model), windows).measure(settings).outcomes
    assert outcomes[1].groups_recall > 0.8 > outcomes[2].groups_recall
    assert outcomes[0].groups_recall > outcomes[1].groups_recall
    assert [layer.kept_groups for layer in outcomes[0].layers] == fewer
    mute = Setting("shadow", lambda: Shadow(model, "low", 1), kept(model, 1.0), heads=fewer)
    with pytest.raises(TypeError, match="shadow scores no KV groups"):
        Lab(model, views_of(model), windows).measure([mute])


@pytest.mark.parametrize("lookahead", [0, 1, 2, 9])
def test_a_rollout_over_exact_rows_knows_what_comes(open_dense, windows, lookahead: int) -> None:
    """Nothing is left out on the way, so the state that was carried forward is the true one."""
    model = open_dense(NAME)
    setting = Setting("rollout", lambda: Rollout(model, "exact", lookahead), kept(model, 1.0))
    (outcome,) = Lab(model, views_of(model), windows).measure([setting]).outcomes
    assert outcome.recall_third > 0.999


def test_an_exact_correction_makes_up_for_all_that_was_left_out(open_dense, windows) -> None:
    model = open_dense(NAME)
    settings = [
        Setting("oracle", Oracle, kept(model, 0.1)),
        Setting("oracle", Oracle, kept(model, 0.1), correction="low"),
        Setting("oracle", Oracle, kept(model, 0.1), correction="exact"),
    ]
    outcomes = Lab(model, views_of(model), windows).measure(settings).outcomes
    left_out, low, exact = (outcome.kl_nats for outcome in outcomes)
    assert abs(exact) < 1e-5 < low < 0.3 * left_out


def test_resident_units_cost_no_staging(open_dense, windows) -> None:
    model = open_dense(NAME)
    resident = torch.zeros(model.shape.layers, model.shape.ffn, dtype=torch.bool)
    resident[:, ::4] = True
    keep = kept(model, 0.25)
    settings = [
        Setting("oracle", Oracle, keep, resident=resident),
        Setting("oracle", Oracle, keep, resident=resident, use_resident=True),
    ]
    chosen, added = Lab(model, views_of(model), windows).measure(settings).outcomes
    unit_bytes = 3 * model.shape.hidden * 2
    assert added.staged_bytes_per_token == model.shape.layers * keep[0] * unit_bytes
    assert chosen.staged_bytes_per_token < added.staged_bytes_per_token
    assert added.computed_share == pytest.approx(0.5)
    assert added.kl_nats < chosen.kl_nats


def test_frequency_and_window_know_the_past_only(open_dense, windows) -> None:
    model = open_dense(NAME)
    counts = torch.arange(model.shape.ffn).expand(model.shape.layers, -1)
    hidden = model.embed(windows)
    layer = model.layer(1)
    activity = model.activity(layer, model.ffn_input(layer, hidden))
    views = LayerViews(layer, {})
    frequent = Frequency(counts).scores(views, hidden, activity)
    assert frequent.shape == activity.shape
    assert frequent[0, 0].argmax() == model.shape.ffn - 1
    before = Window(2, 0.5, torch.zeros_like(counts), 10).scores(views, hidden, activity)
    wanted = top(activity.abs() * layer.down_norm, 10).float()
    assert not before[:, 0].any()
    assert torch.equal(before[:, 1], wanted[:, 0])
    assert torch.equal(before[:, 5], wanted[:, 4] + 0.5 * wanted[:, 3])


def test_top_is_so_many_of_each_row() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, -2.0]])
    assert top(scores, 2).tolist() == [[True, False, True], [True, True, False]]
    assert not top(scores, 0).any()
    assert top(scores, 9).all()


@pytest.mark.parametrize("count", [1, 7, 33, 100, 129, 130])
def test_top_is_what_a_stable_sort_says(count: int) -> None:
    dice = torch.Generator().manual_seed(count)
    scores = torch.randn(3, 40, 130, generator=dice)
    scores[0] = scores[0].mul(2).round()  # many equals
    scores[1, :, ::3] = -torch.inf
    scores[2].mul_(1e-42)  # too small for a normal float32
    expected = top_by_sorting(scores, count)
    assert (expected.sum(-1) == count).all()
    assert torch.equal(top(scores, count), expected)
    other = torch.rand(scores.shape, generator=dice) < 0.5
    assert count_top(other, scores, count) == int((other & expected).sum())


def test_constants_spread_over_rows_are_chosen_from() -> None:
    scores = torch.tensor([2.0, 5.0, 3.0]).expand(4, 2, 3)
    assert top(scores, 1).tolist() == [[[False, True, False]] * 2] * 4


# ---- calibration -----------------------------------------------------------------------------


def test_a_walk_says_what_each_layer_did(lab, open_dense, windows) -> None:
    model = open_dense(NAME)
    statistics = list(walk(model, windows, (0, 1)))
    dense = lab.zoo.dense(NAME)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, arguments, number=number: seen.update({number: arguments[0]})
        )
        for number, layer in enumerate(dense.model.layers)
    ]
    with torch.inference_mode():
        dense(windows)
    for hook in hooks:
        hook.remove()
    for number, found in enumerate(statistics):
        x = seen[number].flatten(0, 1)
        np.testing.assert_allclose(found.moments.ffn, (x.t() @ x).numpy(), rtol=2e-3, atol=2e-3)
        activity = model.activity(found.layer, x)
        scores = activity.abs() * found.layer.down_norm
        third = round(model.shape.ffn / 3)
        assert found.counts.sum() == WINDOWS * TOKENS * third
        assert np.abs(found.counts - top(scores, third).sum(0).numpy()).sum() <= 2
        lost = scores.sort(dim=1).values[:, :-third].pow(2).sum(1).mean()
        assert found.dropped[third] == pytest.approx(float(lost), rel=1e-3)
        assert found.dropped[-1] == 0
        assert (np.diff(found.dropped) <= 0).all()
        assert set(found.seen) == {0, 1}
        carried = found.seen[1] + found.seen[1] @ carrying_map(found.seen[1], found.attended)
        assert (carried - found.attended).norm() < (found.seen[1] - found.attended).norm()


def test_rows_rounded_with_moments_are_rows_that_programs_take(open_dense, windows) -> None:
    model = open_dense(NAME)
    (first, *_) = walk(model, windows)
    rows = round_layer(first.layer, 3, 32, first.moments)
    assert isinstance(rows.ffn.down, LowBitRows)
    assert rows.ffn.down.packed.shape == (model.shape.ffn, model.shape.hidden * 3 // 8)
    low = values_of(first.layer, rows, 3)
    x = torch.randn(50, model.shape.hidden, generator=torch.Generator().manual_seed(1))
    exact, found = model.activity(first.layer, x), model.activity(low, x)
    assert (found - exact).norm() < 0.4 * exact.norm()


def test_a_group_divides_every_row() -> None:
    assert group_of(576, 1536) == 64
    assert group_of(96, 64) == 32
    with pytest.raises(ValueError, match="no group"):
        group_of(100)


@pytest.mark.parametrize("name", ["tied", "untied", "scaled"])
def test_a_packed_model_reads_as_the_checkpoint_it_came_from(lab, name: str) -> None:
    _, packed = lab.packed(name)
    found = PackedCheckpoint(lab.drive, packed)
    with SafetensorsFolder(lab.zoo.folder(name)) as expected:
        assert set(found.names()) == set(expected.names())
        assert found.dtype == expected.dtype
        for tensor in expected.names():
            rows = expected.shape(tensor)[0]
            assert found.shape(tensor) == expected.shape(tensor)
            assert torch.equal(
                found.read_rows(tensor, 0, rows), expected.read_rows(tensor, 0, rows)
            ), tensor
            assert torch.equal(
                found.read_rows(tensor, 3, rows - 2), expected.read_rows(tensor, 3, rows - 2)
            ), tensor
    with pytest.raises(MissingTensor, match="no tensor lm_tail"):
        found.shape("lm_tail")
