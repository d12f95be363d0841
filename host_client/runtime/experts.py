"""Experts of a mixture, staged as they are needed: foreseen by a gate, or once the router has said.

What a token needs of a mixture is known only behind its router, and most of a mixture is not
needed. So experts are in none of the engine's steps. In a pass over one token the drive is asked,
with the state behind one layer's attention, for the experts that its gate foresees for the next
layer; they are on their way while this layer computes. Behind the next router, what was not
foreseen is staged late. A pass over more tokens (the prompt) asks for all that its routers choose,
expert after expert, one read while another computes.

    layer l's router has run:  take what was foreseen for l
                               request what was not                          late
                               request what the gate foresees for l + 1
                               compute: resident, foreseen, late

Steps are taken in the order in which they were requested, so the gate looks one layer ahead and no
further. The first layer's experts are foreseen by the state that enters it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Site, align_up
from csd_protocol.units import format_size
from host_client.driver import TopExperts
from host_client.driver.commands import Origin, Told
from host_client.runtime.gating import Gating
from host_client.runtime.guidance import Ask
from host_client.runtime.plan import STAGE_ALIGN_BYTES, Plan
from host_client.runtime.prefetch import Arrival, Block, Prefetcher
from host_client.runtime.refusals import WindowTooSmall
from host_client.runtime.residency import ResidentSite
from host_client.runtime.schedule import Step, Wanted
from host_client.runtime.tally import Tally
from host_client.runtime.timeline import COMPUTE, HostTimeline

F32 = npt.NDArray[np.float32]

STEPS_AHEAD_MAX = 4  # of experts that a prompt needs


class Experts:
    """One lane of staging for all experts of a model. Every method is the compute thread's."""

    def __init__(
        self,
        model: PackedModel,
        plan: Plan,
        resident: dict[int, ResidentSite],
        prefetcher: Prefetcher,
        gating: Gating,
        kept: float,
        room_bytes: int,
        tally: Tally,
        now_ns: Callable[[], int],
    ) -> None:
        """room_bytes: of the drive's window. Raises WindowTooSmall when no step fits in it."""
        self._model = model
        self.sites = [model.ffns(layer) for layer in range(model.layer_count)]
        self._resident, self._prefetcher, self._tally = resident, prefetcher, tally
        self._gating, self._kept = gating, kept
        self._now_ns = now_ns
        self._experts_of_token = int(model.config["num_experts_per_tok"])
        self._step_bytes = max(self._largest_bytes(layer) for layer in range(model.layer_count))
        self._steps_max = _steps_max(room_bytes, self._step_bytes)
        self._is_guided = False
        self._token = 0  # position of the pass's row 0
        self._foreseen = -1  # the layer that was asked for ahead
        self._behind: F32 | None = None  # the state behind the running layer's attention

    def begin(self, is_guided: bool) -> None:
        """A pass starts; guided: of one token, for which programs are asked."""
        if self._prefetcher.outstanding or self._prefetcher.has_failed:
            self.drop()
        self._is_guided, self._foreseen = is_guided, -1

    def enter(self, layer: int, token: int, hidden: F32) -> None:
        """The state [rows, hidden] enters `layer`; row 0 is at position `token`."""
        self._token = token
        if layer == 0:
            self._foresee(0, Origin(0), hidden)

    def attended(self, hidden: F32) -> None:
        """The state [rows, hidden] leaves a layer's attention."""
        self._behind = hidden

    def drop(self) -> None:
        """Forget what was requested."""
        self._prefetcher.drain()
        self._foreseen = -1

    def record(self, timeline: HostTimeline | None) -> None:
        self._prefetcher.timeline = timeline

    def stage(self, layer: int, chosen: Sequence[int]) -> Iterator[tuple[int, Block]]:
        """Requests what the chosen experts lack; then, as it comes: expert and block.

        A block is valid until the next is asked for; an expert may come in several. chosen:
        ascending.
        """
        early = self._take() if self._foreseen == layer else None
        lacking = [site for site in map(self.sites[layer].__getitem__, chosen) if self._lacks(site)]
        found = [site for site in lacking if early is not None and _was_foreseen(early, site)]
        if self._is_guided and self._gating.gate is not None:
            self._tally.wanted_experts += len(lacking)
            self._tally.foreseen_experts += len(found)
        late = deque(self._steps_of(layer, [site for site in lacking if site not in found]))
        self._request(layer, late)
        return self._blocks(layer, early, found, late)

    def _blocks(
        self, layer: int, early: Arrival | None, found: list[Site], late: deque[Step]
    ) -> Iterator[tuple[int, Block]]:
        wanted = {site.site for site in found}
        while early is not None:
            yield from self._blocks_of(early, wanted)
            early = None if early.is_last else self._take()
        self._request(layer, late)  # what had no room beside what was foreseen
        while self._prefetcher.next_number == layer:
            arrival = self._take()
            if self._is_guided and self._gating.gate is not None:
                self._tally.late_units += sum(b.units.size for b in arrival.blocks.values())
            yield from self._blocks_of(arrival, arrival.blocks.keys())
            self._request(layer, late)

    def _blocks_of(self, arrival: Arrival, wanted: Set[int]) -> Iterator[tuple[int, Block]]:
        """Those of wanted sites; done with the arrival then, or when the pass is broken off."""
        try:
            for site, block in arrival.blocks.items():
                if site in wanted:
                    yield self._model.sites[site].expert, block
        finally:
            arrival.finish()

    # ---- requests ----------------------------------------------------------------------------

    def _request(self, layer: int, late: deque[Step]) -> None:
        """As much of what is late as there is room for; then what comes after this layer."""
        while late and self._prefetcher.outstanding < self._steps_max:
            self._prefetcher.request([late.popleft()], self._ask_within(layer))
        if not late and layer + 1 < len(self.sites) and self._behind is not None:
            self._foresee(layer + 1, Origin(layer, behind_attention=True), self._behind)

    def _ask_within(self, layer: int) -> Ask | None:
        """A program for the neurons of experts that the router chose; None: all neurons."""
        if not self._chooses_within or self._behind is None or self._gating.within is None:
            return None
        origin = Origin(layer, behind_attention=True)
        return Ask(self._gating.within, self._token, self._behind, Told(origin))

    def _foresee(self, layer: int, origin: Origin, hidden: F32) -> None:
        """Ask for the experts that the gate finds for a layer, unless that was done."""
        gate, is_full = self._gating.gate, self._prefetcher.outstanding >= self._steps_max
        if gate is None or not self._is_guided or is_full or self._foreseen == layer:
            return
        wanted = tuple(self._wanted(site) for site in self.sites[layer] if self._lacks(site))
        if not wanted:
            return
        program = self._gating.within if self._chooses_within else gate
        assert program is not None
        told = Told(origin, experts=TopExperts(gate, self._experts_of_token))
        step = Step(layer, wanted, self._step_bytes)
        self._prefetcher.request([step], Ask(program, self._token, hidden, told))
        self._foreseen = layer

    def _steps_of(self, layer: int, sites: list[Site]) -> Iterator[Step]:
        """These experts in steps that are no larger than what is asked for ahead."""
        wanted: list[Wanted] = []
        size_bytes = 0
        for site in sites:
            site_bytes = missing_bytes(self._resident[site.site])
            if wanted and size_bytes + site_bytes > self._step_bytes:
                yield Step(layer, tuple(wanted), size_bytes)
                wanted, size_bytes = [], 0
            wanted.append(self._wanted(site))
            size_bytes += site_bytes
        if wanted:
            yield Step(layer, tuple(wanted), size_bytes)

    def _largest_bytes(self, layer: int) -> int:
        """The most that the experts of one token may lack."""
        sizes = sorted(missing_bytes(self._resident[site.site]) for site in self.sites[layer])
        return sum(sizes[-self._experts_of_token :])

    def _wanted(self, site: Site) -> Wanted:
        return Wanted(site, keep=self._kept if self._chooses_within else 1.0)

    @property
    def _chooses_within(self) -> bool:
        return self._is_guided and self._kept < 1.0 and self._gating.within is not None

    def _lacks(self, site: Site) -> bool:
        return bool(self._resident[site.site].missing.size)

    def _take(self) -> Arrival:
        started_ns = self._now_ns()
        arrival = self._prefetcher.take()
        self._tally.wait_ns += self._now_ns() - started_ns
        if self._prefetcher.timeline is not None:
            what = f"wait for experts of layer {arrival.number}"
            self._prefetcher.timeline.note(COMPUTE, what, started_ns)
        return arrival


def missing_bytes(entry: ResidentSite) -> int:
    """What an expert takes of the window."""
    return align_up(entry.missing.size * entry.site.unit_bytes, STAGE_ALIGN_BYTES)


def _was_foreseen(early: Arrival, site: Site) -> bool:
    """Whether the gate foresaw this expert, of which something is missing."""
    chosen = early.chosen[site.site]
    return bool(chosen.units.size or (chosen.predicted is not None and chosen.predicted.size))


def _steps_max(room_bytes: int, step_bytes: int) -> int:
    """How many steps may lie in the window at once. Raises WindowTooSmall when not even one."""
    if step_bytes > room_bytes:
        raise WindowTooSmall(
            f"the experts of one token need {format_size(step_bytes)} of the drive's window at a "
            f"time; {format_size(room_bytes)} of it are for that. Enlarge the window or the DRAM "
            f"budget"
        )
    return max(1, min(STEPS_AHEAD_MAX, room_bytes // max(1, step_bytes)))
