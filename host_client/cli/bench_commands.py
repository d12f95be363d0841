"""`csd bench`: what a quality setting costs."""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.outcome import QualityReport
from host_client.calibrate.plot import write_plot
from host_client.calibrate.provenance import provenance_of
from host_client.calibrate.sweep import DEFAULT_SETTINGS, GRAMMAR, Asked, parse, prepare, sweep
from host_client.calibrate.text import (
    CALIBRATED_TOKENS,
    calibration_windows,
    held_out_windows,
)
from host_client.calibrate.through_drive import check_askable, measure_through_drive
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.cli.outputs import Markdown, Plot, To, check_outputs
from host_client.cli.quality_tables import quality_markdown, quality_table
from host_client.cli.tokenizers import load_tokenizer
from host_client.model.formats import open_checkpoint
from host_client.model.source import Source, resolve_source

_LAB_TOKENS, _DRIVE_TOKENS = 8192, 2048
_EXACT = "exact"
_DRIVE_SETTINGS = ("rollout@1:0.5", "rollout@1:0.1+correct")

app = typer.Typer(help="Measurements on real text.")


@app.callback()
def _group() -> None:
    """Measurements on real text."""


class Arithmetic(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is Arithmetic.BFLOAT16 else torch.float32


@app.command()
def quality(
    model: Model,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            metavar="SETTING",
            help=f"{GRAMMAR}, like rollout@1:0.33+correct; repeatable. Default: a whole sweep. "
            f"{_EXACT!r} is measured in any case; by itself it leaves the sweep out.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of held-out text. Default: {_LAB_TOKENS}; {_DRIVE_TOKENS} through a "
            "drive.",
            min=2,
        ),
    ] = None,
    calibration: Annotated[
        int, typer.Option(help="Tokens of calibration text.", min=2)
    ] = CALIBRATED_TOKENS,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on, repeatable; Python's own without.", exists=True),
    ] = None,
    resident: Annotated[
        float, typer.Option(help="Share of FFN units that the host holds.", min=0, max=1)
    ] = 0.0,
    arithmetic: Annotated[
        Arithmetic, typer.Option(help="Factors of matrix products; bfloat16 is faster.")
    ] = Arithmetic.BFLOAT16,
    through_drive: Annotated[
        bool,
        typer.Option(
            "--through-drive",
            help="Decode token by token through a drive that has the model and the programs.",
        ),
    ] = False,
    dram: Dram = "45%",
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    plot: Plot = None,
    to: To = None,
    markdown: Markdown = False,
    as_json: Json = False,
) -> None:
    """What leaving FFN units out costs: perplexity, greedy tokens, KL, recall, staged bytes.

    On held-out text, layer by layer in this process, or with --through-drive as it is used.
    """
    check_outputs(plot, to)
    source = resolve_source(model)
    asked = _asked(settings or (_DRIVE_SETTINGS if through_drive else DEFAULT_SETTINGS))
    tokens = tokens or (_DRIVE_TOKENS if through_drive else _LAB_TOKENS)
    held_out = _windows(partial(held_out_windows, tokens=tokens), source)
    if through_drive:
        report = _through_drive(source, asked, held_out, dram, drive, time)
        provenance = provenance_of(held_out, dram=dram)
    else:
        files = text or []
        seen = _windows(partial(calibration_windows, tokens=calibration, files=files), source)
        report = _swept(source, asked, held_out, seen, resident, arithmetic.dtype)
        names = [file.name for file in files]
        provenance = provenance_of(held_out, seen, names, arithmetic.value, resident)
    told = {"model": source.name, "provenance": provenance.model_dump(), **report.model_dump()}
    if to is not None:
        to.write_text(json.dumps(told, indent=1) + "\n")
    if plot is not None:
        write_plot(report, source.name, plot)
    _print(source.name, report, told, markdown, as_json)


def _print(
    model: str, report: QualityReport, told: dict[str, Any], markdown: bool, as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps(told))
    elif markdown:
        typer.echo(quality_markdown(report))
    else:
        out.print(quality_table(model, report))


def _asked(settings: Sequence[str]) -> list[Asked]:
    try:
        return [parse(setting) for setting in settings if setting != _EXACT]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--setting") from None


def _windows(cut: Callable[[Any], torch.Tensor], source: Source) -> torch.Tensor:
    """What `cut` makes with the model's tokenizer, if there is text enough."""
    try:
        return cut(load_tokenizer(source))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens, --calibration") from None


def _swept(
    source: Source,
    asked: list[Asked],
    held_out: torch.Tensor,
    seen: torch.Tensor,
    resident: float,
    dtype: torch.dtype,
) -> QualityReport:
    with open_checkpoint(source) as checkpoint:
        dense = DenseModel(checkpoint, dtype, as_packed=True)
        with progress_count("calibrating, layers") as update:
            prepared = prepare(dense, seen, asked, resident, update)
        with progress_count(f"{len(asked)} settings, layers") as update:
            return sweep(prepared, held_out, asked, update)


def _through_drive(
    source: Source,
    asked: list[Asked],
    held_out: torch.Tensor,
    dram: str,
    drive: str | None,
    time: TimeMode,
) -> QualityReport:
    try:
        check_askable(asked)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--setting") from None
    windows = [window[None] for window in held_out]
    with open_drive(drive, time) as opened:
        return measure_through_drive(opened, source.name, asked, windows, dram, progress_count)
