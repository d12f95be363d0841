"""`CsdModelForCausalLM`: a transformers model whose weights lie on a drive.

model = CsdModelForCausalLM.from_pretrained("smollm2-135m", drive="unix:csd.sock", dram="45%")
model.generate(**inputs)
model.csd.close()
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from csd_protocol.opcodes import Cns
from csd_protocol.packed import PackedModel
from host_client.driver import Drive
from host_client.io import Buffer, WindowReader, open_reader
from host_client.io.opening import Kind as ReaderKind
from host_client.model.catalog import open_model, read_calibration, read_frequencies
from host_client.model.source import name_on_drive
from host_client.runtime.attach import attach, skeleton
from host_client.runtime.audit import Audited, Auditor
from host_client.runtime.checksums import Checksums
from host_client.runtime.copies import Copies, read_any_unit_table
from host_client.runtime.engine import Engine, steps_room_bytes
from host_client.runtime.experts import Experts
from host_client.runtime.fetch import Fetcher
from host_client.runtime.gating import Gating, choose_gating
from host_client.runtime.guidance import Guidance, Guide, Programs, choose_guidance
from host_client.runtime.layers import StagedFfn
from host_client.runtime.lookahead import AUTO, Lookahead
from host_client.runtime.plan import BUFFERS, Plan, make_plan, parse_budget
from host_client.runtime.prefetch import Prefetcher
from host_client.runtime.quality import Quality
from host_client.runtime.recent import RecentUnits
from host_client.runtime.recent_room import AUTO as AUTO_RECENT
from host_client.runtime.recent_room import RecentRoom
from host_client.runtime.refusals import RequestRefused
from host_client.runtime.residency import Progress, ResidentSite, load_resident
from host_client.runtime.tally import Tally

CONTEXT_DEFAULT = 512
LOOKAHEAD_DEFAULT = 1


@dataclass(slots=True)
class CsdRuntime:
    """What stands behind a model: its drive, plan, engine and sums. `model.csd`."""

    drive: Drive
    packed: PackedModel
    plan: Plan
    engine: Engine
    tally: Tally
    copies: Copies
    reader: WindowReader
    weights_bytes: int  # host memory that was allocated for units and buffers
    guidance: Guidance | None  # None at exact quality, and of a mixture
    gating: Gating | None  # of a mixture
    audited: list[Audited] = field(default_factory=list)  # by layer, where an audit was asked for
    owned: ExitStack = field(default_factory=ExitStack)

    @property
    def predictor(self) -> str | None:
        """Kind of the program that guides; None where none does."""
        if self.gating is not None:
            return self.gating.predictor
        return self.guidance.near.kind if self.guidance is not None else None

    @property
    def heads_predictor(self) -> str | None:
        """Kind of the program that chooses KV groups; None where all are kept."""
        heads = self.guidance.heads if self.guidance is not None else None
        return heads.kind if heads is not None else None

    @property
    def lookahead(self) -> int | None:
        """Layers ahead that it is asked; None where none is."""
        if self.gating is not None and self.gating.gate is not None:
            return 1
        return self.guidance.near.ahead.layers if self.guidance is not None else None

    @property
    def far(self) -> Guide | None:
        """The program that brings units of later layers into on-drive DRAM; None: nobody does."""
        far = self.engine.far
        return far.guide if far is not None and not far.stopped else None

    @property
    def far_lookahead(self) -> int | None:
        """Layers ahead that it is asked, at least; None where there is no far level."""
        if self.far is None or self.lookahead is None:
            return None
        return self.lookahead + self.far.ahead.lead

    @property
    def no_far(self) -> str | None:
        """Why there is no far level; None where there is one, or nothing to guide."""
        if self.engine.far is not None:
            return self.engine.far.stopped or None
        return self.guidance.no_far or None if self.guidance is not None else None

    def brought_units_used(self) -> int:
        """Units that a far level had brought when they were staged, as the drive counts them."""
        if self.engine.far is None:
            return 0
        self.engine.far.settle()
        used: int = self.drive.identify(Cns.WINDOW)["unit_cache"]["brought_used"]
        return used

    def close(self) -> None:
        """Stop prefetching, give leases back; end the drive when it was opened for this model."""
        self.owned.close()


class CsdModelForCausalLM:
    """Makes transformers models that run on a drive; never instantiated itself."""

    @staticmethod
    def from_pretrained(
        model: str | Path,
        drive: Drive | str | None = None,
        dram: str | int = "45%",
        quality: str | float | Quality = "exact",
        *,
        context: int = CONTEXT_DEFAULT,
        lookahead: int | str = LOOKAHEAD_DEFAULT,
        predictor: str | None = None,
        far: str = AUTO,
        recent: str | int = AUTO_RECENT,
        reader: ReaderKind = "auto",
        audit: bool = False,
        progress: Progress | None = None,
    ) -> PreTrainedModel:
        """A transformers causal language model over a packed model.

        model: a folder, a .gguf file, `smollm2-135m`, or the name it has on the drive.
        drive: an open `Drive`, an address, or None for an embedded one.
        dram: host memory for weights, staging buffers and KV cache: `5GiB`, bytes or `45%`.
        quality: `exact`, or what is kept in decode, like 0.5 or 0.1+correct; see `Quality`.
        context: tokens that the KV cache has room for. Longer prompts than
            `prompt_chunk_tokens` go through the model in pieces.
        lookahead: how many layers ahead the drive's program is asked (kept fraction only);
            `auto`: as many as the first tokens' times ask for.
        predictor: kind of the program that chooses; None: the best that is active.
        far: kind of the program that brings units of later layers into on-drive DRAM, or
            KIND@LAYERS; `auto`: the best that is active, where it is of use; `none`.
        recent: memory for neurons of the last tokens (kept fraction only): a size, a share of what
            neurons have like `25%`, 0, or `auto`: a quarter.
        audit: measure recall in decode (kept fraction only; stages one layer's rest a token).

        The result's `csd` is a `CsdRuntime`; close it when done. Raises ModelError, DriveError,
        ReaderError, RequestRefused (budget, quality, predictor, window).
        """
        parsed = Quality.parse(quality)
        if context < 1:
            raise RequestRefused(f"a context of {context} tokens; it has one at least")
        ahead = Lookahead.parse(lookahead, LOOKAHEAD_DEFAULT)
        with ExitStack() as undo:
            opened = _open_drive(drive, undo)
            name = name_on_drive(model)
            settings = _Settings(parsed, context, ahead, predictor, far, recent, reader)
            runtime = _start(opened, name, dram, settings, progress or _silent, undo)
            made = skeleton(runtime.packed)
            attach(made, runtime.engine)
            if audit and not parsed.exact:
                runtime.audited = _audit(made, runtime.engine)
            runtime.owned = undo.pop_all()
        made.csd = cast(Any, runtime)
        return made


@dataclass(frozen=True, slots=True)
class _Settings:
    quality: Quality
    context: int
    lookahead: Lookahead
    predictor: str | None
    far: str
    recent: str | int
    reader: ReaderKind


def runtime_of(model: PreTrainedModel) -> CsdRuntime:
    """The runtime behind a model that `from_pretrained` made."""
    return cast(CsdRuntime, model.csd)


def _open_drive(drive: Drive | str | None, undo: ExitStack) -> Drive:
    if isinstance(drive, Drive):
        return drive
    opened = Drive.embedded(time="virtual") if drive is None else Drive.connect(drive)
    return undo.enter_context(opened)


def _start(
    drive: Drive,
    name: str,
    dram: str | int,
    settings: _Settings,
    progress: Progress,
    undo: ExitStack,
) -> CsdRuntime:
    """Load what is resident and start prefetching; what has to be undone goes to `undo`."""
    model_id, packed = open_model(drive, name)
    frequencies = read_frequencies(drive, packed)
    room = RecentRoom.of(settings.recent, settings.quality, bool(packed.experts))
    plan = make_plan(packed, parse_budget(dram, packed), settings.context, frequencies, room)
    guidance = gating = None
    if packed.experts:
        gating = choose_gating(drive, packed, settings.quality, settings.predictor, settings.far)
    else:
        programs = Programs(drive, model_id, packed)
        guidance = choose_guidance(
            programs,
            name,
            settings.quality,
            settings.lookahead,
            settings.predictor,
            settings.far,
            plan.staged_bytes_per_token,
        )
    tally = Tally()
    readers = [
        undo.enter_context(WindowReader(lambda: open_reader(drive.window_path, settings.reader)))
        for _ in range(3 if packed.experts else 2)
    ]
    checksums = Checksums(packed, read_any_unit_table(drive, packed).crcs)
    copies = Copies(drive, model_id, packed)
    fetcher = Fetcher(drive, copies, readers[0], checksums, tally)
    resident = load_resident(packed, plan, fetcher, frequencies, progress)
    buffers = [Buffer(plan.buffer_bytes) for _ in range(BUFFERS)]
    recent = RecentUnits(packed, plan.recent_units) if plan.recent_units else None
    prefetcher = Prefetcher(drive, copies, readers[1], checksums, resident, buffers, tally, recent)
    undo.callback(prefetcher.close)
    experts = None
    if gating is not None:
        expert_buffers = [Buffer(plan.expert_buffer_bytes) for _ in range(BUFFERS)]
        buffers = [*buffers, *expert_buffers]
        lane = Prefetcher(drive, copies, readers[2], checksums, resident, expert_buffers, tally)
        undo.callback(lane.close)
        _, room_bytes = steps_room_bytes(drive, packed, plan)
        kept, now_ns = settings.quality.kept, time.perf_counter_ns
        experts = Experts(packed, plan, resident, lane, gating, kept, room_bytes, tally, now_ns)
    engine = Engine(
        drive,
        model_id,
        packed,
        plan,
        resident,
        copies,
        prefetcher,
        fetcher,
        settings.quality,
        guidance,
        experts,
        tally,
        time.perf_counter_ns,
        read_calibration(drive, packed),
        recent,
    )
    undo.callback(engine.abandon)
    weights = _allocated(resident, buffers) + plan.fetch_buffer_bytes + plan.recent_bytes
    return CsdRuntime(
        drive, packed, plan, engine, tally, copies, readers[1], weights, guidance, gating
    )


def _allocated(resident: dict[int, ResidentSite], buffers: list[Buffer]) -> int:
    return sum(entry.values.nbytes for entry in resident.values()) + sum(
        buffer.size for buffer in buffers
    )


def _audit(made: PreTrainedModel, engine: Engine) -> list[Audited]:
    auditor = Auditor(engine)
    for module in made.modules():
        if isinstance(module, StagedFfn):
            module.auditor = auditor
    return auditor.layers


def _silent(done_bytes: int, total_bytes: int) -> None:
    """Progress for callers that want none."""
