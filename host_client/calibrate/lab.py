"""The lab: what predictors and kept fractions do to a model's output, on whole windows of text.

Every setting has its own run over every block of windows, and all runs go through one layer before
the next layer is read. A run's FFN adds only the units that its chooser kept, so later layers see
what was lost before, as they would in use; attention sees all earlier tokens of the window as that
run left them, and adds only the KV groups that were kept where a setting says so. The last hidden
states are compared with the dense run's, block by block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel

from host_client.calibrate.choosers import Chooser, HeadChooser, LayerViews, top
from host_client.calibrate.dense_model import DenseModel

Progress = Callable[[int, int], None]  # steps done, steps in all
Views = Callable[[int], LayerViews]

WANTED_SHARE = 1 / 3  # recall is also told for the true top third, whatever a setting keeps
_BLOCK_TOKENS = 1024
_LOGIT_ROWS = 512


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


class LayerFigures(BaseModel):
    layer: int
    kept: int
    recall: float  # of the true top `kept`: share that was computed
    precision: float  # of what was computed: share that is in the true top `kept`
    recall_third: float  # of the true top third, a third chosen by the same scores
    staged_units: float  # a token: computed and not resident
    kept_groups: int  # KV groups of attention, none of them resident
    groups_recall: float  # of the true top `kept_groups`: share that was computed


class Outcome(BaseModel):
    """What one setting did, over all scored positions."""

    name: str
    program: str
    correction: str | None
    perplexity: float
    against_dense: float  # perplexity / dense - 1
    agreement: float  # share of positions with the dense model's greedy token
    kl_nats: float  # mean KL(dense || setting)
    computed_share: float  # of all FFN units
    recall: float
    precision: float
    recall_third: float
    staged_bytes_per_token: float  # of FFN units
    heads_bytes_per_token: float  # of KV groups, none of them resident
    groups_recall: float  # over the layers that leave groups out; 1 where none does
    layers: list[LayerFigures]


class LabReport(BaseModel):
    tokens: int
    scored: int  # positions: all but the first of each window
    window: int
    dense_perplexity: float
    dense_bytes_per_token: float  # FFN bytes of a pass that leaves nothing out, none resident
    dense_heads_bytes_per_token: float  # the same of KV groups
    outcomes: list[Outcome]


@dataclass(slots=True)
class _Tallies:
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
    """One setting, or the dense model, on one block of windows."""

    hidden: torch.Tensor
    chooser: Chooser | None = None


@dataclass(slots=True)
class _Losses:
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    scored: int = 0


@dataclass
class Lab:
    """Windows of equal length, and the model that they go through."""

    model: DenseModel
    views: Views
    windows: torch.Tensor  # int64 [windows, tokens]
    progress: Progress = field(default=lambda done, total: None)

    def measure(self, settings: Sequence[Setting]) -> LabReport:
        """All settings in one sweep over the layers."""
        per_block = max(1, _BLOCK_TOKENS // self.windows.shape[1])
        blocks = self.windows.split(per_block)
        layers = self.model.shape.layers
        tallies = [[_Tallies() for _ in range(layers)] for _ in settings]
        with torch.inference_mode():
            dense = [_Run(self.model.embed(ids)) for ids in blocks]
            runs = [
                [_Run(self.model.embed(ids), setting.chooser()) for ids in blocks]
                for setting in settings
            ]
            for number in range(layers):
                views = self.views(number)
                for run in dense:
                    self._dense_step(run, views)
                for setting, blocks_of, tally in zip(settings, runs, tallies, strict=True):
                    for run in blocks_of:
                        self._step(run, views, setting, tally[number])
                self.progress(number + 1, layers + 1)
            losses = self._losses(dense, runs, blocks)
        self.progress(layers + 1, layers + 1)
        return self._report(settings, tallies, losses)

    def _dense_step(self, run: _Run, views: LayerViews) -> None:
        layer, model = views.dense, self.model
        attended = run.hidden + model.attention(layer, run.hidden)
        activity = model.activity(layer, model.ffn_input(layer, attended))
        run.hidden = attended + model.summed(layer, activity)

    def _step(self, run: _Run, views: LayerViews, setting: Setting, tally: _Tallies) -> None:
        layer, model, chooser = views.dense, self.model, run.chooser
        assert chooser is not None
        chooser.entered(views, run.hidden)
        attended = run.hidden + self._attention(run, views, setting, tally)
        x = model.ffn_input(layer, attended)
        activity = model.activity(layer, x)
        scores = chooser.scores(views, attended, activity)
        mask = _computed(scores, setting, layer.number)
        _count(tally, setting, layer.number, scores, activity.abs() * layer.down_norm, mask)
        added = model.summed(layer, activity * mask)
        if setting.correction is not None:
            low = views.low[setting.correction]
            added += model.summed(low, model.activity(low, x) * ~mask)
        run.hidden = attended + added

    def _attention(
        self, run: _Run, views: LayerViews, setting: Setting, tally: _Tallies
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
        tally.groups_found += int((mask & top(norms, kept)).sum())
        return (outputs * mask[..., None]).sum(-2)

    def _losses(
        self, dense: list[_Run], runs: list[list[_Run]], blocks: Sequence[torch.Tensor]
    ) -> list[_Losses]:
        """The dense model's, then each setting's."""
        losses = [_Losses() for _ in range(1 + len(runs))]
        for index, ids in enumerate(blocks):
            targets = ids[:, 1:].reshape(-1)
            ends = [
                run.hidden[:, :-1].reshape(-1, run.hidden.shape[-1])
                for run in (dense[index], *(of[index] for of in runs))
            ]
            for start in range(0, targets.numel(), _LOGIT_ROWS):
                part = slice(start, start + _LOGIT_ROWS)
                truth = self.model.logits(ends[0][part]).log_softmax(-1)
                _add_losses(losses[0], truth, truth, targets[part])
                for loss, end in zip(losses[1:], ends[1:], strict=True):
                    log_p = self.model.logits(end[part]).log_softmax(-1)
                    _add_losses(loss, truth, log_p, targets[part])
        return losses

    def _report(
        self, settings: Sequence[Setting], tallies: list[list[_Tallies]], losses: list[_Losses]
    ) -> LabReport:
        shape = self.model.shape
        unit_bytes = 3 * shape.hidden * 2
        group_bytes = 2 * shape.group_rows * shape.hidden * 2
        dense = losses[0]
        dense_perplexity = math.exp(dense.nll / dense.scored)
        groups = shape.kv_heads
        outcomes = [
            _outcome(setting, of_layers, loss, dense_perplexity, unit_bytes, group_bytes, groups)
            for setting, of_layers, loss in zip(settings, tallies, losses[1:], strict=True)
        ]
        return LabReport(
            tokens=self.windows.numel(),
            scored=dense.scored,
            window=self.windows.shape[1],
            dense_perplexity=dense_perplexity,
            dense_bytes_per_token=float(shape.layers * shape.ffn * unit_bytes),
            dense_heads_bytes_per_token=float(shape.layers * groups * group_bytes),
            outcomes=outcomes,
        )


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
    tally: _Tallies,
    setting: Setting,
    layer: int,
    scores: torch.Tensor,
    truth: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    third = max(1, round(WANTED_SHARE * truth.shape[-1]))
    best = top(truth, setting.kept[layer])
    tally.tokens += mask.shape[0] * mask.shape[1]
    tally.computed += int(mask.sum())
    tally.units += mask.numel()
    tally.found += int((mask & best).sum())
    tally.third_wanted += third * mask.shape[0] * mask.shape[1]
    tally.third_found += int((top(scores, third) & top(truth, third)).sum())
    absent = mask if setting.resident is None else mask & ~setting.resident[layer]
    tally.staged += int(absent.sum())


def _add_losses(
    losses: _Losses, truth: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor
) -> None:
    """truth, log_p: log probabilities [positions, vocabulary] of the dense model and a setting."""
    losses.nll -= float(log_p.gather(1, targets[:, None]).double().sum())
    losses.kl += float((truth.exp() * (truth - log_p)).sum())
    losses.agreed += int((truth.argmax(-1) == log_p.argmax(-1)).sum())
    losses.scored += targets.numel()


def _outcome(
    setting: Setting,
    tallies: list[_Tallies],
    losses: _Losses,
    dense_perplexity: float,
    unit_bytes: int,
    group_bytes: int,
    groups: int,
) -> Outcome:
    kept_groups = setting.heads or [groups] * len(tallies)
    layers = [
        _layer_figures(number, setting.kept[number], kept_groups[number], groups, tally)
        for number, tally in enumerate(tallies)
    ]
    leaving_out = [layer.groups_recall for layer in layers if layer.kept_groups < groups]
    computed = sum(tally.computed for tally in tallies) / sum(tally.units for tally in tallies)
    staged = sum(layer.staged_units for layer in layers)
    perplexity = math.exp(losses.nll / losses.scored)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Outcome(
        name=setting.name or setting.program,
        program=setting.program,
        correction=setting.correction,
        perplexity=perplexity,
        against_dense=perplexity / dense_perplexity - 1,
        agreement=losses.agreed / losses.scored,
        kl_nats=losses.kl / losses.scored,
        computed_share=computed,
        recall=mean([layer.recall for layer in layers]),
        precision=mean([layer.precision for layer in layers]),
        recall_third=mean([layer.recall_third for layer in layers]),
        staged_bytes_per_token=staged * unit_bytes,
        heads_bytes_per_token=float(sum(kept_groups) * group_bytes),
        groups_recall=mean(leaving_out or [1.0]),
        layers=layers,
    )


def _layer_figures(
    number: int, kept: int, kept_groups: int, groups: int, tally: _Tallies
) -> LayerFigures:
    groups_wanted = kept_groups * tally.tokens
    return LayerFigures(
        layer=number,
        kept=kept,
        recall=tally.found / max(1, kept * tally.tokens),
        precision=tally.found / max(1, tally.computed),
        recall_third=tally.third_found / max(1, tally.third_wanted),
        staged_units=tally.staged / tally.tokens,
        kept_groups=kept_groups,
        groups_recall=1.0 if kept_groups == groups else tally.groups_found / groups_wanted,
    )
