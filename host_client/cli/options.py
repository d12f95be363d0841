"""Options that several commands take."""

from typing import Annotated

import typer

from host_client.cli.console import TimeMode

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder (safetensors), a .gguf file, or smollm2-135m.",
    ),
]
DriveAddress = Annotated[
    str | None,
    typer.Option(
        "--drive",
        metavar="ADDRESS",
        help="unix:PATH, tcp:HOST:PORT or HOST:PORT. Default: $CSD_DRIVE, else an embedded drive "
        "whose media lies in the user's cache folder.",
    ),
]
Time = Annotated[
    TimeMode,
    typer.Option(
        "--time",
        help="How an embedded drive keeps time: wall (completions are held until they are due), "
        "virtual (nothing waits, times are modelled) or off.",
    ),
]
Dram = Annotated[
    str,
    typer.Option(
        "--dram",
        metavar="SIZE",
        help="Host memory for weights, staging buffers and KV cache: 5GiB, 120MB, or a share of "
        "the model's 16-bit weights such as 45%.",
    ),
]
QualityText = Annotated[
    str,
    typer.Option(
        "--quality",
        help="exact, or the fraction of FFN neurons that is kept: 0.5, or 0.1+correct with the "
        "drive's low-bit contribution for the others; +uniform: the same share in each layer.",
    ),
]
PredictorKind = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="KIND",
        help="Which kind of program on the drive chooses what is kept. Default: the best that is "
        "there: rollout, shadow, farsight, svd, mlp, lowrank, frequency, window.",
    ),
]
LookaheadText = Annotated[
    str,
    typer.Option(
        "--lookahead",
        metavar="LAYERS",
        help="Layers ahead that the predictor is asked for; auto: as many as the times of the "
        "first tokens ask for.",
    ),
]
FarKind = Annotated[
    str,
    typer.Option(
        "--far",
        metavar="KIND[@LAYERS]",
        help="Which kind of program brings neurons of later layers from NAND into the drive's own "
        "DRAM, and how far ahead (learned unless given). It changes speed, never the output. none: "
        "nobody does. Default: the best that is there, where the drive's unit cache is too small "
        "for what is staged.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
