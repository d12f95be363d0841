"""`csd bench`: what a quality setting costs."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from csd_protocol.units import format_size
from host_client.calibrate.comparison import QualityRow, compare_qualities
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.lab import LabReport
from host_client.calibrate.plot import check_plot, write_plot
from host_client.calibrate.sweep import DEFAULT_SETTINGS, Asked, parse, prepare, sweep
from host_client.calibrate.text import (
    CALIBRATED_TOKENS,
    Split,
    calibration_windows,
    default_text,
    held_out_windows,
    token_windows,
)
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.model_commands import load_tokenizer
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.model.formats import open_checkpoint
from host_client.model.source import Source, resolve_source
from host_client.runtime.causal_lm import LOOKAHEAD_DEFAULT

app = typer.Typer(help="Measurements on real text.")


@app.callback()
def _group() -> None:
    """Measurements on real text."""


@app.command()
def quality(
    model: Model,
    settings: Annotated[
        list[str] | None, typer.Option("--quality", help="Kept fractions to measure; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text.", min=2)] = 2048,
    window: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 256,
    lookahead: Annotated[int, typer.Option(min=0, max=8)] = LOOKAHEAD_DEFAULT,
    dram: Dram = "45%",
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Perplexity of kept fractions beside the dense model's, on held-out text."""
    source = resolve_source(model)
    text = default_text(Split.HELD_OUT)
    windows = token_windows(load_tokenizer(source), text, tokens, window)
    with open_drive(drive, time) as opened:
        rows = []
        for setting in ["exact", *(settings or ["0.5"])]:
            with progress_count(f"quality {setting}, tokens") as update:
                row = compare_qualities(
                    opened, source.name, setting, windows, dram, lookahead, update
                )
            rows.append(row)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": source.name,
                    "tokens": tokens,
                    "window": window,
                    "rows": [row.model_dump() for row in rows],
                }
            )
        )
        return
    out.print(_table(source.name, rows))


class Arithmetic(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is Arithmetic.BFLOAT16 else torch.float32


@app.command()
def predictors(
    model: Model,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="PROGRAM[@LOOKAHEAD]:KEPT[+correct], like rollout@1:0.33+correct; repeatable.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text.", min=2)] = 8192,
    calibration: Annotated[
        int, typer.Option(help="Tokens of calibration text.", min=2)
    ] = CALIBRATED_TOKENS,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on, repeatable; Python's own without.", exists=True),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of the low-bit rows: 2, 3, 4 or 8.")] = 4,
    fit: Annotated[
        bool, typer.Option("--fit", help="Round the rows with a look at calibration text.")
    ] = False,
    resident: Annotated[
        float, typer.Option(help="Share of FFN units that the host holds.", min=0, max=1)
    ] = 0.0,
    arithmetic: Annotated[
        Arithmetic, typer.Option(help="Factors of matrix products; bfloat16 is faster.")
    ] = Arithmetic.BFLOAT16,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    as_json: Json = False,
) -> None:
    """What each predictor and kept share does to the output, on held-out text, without a drive."""
    if plot is not None:
        _check_plot()
    source = resolve_source(model)
    asked = _asked(settings or list(DEFAULT_SETTINGS))
    report = _swept(
        source, asked, tokens, calibration, text or [], bits, fit, resident, arithmetic.dtype
    )
    if plot is not None:
        write_plot(report, source.name, plot)
    if as_json:
        typer.echo(json.dumps({"model": source.name, "bits": bits, **report.model_dump()}))
        return
    out.print(_lab_table(source.name, report))


def _check_plot() -> None:
    try:
        check_plot()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--plot") from None


def _asked(settings: list[str]) -> list[Asked]:
    try:
        return [parse(setting) for setting in settings]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--setting") from None


def _swept(
    source: Source,
    asked: list[Asked],
    tokens: int,
    calibration: int,
    text: list[Path],
    bits: int,
    fit: bool,
    resident: float,
    dtype: torch.dtype,
) -> LabReport:
    tokenizer = load_tokenizer(source)
    seen = calibration_windows(tokenizer, calibration, text)
    held_out = held_out_windows(tokenizer, tokens)
    with open_checkpoint(source) as checkpoint:
        dense = DenseModel(checkpoint, dtype)
        with progress_count("calibrating, layers") as update:
            prepared = prepare(dense, seen, bits, fit, resident, update, asked)
        with progress_count(f"{len(asked)} settings, layers") as update:
            return sweep(prepared, held_out, asked, update)


def _lab_table(model: str, report: LabReport) -> Table:
    table = Table(
        *("setting", "perplexity", "against dense", "same token", "KL, nats"),
        *("recall", "of top third", "staged a token"),
        title=f"{model}: {report.scored} positions, dense {report.dense_perplexity:.2f}",
        title_justify="left",
    )
    for row in report.outcomes:
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.against_dense:+.1%}",
            f"{row.agreement:.1%}",
            f"{row.kl_nats:.4f}",
            f"{row.recall:.3f}",
            f"{row.recall_third:.3f}",
            format_size(row.staged_bytes_per_token),
        )
    return table


def _table(model: str, rows: list[QualityRow]) -> Table:
    dense = rows[0].perplexity
    table = Table(
        "quality",
        "perplexity",
        "against dense",
        "staged a token",
        "recall",
        title=model,
        title_justify="left",
    )
    for row in rows:
        recall = "-" if row.recall is None else f"{row.recall:.2f}"
        table.add_row(
            row.quality,
            f"{row.perplexity:.2f}",
            f"{row.perplexity / dense - 1:+.1%}",
            format_size(row.staged_bytes_per_token),
            recall,
        )
    return table
