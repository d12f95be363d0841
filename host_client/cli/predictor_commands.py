"""`csd predictor`: build programs from a packed model, load them onto the drive, score them."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from csd_protocol.packed import PackedModel, Role
from csd_protocol.units import format_size
from host_client.calibrate.builders import Recipe
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.calibrate.score import ScoreReport, find_program, loaded_for_now, score_program
from host_client.calibrate.statistics import WANTED_SHARE
from host_client.calibrate.text import (
    CALIBRATED_TOKENS,
    Split,
    calibration_windows,
    default_text,
    token_windows,
)
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.cli.tokenizers import load_tokenizer
from host_client.driver import Drive
from host_client.model.catalog import open_model
from host_client.model.source import name_on_drive, resolve_source
from host_client.runtime.causal_lm import LOOKAHEAD_DEFAULT

app = typer.Typer(help="Predictors: build, load, list and score the programs on the drive.")

_SIGHT_TOKENS = 24576  # of text that a farsight is fitted to, where nothing else is asked for


class Scored(StrEnum):
    """What a built program may score."""

    FFN = Role.FFN.value
    HEADS = Role.HEADS.value


@app.command()
def build(
    kind: Kind,
    model: Model,
    role: Annotated[
        Scored,
        typer.Option(help="Score neurons (ffn), or KV groups (heads: frequency, lowrank, mlp)."),
    ] = Scored.FFN,
    bits: Annotated[int, typer.Option(help="shadow, rollout: bits of a level: 2, 3, 4 or 8.")] = 4,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="shadow, rollout: round with a look at calibration text (3 bits: do)."
        ),
    ] = False,
    rank: Annotated[int, typer.Option(help="svd, lowrank, mlp: inner width.", min=1)] = 64,
    lookahead: Annotated[
        int, typer.Option(help="lowrank, mlp: layers ahead that it is fitted to.", min=0, max=8)
    ] = LOOKAHEAD_DEFAULT,
    context: Annotated[int, typer.Option(help="rollout: tokens that it remembers.", min=1)] = 2048,
    size: Annotated[
        float | None,
        typer.Option(
            help="farsight: share of the model's parameters; 0.04 unless that is too little.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="lowrank, mlp, farsight: passes over the text in training; 0: the closed form.",
            min=0,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of calibration text: {CALIBRATED_TOKENS}, farsight {_SIGHT_TOKENS}, "
            "unless said otherwise.",
            min=2,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to fit to, repeatable; Python's own without.", exists=True),
    ] = None,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    to: Annotated[
        Path | None, typer.Option(help="Write the program file here instead of loading it.")
    ] = None,
) -> None:
    """Build a predictor for a packed model, and load it unless --to says where to put it."""
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
        windows = None
        if fit or kind.needs_text(Role(role)):
            windows = _text_to_fit(model, kind, tokens, text or [])
        asked = {"bits": bits, "rank": rank, "lookahead": lookahead, "context": context}
        recipe = Recipe(**asked, size=size, epochs=epochs, windows=windows, role=Role(role))
        with progress_count(f"building {kind.value}") as update:
            data = build_predictor(opened, packed, kind.value, update, recipe)
        if to is not None:
            to.write_bytes(data)
            out.print(f"wrote {to} ({format_size(len(data))})")
            return
        number = load_predictor(opened, packed, kind.value, data)
    out.print(f"loaded {kind.value} for {packed.name} as program {number}")


def _text_to_fit(model: str, kind: Kind, tokens: int | None, files: list[Path]) -> torch.Tensor:
    """int64 [windows, tokens]."""
    tokens = tokens or (_SIGHT_TOKENS if kind is Kind.FARSIGHT else CALIBRATED_TOKENS)
    try:
        return calibration_windows(load_tokenizer(resolve_source(model)), tokens, files)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None


@app.command()
def load(
    file: Annotated[Path, typer.Argument(help="A program file.", exists=True, dir_okay=False)],
    program: Annotated[int, typer.Option(help="Program identifier, 0 to 255.", min=0, max=255)],
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
) -> None:
    """Load and activate a program file."""
    with open_drive(drive, time) as opened:
        opened.load_program(program, file.read_bytes(), activate=True)
    out.print(f"loaded {file} as program {program}")


@app.command("list")
def list_programs(drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL) -> None:
    """List the programs on the drive."""
    with open_drive(drive, time) as opened:
        programs = opened.programs()
    table = Table("program", "kind", "scores", "model", "size", "active")
    for entry in programs:
        table.add_row(
            str(entry["program"]),
            entry["kind"],
            entry["role"] + ("+heads" if entry["kv_groups"] else ""),
            entry["model"],
            format_size(entry["bytes"]),
            "yes" if entry["active"] else "no",
        )
    out.print(table)


@app.command()
def score(
    model: Model,
    kind: Annotated[
        Kind | None, typer.Option(help="The model's active program of this kind.")
    ] = None,
    program: Annotated[
        int | None, typer.Option(help="The program with this number.", min=0, max=255)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A program file, loaded meanwhile.", exists=True, dir_okay=False),
    ] = None,
    lookahead: Annotated[
        int, typer.Option(help="Layers ahead that it is asked.", min=0, max=8)
    ] = LOOKAHEAD_DEFAULT,
    kept: Annotated[
        float, typer.Option(help="Share of an FFN's units that it chooses.", min=0.001, max=1)
    ] = WANTED_SHARE,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text.", min=2)] = 256,
    window: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 128,
    dram: Dram = "45%",
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Recall and precision of a program, asked through the drive on text that it never saw.

    Wanted is the true top third of an FFN's units, or the experts that a router chose.
    """
    if (kind is not None) + (program is not None) + (file is not None) != 1:
        raise typer.BadParameter("name one program: --kind, --program or --file")
    tokenizer = load_tokenizer(resolve_source(model))
    windows = token_windows(tokenizer, default_text(Split.HELD_OUT), tokens, window)

    def scored(opened: Drive, packed: PackedModel, number: int | None) -> ScoreReport:
        entry = find_program(opened, packed.name, kind, number)
        with progress_count(f"scoring {entry['kind']}, tokens") as update:
            return score_program(opened, packed, entry, windows, lookahead, kept, dram, update)

    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
        if file is None:
            report = scored(opened, packed, program)
        else:
            with loaded_for_now(opened, file.read_bytes()) as number:
                report = scored(opened, packed, number)
    if as_json:
        typer.echo(json.dumps(report.model_dump()))
        return
    out.print(_score_table(report))


def _score_table(report: ScoreReport) -> Table:
    table = Table(
        *("layer", "recall", "precision", "asked"),
        title=f"{report.kind} of {report.model}, program {report.program}: lookahead "
        f"{report.lookahead}, {report.tokens} tokens",
        title_justify="left",
    )
    for layer in report.layers:
        table.add_row(
            str(layer.layer), f"{layer.recall:.3f}", f"{layer.precision:.3f}", str(layer.asked)
        )
    table.add_section()
    table.add_row("mean", f"{report.recall:.3f}", f"{report.precision:.3f}", "")
    return table
