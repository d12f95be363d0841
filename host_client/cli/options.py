"""Options that several commands take."""

from enum import StrEnum
from typing import Annotated

import typer

from csd_protocol.packed import Bits
from csd_protocol.program_file import SEED_MAX
from host_client.cli.console import TimeMode

_MODEL = typer.Argument(
    metavar="MODEL", help="A Hugging Face folder (safetensors), a .gguf file, or smollm2-135m."
)
Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Synthetic = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        help="In place of MODEL, one of this shape whose weights the drive makes of a seed: "
        "llama3-8b, chatglm3-6b, qwen-7b, qwen2-7b, mixtral-8x7b, or a config.json.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of a synthetic model.", min=0, max=SEED_MAX)]
Active = Annotated[
    float | None,
    typer.Option(
        help="Of a synthetic model, the share of FFN neurons that are active at a token: plants "
        "frequencies and a predictor that draws them, for --quality 0.1 and the like.",
        min=1e-6,
        max=1.0,
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        help="In place of a prompt, so many random tokens: for a synthetic model, which has no "
        "tokenizer. MODEL is its name on the drive.",
        min=1,
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
Recent = Annotated[
    str,
    typer.Option(
        "--recent",
        metavar="SIZE",
        help="Memory, within the budget, for neurons of the last tokens, so that those are not "
        "staged again (kept fraction only): 200MB, a share of what neurons have like 25%, or 0. "
        "Default: a quarter.",
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


class UnitBits(StrEnum):
    """Bits of a unit's values, as an option's choices."""

    SIXTEEN = "16"
    TWELVE = "12"
    EIGHT = "8"
    FOUR = "4"

    @property
    def number(self) -> Bits:
        counts: dict[UnitBits, Bits] = {
            UnitBits.SIXTEEN: 16,
            UnitBits.TWELVE: 12,
            UnitBits.EIGHT: 8,
            UnitBits.FOUR: 4,
        }
        return counts[self]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
