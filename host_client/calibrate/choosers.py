"""What a predictor would say, computed on whole windows: the drive's programs in torch.

A chooser is told of each layer's hidden states as the forward pass reaches them and scores a
layer's units from what it was allowed to see by then. `lookahead` counts as the runtime does: at 0
a layer is asked for with the state that enters it, at k with the state behind the attention of the
layer k before it; the first layers take what there is, layer 0 the embedding. `AT_FFN` is no
lookahead at all: the FFN's own input, which only a bound or a correction may use.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.selection import top

AT_FFN = -1


@dataclass(frozen=True, slots=True)
class LayerViews:
    """One layer in all the forms that a setting may ask for: dense, and low-bit by name."""

    dense: DecoderLayer
    low: Mapping[str, DecoderLayer]


class Chooser(Protocol):
    """Scores float32 [windows, tokens, units] for one block of windows. Called layer by layer."""

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        """The hidden state [windows, tokens, hidden] enters this layer."""

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        """attended: the state behind this layer's attention; activity: the true one."""


@runtime_checkable
class HeadChooser(Chooser, Protocol):
    """One that scores KV groups too."""

    def head_scores(self, views: LayerViews, norms: torch.Tensor) -> torch.Tensor:
        """Scores [windows, tokens, groups] before this layer's attention, behind `entered`.

        norms: of what each group truly adds, of the same shape.
        """


class Oracle:
    """The true score of each unit: a bound."""

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        pass

    def head_scores(self, views: LayerViews, norms: torch.Tensor) -> torch.Tensor:
        return norms

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        return activity.abs() * views.dense.down_norm


class Frequency:
    """How often each unit was active on the calibration text, whatever the token."""

    def __init__(self, counts: torch.Tensor, head_norms: torch.Tensor | None = None) -> None:
        """counts: [layers, units]; head_norms: [layers, groups], means over the same text."""
        self._counts, self._head_norms = counts.float(), head_norms

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        pass

    def head_scores(self, views: LayerViews, norms: torch.Tensor) -> torch.Tensor:
        assert self._head_norms is not None, "norms are measured where heads are to be chosen"
        return self._head_norms[views.dense.number].expand(norms.shape)

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        return self._counts[views.dense.number].expand(activity.shape)


class Window:
    """The units that the last tokens wanted, each token back worth `decay` as much."""

    def __init__(self, tokens: int, decay: float, counts: torch.Tensor, wanted: int) -> None:
        """counts: [layers, units], shares that break ties; `wanted` units count as a token's."""
        self._tokens, self._decay = tokens, decay
        self._counts, self._wanted = counts.float(), wanted

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        pass

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        wanted = top(activity.abs() * views.dense.down_norm, self._wanted).float()
        scores = torch.zeros_like(wanted)
        for age in range(1, min(self._tokens + 1, wanted.shape[1])):
            scores[:, age:] += self._decay ** (age - 1) * wanted[:, :-age]
        return scores + self._counts[views.dense.number]


class Known:
    """The hidden states of a forward pass, of which one is there in time for a layer."""

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._states: deque[torch.Tensor] = deque(maxlen=max(1, lookahead))

    def entered(self, layer: int, hidden: torch.Tensor) -> None:
        if layer == 0 or self._lookahead == 0:
            self._states.append(hidden)

    def seen(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """What this layer was asked for with; `attended` is known from now on."""
        seen = attended if self._lookahead == AT_FFN else self._states[0]
        if self._lookahead > 0:
            self._states.extend([attended] * (self._lookahead if layer == 0 else 1))
        return seen


class Shadow:
    """The FFN's own low-bit gate and up rows, on the hidden state that is there in time.

    With `maps` [hidden, hidden] by layer a state is carried to where it is wanted first:
    state @ map is added to it.
    """

    def __init__(
        self,
        model: DenseModel,
        low: str,
        lookahead: int,
        maps: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self._model, self._low, self._maps = model, low, maps
        self._known = Known(lookahead)

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        self._known.entered(views.dense.number, hidden)

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        seen = self._known.seen(views.dense.number, attended)
        if self._maps is not None:
            seen = seen + seen @ self._maps[views.dense.number]
        return unit_scores(self._model, views.low[self._low], seen)


class Rollout:
    """The drive carries the hidden state forward through its own low-bit layers, and scores that.

    Of earlier tokens a layer keeps what the last command that passed it left: keys and values of
    the freshest of the states on their way, which was behind the attention of the layer before, or,
    in the last layers, of the last one that was sent.
    """

    def __init__(self, model: DenseModel, low: str, lookahead: int) -> None:
        self._model, self._low, self._lookahead = model, low, lookahead
        self._on_the_way: deque[torch.Tensor] = deque()  # the oldest first; each enters a layer
        self._attended: list[torch.Tensor] = []  # the same behind this layer's attention
        self._mixed = torch.empty(0)  # of the oldest, in this layer

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        low, model = views.low[self._low], self._model
        if views.dense.number == 0 or self._lookahead == 0:
            self._on_the_way.append(hidden)
        states = list(self._on_the_way)
        kept = states[self._freshest(views.dense.number)]
        mixed = [model.mixed(low, state, kept) for state in states]
        pairs = zip(states, mixed, strict=True)
        self._attended = [state + model.projected(low, values) for state, values in pairs]
        self._mixed = mixed[0]
        self._on_the_way.clear()

    def head_scores(self, views: LayerViews, norms: torch.Tensor) -> torch.Tensor:
        outputs = self._model.group_outputs(views.low[self._low], self._mixed)
        scores: torch.Tensor = outputs.norm(dim=-1)
        return scores

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        low, model, number = views.low[self._low], self._model, views.dense.number
        states, self._attended = self._attended, []
        scores = unit_scores(model, low, states[0])
        if self._lookahead > 0:
            done = number == 0 or number >= self._lookahead
            for state in [*states[done:], attended]:
                x = model.ffn_input(low, state)
                self._on_the_way.append(state + model.summed(low, model.activity(low, x)))
        return scores

    def _freshest(self, layer: int) -> int:
        """Which of the states on their way passes a layer last, counted from the oldest."""
        oldest = max(0, layer - self._lookahead)
        last_sent = max(0, self._model.shape.layers - 1 - self._lookahead)
        return max(0, min(layer - 1, last_sent) - oldest)


def unit_scores(model: DenseModel, layer: DecoderLayer, attended: torch.Tensor) -> torch.Tensor:
    """|silu(gate x) * (up x)| * ||down column|| for a state behind attention."""
    activity = model.activity(layer, model.ffn_input(layer, attended))
    return activity.abs_().mul_(layer.down_norm)
