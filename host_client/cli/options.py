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
        "drive's low-bit contribution for the others.",
    ),
]
PredictorKind = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="KIND",
        help="Which kind of program on the drive chooses what is kept. Default: the best that is "
        "there, rollout, then shadow, then frequency.",
    ),
]
Enforce = Annotated[
    bool,
    typer.Option(
        "--enforce",
        help="Have the kernel limit the process to the budget and a stated allowance for "
        "interpreter and libraries, in a control group, and say what the kernel measured.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
