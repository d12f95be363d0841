"""`csd calibrate`: measure a packed model's neurons on the user's own text."""

from pathlib import Path
from typing import Annotated

import typer

from host_client.calibrate.preparation import recalibrate
from host_client.calibrate.text import CALIBRATED_TOKENS, calibration_windows
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.model_commands import load_tokenizer
from host_client.cli.options import DriveAddress, Model, Time
from host_client.model.catalog import open_model
from host_client.model.source import resolve_source


def calibrate(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on, repeatable; Python's own without.", exists=True),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it.", min=2)] = CALIBRATED_TOKENS,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
) -> None:
    """Count how often each neuron is wanted on this text, and keep the counts on the drive."""
    source = resolve_source(model)
    try:
        windows = calibration_windows(load_tokenizer(source), tokens, text or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, source.name)
        with progress_count("calibrating, layers") as update:
            stored = recalibrate(opened, packed, windows, update)
    out.print(
        f"counted the neurons of {stored.name} over {stored.frequency_tokens:,} tokens; "
        "`csd predictor build frequency` and the memory plan use the counts from now on"
    )
