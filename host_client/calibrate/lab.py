"""The lab: what predictors and kept fractions do to a model's output, on whole windows of text.

Every setting has its own run over every block of windows, and all runs go through one layer before
the next layer is read. A run's FFN adds only the units that its chooser kept, so later layers see
what was lost before, as they would in use; attention sees all earlier tokens of the window as that
run left them, and adds only the KV groups that were kept where a setting says so. The last hidden
states are compared with the dense run's, block by block.

Runs know nothing of each other, so each core takes one after the other: twice as fast on two as
cutting every product in two, most of whose parts are too small to share.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial

import torch

from host_client.calibrate.choosers import Chooser, HeadChooser, LayerViews
from host_client.calibrate.dense_model import DenseModel
from host_client.calibrate.losses import Losses, Truth
from host_client.calibrate.outcome import LayerFigures, Outcome, QualityReport
from host_client.calibrate.selection import count_top, top

Progress = Callable[[int, int], None]  # steps done, steps in all
Views = Callable[[int], LayerViews]

WANTED_SHARE = 1 / 3  # recall is also told for the true top third, whatever a setting keeps
_BLOCK_TOKENS = 1024
_LOGIT_ROWS = 64  # positions at once: what they take is allocated again and again, and stays small


@dataclass(frozen=True, slots=True)
class Setting:
    """A point of a curve: who chooses, how many units of each layer, what is done for the rest."""

    program: str  # the curve it belongs to
    chooser: Callable[[], Chooser]
    kept: Sequence[int]  # units by layer
    correction: str | None = None  # low-bit rows that speak for the units left out
    resident: torch.Tensor | None = None  # bool [layers, units], held by the host
    use_resident: bool = False  # resident units are always computed, and the kept ones come on top
    heads: Sequence[int] | None = None  # KV groups by layer; None: all, and nobody chooses
    name: str = ""


@dataclass(slots=True)
class _Tally:
    """Sums of one layer of one setting."""

    tokens: int = 0
    computed: int = 0
    found: int = 0
    third_found: int = 0
    third_wanted: int = 0
    units: int = 0
    staged: int = 0
    groups_found: int = 0


@dataclass(slots=True)
class _Run:
    """One setting, or the dense model where there is none, on one block of windows."""

    hidden: torch.Tensor
    setting: Setting | None = None
    chooser: Chooser | None = None
    tallies: list[_Tally] = field(default_factory=list)  # by layer


@dataclass
class Lab:
    """Windows of equal length, and the model that they go through."""

    model: DenseModel
    views: Views
    windows: torch.Tensor  # int64 [windows, tokens]
    progress: Progress = field(default=lambda done, total: None)

    def measure(self, settings: Sequence[Setting]) -> QualityReport:
        """All settings in one sweep over the layers."""
        per_block = max(1, _BLOCK_TOKENS // self.windows.shape[1])
        blocks = self.windows.split(per_block)
        layers = self.model.shape.layers
        with _workers() as pool:
            dense = [_Run(self.model.embed(ids)) for ids in blocks]
            runs = [
                [_Run(self.model.embed(ids), setting, setting.chooser()) for ids in blocks]
                for setting in settings
            ]
            everyone = [*dense, *(run for of_setting in runs for run in of_setting)]
            for number in range(layers):
                views = self.views(number)
                list(pool.map(partial(self._step, views), everyone))
                self.progress(number + 1, layers + 1)
            ends = zip(blocks, *([run.hidden for run in of] for of in (dense, *runs)), strict=True)
            losses = list(pool.map(self._losses, ends))
        self.progress(layers + 1, layers + 1)
        return self._report(settings, runs, [sum(of, Losses()) for of in zip(*losses, strict=True)])

    @torch.inference_mode()
    def _step(self, views: LayerViews, run: _Run) -> None:
        """One run through one layer."""
        layer, model = views.dense, self.model
        if run.setting is None or run.chooser is None:
            attended = run.hidden + model.attention(layer, run.hidden)
            activity = model.activity(layer, model.ffn_input(layer, attended))
            run.hidden = attended + model.summed(layer, activity)
            return
        tally = _Tally()
        run.tallies.append(tally)
        run.chooser.entered(views, run.hidden)
        attended = run.hidden + self._attention(run, views, run.setting, tally)
        x = model.ffn_input(layer, attended)
        activity = model.activity(layer, x)
        scores = run.chooser.scores(views, attended, activity)
        mask = _computed(scores, run.setting, layer.number)
        truth = activity.abs().mul_(layer.down_norm)
        _count(tally, run.setting, layer.number, scores, truth, mask)
        added = model.summed(layer, activity * mask)
        if run.setting.correction is not None:
            low = views.low[run.setting.correction]
            added += model.summed(low, model.activity(low, x) * ~mask)
        run.hidden = attended + added

    def _attention(
        self, run: _Run, views: LayerViews, setting: Setting, tally: _Tally
    ) -> torch.Tensor:
        """What the KV groups add that were kept."""
        layer, groups = views.dense, self.model.shape.kv_heads
        kept = groups if setting.heads is None else setting.heads[layer.number]
        if kept == groups:
            return self.model.attention(layer, run.hidden)
        if not isinstance(run.chooser, HeadChooser):
            raise TypeError(f"{setting.name or setting.program} scores no KV groups")
        outputs = self.model.group_outputs(layer, self.model.mixed(layer, run.hidden))
        norms = outputs.norm(dim=-1)
        mask = top(run.chooser.head_scores(views, norms), kept)
        tally.groups_found += count_top(mask, norms, kept)
        return (outputs * mask[..., None]).sum(-2)

    @torch.inference_mode()
    def _losses(self, ends: tuple[torch.Tensor, ...]) -> list[Losses]:
        """The dense model's, then each setting's, of one block.

        ends: its ids [windows, tokens], then last hidden states in the same order.
        """
        targets = ends[0][:, 1:].reshape(-1)
        states = [hidden[:, :-1].flatten(0, 1) for hidden in ends[1:]]
        losses = [Losses() for _ in states]
        for start in range(0, targets.numel(), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            truth = Truth.of(self.model.logits(states[0][part]), targets[part])
            found = [truth.losses_of(self.model.logits(hidden[part])) for hidden in states[1:]]
            losses = [of + more for of, more in zip(losses, [truth.losses, *found], strict=True)]
        return losses

    def _report(
        self, settings: Sequence[Setting], runs: list[list[_Run]], losses: list[Losses]
    ) -> QualityReport:
        shape, dense = self.model.shape, losses[0]
        return QualityReport(
            tokens=self.windows.numel(),
            scored=dense.scored,
            window=self.windows.shape[1],
            dense_perplexity=dense.perplexity,
            dense_bytes_per_token=float(shape.layers * shape.ffn * shape.unit_bytes),
            dense_heads_bytes_per_token=float(shape.layers * shape.kv_heads * shape.group_bytes),
            outcomes=[
                self._outcome(setting, of_setting, loss, dense)
                for setting, of_setting, loss in zip(settings, runs, losses[1:], strict=True)
            ],
        )

    def _outcome(
        self, setting: Setting, runs: list[_Run], losses: Losses, dense: Losses
    ) -> Outcome:
        shape = self.model.shape
        tallies = [_sum(of) for of in zip(*(run.tallies for run in runs), strict=True)]
        kept_groups = setting.heads or [shape.kv_heads] * shape.layers
        return Outcome.of(
            setting.name or setting.program,
            setting.program,
            losses,
            dense,
            _layer_figures(setting, tallies, shape.kv_heads),
            staged_bytes_per_token=sum(of.staged / of.tokens for of in tallies) * shape.unit_bytes,
            correction=setting.correction,
            computed_share=sum(of.computed for of in tallies) / sum(of.units for of in tallies),
            heads_bytes_per_token=float(sum(kept_groups) * shape.group_bytes),
        )


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, each of which has torch to itself on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "csd-lab", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _computed(scores: torch.Tensor, setting: Setting, layer: int) -> torch.Tensor:
    """The units that the host adds up: bool [windows, tokens, units]."""
    if not setting.use_resident:
        return top(scores, setting.kept[layer])
    assert setting.resident is not None
    resident = setting.resident[layer]
    absent = scores.masked_fill(resident, -torch.inf)
    wanted = min(setting.kept[layer], int((~resident).sum()))
    return top(absent, wanted) | resident


def _count(
    tally: _Tally,
    setting: Setting,
    layer: int,
    scores: torch.Tensor,
    truth: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    third = max(1, round(WANTED_SHARE * truth.shape[-1]))
    tokens = mask.shape[0] * mask.shape[1]
    tally.tokens += tokens
    tally.computed += int(mask.count_nonzero())
    tally.units += mask.numel()
    tally.found += count_top(mask, truth, setting.kept[layer])
    tally.third_wanted += third * tokens
    tally.third_found += count_top(top(scores, third), truth, third)
    absent = mask if setting.resident is None else mask & ~setting.resident[layer]
    tally.staged += int(absent.count_nonzero())


def _sum(tallies: Sequence[_Tally]) -> _Tally:
    return _Tally(*(sum(values) for values in zip(*map(astuple, tallies), strict=True)))


def _layer_figures(setting: Setting, tallies: list[_Tally], groups: int) -> list[LayerFigures]:
    layers = []
    for number, tally in enumerate(tallies):
        kept = setting.kept[number]
        kept_groups = groups if setting.heads is None else setting.heads[number]
        groups_wanted = kept_groups * tally.tokens
        figures = LayerFigures(
            layer=number,
            kept=kept,
            recall=tally.found / max(1, kept * tally.tokens),
            precision=tally.found / max(1, tally.computed),
            recall_third=tally.third_found / max(1, tally.third_wanted),
            staged_units=tally.staged / tally.tokens,
            kept_groups=kept_groups,
            groups_recall=tally.groups_found / groups_wanted if kept_groups < groups else None,
        )
        layers.append(figures)
    return layers
