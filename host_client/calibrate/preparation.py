"""What follows packing: measure the neurons, then build and load the predictors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from host_client.calibrate.builders import Builder, Recipe
from host_client.calibrate.dense_model import DenseModel, best_device, knows
from host_client.calibrate.gate_builder import build_gate
from host_client.calibrate.measurement import Bookmark, measure
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.calibrate.predictor import (
    build_frequency,
    load_predictor,
    read_down_norms,
)
from host_client.calibrate.shadow_builder import build_shadow
from host_client.calibrate.statistics import measure_frequencies
from host_client.calibrate.text import (
    CALIBRATION_WINDOW,
    Split,
    default_text,
    token_windows,
)
from host_client.driver import CommandFailed, Drive
from host_client.model.catalog import (
    check_room,
    open_model,
    read_frequencies,
    store_frequencies,
)
from host_client.model.errors import UnsupportedModel
from host_client.model.placement import place_units
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of
from host_client.runtime.guidance import Programs
from host_client.runtime.plain_reads import PlainReads
from host_client.runtime.refusals import NoPredictor, RequestRefused

CALIBRATION_TOKENS = 2048
_NO_ROOM = (
    Status.INSUFFICIENT_PROGRAM_RESOURCES,
    Status.PROGRAM_TOO_BIG,
    Status.DRAM_EXCEEDED,
)

Progress = Callable[[int, int], None]
Maker = Callable[[Builder], bytes]


def calibrate(
    drive: Drive,
    packed: PackedModel,
    tokenizer: Any,
    dram: str | int,
    progress: Progress,
    tokens: int = CALIBRATION_TOKENS,
) -> PackedModel:
    """Count how often each neuron is wanted, on text of Python's own, and keep it on the drive.

    Runs the packed model itself at exact quality within `dram`. Returns the new manifest.
    """
    windows = token_windows(tokenizer, default_text(Split.CALIBRATION), tokens, CALIBRATION_WINDOW)
    model = CsdModelForCausalLM.from_pretrained(
        packed.name, drive, dram, context=CALIBRATION_WINDOW
    )
    try:
        counts = measure_frequencies(model, windows, read_down_norms(drive, packed), progress)
    finally:
        runtime_of(model).close()
    return store_frequencies(drive, packed.name, counts, tokens)


def recalibrate(
    drive: Drive,
    packed: PackedModel,
    windows: torch.Tensor,
    progress: Progress,
    folder: Path | None = None,
) -> PackedModel:
    """Measure on other text, layer by layer off the drive, no budget asked. The new manifest.

    `folder`: where a walk that is broken off is kept, to go on from; None: nowhere.
    Raises PackedBefore, before it begins, where the drive has no room for what is measured.
    """
    check_room(drive, packed.name)
    model = DenseModel(PackedCheckpoint(drive, packed), device=best_device())
    bookmark = None
    if folder is not None:
        bookmark = Bookmark.of(folder, packed.name, packed.fingerprint, windows)
    found = measure(model, windows, progress, bookmark)
    stored = store_frequencies(drive, packed.name, found.counts, windows.numel(), found.calibration)
    if bookmark is not None:
        bookmark.remove()
    return stored


def place(drive: Drive, packed: PackedModel, progress: Progress) -> PackedModel:
    """Lay neurons that are wanted together side by side, as the calibration says.

    The new manifest. Raises NotCalibrated, DriveTooSmall, UnitsLost.
    """
    read = PlainReads(drive, packed).units

    def told(done: int, total: int, _: str) -> None:
        progress(done, total)

    return place_units(drive, packed.name, read, told)


class Kind(StrEnum):
    """Kinds that can be built for a packed model."""

    SHADOW = "shadow"
    ROLLOUT = "rollout"
    SVD = "svd"
    LOWRANK = "lowrank"
    MLP = "mlp"
    FARSIGHT = "farsight"
    WINDOW = "window"
    FREQUENCY = "frequency"
    ORACLE = "oracle"
    GATE = "gate"

    def needs_text(self, role: Role = Role.FFN) -> bool:
        of_text = (Kind.LOWRANK, Kind.MLP, Kind.FARSIGHT, Kind.WINDOW)
        return self in of_text or role is Role.HEADS


def build_predictor(
    drive: Drive,
    packed: PackedModel,
    kind: str,
    progress: Progress,
    recipe: Recipe | None = None,
) -> bytes:
    """A program file of this kind; without a recipe as `csd pack` loads it.

    Raises NoPredictor for `frequency` before calibration, UnsupportedModel for a model that the
    kind has no place for, RequestRefused for a role that the kind does not have and for a recipe
    that leaves a farsight no room or no text.
    """
    recipe = recipe or Recipe()
    if recipe.role is Role.HEADS:
        return _built(drive, packed, _maker_for_heads(kind), recipe, progress)
    if kind == Kind.FREQUENCY:
        return _frequency(drive, packed)
    if kind == Kind.GATE:
        return build_gate(drive, packed, progress)
    if kind == Kind.SHADOW and not knows(packed.config):
        return build_shadow(drive, packed, recipe, progress)
    return _built(drive, packed, getattr(Builder, Kind(kind).value), recipe, progress)


def _built(
    drive: Drive, packed: PackedModel, make: Maker, recipe: Recipe, progress: Progress
) -> bytes:
    model = DenseModel(PackedCheckpoint(drive, packed))
    with torch.no_grad():
        return make(Builder(packed.name, model, recipe, progress))


def _maker_for_heads(kind: str) -> Maker:
    makers: dict[str, Maker] = {
        Kind.FREQUENCY: Builder.head_norms,
        Kind.LOWRANK: Builder.lowrank,
        Kind.MLP: Builder.mlp,
    }
    if kind not in makers:
        raise RequestRefused(
            f"a {kind} of role heads: KV groups are scored by {', '.join(makers)}, and by a "
            f"rollout without any role. Build one of those"
        )
    return makers[kind]


def _frequency(drive: Drive, packed: PackedModel) -> bytes:
    counts = read_frequencies(drive, packed)
    if counts is None:
        raise NoPredictor(
            f"the neurons of {packed.name} were never counted: "
            f"run `csd pack` on it again without --no-calibrate"
        )
    return build_frequency(packed, counts)


@dataclass(slots=True)
class Loaded:
    """Which kinds of program were loaded, and why others were not."""

    kinds: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_predictors(
    drive: Drive, packed: PackedModel, progress: Progress, windows: torch.Tensor | None = None
) -> Loaded:
    """Build and load what serves the model best; earlier programs of the same kinds go.

    windows: int64 [windows, tokens] of text that low-bit rows are rounded to fit; None: each value
    to the nearest level.

    A rollout, or a shadow where the drive cannot hold that or the model has no place for it: both
    choose and correct. And a frequency, where the neurons were counted. A mixture has a gate as
    well, and no rollout.
    """
    loaded, recipe = Loaded(), Recipe(windows=windows)
    if packed.experts:
        _load_if_it_fits(drive, packed, Kind.GATE, recipe, progress, loaded)
    for kind in (Kind.SHADOW,) if packed.experts else (Kind.ROLLOUT, Kind.SHADOW):
        if _load_if_it_fits(drive, packed, kind, recipe, progress, loaded):
            break
    if packed.frequencies is not None:
        _load_if_it_fits(drive, packed, Kind.FREQUENCY, recipe, progress, loaded)
    return loaded


def _load_if_it_fits(
    drive: Drive,
    packed: PackedModel,
    kind: Kind,
    recipe: Recipe,
    progress: Progress,
    loaded: Loaded,
) -> bool:
    """Whether the drive can hold the program, and what it remembers of this host."""
    try:
        data = build_predictor(drive, packed, kind, progress, recipe)
        number = load_predictor(drive, packed, kind, data)
    except UnsupportedModel as error:
        loaded.skipped.append(f"{kind}: {error}")
        return False
    except CommandFailed as failed:
        if failed.status not in _NO_ROOM:
            raise
        loaded.skipped.append(f"{kind}: {failed}")
        return False
    try:
        model_id, _ = open_model(drive, packed.name)
        Programs(drive, model_id, packed).meet(number)
    except CommandFailed as failed:
        drive.unload_program(number)
        if failed.status not in _NO_ROOM:
            raise
        loaded.skipped.append(f"{kind}: {failed}")
        return False
    loaded.kinds.append(kind)
    return True
