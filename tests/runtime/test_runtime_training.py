"""Training by gradient: what it learns, and that it never ends worse than it began."""

import numpy as np
import pytest
import torch

from csd_protocol.program_file import ProgramKind, TwoLayers
from host_client.calibrate import two_layers
from host_client.calibrate.farsight import Farsight
from host_client.calibrate.farsight_fit import SightText, fit_farsight, width_for
from host_client.calibrate.labels import Labels, SoftLabels
from host_client.calibrate.read_program import read_program
from host_client.calibrate.training import found_share
from host_client.calibrate.two_layers import Rows, fit_two_layers

HIDDEN, UNITS, WANTED = 16, 24, 8
EPS = 1e-5


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def best_of(scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, scores.topk(WANTED, dim=-1).indices, True
    )


@pytest.fixture
def dice() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def scores_of(layer: TwoLayers, inputs: torch.Tensor, relu: bool) -> torch.Tensor:
    inner = inputs @ torch.from_numpy(layer.inner).t() + torch.from_numpy(layer.inner_bias)
    between = inner.relu() if relu else inner
    return between @ torch.from_numpy(layer.outer).t() + torch.from_numpy(layer.outer_bias)


def recall_of(layer: TwoLayers, inputs: torch.Tensor, wanted: Labels, relu: bool) -> float:
    return found_share(scores_of(layer, inputs, relu), wanted.rows(slice(0, None)), WANTED)


@pytest.mark.parametrize("kind", [ProgramKind.LOWRANK, ProgramKind.MLP])
def test_training_finds_more_than_the_closed_form(dice, kind: ProgramKind) -> None:
    """Units wanted by where the input lies, which a straight line does not say."""
    inputs = torch.randn(800, HIDDEN, generator=dice)
    middle = inputs @ torch.randn(HIDDEN, 3, generator=dice)
    far = torch.cat([middle, middle.pow(2)], 1) @ torch.randn(6, UNITS, generator=dice)
    wanted = Labels.of(best_of(far))
    norm = torch.ones(HIDDEN)
    rows = Rows(inputs, wanted)
    begun, trained = (fit_two_layers(kind, rows, norm, 6, epochs) for epochs in (0, 150))
    relu = kind is ProgramKind.MLP
    before, after = (recall_of(layer, inputs, wanted, relu) for layer in (begun, trained))
    assert after > before + (0.005 if relu else 0)
    assert trained.inner.shape == (6, HIDDEN)


def test_training_never_ends_worse_than_it_began(dice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_layers, "_RATE", 1e3)
    inputs = torch.randn(200, HIDDEN, generator=dice)
    wanted = Labels.of(best_of(inputs @ torch.randn(HIDDEN, UNITS, generator=dice)))
    rows, norm = Rows(inputs, wanted), torch.ones(HIDDEN)
    begun, trained = (fit_two_layers(ProgramKind.LOWRANK, rows, norm, 8, n) for n in (0, 3))
    assert np.array_equal(begun.outer, trained.outer)
    assert np.array_equal(begun.inner, trained.inner)


def words(dice: torch.Generator, windows: int, tokens: int) -> tuple[torch.Tensor, SightText]:
    """A text of six words; what is wanted of the two layers follows from this and the last word."""
    ids = torch.randint(0, 6, (windows, tokens), generator=dice)
    embedding = torch.randn(6, HIDDEN, generator=dice)
    of_word = torch.randn(2, 6, UNITS, generator=dice)
    before = torch.cat([ids[:, :1], ids[:, :-1]], 1)
    wanted = [Labels.of(best_of(of_word[0][ids])), Labels.of(best_of(of_word[1][before]))]
    return ids, SightText(embedding[ids], wanted)


def test_a_farsight_learns_what_only_attention_can_know(dice) -> None:
    _, text = words(dice, 64, 8)
    begun, trained = (fit_farsight(text, 16, EPS, epochs, silent) for epochs in (0, 12))
    shares = []
    for sight in (begun, trained):
        features = sight.features(text.hidden).flatten(0, 1)
        for layer, wanted in enumerate(text.wanted):
            found = found_share(sight.scores(layer, features), wanted.rows(slice(0, None)), WANTED)
            shares.append(found)
    this_begun, last_begun, this_trained, last_trained = shares
    assert this_begun > 0.95
    assert this_trained > 0.95
    assert last_begun < 0.7
    assert last_trained > last_begun + 0.15


def test_a_farsight_is_written_as_it_was_trained(dice) -> None:
    _, text = words(dice, 8, 6)
    told: list[tuple[int, int]] = []
    sight = fit_farsight(text, 16, EPS, 2, lambda *step: told.append(step))
    assert told[-1] == (8, 8)
    again = Farsight.of(read_program(sight.encode("m")))
    assert (again.shape, again.layers, again.blocks) == (sight.shape, (0, 1), 2)
    assert again.shape.context == 6
    expected = sight.scores(1, sight.features(text.hidden))
    assert torch.allclose(
        again.scores(1, again.features(text.hidden)), expected, rtol=0.02, atol=0.02
    )


def test_the_same_text_makes_the_same_farsight(dice) -> None:
    _, text = words(dice, 8, 6)
    first, second = (fit_farsight(text, 16, EPS, 1, silent).weights for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_farsight_is_as_wide_as_its_share_allows() -> None:
    assert width_for(139_500_000, 0.04, 576, 30 * 1536) == 112
    with pytest.raises(ValueError, match="the narrowest for this model has 752,576"):
        width_for(7_000_000, 0.1, 576, 30 * 1536)


def test_a_farsight_that_nobody_sized_is_never_too_narrow() -> None:
    assert width_for(139_500_000, None, 576, 30 * 1536) == 112
    assert width_for(7_000_000, None, 576, 30 * 1536) == 16


def test_one_window_is_no_text_to_judge_by(dice) -> None:
    _, text = words(dice, 1, 6)
    with pytest.raises(ValueError, match="give it more"):
        fit_farsight(text, 16, EPS, 1, silent)


def test_labels_are_what_they_were_made_of(dice) -> None:
    mask = best_of(torch.randn(3, 5, UNITS, generator=dice))
    labels = Labels.of(mask)
    assert (len(labels), labels.outputs, labels.wanted) == (15, UNITS, WANTED)
    assert torch.equal(labels.rows(slice(0, None)).bool(), mask.flatten(0, 1))
    assert torch.equal(labels.rows(torch.tensor([7, 2])).bool(), mask.flatten(0, 1)[[7, 2]])
    assert np.allclose(labels.shares(), mask.flatten(0, 1).float().mean(0))


def test_soft_labels_are_shares_that_rank_as_sizes_do(dice) -> None:
    sizes = torch.rand(3, 5, 4, generator=dice)
    sizes[0, 0] = 0  # a row that adds nothing
    labels = SoftLabels.of(sizes)
    rows = labels.rows(slice(1, None))
    assert labels.wanted == 2
    assert torch.allclose(rows.sum(1), torch.ones(14))
    assert torch.equal(rows.argsort(), sizes.flatten(0, 1)[1:].argsort())
    assert not labels.rows(torch.tensor([0])).any()


@pytest.mark.parametrize("kind", [ProgramKind.LOWRANK, ProgramKind.MLP])
def test_a_program_of_few_outputs_ranks_them_as_their_sizes(dice, kind: ProgramKind) -> None:
    inputs = torch.randn(400, HIDDEN, generator=dice)
    sizes = (inputs @ torch.randn(HIDDEN, 3, generator=dice) / HIDDEN**0.5).exp()
    layer = fit_two_layers(kind, Rows(inputs, SoftLabels.of(sizes)), torch.ones(HIDDEN), 8, 4)
    scores = scores_of(layer, inputs, kind is ProgramKind.MLP)
    agreed = scores.argmax(1) == sizes.argmax(1)
    assert agreed.float().mean() > 0.85  # a third by chance
