"""Guidance: which programs on the drive choose, how far ahead they are asked, and what they see.

At lookahead k, layer l + k is asked for with the hidden state behind layer l's attention, while its
FFN and the next attention compute; at lookahead 0, layer l with the state that enters it, behind
its own attention alone. The first layers take what there is: layer 0 the embedding, the next ones
the state behind layer 0's attention. The nearer, the better the choice.

The *near* program decides what crosses to the host, and so what counts. A *far* one may bring units
of layers further ahead into on-drive DRAM (`far_level`): it decides when, never what.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from csd_protocol.opcodes import Cns
from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from csd_protocol.units import format_size
from host_client.driver import CommandFailed, Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.lookahead import AUTO, Lookahead, Moves
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

# Which kind of program is asked unless one is named; any other kind guides by name only.
NEAR_KINDS = ("rollout", "shadow", "farsight", "svd", "mlp", "lowrank", "frequency", "window")
FAR_KINDS = ("farsight", "rollout", "window", "frequency", "shadow", "svd", "mlp", "lowrank")
NO_FAR = "none"
UNNAMED = (AUTO, NO_FAR)


@dataclass(frozen=True, slots=True)
class Guide:
    """A program that chooses, and how many layers ahead it is asked."""

    program: int
    kind: str
    ahead: Lookahead

    @property
    def observes(self) -> bool:
        """Whether it is told which units were active."""
        return self.kind == "window"

    @property
    def sees_embedding(self) -> bool:
        """Whether it speaks for all layers from the state that enters the first one."""
        return self.kind == "farsight"

    def hears(self, layer: int) -> bool:
        """Whether it is told of a prompt's states that enter this layer."""
        return self.kind == "rollout" or (self.sees_embedding and layer == 0)

    def last_asked(self, origin: Origin) -> int:
        """The last layer that is to be asked for with a state from there."""
        return origin.layer + self.ahead.layers if origin.behind_attention else origin.layer


@dataclass(frozen=True, slots=True)
class Ask:
    """What a command shows a program. hidden: float32 [rows, hidden]; token: row 0's position."""

    program: int
    token: int
    hidden: F32
    told: Told

    def again(self) -> "Ask":
        """The same in a further command: what was observed is told once."""
        return replace(self, told=replace(self.told, observed={}))


@dataclass(slots=True)
class Asker:
    """Asks one program as a text goes on: keeps what it has to be shown until then."""

    guide: Guide
    _embedding: F32 | None = None
    _observed: dict[int, U32] = field(default_factory=dict)  # by site, not told yet

    def enter(self, layer: int, hidden: F32) -> None:
        """The state [rows, hidden] enters a layer."""
        if layer == 0 and self.guide.sees_embedding:
            self._embedding = hidden

    def observe(self, site: int, units: U32) -> None:
        """These units of a site were active, ascending."""
        if self.guide.observes:
            self._observed[site] = units

    def ask(self, token: int, hidden: F32, origin: Origin) -> Ask:
        """To be sent: it holds what was observed and not told before."""
        if self._embedding is not None:
            hidden, origin = self._embedding, Origin(0)
        observed, self._observed = self._observed, {}
        return Ask(self.guide.program, token, hidden, Told(origin, observed))


@dataclass(frozen=True, slots=True)
class Guidance:
    """The programs behind guided passes."""

    near: Guide  # decides what crosses to the host
    corrector: int | None = None  # the program that speaks for what was left out
    far: Guide | None = None  # brings units of later layers into on-drive DRAM
    no_far: str = ""  # why there is none


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

    def first(self, kinds: tuple[str, ...]) -> tuple[tuple[int, str] | None, str]:
        """Number and kind of the first that the drive can run for this host; and why not others."""
        refused = ""
        for kind in kinds:
            program = self.by_kind.get(kind)
            if program is None:
                continue
            try:
                self.meet(program)
            except CommandFailed as failed:
                if failed.status is not Status.DRAM_EXCEEDED:
                    raise
                refused = f" {kind}: {failed}."
            else:
                return (program, kind), ""
        return None, refused

    def cache_bytes(self) -> int:
        """Of the drive's unit cache."""
        capacity: int = self._drive.identify(Cns.WINDOW)["unit_cache"]["capacity_bytes"]
        return capacity

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
    programs: Programs,
    name: str,
    quality: Quality,
    near: Lookahead,
    predictor: str | None = None,
    far: str = AUTO,
    staged_bytes: int = 0,
) -> Guidance | None:
    """The programs for this quality of the model `name`; None where nothing is left out.

    near: how many layers ahead. predictor: the kind that is to guide. far: `auto`, `none`, or the
    kind of the far level, also KIND@LAYERS. staged_bytes: of all layers, what the host does not
    hold. Raises NoPredictor, RequestRefused.
    """
    if quality.exact:
        for level, kind in (("predictor", predictor), ("far", None if far in UNNAMED else far)):
            if kind is not None:
                raise RequestRefused(
                    f"{level} {kind}: quality exact needs every neuron, so there is nothing to "
                    f"predict. Leave the {level} out, or ask for a kept fraction like 0.5"
                )
        return None
    if quality.heads < 1.0:
        raise RequestRefused(f"quality {quality}: attention heads are not predicted yet")
    guide = Guide(*_near(programs, name, quality, predictor), near)
    corrector = _corrector(programs, name, quality, guide) if quality.corrected else None
    return Guidance(guide, corrector, *_far(programs, name, guide, far, staged_bytes))


def _near(
    programs: Programs, name: str, quality: Quality, predictor: str | None
) -> tuple[int, str]:
    """Number and kind of the first program that the drive can run for this host."""
    kinds = NEAR_KINDS if predictor is None else (predictor,)
    found, refused = programs.first(kinds)
    if found is not None:
        return found
    wanted = "a predictor" if predictor is None else f"the predictor {predictor}"
    raise NoPredictor(
        f"quality {quality} needs {wanted} for {name} on the drive, and {programs}.{refused} Run "
        f"`csd predictor build {predictor or NEAR_KINDS[0]} {name}`, or ask for --quality exact"
    )


def _far(
    programs: Programs, name: str, near: Guide, far: str, staged_bytes: int
) -> tuple[Guide | None, str]:
    """Who brings units into on-drive DRAM ahead of the near program; or None and why nobody does.

    Raises NoPredictor for a kind that is named and not there, RequestRefused.
    """
    if far == NO_FAR:
        return None, "it was switched off"
    kind, _, layers = far.partition("@")
    if kind != AUTO and kind not in programs.by_kind:
        raise NoPredictor(
            f"a far level of {kind} needs that program for {name} on the drive, and {programs}. "
            f"Run `csd predictor build {kind} {name}`, or leave --far out"
        )
    ahead = Lookahead(near.ahead.layers + 1, Moves.ALWAYS, near.ahead)
    if layers:
        ahead = Lookahead(Lookahead.steady(layers).layers, beyond=near.ahead)
    cache_bytes = programs.cache_bytes()
    if not cache_bytes:
        return None, "the drive has no unit cache to bring units into"
    if kind == AUTO and cache_bytes >= staged_bytes:
        return None, f"the drive's unit cache, {format_size(cache_bytes)}, holds all that is staged"
    found, refused = programs.first(FAR_KINDS if kind == AUTO else (kind,))
    if found is None:
        return None, f"the drive has no room for it.{refused}"
    return Guide(*found, ahead), ""


def _corrector(programs: Programs, name: str, quality: Quality, near: Guide) -> int:
    """The near program if it can, else another that can."""
    others = [programs.by_kind[kind] for kind in NEAR_KINDS if kind in programs.by_kind]
    for program in dict.fromkeys([near.program, *others]):
        if programs.can_correct(program):
            return program
    raise NoPredictor(
        f"quality {quality} needs a program for {name} on the drive that can correct, so one with "
        f"down rows; {programs}, and none of them can. Run `csd predictor build rollout {name}`, "
        f"or ask for --quality {quality.kept:g}"
    )
