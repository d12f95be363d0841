"""The sweep of `csd bench quality`: programs, kept shares and corrections, measured in one lab.

Low-bit rows are rounded once, from calibration text where `fitted` says so; then every setting goes
through the held-out text. The two never meet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from host_client.calibrate.builders import WINDOW_DECAY, WINDOW_TOKENS, Builder, Recipe
from host_client.calibrate.calibration import walk
from host_client.calibrate.choosers import (
    AT_FFN,
    Chooser,
    Frequency,
    LayerViews,
    Oracle,
    Rollout,
    Shadow,
    Window,
)
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.lab import WANTED_SHARE, Lab, LabReport, Setting
from host_client.calibrate.low_bit_layers import group_of, round_layer, values_of
from host_client.calibrate.program_choosers import chooser_of
from host_client.runtime.head_groups import DENSE_LAYERS_DEFAULT, kept_by_layer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the choosers of a model draw on."""

    model: DenseModel
    views: dict[int, LayerViews]  # rows by name: "4", "3 fitted"
    shares: torch.Tensor  # float32 [layers, units]: how often each unit is wanted
    head_norms: torch.Tensor  # float32 [layers, groups]: mean norm of what each KV group adds
    resident: torch.Tensor  # bool [layers, units]: the units that the host holds
    programs: Mapping[tuple[str, int], bytes] = field(default_factory=dict)  # kind and lookahead


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of the table, as `parse` reads it."""

    program: str
    lookahead: int
    kept: float
    corrected: bool
    heads: float = 1.0

    @property
    def name(self) -> str:
        ahead = "" if self.lookahead == AT_FFN else f"@{self.lookahead}"
        words = [f"{self.kept:g}"] + ["correct"] * self.corrected
        words += [f"heads={self.heads:g}"] * (self.heads < 1)
        return f"{self.program}{ahead} {'+'.join(words)}"


BUILT = ("svd", "lowrank", "mlp", "farsight")  # as for a drive, from program files
PROGRAMS = ("oracle", "shadow", "rollout", *BUILT, "frequency", "window")
_NEED_LOOKAHEAD = ("shadow", "rollout", "svd", "lowrank", "mlp")
_ONE_AHEAD = ("rollout", "lowrank", "mlp")  # unless said otherwise; others at the FFN's input
_SCORE_HEADS = ("oracle", "rollout", "frequency")
DEFAULT_SETTINGS = (
    "oracle:0.5 oracle:0.33 oracle:0.1 shadow@0:0.5 shadow@1:0.5 shadow@1:0.33 "
    "rollout@0:0.5 rollout@1:0.5 rollout@1:0.33 rollout@1:0.2 rollout@4:0.5 rollout@4:0.33 "
    "rollout@1:0.33+correct rollout@1:0.1+correct frequency:0.5 window:0.5"
).split()


def parse(text: str) -> Asked:
    """PROGRAM[@LOOKAHEAD]:KEPT[+correct][+heads=SHARE], as in rollout@1:0.33+correct.

    Raises ValueError.
    """
    program, _, quality = text.partition(":")
    program, _, ahead = program.partition("@")
    kept, *words = quality.split("+")
    corrected = words[:1] == ["correct"]
    heads = [word.removeprefix("heads=") for word in words[corrected:]] or ["1"]
    lookahead = int(ahead) if ahead.isdigit() else AT_FFN
    if program in _ONE_AHEAD and not ahead:
        lookahead = 1
    asked = Asked(program, lookahead, _share(kept), corrected, _share(heads[0]))
    wrong_ahead = bool(ahead) and (program not in _NEED_LOOKAHEAD or not ahead.isdigit())
    said = f"{program}{'@' * bool(ahead)}{ahead}:{kept}" + "+correct" * corrected
    said += f"+heads={heads[0]}" * (len(words) > corrected)
    if program not in PROGRAMS or wrong_ahead or 0 in (asked.kept, asked.heads) or said != text:
        raise ValueError(
            f"{text!r} is no setting. Write PROGRAM[@LOOKAHEAD]:KEPT[+correct][+heads=SHARE], "
            f"PROGRAM one of {', '.join(PROGRAMS)}, like rollout@1:0.33+correct"
        )
    if asked.heads < 1 and (program not in _SCORE_HEADS or lookahead == 0):
        raise ValueError(
            f"{text!r}: heads are chosen by {', '.join(_SCORE_HEADS)}, and by a rollout one layer "
            "ahead or more, like rollout@1:0.5+heads=0.67"
        )
    return asked


def _share(text: str) -> float:
    """A share in (0, 1]; 0 for what is none."""
    share = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    return share if share <= 1 else 0.0


def prepare(
    model: DenseModel,
    windows: torch.Tensor,
    bits: int,
    fitted: bool,
    resident_share: float,
    progress: Progress,
    settings: Sequence[Asked] = (),
) -> Prepared:
    """One walk of the calibration windows: counts, and the low-bit rows of every layer.

    What `settings` need beside that is built, a walk a program.
    """
    shape = model.shape
    group = group_of(shape.hidden, shape.heads * shape.head_dim)
    views, counts, norms = {}, [], []
    for found in walk(model, windows, progress=progress):
        rows = round_layer(found.layer, bits, group, found.moments if fitted else None)
        low = values_of(found.layer, rows, bits).cast(model.dtype)
        views[found.layer.number] = LayerViews(found.layer.cast(model.dtype), {"low": low})
        counts.append(torch.from_numpy(found.counts.astype("float32")))
        norms.append(found.head_norms.mean((0, 1)))
    shares = torch.stack(counts) / windows.numel()
    resident = hottest(shares, resident_share)
    programs = _build(model, windows, settings, progress)
    return Prepared(model, views, shares, torch.stack(norms), resident, programs)


def _build(
    model: DenseModel, windows: torch.Tensor, settings: Sequence[Asked], progress: Progress
) -> dict[tuple[str, int], bytes]:
    """The program files that a drive would be given, by kind and lookahead."""
    programs: dict[tuple[str, int], bytes] = {}
    for asked in settings:
        key = (asked.program, asked.lookahead)
        if asked.program in BUILT and key not in programs:
            recipe = Recipe(lookahead=asked.lookahead, windows=windows)
            with torch.no_grad():
                programs[key] = getattr(Builder("lab", model, recipe, progress), asked.program)()
    return programs


def hottest(shares: torch.Tensor, share: float) -> torch.Tensor:
    """A mask of the units that are wanted most often, over all layers."""
    resident = torch.zeros(shares.numel(), dtype=torch.bool)
    resident[shares.flatten().argsort(descending=True)[: round(share * shares.numel())]] = True
    return resident.view_as(shares)


def setting_of(
    asked: Asked, prepared: Prepared, dense_layers: int = DENSE_LAYERS_DEFAULT
) -> Setting:
    """`dense_layers`: how many first layers keep all KV groups where others leave some out."""
    shape = prepared.model.shape
    units, layers, heads = shape.ffn, shape.layers, None
    if asked.heads < 1:
        heads = kept_by_layer(asked.heads, shape.kv_heads, layers, dense_layers)
    ahead = "" if asked.lookahead == AT_FFN else f", {asked.lookahead} ahead"
    corrected = ", corrected" if asked.corrected else ""
    return Setting(
        program=f"{asked.program}{ahead}{corrected}{', fewer heads' if heads else ''}",
        chooser=_maker(asked, prepared),
        kept=[math.ceil(asked.kept * units)] * layers,
        correction="low" if asked.corrected else None,
        resident=prepared.resident,
        heads=heads,
        name=asked.name,
    )


def _maker(asked: Asked, prepared: Prepared) -> Callable[[], Chooser]:
    model, shares, lookahead = prepared.model, prepared.shares, asked.lookahead
    wanted = max(1, round(WANTED_SHARE * model.shape.ffn))
    if asked.program in BUILT:
        return chooser_of(prepared.programs[asked.program, lookahead], lookahead)
    makers: dict[str, Callable[[], Chooser]] = {
        "oracle": Oracle,
        "shadow": lambda: Shadow(model, "low", lookahead),
        "rollout": lambda: Rollout(model, "low", lookahead),
        "frequency": lambda: Frequency(shares, prepared.head_norms),
        "window": lambda: Window(WINDOW_TOKENS, WINDOW_DECAY, shares, wanted),
    }
    return makers[asked.program]


def sweep(
    prepared: Prepared,
    windows: torch.Tensor,
    settings: Sequence[Asked],
    progress: Progress,
    dense_layers: int = DENSE_LAYERS_DEFAULT,
) -> LabReport:
    """Every setting over the held-out windows, int64 [windows, tokens]."""
    lab = Lab(prepared.model, lambda number: prepared.views[number], windows, progress)
    return lab.measure([setting_of(asked, prepared, dense_layers) for asked in settings])
