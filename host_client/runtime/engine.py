"""The engine: one model's forward passes as a sequence of steps, requested ahead of compute.

Two ways to run a pass. A *sweep* needs every unit (exact quality, and any pass over more than a
few tokens): steps are requested as far ahead as the drive's window allows, across the end of a
pass, since the next token needs the same again. A *guided* pass (a kept fraction, decode) lets a
program on the drive choose, by the hidden states of the pass; when it is asked is `guidance`'s.
What is resident is computed in both, whatever was chosen: it costs nothing.

Modules (`layers`) call in here in the order of the forward pass: `begin`, then for each layer
`enter`, `attended`, `block` and `leave`, then `head_slices`.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.units import format_size
from host_client.driver import Drive, PendingCommand, Staged
from host_client.driver.commands import Origin
from host_client.io import Buffer
from host_client.model.calibration_record import Calibration
from host_client.runtime.allotment import kept_shares
from host_client.runtime.copies import Copies
from host_client.runtime.experts import Experts
from host_client.runtime.far_level import FarLevel
from host_client.runtime.fetch import WINDOW_SHARE, Fetcher
from host_client.runtime.guidance import Ask, Asker, Guidance, Guide
from host_client.runtime.head_groups import DENSE_LAYERS_DEFAULT, kept_by_layer, kept_fraction
from host_client.runtime.kernels import NARROW_ROWS
from host_client.runtime.lookahead import Pace
from host_client.runtime.notes import Notes, Place, Text
from host_client.runtime.plan import Plan, head_site
from host_client.runtime.prefetch import Arrival, Block, Chosen, Prefetcher
from host_client.runtime.quality import Quality
from host_client.runtime.recent import RecentSite, RecentUnits
from host_client.runtime.refusals import ContextExceeded, WindowTooSmall
from host_client.runtime.residency import ResidentSite, residency_of
from host_client.runtime.row_arithmetic import Encoding
from host_client.runtime.schedule import Schedule, Scheduler, Step, Wanted
from host_client.runtime.tally import Tally
from host_client.runtime.timeline import COMPUTE, HostTimeline

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
BOOL = npt.NDArray[np.bool_]

STEPS_AHEAD_MAX = 8
BURST_STEPS_MAX = 4  # steps of one command: fewer round trips, a later first answer
GUIDED_TOKENS_MAX = 1  # a pass over more rows wants nearly every unit anyway


class TorchThreads:
    """How many threads torch computes with: one in decode, one less than there are cores else.

    Torch's worker threads spin while they wait for each other. As many of them as cores, beside a
    drive and a reading thread that need a core as well, and a matrix product takes twenty times as
    long. What is left to torch in decode (norms, attention of one token) is too small to divide.
    """

    def __init__(self) -> None:
        self._before = torch.get_num_threads()
        self._wide = max(1, min(self._before, len(os.sched_getaffinity(0)) - 1))

    def suit(self, rows: int) -> None:
        """For a pass over so many rows."""
        torch.set_num_threads(1 if rows <= NARROW_ROWS else self._wide)

    def restore(self) -> None:
        """As it was before this model."""
        torch.set_num_threads(self._before)


class Engine:
    """Steps of one model over one drive. Not thread-safe: one forward pass at a time."""

    def __init__(
        self,
        drive: Drive,
        model_id: int,
        model: PackedModel,
        plan: Plan,
        resident: dict[int, ResidentSite],
        copies: Copies,
        prefetcher: Prefetcher,
        fetcher: Fetcher,
        quality: Quality,
        guidance: Guidance | None,
        experts: Experts | None,
        tally: Tally,
        now_ns: Callable[[], int],
        calibration: Calibration | None = None,
        recent: RecentUnits | None = None,
    ) -> None:
        self.drive, self.model_id, self.model, self.plan = drive, model_id, model, plan
        self.resident, self.quality, self.tally = resident, quality, tally
        self.head = head_site(model)
        self._kept = kept_shares(quality, calibration, model.layer_count)
        self._fetcher, self._prefetcher = fetcher, prefetcher
        self._guidance = guidance
        self.experts = experts  # of a mixture
        self._recent = recent
        self._now_ns = now_ns
        self._fetch_buffer = Buffer(plan.fetch_buffer_bytes)
        groups = model.find(Role.HEADS, 0).count
        self._kept_groups = kept_by_layer(
            quality.heads, groups, model.layer_count, DENSE_LAYERS_DEFAULT
        )
        scheduler = Scheduler(model, self.head, resident, plan.buffer_bytes)
        self._sweep = scheduler.sweep()
        self._choosing = scheduler.guided(self.kept_of)
        self._asker: Asker | None = None  # of the near program, if it is ever asked
        self._notes: Notes | None = None
        self.far: FarLevel | None = None
        if guidance is not None and self._is_asked:
            self._asker = Asker(guidance.near, guidance.heads_apart)
            self._notes = self._notes_for(guidance.near)
            self.far = self._far_level(guidance, self._asker, copies)
        self._pace = Pace(now_ns)
        self._place, self._text = Place(), Text()
        self._token = 0  # the position of the pass's first token, as programs count
        self._layers = model.layer_count
        room_bytes, _ = steps_room_bytes(drive, model, plan)
        self._ahead = _steps_ahead(room_bytes, self._sweep)
        self._layers_ahead = _steps_ahead(room_bytes, self._choosing) if guidance else 0
        self._schedule = self._sweep  # of the running pass
        self._next = 0  # the step to request next
        self._is_complete = True  # the pass that began last
        self._current: Arrival | None = None
        self._arrived_layer = -1
        self._threads = TorchThreads()

    # ---- the order of a pass -----------------------------------------------------------------

    def begin(self, rows: int) -> None:
        """A pass over `rows` = batch x tokens starts."""
        self._threads.suit(rows)
        self.tell_residency()
        guided = self._guidance is not None and rows <= GUIDED_TOKENS_MAX
        is_stale = not self._is_complete or self._prefetcher.next_number not in (None, 0)
        self._is_complete = False
        if is_stale or guided or self.guided:
            self._drop()
        if self._prefetcher.next_number is None:
            self._next = 0
        self._schedule = self._choosing if guided else self._sweep
        if guided:
            self._begin_guided()
        if self.experts is not None:
            self.experts.begin(is_guided=rows <= GUIDED_TOKENS_MAX)
        self._pump()

    def record(self, timeline: HostTimeline | None) -> None:
        """Waits, commands and reads go into this timeline from here on; None: into none."""
        self._prefetcher.timeline = timeline
        if self.experts is not None:
            self.experts.record(timeline)

    def tell_residency(self) -> None:
        """Say what this model holds, unless it was the last to speak of its packed model."""
        if self.drive.told_by(self.model_id) is not self:
            told = residency_of(self.resident.values())
            self.drive.set_residency(self.model_id, told, teller=self)
            self._text.forget()  # the other one may have told its own

    def locate(self, place: Place) -> None:
        """Where the pass that has begun stands. Raises ContextExceeded."""
        self._place = place
        if place.cached_tokens > self.plan.context:
            raise ContextExceeded(
                f"{place.cached_tokens} tokens in the KV cache; the plan made room for "
                f"{self.plan.context}. Pass a larger context (--context, or context= of "
                f"from_pretrained)"
            )
        if self.guided or self._takes_note:
            self._token = self._text.go_on(place)
        if self.guided and self._recent is not None:
            self._recent.go_on(place.cache)

    def encoding(self, site: Site) -> Encoding:
        """How the rows of a site's units are to be read."""
        return Encoding.of(site, self.model.dtype)

    @property
    def position(self) -> int:
        """Of the running pass's first token, in its text."""
        return self._place.position

    def enter(self, layer: int, hidden: F32) -> None:
        """The hidden state [rows, hidden] enters `layer`: request it, unless that was done."""
        self._release_current()
        if self._takes_note:
            self._note(layer, hidden[self._place.padding :])
        for asker in self._askers:
            asker.enter(layer, hidden)
        self._request_guided(Origin(layer), hidden)
        if self.experts is not None:
            self.experts.enter(layer, self.position, hidden)

    def attended(self, layer: int, hidden: F32) -> None:
        """The hidden state [rows, hidden] behind the attention of `layer`: request what follows."""
        if self.guided:
            self._learn_pace()
        self._request_guided(Origin(layer, behind_attention=True), hidden)
        if self.experts is not None:
            self.experts.attended(hidden)

    def block(self, site: Site) -> Block | None:
        """What was staged of a site of the current layer that comes whole, waiting for it."""
        return self._arrived(site.layer).blocks.get(site.site)

    def blocks(self, site: Site) -> Iterator[Block]:
        """What was staged of the current layer's FFN, as it comes: each is good until the next."""
        while True:
            arrival = self._arrived(site.layer)
            if site.site in arrival.blocks:
                yield arrival.blocks[site.site]
            following = arrival.number + arrival.is_last
            if following == self._schedule.first_of[site.layer + 1]:
                return
            self._release_current()
            self._current, self._arrived_layer = self._take(following), site.layer
            self._pump()

    def chosen(self, site: Site) -> Chosen | None:
        """What a guided pass has of a site of the current layer; None: nothing was to be staged."""
        return self._arrived(site.layer).chosen.get(site.site)

    def recent(self, site: Site) -> RecentSite | None:
        """What of an FFN is held since recent tokens; None: the running pass uses none."""
        if self._recent is None or not self.guided or self.kept_of(site) == 1.0:
            return None
        return self._recent.of(site)

    def choose_recent(self, site: Site) -> None:
        """What is held of an FFN was computed: what was chosen, once it is known, is worth more."""
        recent, chosen = self.recent(site), self.chosen(site)
        if recent is None or chosen is None or chosen.predicted is None:
            return
        self.tally.recent_units += int(np.count_nonzero(recent.held[chosen.predicted]))
        recent.choose(chosen.predicted)

    def leave(self, layer: int) -> None:
        """The layer's FFN is computed: its buffer is free."""
        self._arrived(layer)
        self._release_current()
        if layer == self._layers - 1:
            self._end_notes()
        self._pump()

    def head_slices(self) -> Iterator[tuple[U32, U16]]:
        """The staged rows of the output head, slice by slice: (row numbers, values [n, words])."""
        for step in self._schedule.slices:
            arrival = self._take(step.number)
            block = arrival.blocks[self.head.site]
            try:
                yield block.units, block.values
            finally:  # also when the pass is broken off here
                arrival.finish()
            self._pump()
        self._is_complete = True

    def abandon(self) -> None:
        """Forget a pass that was broken off, so that the next one starts clean."""
        self._drop()
        if self.far is not None:
            self.far.drop()
        if self.experts is not None:
            self.experts.drop()
        self._threads.restore()

    # ---- what was left out -------------------------------------------------------------------

    @property
    def corrects(self) -> bool:
        """Whether what the running pass leaves out of an FFN counts with the drive's low bits."""
        return self.guided and self.quality.corrected

    def correct(self, site: Site, x: F32) -> Callable[[], F32] | None:
        """Ask the drive for what the units of an FFN add that are not here, by its own input.

        x: float32 [rows, hidden]. Waits for what is staged; calling the result waits for the
        answer, of the same shape. None: nothing is left out.
        """
        assert self._guidance is not None
        assert self._guidance.corrector is not None
        chosen = self.chosen(site)
        if chosen is None:
            return None
        computed = self.resident[site.site].held
        computed[chosen.units] = True
        recent = self.recent(site)
        if recent is not None:
            computed[recent.units] = True
        units = np.flatnonzero(computed).astype(np.uint32)
        if units.size == site.count:
            return None
        corrector = self._guidance.corrector
        pending = self.drive.correct(corrector, self.model_id, site.layer, x, units)
        return lambda: self._corrected(pending)

    def _corrected(self, pending: PendingCommand[F32]) -> F32:
        started_ns = self._now_ns()
        values = pending.result()
        self.tally.wait_ns += self._now_ns() - started_ns
        if self._prefetcher.timeline is not None:
            self._prefetcher.timeline.note(COMPUTE, "wait for a correction", started_ns)
        self.tally.corrections += 1
        self.tally.add_run(pending.timing)
        return values

    # ---- units by name -----------------------------------------------------------------------

    def embedding_rows(self, rows: U32) -> Iterator[tuple[U32, U16]]:
        """Rows of the embedding, ascending and unique, in parts: (rows, values [n, words])."""
        site = self.model.find(Role.EMBED)
        entry = self.resident[site.site]
        here = rows[entry.position[rows] >= 0]
        if here.size:
            yield here, entry.values[entry.position[here]]
        away = rows[entry.position[rows] < 0]
        for part in self._fetchable(site, away):
            yield part, self._fetch(site, part)

    def missed_parts(self, site: Site, computed: BOOL) -> Iterator[tuple[U32, U16]]:
        """Stage late, part by part, the units of a site not in `computed`, bool [count]."""
        for part in self._fetchable(site, np.flatnonzero(~computed).astype(np.uint32)):
            self.tally.late_units += part.size
            yield part, self._fetch(site, part)

    def _fetchable(self, site: Site, units: U32) -> Iterator[U32]:
        """`units` in parts that the fetch buffer holds."""
        most = self.plan.fetch_buffer_bytes // site.unit_bytes
        for start in range(0, units.size, most):
            yield units[start : start + most]

    def _fetch(self, site: Site, units: U32) -> U16:
        self._fetcher.fetch(site, units, self._fetch_buffer)
        values = self._fetch_buffer.array[: units.size * site.unit_bytes]
        return values.reshape(units.size, site.unit_bytes).view(np.uint16)

    # ---- requests ----------------------------------------------------------------------------

    @property
    def guided(self) -> bool:
        """Whether the running pass lets the program choose."""
        return self._schedule is self._choosing

    def kept_of(self, site: Site) -> float:
        """The fraction of a site's units that a guided pass needs; 1: all of them."""
        if site.role is Role.FFN:
            return self._kept[site.layer]
        if site.role is Role.HEADS:
            return kept_fraction(self._kept_groups[site.layer], site.count)
        return 1.0

    def _request_guided(self, origin: Origin, hidden: F32) -> None:
        """Let the program choose for the layers that are due with a state from there."""
        if not self.guided:
            return
        assert self._guidance is not None
        due = min(self._guidance.near.last_asked(origin) + 1, self._layers)
        ask: Ask | None = None
        while self._next < due:  # one run of the program, unless the window is too small
            most = min(due, self._next + max(1, self._layers_ahead))
            steps = self._choosing.steps[self._next : most]
            self._next += len(steps)
            if _chooses(steps) and self._asker is not None:
                ask = ask.again() if ask else self._asker.ask(self._token, hidden, origin)
                self._prefetcher.request(steps, ask, self._shared_due(origin, due))
            else:
                self._prefetcher.request(steps)
        self._request_far(origin, hidden)
        self._pump()

    def _pump(self) -> None:
        """Request what is known to be needed, as far ahead as the window allows."""
        burst = max(1, min(BURST_STEPS_MAX, self._ahead // 2))
        while self._prefetcher.outstanding + burst <= self._ahead and self._may_request():
            steps = self._schedule.steps[self._next : self._next + burst]
            self._prefetcher.request(steps)
            self._next += len(steps)
            if self._next == len(self._schedule.steps) and self._guidance is None:
                self._next = 0

    def _may_request(self) -> bool:
        if self._next == len(self._schedule.steps):
            return False
        return not self.guided or self._next >= self._layers

    def _take(self, number: int) -> Arrival:
        if self._prefetcher.next_number is None:
            self._pump()
        assert self._prefetcher.next_number == number, (
            f"step {number} is needed, step {self._prefetcher.next_number} is on its way"
        )
        started_ns = self._now_ns()
        arrival = self._prefetcher.take()
        self.tally.wait_ns += self._now_ns() - started_ns
        if self._prefetcher.timeline is not None:
            self._prefetcher.timeline.note(COMPUTE, f"wait for step {number}", started_ns)
        if self.guided and arrival.answer is not None and number < self._layers:
            self._learn(arrival.answer)
        return arrival

    # ---- two levels --------------------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether a program is to be told which units of the running pass were active."""
        return self.guided and any(asker.guide.observes for asker in self._askers)

    def observe(self, site: Site, active: U32) -> None:
        """Units of a site were active, ascending."""
        for asker in self._askers:
            asker.observe(site.site, active)

    @property
    def _askers(self) -> tuple[Asker, ...]:
        """One a program."""
        near = () if self._asker is None else (self._asker,)
        return near if self.far is None or self.far.is_shared else (*near, self.far.asker)

    def _far_level(self, guidance: Guidance, near: Asker, copies: Copies) -> FarLevel | None:
        if guidance.far is None:
            return None
        layers = self._choosing.layers
        if guidance.far.program == guidance.near.program:
            return FarLevel(guidance.far, layers, near, None, copies, self.tally, self._recent)
        notes = self._notes_for(guidance.far)
        asker = Asker(guidance.far)
        return FarLevel(guidance.far, layers, asker, notes, copies, self.tally, self._recent)

    def _begin_guided(self) -> None:
        assert self._guidance is not None
        self._guidance.near.ahead.end_pass()
        if self.far is not None:
            self.far.begin()
        self._pace.begin()

    def _far_due(self, origin: Origin) -> list[Wanted]:
        """What is due at the far level, with a state of the kind that the near one is asked with.

        What enters the first layer is not, where its attention follows before the next command.
        """
        assert self._guidance is not None
        if self.far is None or origin.behind_attention != (self._guidance.near.ahead.layers > 0):
            return []
        return self.far.due(self._next)

    def _shared_due(self, origin: Origin, due: int) -> list[Wanted]:
        """What the near program's last command for now is to bring for the far level as well."""
        if self.far is None or not self.far.is_shared or self._next < due:
            return []
        return self._far_due(origin)

    def _request_far(self, origin: Origin, hidden: F32) -> None:
        """Ask the far program for what is due and went with no other command."""
        if self.far is not None:
            self.far.settle()
            due = self._far_due(origin)
            if due:
                self.far.send(due, self._token, hidden, origin)

    def _learn(self, answer: Staged) -> None:
        """What a command to the near program took."""
        assert self._guidance is not None
        self._guidance.near.ahead.note_drive(answer.timing.done_ns - answer.timing.submitted_ns)
        if self.far is not None:
            self.far.learn(answer)

    def _learn_pace(self) -> None:
        """What the host took for a layer."""
        layer_ns = self._pace.layer_ns(self.tally.wait_ns)
        if layer_ns is not None and self._guidance is not None:
            self._guidance.near.ahead.note_host(layer_ns)
            if self.far is not None:
                self.far.guide.ahead.note_host(layer_ns)

    # ---- what programs hear of a prompt ------------------------------------------------------

    @property
    def _takes_note(self) -> bool:
        """Whether a program is told of the running sweep, since it is of one text."""
        is_heard = self._notes is not None or (self.far is not None and self.far.hears)
        return is_heard and not self.guided and self._place.texts == 1

    def _notes_for(self, guide: Guide) -> Notes | None:
        """For a program that remembers texts."""
        if not any(guide.hears(layer) for layer in range(self.model.layer_count)):
            return None
        return Notes(self.drive, self.model_id, guide, self.tally)

    def _note(self, layer: int, hidden: F32) -> None:
        """Tell who hears it of states [rows, hidden] that enter a layer."""
        if self._notes is not None:
            self._notes.send(layer, self._token, hidden)
        if self.far is not None:
            self.far.note(layer, self._token, hidden)

    def _end_notes(self) -> None:
        if self._notes is not None:
            self._notes.settle()
        if self.far is not None:
            self.far.end_prompt()

    @property
    def _is_asked(self) -> bool:
        """Whether anything is left for a program to choose."""
        return _chooses(self._choosing.layers)

    # ---- what arrived ------------------------------------------------------------------------

    def _arrived(self, layer: int) -> Arrival:
        """The current layer's step, waiting for it."""
        if self._arrived_layer != layer:
            self._current = self._take(self._schedule.first_of[layer])
            self._arrived_layer = layer
        assert self._current is not None, "a layer is taken before its blocks are asked for"
        return self._current

    def _release_current(self) -> None:
        if self._current is not None:
            self._current.finish()
        self._current, self._arrived_layer = None, -1

    def _drop(self) -> None:
        self._release_current()
        self._prefetcher.drain()
        if self._notes is not None:
            self._notes.drop()
        self._next = 0


def _chooses(steps: Sequence[Step]) -> bool:
    """Whether a program is to choose units of these."""
    return any(wanted.keep < 1.0 for step in steps for wanted in step.wanted)


def steps_room_bytes(drive: Drive, model: PackedModel, plan: Plan) -> tuple[int, int]:
    """What the window has for the engine's steps, and for a mixture's experts.

    A step of a mixture is small, and what one token needs of its experts is large: so the steps get
    what they can use, up to half of it.
    """
    room_bytes = drive.window_bytes - drive.window_bytes // WINDOW_SHARE
    if not model.experts:
        return room_bytes, 0
    steps_bytes = min(room_bytes // 2, STEPS_AHEAD_MAX * plan.buffer_bytes)
    return steps_bytes, room_bytes - steps_bytes


def _steps_ahead(room_bytes: int, schedule: Schedule) -> int:
    """How many steps may lie in the window at once. Raises WindowTooSmall when not even one."""
    ahead = schedule.steps_ahead(room_bytes, STEPS_AHEAD_MAX)
    if ahead == 0:
        raise WindowTooSmall(
            f"one step needs {format_size(schedule.largest_bytes)} of the drive's window at a "
            f"time; {format_size(room_bytes)} of it are for that. Enlarge the window or the DRAM "
            f"budget"
        )
    return ahead
