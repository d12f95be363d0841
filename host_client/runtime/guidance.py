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

from csd_protocol.packed import PackedModel
from host_client.driver import Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

F32 = npt.NDArray[np.float32]

PREFERRED = ("rollout", "shadow", "frequency")  # which kind of program guides unless one is named


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

    def last_asked(self, origin: Origin) -> int:
        """The last layer that is to be asked for with a state from there."""
        if origin.behind_attention:
            return origin.layer + self.near.lookahead
        return origin.layer

    def ask(self, token: int, hidden: F32, origin: Origin) -> Ask:
        return Ask(self.near.program, token, hidden, Told(origin))


def choose_guidance(
    drive: Drive, packed: PackedModel, quality: Quality, lookahead: int
) -> Guidance | None:
    """The programs for this quality; None where nothing is left out.

    Raises NoPredictor, RequestRefused.
    """
    if quality.exact:
        return None
    if quality.heads < 1.0:
        raise RequestRefused(f"quality {quality}: attention heads are not predicted yet")
    loaded = _active_programs(drive, packed)
    for kind in PREFERRED:
        if kind in loaded:
            return Guidance(Guide(loaded[kind], kind, lookahead))
    raise NoPredictor(
        f"quality {quality} needs a predictor for {packed.name} on the drive, and none is active. "
        f"Run `csd predictor build {PREFERRED[0]} {packed.name}`, or ask for --quality exact"
    )


def _active_programs(drive: Drive, packed: PackedModel) -> dict[str, int]:
    """Numbers of this model's active programs by kind."""
    programs: Sequence[dict[str, Any]] = drive.programs()
    return {
        entry["kind"]: entry["program"]
        for entry in programs
        if entry["active"] and entry["model"] == packed.name
    }
