"""Programs of every kind, built from a packed model, on a drive; the lab says the same of them."""

from typing import Any

import numpy as np
import pytest
import torch

from host_client.calibrate.builders import Recipe
from host_client.calibrate.calibration import walk
from host_client.calibrate.choosers import unit_scores
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.low_bit_layers import group_of, round_layer, values_of
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor, recalibrate
from host_client.driver.commands import Origin, Told
from host_client.model.catalog import read_frequencies
from host_client.model.errors import UnsupportedModel
from host_client.model.safetensors_folder import SafetensorsFolder

NAME, LAYERS, NEURONS, HIDDEN = "tied", 4, 160, 64
KEPT = 0.3


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def text(lab, tokens_of) -> torch.Tensor:
    return torch.cat([tokens_of(lab, NAME, 32, seed=seed) for seed in range(10)])


def built(lab: Any, kind: Kind, recipe: Recipe) -> int:
    _, packed = lab.packed(NAME)
    data = build_predictor(lab.drive, packed, kind, silent, recipe)
    return int(load_predictor(lab.drive, packed, kind, data))


def choice(lab: Any, number: int, layer: int, state: torch.Tensor, told: Told) -> set[int]:
    model, _ = lab.packed(NAME)
    pending = lab.drive.execute_program(number, model, layer, state.numpy(), KEPT, told)
    return set(pending.result().tolist())


@pytest.mark.parametrize(
    "kind, least",
    [
        (Kind.SHADOW, 0.85),
        (Kind.ROLLOUT, 0.85),
        (Kind.SVD, 0.8),
        (Kind.LOWRANK, 0.35),
        (Kind.MLP, 0.35),
    ],
)
def test_what_is_built_finds_what_the_layer_wants(lab, text, kind: Kind, least: float) -> None:
    """At the true input; a choice at random would find KEPT of it."""
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    recipe = Recipe(bits=4, rank=HIDDEN, lookahead=0, windows=text)
    number = built(lab, kind, recipe)
    layer = model.layer(1)
    states = model.embed(text[:1, :20])[0]
    found = 0
    for position, state in enumerate(states):
        told = Told(origin=Origin(1, behind_attention=True)) if kind is Kind.ROLLOUT else Told()
        named = choice(lab, number, 1, state[None], told)
        best = unit_scores(model, layer, state[None])[0].topk(48).indices.tolist()
        found += len(named & set(best))
        assert len(named) == 48, position
    assert found > least * 48 * len(states)


def test_fitted_rows_are_the_labs_own(lab, text) -> None:
    """What the lab measures is what the drive runs, to the last level."""
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    number = built(lab, Kind.SHADOW, Recipe(bits=3, windows=None))
    layer = model.layer(2)
    low = values_of(layer, round_layer(layer, 3, group_of(HIDDEN)), 3)
    for state in model.embed(text[:1, :10])[0]:
        scores = unit_scores(model, low, state[None])[0].numpy()
        named = choice(lab, number, 2, state[None], Told())
        assert len(named & set(np.argsort(-scores)[:48].tolist())) >= 47  # a tie falls either way


@pytest.mark.parametrize("bits", [3, 4])
def test_a_fitted_shadow_corrects(lab, text, bits: int) -> None:
    """The drive's contribution of what was left out, against the layer's own."""
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    id_, _ = lab.packed(NAME)
    number = built(lab, Kind.SHADOW, Recipe(bits=bits, windows=text))
    layer = model.layer(1)
    x = model.ffn_input(layer, model.embed(text[:1, :1])[0])
    computed = np.arange(0, NEURONS, 3, dtype=np.uint32)
    found = lab.drive.correct(number, id_, 1, x.numpy(), computed).result()
    activity = model.activity(layer, x)
    activity[:, computed.astype(np.int64)] = 0
    expected = model.summed(layer, activity).numpy()
    assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)


def test_a_window_and_an_oracle_are_built(lab, text) -> None:
    number = built(lab, Kind.WINDOW, Recipe(windows=text))
    _, packed = lab.packed(NAME)
    entries = {entry["program"]: entry["kind"] for entry in lab.drive.programs()}
    assert entries[number] == "window"
    assert build_predictor(lab.drive, packed, Kind.ORACLE, silent, Recipe())


def test_scaled_positions_are_refused_for_a_rollout(lab) -> None:
    _, packed = lab.packed("scaled")
    with pytest.raises(UnsupportedModel, match="Build a shadow"):
        build_predictor(lab.drive, packed, Kind.ROLLOUT, silent, Recipe())


def test_counts_on_other_text_replace_the_earlier_ones(make_lab, tokens_of) -> None:
    lab = make_lab()
    _, packed = lab.packed(NAME)
    windows = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(4)])
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    for part in (windows[:2], windows):
        packed = recalibrate(lab.drive, packed, part, silent)
        assert packed.frequency_tokens == part.numel()
        expected = np.stack([found.counts for found in walk(model, part)])
        assert np.array_equal(read_frequencies(lab.drive, packed), expected)
