"""Which programs foresee a mixture's experts, and choose neurons within them.

Expert, then neurons within: a gate on the drive says which experts the next layer's router is
likely to choose, and the drive stages them before that router has run. At a kept fraction another
program chooses within each expert; where none is loaded, experts are taken whole. The router
itself runs on the host, so a gate decides when an expert comes, never whether.
"""

from dataclasses import dataclass

from csd_protocol.packed import PackedModel
from host_client.driver import Drive
from host_client.runtime.guidance import active_programs
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

GATES = ("gate",)
WITHIN = ("shadow", "frequency")  # in the order in which they are preferred


@dataclass(frozen=True, slots=True)
class Gating:
    """Program numbers; None: nobody foresees experts, or experts are taken whole."""

    gate: int | None = None
    within: int | None = None
    kinds: tuple[str, ...] = ()  # of these programs

    @property
    def predictor(self) -> str | None:
        """What reports call it."""
        return "+".join(self.kinds) or None


def choose_gating(drive: Drive, packed: PackedModel, quality: Quality) -> Gating:
    """The active programs that a mixture of this quality makes use of.

    Raises NoPredictor for a kept fraction without any, RequestRefused for a quality that mixtures
    do not have.
    """
    if quality.corrected or quality.heads < 1.0:
        raise RequestRefused(
            f"quality {quality}: {packed.name} is a mixture of experts, and neither corrections "
            f"nor heads of mixtures are there yet. Ask for exact, or a kept fraction like 0.5"
        )
    loaded = active_programs(drive, packed)
    gate = next((kind for kind in GATES if kind in loaded), None)
    within = None
    if not quality.exact:
        within = next((kind for kind in WITHIN if kind in loaded), None)
    kinds = tuple(kind for kind in (gate, within) if kind is not None)
    if not kinds and not quality.exact:
        raise NoPredictor(
            f"quality {quality} needs a predictor for {packed.name} on the drive, and none is "
            f"active. Run `csd predictor build gate {packed.name}` and `csd predictor build "
            f"shadow {packed.name}`, or ask for --quality exact"
        )
    return Gating(
        gate=loaded[gate] if gate is not None else None,
        within=loaded[within] if within is not None else None,
        kinds=kinds,
    )
