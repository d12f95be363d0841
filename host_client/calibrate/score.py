"""How much of what a layer truly wanted a program on the drive finds: recall and precision.

The model runs over held-out text at exact quality, off the drive. Then the program is asked through
the drive, token by token and layer by layer as a decoding host asks, in commands that choose units
and stage none (Execute Program). Wanted is the true top third of an FFN's units, or the experts
that a router chose.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel

from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.program_file import ProgramKind
from host_client.calibrate.predictor import free_program_number, read_down_norms
from host_client.calibrate.statistics import WANTED_SHARE
from host_client.calibrate.watching import Seen, Watcher
from host_client.driver import Drive, PendingCommand
from host_client.driver.commands import Origin, Told
from host_client.model.catalog import open_model
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of
from host_client.runtime.refusals import NoPredictor, RequestRefused

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
Progress = Callable[[int, int], None]  # tokens done, tokens in all

_IN_FLIGHT_MAX = 32  # commands


class LayerScore(BaseModel):
    layer: int  # as the program counts: experts of a mixture are counted through
    asked: int  # tokens
    recall: float  # of the wanted units: share that was chosen
    precision: float  # of the chosen units: share that was wanted


class ScoreReport(BaseModel):
    model: str
    program: int
    kind: str
    role: str
    lookahead: int
    kept: float  # share of an FFN's units that the program chose
    tokens: int
    recall: float  # mean over layers
    precision: float
    layers: list[LayerScore]


@dataclass(slots=True)
class _Tally:
    asked: int = 0
    wanted: int = 0
    chosen: int = 0
    found: int = 0


@dataclass(frozen=True, slots=True)
class _Question:
    """One command, and what would be the right answer."""

    layer: int  # as the program counts
    token: int
    hidden: F32  # [1, hidden]
    told: Told
    wanted: U32  # ascending


def find_program(
    drive: Drive, model: str, kind: str | None = None, program: int | None = None
) -> dict[str, Any]:
    """The entry of an active program of a model, by its number, or a kind that is not of heads.

    Raises NoPredictor.
    """
    entries = [entry for entry in drive.programs() if entry["model"] == model and entry["active"]]
    for entry in entries:
        of_kind = program is None and kind == entry["kind"] and entry["role"] != Role.HEADS
        if program == entry["program"] or of_kind:
            return entry
    known = ", ".join(_named(entry) for entry in entries) or "none"
    sought = f"program {program}" if program is not None else f"a {kind}"
    raise NoPredictor(
        f"{sought} for {model} is not active on the drive; its programs there: {known}. "
        "Build one with `csd predictor build`, or name a program file"
    )


def _named(entry: dict[str, Any]) -> str:
    of_heads = " of heads" * (entry["role"] == Role.HEADS)
    return f"{entry['program']} ({entry['kind']}{of_heads})"


@contextmanager
def loaded_for_now(drive: Drive, data: bytes) -> Iterator[int]:
    """A program file under a free number; taken off the drive again."""
    number = free_program_number(drive)
    drive.load_program(number, data)
    try:
        yield number
    finally:
        drive.unload_program(number)


def score_program(
    drive: Drive,
    packed: PackedModel,
    entry: dict[str, Any],
    windows: Sequence[torch.Tensor],
    lookahead: int,
    kept: float,
    dram: str | int,
    progress: Progress,
) -> ScoreReport:
    """Recall and precision by layer of a program as `Drive.programs` lists it.

    windows: int64 [1, tokens] each; `kept`: the share of an FFN's units that it chooses. Of a
    router's experts it chooses as many as the router. Raises RequestRefused for programs of heads.
    """
    if entry["role"] not in (Role.FFN, Role.ROUTER):
        raise RequestRefused(
            f"program {entry['program']} speaks for {entry['role']}; scores are of FFN units and "
            "of a mixture's experts"
        )
    model_id, _ = open_model(drive, packed.name)
    asking = _Asking(drive, model_id, packed, entry, lookahead, kept)
    context = max(window.numel() for window in windows)
    model = CsdModelForCausalLM.from_pretrained(packed.name, drive, dram, context=context)
    total = sum(window.numel() for window in windows)
    try:
        watcher = Watcher(model)
        for window in windows:
            asking.ask(watcher.watch(window), lambda: progress(asking.tokens, total))
    finally:
        runtime_of(model).close()
    return asking.report()


class _Asking:
    """Commands to one program, and what became of them."""

    def __init__(
        self,
        drive: Drive,
        model_id: int,
        packed: PackedModel,
        entry: dict[str, Any],
        lookahead: int,
        kept: float,
    ) -> None:
        self._drive, self._model_id, self._packed = drive, model_id, packed
        self._entry, self._lookahead, self._kept = entry, lookahead, kept
        self._kind = ProgramKind(entry["kind"])
        self._of_experts = entry["role"] == Role.ROUTER
        if self._of_experts:  # as many as the router; a part of a unit counts as one
            self._kept = (int(packed.config["num_experts_per_tok"]) - 0.5) / packed.experts
        self._norms = read_down_norms(drive, packed)
        self.tokens = 0  # that were asked for
        self._tallies: dict[int, _Tally] = {}
        self._pending: deque[tuple[PendingCommand[U32], _Question]] = deque()

    def ask(self, seen: Seen, told: Callable[[], None]) -> None:
        """All questions of one window, token after token; `told` is called behind each."""
        wanted = self._wanted(seen)
        before: dict[int, U32] = {}  # by layer: what the last token there wanted
        for token in range(seen.entered[0].shape[0]):
            for question in self._questions(seen, token, wanted, before):
                self._send(question)
                before[question.layer] = question.wanted
            self.tokens += 1
            told()
        while self._pending:
            self._settle_one()

    def _send(self, question: _Question) -> None:
        if len(self._pending) == min(_IN_FLIGHT_MAX, self._drive.queue_depth):
            self._settle_one()
        pending = self._drive.execute_program(
            self._entry["program"],
            self._model_id,
            question.layer,
            question.hidden,
            self._kept,
            question.told,
            question.token,
        )
        self._pending.append((pending, question))

    def report(self) -> ScoreReport:
        layers = [
            LayerScore(
                layer=layer,
                asked=tally.asked,
                recall=tally.found / tally.wanted,
                precision=tally.found / tally.chosen,
            )
            for layer, tally in sorted(self._tallies.items())
        ]
        return ScoreReport(
            model=self._packed.name,
            program=self._entry["program"],
            kind=self._kind,
            role=self._entry["role"],
            lookahead=self._lookahead,
            kept=self._kept,
            tokens=self.tokens,
            recall=sum(layer.recall for layer in layers) / len(layers),
            precision=sum(layer.precision for layer in layers) / len(layers),
            layers=layers,
        )

    def _settle_one(self) -> None:
        pending, question = self._pending.popleft()
        chosen = pending.result()
        tally = self._tallies.setdefault(question.layer, _Tally())
        tally.asked += 1
        tally.wanted += question.wanted.size
        tally.chosen += chosen.size
        tally.found += np.intersect1d(chosen, question.wanted, assume_unique=True).size

    def _questions(
        self, seen: Seen, token: int, wanted: dict[int, dict[int, U32]], before: dict[int, U32]
    ) -> Iterator[_Question]:
        """One token's, layer after layer: of a mixture only for experts that it went to."""
        for site, layer in self._sites:
            if token not in wanted[layer]:
                continue
            hidden, origin = self._state(seen, site.layer, token)
            if self._kind is ProgramKind.ORACLE:
                row = np.searchsorted(seen.tokens_of(site.layer, site.expert), token)
                hidden = seen.activities[layer][row]
            observed: dict[int, U32] = {}
            if self._kind is ProgramKind.WINDOW and layer in before:
                observed = {site.site: before[layer]}
            told = Told(origin, observed)
            yield _Question(layer, token, hidden[None], told, wanted[layer][token])

    def _state(self, seen: Seen, layer: int, token: int) -> tuple[F32, Origin]:
        """The hidden state that is there in time, as the runtime has it."""
        if self._kind is ProgramKind.FARSIGHT:
            return seen.entered[0][token], Origin(0)
        if self._lookahead == 0 or layer == 0:
            return seen.entered[layer][token], Origin(layer)
        behind = max(0, layer - self._lookahead)
        return seen.attended[behind][token], Origin(behind, behind_attention=True)

    @cached_property
    def _sites(self) -> list[tuple[Site, int]]:
        """Sites that the program is asked for, in order, and what it calls their layers."""
        packed, known = self._packed, {*self._entry["layers"]}
        if self._of_experts:
            layers = range(packed.layer_count)
            found = [(packed.find(Role.ROUTER, layer), layer) for layer in layers]
        else:
            found = [(site, packed.program_layer(site)) for site in packed.ffns()]
        return [(site, layer) for site, layer in found if layer in known]

    def _wanted(self, seen: Seen) -> dict[int, dict[int, U32]]:
        """By the program's layer and by token: units, ascending."""
        if self._of_experts:
            return {
                layer: dict(enumerate(np.sort(experts, axis=1).astype(np.uint32)))
                for layer, experts in enumerate(seen.experts)
            }
        wanted: dict[int, dict[int, U32]] = {layer: {} for _, layer in self._sites}
        for site, layer in self._sites:
            if layer in seen.activities:
                tokens = seen.tokens_of(site.layer, site.expert).tolist()
                scores = np.abs(seen.activities[layer]) * self._norms[layer]
                wanted[layer] = dict(zip(tokens, _top_third(scores), strict=True))
        return wanted


def _top_third(scores: F32) -> U32:
    """Units of the highest scores, ascending, [tokens, a third of them]; scores [tokens, units]."""
    count = max(1, round(WANTED_SHARE * scores.shape[1]))
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.sort(best, axis=1).astype(np.uint32)
