"""`csd bench predictors` on a tiny model: settings as they are written, the rows, the plot."""

import sys
from pathlib import Path

import pytest
import torch

from host_client.calibrate.choosers import AT_FFN
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.plot import write_plot
from host_client.calibrate.sweep import DEFAULT_SETTINGS, Asked, hottest, parse, prepare, sweep
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime.head_groups import kept_by_layer, kept_groups

NAME = "tied"


def test_settings_read_as_they_are_written() -> None:
    assert parse("oracle:0.5") == Asked("oracle", AT_FFN, 0.5, corrected=False)
    assert parse("shadow@1:0.1+correct") == Asked("shadow", 1, 0.1, corrected=True)
    assert [parse(f"{name}:1").lookahead for name in ("rollout", "mlp", "lowrank")] == [1, 1, 1]
    assert [parse(f"{name}:1").lookahead for name in ("svd", "farsight")] == [AT_FFN, AT_FFN]
    assert parse("rollout@4:0.33").name == "rollout@4 0.33"
    fewer = parse("rollout@2:0.5+correct+heads=0.67")
    assert fewer == Asked("rollout", 2, 0.5, corrected=True, heads=0.67)
    assert fewer.name == "rollout@2 0.5+correct+heads=0.67"
    assert parse("oracle:1+heads=0.67").heads == 0.67
    assert len({parse(text) for text in DEFAULT_SETTINGS}) == len(DEFAULT_SETTINGS)


@pytest.mark.parametrize(
    "text",
    [
        *("", "oracle", "oracle@1:0.5", "psychic:0.5", "shadow:0", "shadow:1.1", "shadow@x:0.5"),
        *("shadow:0.5+", "shadow:0.5+corrects", "rollout@1:nan", "frequency@2:0.5"),
    ],
)
def test_what_is_no_setting_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no setting. Write .* like rollout@1"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["shadow@1:0.5+heads=0.67", "window:0.5+heads=0.5", "rollout@0:1+heads=0.5"]
)
def test_heads_that_nobody_chooses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="heads are chosen by oracle, rollout, frequency"):
        parse(text)


def test_a_share_of_heads_is_whole_groups() -> None:
    assert [kept_groups(share, 3) for share in (0.01, 0.34, 0.5, 0.67, 0.99)] == [1, 1, 2, 2, 3]
    assert kept_by_layer(0.5, 4, 5, 2) == [4, 4, 2, 2, 2]
    assert kept_by_layer(0.5, 4, 2, 0) == [4, 2]
    assert kept_by_layer(0.5, 4, 2, 9) == [4, 4]


def test_the_hottest_units_are_counted_over_all_layers() -> None:
    shares = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.3]])
    assert hottest(shares, 0.5).tolist() == [[True, False, True], [False, True, False]]
    assert not hottest(shares, 0.0).any()


def test_programs_are_built_for_the_settings_that_need_them(lab, tokens_of) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    seen = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(8)])
    asked = [parse(text) for text in ("svd:0.5", "lowrank:0.5", "lowrank@2:0.5", "mlp:0.5")]
    prepared = prepare(model, seen, 4, False, 0.0, lambda done, total: None, asked)
    assert set(prepared.programs) == {(row.program, row.lookahead) for row in asked}
    report = sweep(prepared, seen[:2], asked, lambda done, total: None)
    assert [outcome.recall > 0.5 for outcome in report.outcomes] == [True] * 4  # half by chance


def test_a_sweep_gives_a_row_a_setting_and_a_plot(
    lab, tokens_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    seen = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(8)])
    prepared = prepare(model, seen, 3, True, 0.25, lambda done, total: None)
    asked = [parse(text) for text in DEFAULT_SETTINGS]
    told: list[tuple[int, int]] = []
    report = sweep(prepared, seen[:2], asked, lambda *step: told.append(step))
    assert [outcome.name for outcome in report.outcomes] == [row.name for row in asked]
    assert told[-1] == (5, 5)
    by_name = {outcome.name: outcome for outcome in report.outcomes}
    assert by_name["rollout@1 0.1+correct"].kl_nats < by_name["shadow@1 0.5"].kl_nats
    for row in report.outcomes:
        assert 0 < row.staged_bytes_per_token < row.computed_share * report.dense_bytes_per_token
        assert 0 < row.recall <= 1
        assert len(row.layers) == model.shape.layers
    write_plot(report, NAME, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'flash-csd"):
        write_plot(report, NAME, tmp_path / "none.png")
