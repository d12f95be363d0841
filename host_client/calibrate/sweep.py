"""The sweep of `csd bench quality`: programs, kept shares and corrections, measured in one lab.

Every low-bit rounding that a setting asks for is made once, from calibration text where it is
fitted; then every setting goes through the held-out text. The two never meet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from host_client.calibrate.builders import WINDOW_DECAY, WINDOW_TOKENS, Builder, Recipe
from host_client.calibrate.calibration import LayerStatistics, walk
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
from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.lab import WANTED_SHARE, Lab, Setting
from host_client.calibrate.low_bit_layers import group_of, round_layer, values_of
from host_client.calibrate.measurement import measure
from host_client.calibrate.outcome import QualityReport
from host_client.calibrate.program_choosers import chooser_of
from host_client.model.calibration_record import Calibration
from host_client.runtime.allotment import allotted
from host_client.runtime.head_groups import DENSE_LAYERS_DEFAULT, kept_by_layer
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import InvalidQuality

Progress = Callable[[int, int], None]

BITS_DEFAULT = 4
_EPOCHS = 2  # of programs that are trained here; a drive's are trained for longer


@dataclass(frozen=True, slots=True)
class Rows:
    """One rounding of the layers that low-bit programs hold."""

    bits: int = BITS_DEFAULT
    fitted: bool = False  # rounded with a look at calibration text, else to the nearest level

    @property
    def name(self) -> str:
        return f"{self.bits} bits{', fitted' * self.fitted}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the choosers of a model draw on."""

    model: DenseModel
    views: dict[int, LayerViews]  # low-bit layers by the name of their `Rows`
    shares: torch.Tensor  # float32 [layers, units]: how often each unit is wanted
    head_norms: torch.Tensor  # float32 [layers, groups]: mean norm of what each KV group adds
    resident: torch.Tensor  # bool [layers, units]: the units that the host holds
    seen: torch.Tensor  # int64 [windows, tokens]: the text of all that
    programs: Mapping[tuple[str, int], bytes]  # files, by kind and lookahead


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of the table, as `parse` reads it."""

    program: str
    lookahead: int
    kept: float
    corrected: bool = False
    heads: float = 1.0
    rows: Rows | None = None  # None: no low-bit rows take part
    allotted: bool = False  # layers keep different shares, as `csd calibrate` finds

    @property
    def name(self) -> str:
        """What `parse` reads this from."""
        words = [f"{self.kept:g}"] + ["correct"] * self.corrected
        words += [f"heads={self.heads:g}"] * (self.heads < 1) + [_ALLOTTED] * self.allotted
        if self.rows is not None:
            words += [f"bits={self.rows.bits}"] * (self.rows.bits != BITS_DEFAULT)
            words += ["fit"] * self.rows.fitted
        return f"{self.program}{_ahead(self.lookahead)}:{'+'.join(words)}"

    @property
    def curve(self) -> str:
        """The points of a plot that belong together: those that differ in what is kept alone."""
        words = ["corrected"] * self.corrected + ["fewer heads"] * (self.heads < 1)
        words += [_ALLOTTED] * self.allotted
        if self.rows is not None:
            words += [f"{self.rows.bits} bits"] * (self.rows.bits != BITS_DEFAULT)
            words += ["fitted"] * self.rows.fitted
        return ", ".join([f"{self.program}{_ahead(self.lookahead)}", *words])


def _ahead(lookahead: int) -> str:
    return "" if lookahead == AT_FFN else f"@{lookahead}"


_ALLOTTED = "allotted"
BUILT = ("svd", "lowrank", "mlp", "farsight")  # as for a drive, from program files
PROGRAMS = ("oracle", "shadow", "rollout", *BUILT, "frequency", "window")
TAKE_LOOKAHEAD = ("shadow", "rollout", "svd", "lowrank", "mlp")
_ONE_AHEAD = ("rollout", "lowrank", "mlp")  # unless said otherwise; others at the FFN's own input
_LOW_BIT = ("shadow", "rollout")  # score by low-bit rows
_SCORE_HEADS = ("oracle", "rollout", "frequency")
_BITS = (2, 3, 4, 8)
GRAMMAR = "PROGRAM[@LOOKAHEAD]:KEPT[+correct][+heads=SHARE][+allotted][+bits=N][+fit]"
DEFAULT_SETTINGS = (
    *("oracle:0.5", "oracle:0.33", "oracle:0.25", "oracle:0.1"),
    *("shadow@1:0.5", "shadow@1:0.33", "frequency:0.5", "window:0.5"),
    *("rollout@0:0.5", "rollout@0:0.33", "rollout@4:0.5", "rollout@4:0.33"),
    *("rollout@1:0.5", "rollout@1:0.33", "rollout@1:0.25", "rollout@1:0.1"),
    *("rollout@1:0.33+correct", "rollout@1:0.25+correct", "rollout@1:0.1+correct"),
    *("rollout@1:0.5+fit", "rollout@1:0.33+fit"),
    *("rollout@1:0.33+correct+fit", "rollout@1:0.25+correct+fit", "rollout@1:0.1+correct+fit"),
    *("shadow:0.1+correct+bits=3", "shadow:0.1+correct+bits=3+fit"),
    *("rollout@1:0.1+correct+bits=3", "rollout@1:0.1+correct+bits=3+fit"),
    *("svd@1:0.5", "lowrank@1:0.5", "mlp@1:0.5", "farsight:0.5"),
)


def parse(text: str) -> Asked:
    """One setting as `GRAMMAR` has it, such as rollout@1:0.33+correct. Raises ValueError."""
    program, _, rest = text.partition(":")
    program, at, ahead = program.partition("@")
    rows, rest = _rows_of(rest)
    is_allotted, quality = _quality_of(rest)
    lookahead = int(ahead) if ahead.isdigit() else AT_FFN
    if program in _ONE_AHEAD and not at:
        lookahead = 1
    wrong_ahead = bool(at) and (program not in TAKE_LOOKAHEAD or not ahead.isdigit())
    if quality is None or program not in PROGRAMS or wrong_ahead:
        raise ValueError(
            f"{text!r} is no setting. Write {GRAMMAR}, "
            f"PROGRAM one of {', '.join(PROGRAMS)}, like rollout@1:0.33+correct"
        )
    if quality.heads < 1 and (program not in _SCORE_HEADS or lookahead == 0):
        raise ValueError(
            f"{text!r}: heads are chosen by {', '.join(_SCORE_HEADS)}, and by a rollout one layer "
            "ahead or more, like rollout@1:0.5+heads=0.67"
        )
    if program in _LOW_BIT or quality.corrected:
        rows = rows or Rows()
    elif rows is not None:
        raise ValueError(
            f"{text!r}: {program} has no low-bit rows to round. Leave bits and fit out, or add "
            "+correct"
        )
    return Asked(
        program, lookahead, quality.kept, quality.corrected, quality.heads, rows, is_allotted
    )


def _rows_of(text: str) -> tuple[Rows | None, str]:
    """The rounding that is asked for, if one is, and what stands before it."""
    words = text.split("+")
    bits, fitted = BITS_DEFAULT, words[-1] == "fit"
    count = len(words)
    words = words[: count - fitted]
    if words and words[-1] in {f"bits={bits}" for bits in _BITS}:
        bits = int(words.pop().removeprefix("bits="))
    return Rows(bits, fitted) if len(words) < count else None, "+".join(words)


def _quality_of(text: str) -> tuple[bool, Quality | None]:
    """Whether units are allotted, and the quality before that; None for what is none here."""
    said = text.removesuffix(f"+{_ALLOTTED}")
    is_allotted = said != text
    try:
        quality = Quality.parse(said)
    except InvalidQuality:
        return is_allotted, None
    if said == "exact" or quality.uniform or (is_allotted and quality.kept == 1):
        return is_allotted, None
    return is_allotted, quality


def prepare(
    model: DenseModel,
    windows: torch.Tensor,
    settings: Sequence[Asked],
    resident_share: float,
    progress: Progress,
) -> Prepared:
    """One walk of the calibration windows: counts, and what the settings need of each layer.

    Programs of files are built beside it, a walk each.
    """
    roundings = {asked.rows for asked in settings if asked.rows is not None}
    views, counts, norms = {}, [], []
    for found in walk(model, windows, progress=progress):
        low = {rows.name: _rounded(model, found, rows) for rows in roundings}
        views[found.layer.number] = LayerViews(found.layer.cast(model.dtype), low)
        counts.append(torch.from_numpy(found.counts.astype("float32")))
        norms.append(found.head_norms.mean((0, 1)))
    shares = torch.stack(counts) / windows.numel()
    resident = hottest(shares, resident_share)
    programs = _build(model, windows, settings, progress)
    return Prepared(model, views, shares, torch.stack(norms), resident, windows, programs)


def _build(
    model: DenseModel, windows: torch.Tensor, settings: Sequence[Asked], progress: Progress
) -> dict[tuple[str, int], bytes]:
    """The program files that a drive would be given, by kind and lookahead."""
    programs: dict[tuple[str, int], bytes] = {}
    for asked in settings:
        key = (asked.program, asked.lookahead)
        if asked.program in BUILT and key not in programs:
            recipe = Recipe(lookahead=asked.lookahead, epochs=_EPOCHS, windows=windows)
            with torch.no_grad():
                programs[key] = getattr(Builder("lab", model, recipe, progress), asked.program)()
    return programs


def _rounded(model: DenseModel, found: LayerStatistics, rows: Rows) -> DecoderLayer:
    shape = model.shape
    group = group_of(shape.hidden, shape.heads * shape.head_dim)
    low = round_layer(found.layer, rows.bits, group, found.moments if rows.fitted else None)
    return values_of(found.layer, low, rows.bits).cast(model.dtype)


def hottest(shares: torch.Tensor, share: float) -> torch.Tensor:
    """A mask of the units that are wanted most often, over all layers."""
    resident = torch.zeros(shares.numel(), dtype=torch.bool)
    resident[shares.flatten().argsort(descending=True)[: round(share * shares.numel())]] = True
    return resident.view_as(shares)


def setting_of(
    asked: Asked,
    prepared: Prepared,
    dense_layers: int = DENSE_LAYERS_DEFAULT,
    calibration: Calibration | None = None,
) -> Setting:
    """`dense_layers`: how many first layers keep all KV groups where others leave some out.

    `calibration`: where units are allotted.
    """
    shape = prepared.model.shape
    units, layers, heads = shape.ffn, shape.layers, None
    if asked.heads < 1:
        heads = kept_by_layer(asked.heads, shape.kv_heads, layers, dense_layers)
    return Setting(
        program=asked.curve,
        chooser=_maker(asked, prepared),
        kept=_kept(asked, calibration, units, layers),
        correction=asked.rows.name if asked.corrected and asked.rows else None,
        resident=prepared.resident,
        heads=heads,
        name=asked.name,
    )


def _kept(asked: Asked, calibration: Calibration | None, units: int, layers: int) -> list[int]:
    if not asked.allotted:
        return [math.ceil(asked.kept * units)] * layers
    assert calibration is not None
    return allotted(calibration, asked.kept)


def _maker(asked: Asked, prepared: Prepared) -> Callable[[], Chooser]:
    model, shares, lookahead = prepared.model, prepared.shares, asked.lookahead
    low = asked.rows.name if asked.rows else ""
    wanted = max(1, round(WANTED_SHARE * model.shape.ffn))
    if asked.program in BUILT:
        return chooser_of(prepared.programs[asked.program, lookahead], lookahead)
    makers: dict[str, Callable[[], Chooser]] = {
        "oracle": Oracle,
        "shadow": lambda: Shadow(model, low, lookahead),
        "rollout": lambda: Rollout(model, low, lookahead),
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
) -> QualityReport:
    """Every setting over the held-out windows, int64 [windows, tokens]."""
    calibration = None
    if any(asked.allotted for asked in settings):
        calibration = measure(prepared.model, prepared.seen, progress).calibration
    lab = Lab(prepared.model, lambda number: prepared.views[number], windows, progress)
    return lab.measure(
        [setting_of(asked, prepared, dense_layers, calibration) for asked in settings]
    )
