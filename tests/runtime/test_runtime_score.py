"""`csd predictor score`: what the drive's programs find; the lab's choosers find the same."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from host_client.calibrate.builders import WINDOW_DECAY, WINDOW_TOKENS, Recipe
from host_client.calibrate.choosers import (
    Chooser,
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
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.calibrate.program_choosers import chooser_of
from host_client.calibrate.read_program import read_program
from host_client.calibrate.score import find_program, loaded_for_now, score_program
from host_client.calibrate.selection import top
from host_client.driver.commands import Origin, Told
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime.refusals import NoPredictor, RequestRefused

NAME, LAYERS, UNITS, TOKENS = "tied", 4, 160, 16
THIRD = 53 / 160  # of the units, as the lab counts the top third
BUILT = (Kind.SVD, Kind.LOWRANK, Kind.MLP, Kind.FARSIGHT)
AMPLE = 1 << 30


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def model(lab) -> DenseModel:
    return DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))


@pytest.fixture
def text(lab, tokens_of) -> torch.Tensor:
    return torch.cat([tokens_of(lab, NAME, 32, seed=seed) for seed in range(10)])


@pytest.fixture
def windows(lab, tokens_of) -> torch.Tensor:
    """Other text than that."""
    return torch.cat([tokens_of(lab, NAME, TOKENS, seed=seed) for seed in (70, 71)])


def built(lab: Any, kind: Kind, text: torch.Tensor, lookahead: int = 1) -> bytes:
    _, packed = lab.packed(NAME)
    windows = text if kind in (*BUILT, Kind.WINDOW) else None
    recipe = Recipe(rank=32, lookahead=lookahead, size=0.3, epochs=2, windows=windows)
    return build_predictor(lab.drive, packed, kind, silent, recipe)


def scored(lab: Any, kind: Kind, data: bytes, windows: torch.Tensor, lookahead: int = 1) -> Any:
    _, packed = lab.packed(NAME)
    load_predictor(lab.drive, packed, kind, data)
    entry = find_program(lab.drive, packed.name, kind)
    parts = list(windows.split(1))
    return score_program(lab.drive, packed, entry, parts, lookahead, THIRD, AMPLE, silent)


def views_of(model: DenseModel, number: int) -> LayerViews:
    layer, group = model.layer(number), group_of(model.shape.hidden)
    return LayerViews(layer, {"low": values_of(layer, round_layer(layer, 4, group), 4)})


def lab_recalls(model: DenseModel, chooser: Any, windows: torch.Tensor) -> list[float]:
    """By layer, of the top third, nothing being left out."""
    setting = Setting("", chooser, [UNITS] * LAYERS)
    report = Lab(model, lambda number: views_of(model, number), windows).measure([setting])
    return [layer.recall_third for layer in report.outcomes[0].layers]


@pytest.mark.parametrize("kind", BUILT)
def test_a_chooser_scores_as_the_program_of_the_same_file(
    lab, model, text, windows, kind: Kind
) -> None:
    """State by state: the units that a drive names are those that score highest in the lab."""
    id_, packed = lab.packed(NAME)
    data = built(lab, kind, text)
    number = load_predictor(lab.drive, packed, kind, data)
    chooser: Chooser = chooser_of(data, lookahead=1)()
    hidden = first = model.embed(windows)
    asked = first
    with torch.no_grad():
        for layer in range(LAYERS):
            views = views_of(model, layer)
            chooser.entered(views, hidden)
            attended = hidden + model.attention(views.dense, hidden)
            activity = model.activity(views.dense, model.ffn_input(views.dense, attended))
            scores = chooser.scores(views, attended, activity)
            expected = top(scores, math.ceil(THIRD * UNITS))
            states = first if kind is Kind.FARSIGHT else asked
            for window in range(len(windows)):
                for token in range(TOKENS):
                    state = states[window, token][None].numpy()
                    told = Told(Origin(0))
                    found = lab.drive.execute_program(
                        number, id_, layer, state, THIRD, told, token
                    ).result()
                    agreed = expected[window, token][found.astype(np.int64)].sum()
                    assert agreed >= found.size - 1, (layer, window, token)  # ties
            hidden = attended + model.summed(views.dense, activity)
            asked = attended


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("kind", [Kind.ORACLE, Kind.SHADOW, Kind.ROLLOUT, Kind.FARSIGHT, Kind.MLP])
def test_a_score_is_the_labs_own(lab, model, text, windows, kind: Kind, lookahead: int) -> None:
    data = built(lab, kind, text, lookahead)
    choosers: dict[Kind, Any] = {
        Kind.ORACLE: Oracle,
        Kind.SHADOW: lambda: Shadow(model, "low", lookahead),
        Kind.ROLLOUT: lambda: Rollout(model, "low", lookahead),
    }
    chooser = choosers[kind] if kind in choosers else chooser_of(data, lookahead)
    report = scored(lab, kind, data, windows, lookahead)
    expected = lab_recalls(model, chooser, windows)
    assert [layer.recall for layer in report.layers] == pytest.approx(expected, abs=4e-3)
    assert [layer.asked for layer in report.layers] == [windows.numel()] * LAYERS
    assert report.precision == pytest.approx(report.recall, abs=4e-3)  # as many as are wanted
    assert (report.recall == 1) == (kind is Kind.ORACLE)


def test_a_window_is_told_of_each_token_and_a_frequency_of_none(lab, model, text, windows) -> None:
    data = built(lab, Kind.WINDOW, text)
    tensors = read_program(data).tensors
    shares = torch.stack([tensors[f"counts.{layer}"] for layer in range(LAYERS)])
    one = windows[:1]  # a second one would begin with what the first left behind
    report = scored(lab, Kind.WINDOW, data, one)
    expected = lab_recalls(model, lambda: Window(WINDOW_TOKENS, WINDOW_DECAY, shares, 53), one)
    assert [layer.recall for layer in report.layers] == pytest.approx(expected, abs=0.02)
    counts = encode_frequency(NAME, dict(enumerate(shares.numpy())))
    report = scored(lab, Kind.FREQUENCY, counts, windows)
    expected = lab_recalls(model, lambda: Frequency(shares), windows)
    assert [layer.recall for layer in report.layers] == pytest.approx(expected, abs=4e-3)


def test_more_kept_is_more_found_and_less_to_the_point(lab, text, windows) -> None:
    data = built(lab, Kind.SHADOW, text)
    _, packed = lab.packed(NAME)
    told: list[tuple[int, int]] = []
    with loaded_for_now(lab.drive, data) as number:
        entry = find_program(lab.drive, NAME, program=number)
        few, many = (
            score_program(
                lab.drive, packed, entry, [windows[:1]], 1, kept, AMPLE,
                lambda *step: told.append(step),
            )
            for kept in (0.2, 0.6)
        )  # fmt: skip
    assert lab.drive.programs() == []
    assert few.recall < many.recall
    assert few.precision > many.precision
    assert told[TOKENS - 1] == (TOKENS, TOKENS)


def test_what_cannot_be_scored_is_refused(lab, windows) -> None:
    _, packed = lab.packed(NAME)
    with pytest.raises(NoPredictor, match="a shadow for tied is not active"):
        find_program(lab.drive, NAME, Kind.SHADOW)
    heads = {layer: np.ones(2) for layer in range(LAYERS)}
    with loaded_for_now(lab.drive, encode_frequency(NAME, heads, role=Role.HEADS)) as number:
        entry = find_program(lab.drive, NAME, program=number)
        with pytest.raises(RequestRefused, match="speaks for heads"):
            score_program(lab.drive, packed, entry, [windows], 1, THIRD, AMPLE, silent)
        with pytest.raises(NoPredictor, match=r"its programs there: \d+ \(frequency of heads\)"):
            find_program(lab.drive, NAME, Kind.FREQUENCY)
