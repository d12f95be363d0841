"""Guidance: which programs on the drive choose, how far ahead they are asked, and what they see.

At lookahead k, layer l + k is asked for with the hidden state behind layer l's attention, while its
FFN and the next attention compute; at lookahead 0, layer l with the state that enters it, behind
its own attention alone. The first layers take what there is: layer 0 the embedding, the next ones
the state behind layer 0's attention. The nearer, the better the choice.

KV groups of attention are chosen in the same commands, so a layer ahead at least, by the program
that chooses neurons where it scores groups too, else by another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.head_groups import LOOKAHEAD_MIN
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

F32 = npt.NDArray[np.float32]

PREFERRED = ("rollout", "shadow", "frequency")  # which kind of program guides unless one is named
PREFERRED_FOR_HEADS = ("rollout", "lowrank", "mlp", "frequency")
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
    heads: Guide | None = None  # decides the same of KV groups; None: all of them do

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
        heads = self.heads.program if self.heads not in (None, self.near) else None
        return Ask(self.near.program, token, hidden, Told(origin, heads=heads))


class Programs:
    """One model's programs on a drive, of those that are active and score all of its layers."""

    def __init__(self, drive: Drive, model_id: int, packed: PackedModel) -> None:
        self._drive, self._model_id, self._packed = drive, model_id, packed
        layers = set(range(packed.layer_count))
        able = [
            entry
            for entry in drive.programs()
            if entry["active"] and entry["model"] == packed.name and layers <= {*entry["layers"]}
        ]
        self.by_kind: dict[str, int] = {  # of neurons
            entry["kind"]: entry["program"] for entry in able if entry["role"] == Role.FFN
        }
        self.of_heads: dict[str, int] = {
            entry["kind"]: entry["program"]
            for entry in able
            if entry["role"] == Role.HEADS or entry["kv_groups"]
        }
        self._refusals = ""  # of those that the drive could not run for this host

    def __str__(self) -> str:
        return self.said_of(self.by_kind)

    def said_of(self, found: Mapping[str, int]) -> str:
        """Which of them there are, and why one was not taken."""
        kinds = ", ".join(sorted(found))
        return (f"active are {kinds}" if kinds else "none is active") + self._refusals

    def first(self, found: Mapping[str, int], kinds: Iterable[str], lookahead: int) -> Guide | None:
        """The first of these kinds that the drive can run for this host."""
        for kind in kinds:
            if kind not in found:
                continue
            try:
                self.meet(found[kind])
            except CommandFailed as failed:
                if failed.status is not Status.DRAM_EXCEEDED:
                    raise
                self._refusals += f". {kind}: {failed}"
            else:
                return Guide(found[kind], kind, lookahead)
        return None

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
    near = heads = None
    if quality.kept < 1.0:
        near = _near(programs, name, quality, lookahead, predictor)
    if quality.heads < 1.0:
        heads = _of_heads(programs, name, quality, lookahead, predictor, near)
    guide = near or heads
    assert guide is not None, "a quality that is not exact leaves something out"
    corrector = _corrector(programs, name, quality, guide) if quality.corrected else None
    return Guidance(guide, corrector, heads)


def _near(
    programs: Programs, name: str, quality: Quality, lookahead: int, predictor: str | None
) -> Guide:
    kinds = PREFERRED if predictor is None else (predictor,)
    guide = programs.first(programs.by_kind, kinds, lookahead)
    if guide is not None:
        return guide
    wanted = "a predictor" if predictor is None else f"the predictor {predictor}"
    raise NoPredictor(
        f"quality {quality} needs {wanted} for {name} on the drive, and {programs}. Run "
        f"`csd predictor build {predictor or PREFERRED[0]} {name}`, or ask for --quality exact"
    )


def _of_heads(
    programs: Programs,
    name: str,
    quality: Quality,
    lookahead: int,
    predictor: str | None,
    near: Guide | None,
) -> Guide:
    """The near program where it scores KV groups, else one that need not be told of the text."""
    if lookahead < LOOKAHEAD_MIN:
        raise RequestRefused(
            f"quality {quality} at lookahead {lookahead}: attention heads are needed as soon as a "
            f"state enters their layer. Ask for a lookahead of {LOOKAHEAD_MIN} or more"
        )
    found = programs.of_heads
    if near is not None and found.get(near.kind) == near.program:
        return near
    kinds = [*PREFERRED_FOR_HEADS] if predictor is None else [predictor]
    if near is not None:
        kinds = [near.kind, *(kind for kind in PREFERRED_FOR_HEADS if kind not in REMEMBERING)]
    guide = programs.first(found, kinds, lookahead)
    if guide is not None:
        return guide
    raise NoPredictor(
        f"quality {quality} needs a program for {name} on the drive that scores KV groups, and of "
        f"such {programs.said_of(found)}. Run `csd predictor build rollout {name}` or `csd "
        f"predictor build frequency {name} --role heads`, or leave heads= out of the quality"
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
