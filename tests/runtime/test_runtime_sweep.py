"""`csd bench quality` on a tiny model: settings as they are written, the rows, table and plot."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from host_client.calibrate.choosers import AT_FFN
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.outcome import QualityReport
from host_client.calibrate.plot import write_plot
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import build_predictor
from host_client.calibrate.provenance import provenance_of
from host_client.calibrate.sweep import (
    DEFAULT_SETTINGS,
    Asked,
    Rows,
    hottest,
    parse,
    prepare,
    sweep,
)
from host_client.calibrate.text import Split, text_name
from host_client.calibrate.through_drive import measure_through_drive
from host_client.cli.quality_tables import quality_markdown, quality_table
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime.head_groups import kept_by_layer, kept_groups

NAME = "tied"


def test_settings_read_as_they_are_written() -> None:
    assert parse("oracle:0.5") == Asked("oracle", AT_FFN, 0.5)
    assert parse("shadow@1:0.1+correct") == Asked("shadow", 1, 0.1, corrected=True, rows=Rows())
    assert [parse(f"{name}:1").lookahead for name in ("rollout", "mlp", "lowrank")] == [1, 1, 1]
    assert [parse(f"{name}:1").lookahead for name in ("svd", "farsight")] == [AT_FFN, AT_FFN]
    assert parse("rollout@4:0.33").name == "rollout@4:0.33"
    fewer = parse("rollout@2:0.5+correct+heads=0.67")
    assert fewer == Asked("rollout", 2, 0.5, corrected=True, heads=0.67, rows=Rows())
    assert parse("oracle:1+heads=0.67").heads == 0.67
    three = parse("rollout@1:0.1+correct+bits=3+fit")
    assert three == Asked("rollout", 1, 0.1, corrected=True, rows=Rows(3, fitted=True))
    assert three.curve == "rollout@1, corrected, 3 bits, fitted"
    assert parse("oracle:0.1+correct+fit").rows == Rows(fitted=True)
    dealt = parse("rollout@2:0.5+correct+heads=0.67+allotted+fit")
    assert dealt.allotted
    assert (dealt.corrected, dealt.heads, dealt.rows) == (True, 0.67, Rows(fitted=True))
    assert dealt.name == "rollout@2:0.5+correct+heads=0.67+allotted+fit"
    assert dealt.curve == "rollout@2, corrected, fewer heads, allotted, fitted"
    assert parse("oracle:0.5+allotted") == Asked("oracle", AT_FFN, 0.5, allotted=True)
    assert len({parse(text) for text in DEFAULT_SETTINGS}) == len(DEFAULT_SETTINGS)


@pytest.mark.parametrize("text", [*DEFAULT_SETTINGS, "rollout@2:0.5+correct+heads=0.67+bits=8+fit"])
def test_a_setting_is_named_as_it_is_asked_for(text: str) -> None:
    assert parse(text).name == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "oracle", "oracle@1:0.5", "psychic:0.5", "shadow:0", "shadow:1.1", "shadow@x:0.5"),
        *("shadow:0.5+", "shadow:0.5+corrects", "rollout@1:nan", "frequency@2:0.5"),
        *("oracle:0.5+allotted+correct", "oracle:0.5+uniform", "oracle:1+allotted"),
        *(
            "shadow:0.5+bits=5",
            "shadow:0.5+fit+bits=3",
            "rollout@1:exact",
            "shadow@:0.5",
            "shadow:",
        ),
    ],
)
def test_what_is_no_setting_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no setting. Write .* like rollout@1"):
        parse(text)


@pytest.mark.parametrize("text", ["oracle:0.5+bits=3", "frequency:0.5+fit"])
def test_rows_that_nobody_has_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="has no low-bit rows to round"):
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


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_programs_are_built_for_the_settings_that_need_them(lab, tokens_of) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    seen = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(8)])
    asked = [parse(text) for text in ("svd:0.5", "lowrank:0.5", "lowrank@2:0.5", "mlp:0.5")]
    prepared = prepare(model, seen, asked, 0.0, silent)
    assert set(prepared.programs) == {(row.program, row.lookahead) for row in asked}
    report = sweep(prepared, seen[:2], asked, silent)
    assert [outcome.recall > 0.5 for outcome in report.outcomes] == [True] * 4  # half by chance


def test_allotted_units_are_as_many_in_all(lab, tokens_of) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    seen = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(4)])
    asked = [parse(text) for text in ("oracle:0.4", "oracle:0.4+allotted")]
    prepared = prepare(model, seen, asked, 0.0, silent)
    even, dealt = sweep(prepared, seen[:2], asked, silent).outcomes
    assert dealt.computed_share == even.computed_share
    assert len({row.kept for row in even.layers}) == 1 < len({row.kept for row in dealt.layers})
    assert dealt.kl_nats < even.kl_nats  # on the text that it was measured on


def test_a_sweep_gives_a_row_a_setting_and_a_plot(
    lab, tokens_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DenseModel(SafetensorsFolder(lab.zoo.folder(NAME)))
    seen = torch.cat([tokens_of(lab, NAME, 16, seed=seed) for seed in range(8)])
    asked = [parse(text) for text in DEFAULT_SETTINGS]
    prepared = prepare(model, seen, asked, 0.25, silent)
    assert set(prepared.views[0].low) == {"4 bits", "4 bits, fitted", "3 bits", "3 bits, fitted"}
    told: list[tuple[int, int]] = []
    report = sweep(prepared, seen[:2], asked, lambda *step: told.append(step))
    assert [outcome.name for outcome in report.outcomes] == list(DEFAULT_SETTINGS)
    assert told[-1] == (5, 5)
    by_name = {outcome.name: outcome for outcome in report.outcomes}
    assert by_name["rollout@1:0.1+correct"].kl_nats < by_name["shadow@1:0.5"].kl_nats
    three, four = by_name["rollout@1:0.1+correct+bits=3"], by_name["rollout@1:0.1+correct"]
    assert four.kl_nats < three.kl_nats
    assert three.correction == "3 bits"
    for row in report.outcomes:
        assert 0 < row.staged_bytes_per_token < row.computed_share * report.dense_bytes_per_token
        assert 0 < row.recall <= 1
        assert len(row.layers) == model.shape.layers
    check_told(report, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'flash-csd"):
        write_plot(report, NAME, tmp_path / "none.png")


def check_told(report: QualityReport, folder: Path) -> None:
    """A table, a Markdown table and a picture, of every setting."""
    assert quality_table(NAME, report).row_count == len(report.outcomes)
    heading, _, columns, _, *rows = quality_markdown(report).splitlines()
    assert f"{report.scored:,} positions" in heading
    assert [row.split(" | ")[0] for row in rows] == [f"| {row.name}" for row in report.outcomes]
    assert {row.count("|") for row in rows} == {columns.count("|")}
    write_plot(report, NAME, folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def test_what_the_lab_says_is_what_a_drive_does(make_lab, tokens_of, tmp_path: Path) -> None:
    """The same settings by the same names, rows rounded once for the lab and once for the drive."""
    lab = make_lab()
    _, packed = lab.packed(NAME)
    for kind in ("rollout", "shadow"):
        data = build_predictor(lab.drive, packed, kind, silent)
        load_predictor(lab.drive, packed, kind, data)
    windows = torch.cat([tokens_of(lab, NAME, 24, seed=seed) for seed in range(2)])
    asked = [parse(text) for text in ("shadow@0:0.5", "rollout@1:0.2+correct")]
    prepared = prepare(
        DenseModel(SafetensorsFolder(lab.zoo.folder(NAME))), windows, asked, 0.0, silent
    )
    expected = sweep(prepared, windows, asked, silent)
    budget = lab.budget(NAME, 0.0)
    split = [window[None] for window in windows]
    found = measure_through_drive(
        lab.drive, NAME, asked, split, budget, lambda name: nullcontext(silent)
    )
    assert (found.tokens, found.scored) == (expected.tokens, expected.scored)
    assert found.dense_perplexity == pytest.approx(expected.dense_perplexity, rel=1e-4)
    for there, here in zip(found.outcomes, expected.outcomes, strict=True):
        assert (there.name, there.program) == (here.name, here.program)
        assert there.perplexity == pytest.approx(here.perplexity, rel=1e-3)
        assert there.kl_nats == pytest.approx(here.kl_nats, rel=0.05)
        assert there.agreement == pytest.approx(here.agreement, abs=0.05)
        assert there.computed_share == pytest.approx(here.computed_share, rel=0.01)
        assert there.recall == pytest.approx(here.recall, abs=0.1)  # of a token in four
        assert there.precision == pytest.approx(there.recall, abs=1e-6)
        assert [of.kept for of in there.layers] == [of.kept for of in here.layers]
        assert here.staged_bytes_per_token < there.staged_bytes_per_token
    check_told(found, tmp_path)
    assert lab.leases == 0


@pytest.mark.parametrize(
    "text, why",
    [
        ("rollout@1:0.1+correct+bits=3", "rows of the program"),
        ("shadow:0.5", "ahead"),
        ("svd:0.5", "ahead"),
    ],
)
def test_a_drive_is_not_asked_for_what_it_cannot_do(lab, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        measure_through_drive(lab.drive, NAME, [parse(text)], [], "45%", lambda name: nullcontext())


def test_figures_say_where_they_come_from() -> None:
    ids = torch.arange(12).view(3, 4)
    lab = provenance_of(ids, ids[:2], arithmetic="bfloat16", resident_share=0.25)
    assert (lab.measured, lab.calibration_tokens) == ("in the lab", 8)
    assert lab.calibration_text == text_name(Split.CALIBRATION) != lab.held_out_text
    assert lab.held_out_sha256 != provenance_of(ids + 1).held_out_sha256
    assert {"python", "torch", "flash-csd"} <= set(lab.versions)
    drive = provenance_of(ids, dram="45%")
    assert (drive.measured, drive.calibration_text) == ("through a drive", None)
    assert provenance_of(ids, ids, ["my.txt"]).calibration_text == "my.txt"
