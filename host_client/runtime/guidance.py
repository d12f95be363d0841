"""Guidance: which programs on the drive choose, how far ahead they are asked, and what they see.

At lookahead k, layer l + k is asked for with the hidden state behind layer l's attention, while its
FFN and the next attention compute; at lookahead 0, layer l with the state that enters it, behind
its own attention alone. The first layers take what there is: layer 0 the embedding, the next ones
the state behind layer 0's attention. The nearer, the better the choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

F32 = npt.NDArray[np.float32]

PREFERRED = ("rollout", "shadow", "frequency")  # which kind of program guides unless one is named
REMEMBERING = ("rollout",)  # kinds that score by earlier tokens of the text as well


@dataclass(frozen=True, slots=True)
class Guide:
    """A program that chooses, and how many layers ahead it is asked."""

    program: int
    kind: str
    lookahead: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What a command shows a program. hidden: float32 [rows, hidden]; token: row 0's position."""

    program: int
    token: int
    hidden: F32
    told: Told


@dataclass(frozen=True, slots=True)
class Guidance:
    """The programs behind guided passes."""

    near: Guide  # decides what crosses to the host
    corrector: int | None = None  # the program that speaks for what was left out

    @property
    def takes_notes(self) -> bool:
        """Whether the near program has to be told of every token of a text."""
        return self.near.kind in REMEMBERING

    def last_asked(self, origin: Origin) -> int:
        """The last layer that is to be asked for with a state from there."""
        if origin.behind_attention:
            return origin.layer + self.near.lookahead
        return origin.layer

    def ask(self, token: int, hidden: F32, origin: Origin) -> Ask:
        return Ask(self.near.program, token, hidden, Told(origin))


def choose_guidance(
    drive: Drive,
    model_id: int,
    packed: PackedModel,
    quality: Quality,
    lookahead: int,
    predictor: str | None = None,
) -> Guidance | None:
    """The programs for this quality; None where nothing is left out.

    predictor: the kind that is to guide. Raises NoPredictor, RequestRefused.
    """
    if quality.exact:
        if predictor is not None:
            raise RequestRefused(
                f"predictor {predictor}: quality exact needs every neuron, so there is nothing to "
                f"predict. Leave the predictor out, or ask for a kept fraction like 0.5"
            )
        return None
    if quality.heads < 1.0:
        raise RequestRefused(f"quality {quality}: attention heads are not predicted yet")
    loaded = _active_programs(drive, packed)
    near = _near(loaded, packed, quality, lookahead, predictor)
    if not quality.corrected:
        return Guidance(near)
    for program in dict.fromkeys([near.program, *(loaded[k] for k in PREFERRED if k in loaded)]):
        if _can_correct(drive, model_id, packed, program):
            return Guidance(near, program)
    raise NoPredictor(
        f"quality {quality} needs a program for {packed.name} on the drive that can correct, so "
        f"one with down rows; active are {', '.join(sorted(loaded))}, and none of them can. Run "
        f"`csd predictor build rollout {packed.name}`, or ask for --quality {quality.kept:g}"
    )


def _near(
    loaded: dict[str, int],
    packed: PackedModel,
    quality: Quality,
    lookahead: int,
    predictor: str | None,
) -> Guide:
    for kind in PREFERRED if predictor is None else (predictor,):
        if kind in loaded:
            return Guide(loaded[kind], kind, lookahead)
    wanted = "a predictor" if predictor is None else f"the predictor {predictor}"
    active = f"active are {', '.join(sorted(loaded))}" if loaded else "none is active"
    raise NoPredictor(
        f"quality {quality} needs {wanted} for {packed.name} on the drive, and {active}. Run "
        f"`csd predictor build {predictor or PREFERRED[0]} {packed.name}`, or ask for "
        f"--quality exact"
    )


def _active_programs(drive: Drive, packed: PackedModel) -> dict[str, int]:
    """Numbers of this model's active programs that score all of its layers, by kind."""
    layers = set(range(packed.layer_count))
    programs: Sequence[dict[str, Any]] = drive.programs()
    return {
        entry["kind"]: entry["program"]
        for entry in programs
        if entry["active"] and entry["model"] == packed.name and layers <= set(entry["layers"])
    }


def _can_correct(drive: Drive, model_id: int, packed: PackedModel, program: int) -> bool:
    """Whether the program has the rows for it: asked with nothing left out, which costs nothing."""
    site = packed.find(Role.FFN, 0)
    nothing = np.zeros((1, site.cols), np.float32)
    everything = np.arange(site.count, dtype=np.uint32)
    try:
        drive.correct(program, model_id, 0, nothing, everything).result()
    except CommandFailed as failed:
        if failed.status is not Status.INVALID_FIELD:
            raise
        return False
    return True
