"""Options that several commands take."""

from enum import StrEnum
from typing import Annotated

import typer

from csd_protocol.packed import Bits
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


class UnitBits(StrEnum):
    """Bits of a unit's values, as an option's choices."""

    SIXTEEN = "16"
    EIGHT = "8"
    FOUR = "4"

    @property
    def number(self) -> Bits:
        counts: dict[UnitBits, Bits] = {UnitBits.SIXTEEN: 16, UnitBits.EIGHT: 8, UnitBits.FOUR: 4}
        return counts[self]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
