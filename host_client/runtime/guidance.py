"""Guidance: which programs on the drive choose, how far ahead they are asked, and what they see.

At lookahead k, layer l + k is asked for with the hidden state behind layer l's attention, while its
FFN and the next attention compute; at lookahead 0, layer l with the state that enters it, behind
its own attention alone. The first layers take what there is: layer 0 the embedding, the next ones
the state behind layer 0's attention. The nearer, the better the choice.

KV groups of attention are chosen in the same commands, so a layer ahead at least, by the program
that chooses neurons where it scores groups too, else by another.

The *near* program decides what crosses to the host, and so what counts. A *far* one may bring units
of layers further ahead into on-drive DRAM (`far_level`): it decides when, never what.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from csd_protocol.opcodes import Cns
from csd_protocol.packed import PackedModel, Role
from csd_protocol.status import Status
from csd_protocol.units import format_size
from host_client.driver import CommandFailed, Drive
from host_client.driver.commands import Origin, Told
from host_client.runtime.head_groups import LOOKAHEAD_MIN
from host_client.runtime.lookahead import AUTO, Lookahead, Moves
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

# Which kind of program is asked unless one is named; any other kind guides by name only.
NEAR_KINDS = tuple("rollout shadow farsight svd mlp lowrank planted frequency window".split())
FAR_KINDS = ("farsight", "rollout", "window", "frequency", "shadow", "svd", "mlp", "lowrank")
HEADS_KINDS = ("rollout", "lowrank", "mlp", "frequency")
HEADS_KINDS_BESIDE = HEADS_KINDS[1:]  # beside a near program: those that need not hear the text
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
    heads: int | None = None  # the program that chooses KV groups in the same commands
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
        return Ask(self.guide.program, token, hidden, Told(origin, observed, heads=self.heads))


@dataclass(frozen=True, slots=True)
class Guidance:
    """The programs behind guided passes."""

    near: Guide  # decides what crosses to the host
    corrector: int | None = None  # the program that speaks for what was left out
    heads: Guide | None = None  # decides the same of KV groups; None: all of them do
    far: Guide | None = None  # brings units of later layers into on-drive DRAM
    no_far: str = ""  # why there is none

    @property
    def heads_apart(self) -> int | None:
        """The program that chooses KV groups where it is not the near one."""
        return self.heads.program if self.heads not in (None, self.near) else None


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
        self.refusals = ""  # of those that the drive could not run for this host

    def __str__(self) -> str:
        return self.said_of(self.by_kind)

    def said_of(self, found: Mapping[str, int]) -> str:
        """Which of them there are, and why one was not taken."""
        kinds = ", ".join(sorted(found))
        return (f"active are {kinds}" if kinds else "none is active") + self.refusals

    def first(
        self, found: Mapping[str, int], kinds: Iterable[str], ahead: Lookahead
    ) -> Guide | None:
        """The first of these kinds that the drive can run for this host."""
        for kind in kinds:
            if kind not in found:
                continue
            try:
                self.meet(found[kind])
            except CommandFailed as failed:
                if failed.status is not Status.DRAM_EXCEEDED:
                    raise
                self.refusals += f". {kind}: {failed}"
            else:
                return Guide(found[kind], kind, ahead)
        return None

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


def named_levels(predictor: str | None, far: str) -> Iterator[tuple[str, str]]:
    """The levels whose program a user named, and the kinds."""
    if predictor is not None:
        yield "predictor", predictor
    if far not in UNNAMED:
        yield "far", far


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
        for level, kind in named_levels(predictor, far):
            raise RequestRefused(
                f"{level} {kind}: quality exact needs every neuron, so there is nothing to "
                f"predict. Leave the {level} out, or ask for a kept fraction like 0.5"
            )
        return None
    guide = heads = None
    if quality.kept < 1.0:
        guide = _near(programs, name, quality, near, predictor)
    if quality.heads < 1.0:
        heads = _of_heads(programs, name, quality, near, predictor, guide)
    asked = guide or heads
    assert asked is not None, "a quality that is not exact leaves something out"
    corrector = _corrector(programs, name, quality, asked) if quality.corrected else None
    if guide is None:
        return Guidance(asked, corrector, heads, no_far="all neurons are kept")
    return Guidance(asked, corrector, heads, *_far(programs, name, guide, far, staged_bytes))


def _near(
    programs: Programs, name: str, quality: Quality, ahead: Lookahead, predictor: str | None
) -> Guide:
    guide = programs.first(
        programs.by_kind, NEAR_KINDS if predictor is None else (predictor,), ahead
    )
    if guide is not None:
        return guide
    wanted = "a predictor" if predictor is None else f"the predictor {predictor}"
    raise NoPredictor(
        f"quality {quality} needs {wanted} for {name} on the drive, and {programs}. Run "
        f"`csd predictor build {predictor or NEAR_KINDS[0]} {name}`, or ask for --quality exact"
    )


def _of_heads(
    programs: Programs,
    name: str,
    quality: Quality,
    ahead: Lookahead,
    predictor: str | None,
    near: Guide | None,
) -> Guide:
    """The near program where it scores KV groups, else one that need not be told of the text."""
    if ahead.layers < LOOKAHEAD_MIN:
        raise RequestRefused(
            f"quality {quality} at lookahead {ahead.layers}: attention heads are needed as soon as "
            f"a state enters their layer. Ask for a lookahead of {LOOKAHEAD_MIN} or more"
        )
    found = programs.of_heads
    if near is not None and found.get(near.kind) == near.program:
        return near
    kinds = HEADS_KINDS if predictor is None else (predictor,)
    if near is not None:
        kinds = (near.kind, *HEADS_KINDS_BESIDE)
    guide = programs.first(found, kinds, ahead)
    if guide is not None:
        return guide
    raise NoPredictor(
        f"quality {quality} needs a program for {name} on the drive that scores KV groups, and of "
        f"such {programs.said_of(found)}. Run `csd predictor build rollout {name}` or `csd "
        f"predictor build frequency {name} --role heads`, or leave heads= out of the quality"
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
    kinds = FAR_KINDS if kind == AUTO else (kind,)
    guide = programs.first(programs.by_kind, kinds, ahead)
    if guide is not None:
        return guide, ""
    if programs.refusals:
        return None, f"the drive has no room for it{programs.refusals}"
    return None, "no program on the drive looks further ahead"


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
