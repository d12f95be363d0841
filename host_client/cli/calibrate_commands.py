"""`csd calibrate` and `csd place`: measure a packed model on text, and lay it out by that."""

from pathlib import Path
from typing import Annotated

import typer

from host_client.calibrate.preparation import load_predictors, recalibrate
from host_client.calibrate.preparation import place as place_neurons
from host_client.calibrate.text import CALIBRATED_TOKENS, calibration_windows
from host_client.cli.console import TimeMode, open_drive, out, progress_bytes, progress_count
from host_client.cli.model_commands import print_loaded
from host_client.cli.options import DriveAddress, Model, Time
from host_client.cli.tokenizers import load_tokenizer
from host_client.driver.drive import cache_folder
from host_client.model.catalog import open_model
from host_client.model.source import name_on_drive, resolve_source


def calibrate(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on, repeatable; Python's own without.", exists=True),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it.", min=2)] = CALIBRATED_TOKENS,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit/--no-fit",
            help="Build the predictors anew, their low-bit rows rounded to fit this text.",
        ),
    ] = True,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
) -> None:
    """Measure on text how often each neuron is wanted and what leaving some out costs.

    Goes on where it was broken off. Then the predictors on the drive are fitted to the text.
    """
    source = resolve_source(model)
    try:
        windows = calibration_windows(load_tokenizer(source), tokens, text or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, source.name)
        with progress_count("calibrating, layers") as update:
            stored = recalibrate(opened, packed, windows, update, cache_folder() / "calibration")
        if fit:
            with progress_count("fitting predictors, layers") as update:
                print_loaded(load_predictors(opened, stored, update, windows))
    out.print(
        f"measured {stored.name} over {stored.frequency_tokens:,} tokens: the memory plan, kept "
        f"fractions, `csd predictor build frequency` and `csd place` use it from now on"
    )


def place(model: Model, drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL) -> None:
    """Lay neurons that are wanted together side by side; needs `csd calibrate`.

    The output stays what it is, and reads touch fewer flash pages. Takes free space as large as the
    model; goes on where it was broken off.
    """
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
        with progress_bytes("placing") as update:
            placed = place_neurons(opened, packed, update)
    out.print(f"the neurons of {placed.name} lie as its calibration says")
