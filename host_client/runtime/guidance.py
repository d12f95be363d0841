"""Guidance: which programs on the drive choose, how far ahead they are asked, and what they see.

At lookahead k, layer l + k is asked for with the hidden state behind layer l's attention, while its
FFN and the next attention compute; at lookahead 0, layer l with the state that enters it, behind
its own attention alone. The first layers take what there is: layer 0 the embedding, the next ones
the state behind layer 0's attention. The nearer, the better the choice.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

F32 = npt.NDArray[np.float32]

PREFERRED = (
    "rollout",
    "shadow",
    "frequency",
    "planted",
)  # which kind of program guides unless one is named
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


class Programs:
    """One model's programs on a drive, of those that are active and score all of its FFNs."""

    def __init__(self, drive: Drive, model_id: int, packed: PackedModel) -> None:
        self._drive, self._model_id, self._packed = drive, model_id, packed
        layers = set(range(packed.layer_count))
        self.by_kind: dict[str, int] = {
            entry["kind"]: entry["program"]
            for entry in drive.programs()
            if entry["active"]
            and (entry["model"], entry["role"]) == (packed.name, Role.FFN)
            and layers <= {*entry["layers"]}
        }

    def __str__(self) -> str:
        kinds = ", ".join(sorted(self.by_kind))
        return f"active are {kinds}" if kinds else "none is active"

    def meet(self, program: int) -> None:
        """Has the drive make room for what a program remembers of this host.

        Raises CommandFailed (On-Drive DRAM Exceeded) with the figures.
        """
        nothing = np.zeros((1, self._packed.ffns()[0].cols), np.float32)
        told = Told(Origin(0))
        self._drive.execute_program(program, self._model_id, 0, nothing, 0.0, told).result()

    def can_correct(self, program: int) -> bool:
        """Whether it has the rows for it: asked with nothing left out, which costs nothing."""
        site = self._packed.find(Role.FFN, 0)
        nothing = np.zeros((1, site.cols), np.float32)
        everything = np.arange(site.count, dtype=np.uint32)
        try:
            self._drive.correct(program, self._model_id, 0, nothing, everything).result()
        except CommandFailed as failed:
            if failed.status is not Status.INVALID_FIELD:
                raise
            return False
        return True


def choose_guidance(
    programs: Programs, name: str, quality: Quality, lookahead: int, predictor: str | None = None
) -> Guidance | None:
    """The programs for this quality of the model `name`; None where nothing is left out.

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
    near = Guide(*_near(programs, name, quality, predictor), lookahead)
    if not quality.corrected:
        return Guidance(near)
    return Guidance(near, _corrector(programs, name, quality, near))


def _near(
    programs: Programs, name: str, quality: Quality, predictor: str | None
) -> tuple[int, str]:
    """Number and kind of the first program that the drive can run for this host."""
    refused = ""
    for kind in PREFERRED if predictor is None else (predictor,):
        program = programs.by_kind.get(kind)
        if program is None:
            continue
        try:
            programs.meet(program)
        except CommandFailed as failed:
            if failed.status is not Status.DRAM_EXCEEDED:
                raise
            refused = f" {kind}: {failed}."
        else:
            return program, kind
    wanted = "a predictor" if predictor is None else f"the predictor {predictor}"
    raise NoPredictor(
        f"quality {quality} needs {wanted} for {name} on the drive, and {programs}.{refused} Run "
        f"`csd predictor build {predictor or PREFERRED[0]} {name}`, or ask for --quality exact"
    )


def _corrector(programs: Programs, name: str, quality: Quality, near: Guide) -> int:
    """The near program if it can, else another that can."""
    others = [programs.by_kind[kind] for kind in PREFERRED if kind in programs.by_kind]
    for program in dict.fromkeys([near.program, *others]):
        if programs.can_correct(program):
            return program
    raise NoPredictor(
        f"quality {quality} needs a program for {name} on the drive that can correct, so one with "
        f"down rows; {programs}, and none of them can. Run `csd predictor build rollout {name}`, "
        f"or ask for --quality {quality.kept:g}"
    )
