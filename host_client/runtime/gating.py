"""Which programs foresee a mixture's experts, and choose neurons within them.

Expert, then neurons within: a gate on the drive says which experts the next layer's router is
likely to choose, and the drive stages them before that router has run. At a kept fraction another
program chooses within each expert; where none is loaded, experts are taken whole. The router
itself runs on the host, so a gate decides when an expert comes, never whether.
"""

from dataclasses import dataclass
from typing import Any

from csd_protocol.packed import PackedModel, Role
from host_client.driver import Drive
from host_client.runtime.guidance import named_levels
from host_client.runtime.lookahead import AUTO
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import NoPredictor, RequestRefused

# In the order in which they are preferred.
GATES = ("gate", "frequency")
WITHIN = ("shadow", "frequency", "planted")


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


def choose_gating(
    drive: Drive,
    packed: PackedModel,
    quality: Quality,
    predictor: str | None = None,
    far: str = AUTO,
) -> Gating:
    """The active programs that a mixture of this quality makes use of.

    Raises NoPredictor for a kept fraction without any, RequestRefused for a quality that mixtures
    do not have, or a `predictor` or a `far` level by name.
    """
    for level, kind in named_levels(predictor, far):
        raise RequestRefused(
            f"{level} {kind}: {packed.name} is a mixture of experts, which takes a gate and a "
            f"program within its experts as they are loaded. Leave the {level} out"
        )
    if quality.corrected or quality.heads < 1.0:
        raise RequestRefused(
            f"quality {quality}: {packed.name} is a mixture of experts, and neither corrections "
            f"nor heads of mixtures are there yet. Ask for exact, or a kept fraction like 0.5"
        )
    gate = _preferred(drive, packed, Role.ROUTER, GATES)
    within = None if quality.exact else _preferred(drive, packed, Role.FFN, WITHIN)
    if gate is None and within is None and not quality.exact:
        raise NoPredictor(
            f"quality {quality} needs a predictor for {packed.name} on the drive, and none is "
            f"active. Run `csd predictor build gate {packed.name}` and `csd predictor build "
            f"shadow {packed.name}`, or ask for --quality exact"
        )
    kinds = tuple(f"{entry['kind']}" for entry in (gate, within) if entry is not None)
    return Gating(
        gate=gate["program"] if gate is not None else None,
        within=within["program"] if within is not None else None,
        kinds=kinds,
    )


def _preferred(
    drive: Drive, packed: PackedModel, role: Role, kinds: tuple[str, ...]
) -> dict[str, Any] | None:
    """An active program of this model that speaks for all of its sites of a role."""
    needed = {packed.program_layer(site) for site in packed.sites if site.role is role}
    able = [
        entry
        for entry in drive.programs()
        if entry["active"]
        and (entry["model"], entry["role"]) == (packed.name, role)
        and needed <= set(entry["layers"])
        and entry["kind"] in kinds
    ]
    return min(able, key=lambda entry: kinds.index(entry["kind"]), default=None)
