"""`csd predictor`: build programs from a packed model and load them onto the drive."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.packed import Role
from csd_protocol.units import format_size
from host_client.calibrate.builders import Recipe
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.calibrate.text import CALIBRATED_TOKENS, calibration_windows
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.model_commands import load_tokenizer
from host_client.cli.options import DriveAddress, Model, Time
from host_client.model.catalog import open_model
from host_client.model.source import name_on_drive, resolve_source
from host_client.runtime.causal_lm import LOOKAHEAD_DEFAULT

app = typer.Typer(help="Predictors: build, load and list the programs on the drive.")


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
    tokens: Annotated[
        int, typer.Option(help="Tokens of calibration text.", min=2)
    ] = CALIBRATED_TOKENS,
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
            tokenizer = load_tokenizer(resolve_source(model))
            windows = calibration_windows(tokenizer, tokens, text or [])
        recipe = Recipe(bits, rank, lookahead, context, windows, Role(role))
        with progress_count(f"building {kind.value}, layers") as update:
            data = build_predictor(opened, packed, kind.value, update, recipe)
        if to is not None:
            to.write_bytes(data)
            out.print(f"wrote {to} ({format_size(len(data))})")
            return
        number = load_predictor(opened, packed, kind.value, data)
    out.print(f"loaded {kind.value} for {packed.name} as program {number}")


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
