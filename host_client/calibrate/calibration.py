"""One walk of calibration text through the dense model: what each layer's inputs and units do.

Layer by layer, so a layer's statistics are used (to round its rows, to fit a map) and let go before
the next layer is read. What stays is small: how often each unit is among the wanted, and how much
of a layer's own output leaving units out would lose.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.lab import WANTED_SHARE
from host_client.calibrate.low_bit_layers import Moments
from host_client.calibrate.selection import top

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]

# The few units of a huge activity would rule the moments, and those are never left out.
COMPUTED_SHARE = 0.1
_RIDGE = 1e-2  # of the mean second moment
_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What one layer did on the calibration text."""

    layer: DecoderLayer  # float32
    moments: Moments
    counts: U32  # [units], tokens that had the unit in their top third
    dropped: F32  # [units + 1], squared output lost, a token, when only so many units are kept
    attended: torch.Tensor  # [windows, tokens, hidden], behind this layer's attention
    head_norms: torch.Tensor  # [windows, tokens, groups], of what each KV group added there
    seen: dict[int, torch.Tensor]  # by lookahead: the same of the state that is known so early


def walk(
    model: DenseModel,
    windows: torch.Tensor,
    lookaheads: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[LayerStatistics]:
    """Statistics of each layer in order. windows: int64 [windows, tokens].

    `lookaheads`: how early hidden states are wanted in `seen`; see `choosers`.
    """
    with torch.no_grad():
        hidden = model.embed(windows)
        known: deque[torch.Tensor] = deque(maxlen=max([1, *lookaheads]))
        for number in range(model.shape.layers):
            layer = model.layer(number)
            passed = _pass(model, layer.cast(model.dtype), hidden)
            seen = {ahead: seen_state(known, hidden, ahead) for ahead in lookaheads}
            yield LayerStatistics(
                layer=layer,
                moments=passed.moments,
                counts=passed.counts,
                dropped=passed.dropped,
                attended=passed.attended,
                head_norms=passed.head_norms,
                seen=seen,
            )
            known.append(passed.attended)
            hidden = passed.hidden
            progress(number + 1, model.shape.layers)


class UnitSums:
    """What the scores of a layer's units come to, rows of them after rows."""

    def __init__(self, units: int, device: torch.device) -> None:
        self.third = max(1, round(WANTED_SHARE * units))
        self._counts = torch.zeros(units, device=device, dtype=torch.int64)
        self._dropped = torch.zeros(units + 1, device=device, dtype=torch.float64)
        self._tokens = 0

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """scores: float32 [tokens, units]. The top third of each token: bool, of that shape."""
        wanted = top(scores, self.third)
        self._counts += wanted.sum(0)
        squares = scores.sort(dim=1).values.double().pow_(2).sum(0)
        self._dropped[:-1] += squares.cumsum(0).flip(0)
        self._tokens += scores.shape[0]
        return wanted

    @property
    def counts(self) -> U32:
        """[units], tokens that had the unit in their top third."""
        return self._counts.cpu().numpy().astype(np.uint32)

    @property
    def dropped(self) -> F32:
        """[units + 1], squared output lost, a token, when only so many units are kept."""
        return (self._dropped / max(1, self._tokens)).float().cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Passed:
    attended: torch.Tensor
    head_norms: torch.Tensor
    hidden: torch.Tensor
    moments: Moments
    counts: U32
    dropped: F32


def _pass(model: DenseModel, layer: DecoderLayer, hidden: torch.Tensor) -> _Passed:
    """All windows through one layer, a few at a time."""
    units, width = layer.gate.shape
    attention, ffn = torch.zeros(width, width), torch.zeros(width, width)
    active = torch.zeros(units, units)
    sums = UnitSums(units, model.device)
    attended, head_norms, left = [], [], []
    for part in hidden.split(_WINDOWS_AT_ONCE):
        _add_moments(attention, model.normed(part, layer.attn_norm))
        outputs = model.group_outputs(layer, model.mixed(layer, part))
        head_norms.append(outputs.norm(dim=-1))
        attended.append(part + outputs.sum(-2))
        x = model.ffn_input(layer, attended[-1])
        _add_moments(ffn, x)
        activity = model.activity(layer, x)
        left.append(attended[-1] + model.summed(layer, activity))
        scores = (activity.abs() * layer.down_norm).flatten(0, 1)
        left_out = ~top(scores, round(COMPUTED_SHARE * units)).view_as(activity)
        _add_moments(active, activity.mul_(left_out))
        sums.add(scores)
    return _Passed(
        torch.cat(attended),
        torch.cat(head_norms),
        torch.cat(left),
        Moments(*(moments.double().numpy() for moments in (attention, ffn, active))),
        sums.counts,
        sums.dropped,
    )


def _add_moments(total: torch.Tensor, rows: torch.Tensor) -> None:
    flat = rows.flatten(0, 1)
    total.addmm_(flat.t(), flat)


def seen_state(known: deque[torch.Tensor], hidden: torch.Tensor, lookahead: int) -> torch.Tensor:
    """The state that a lookahead may see: see `choosers`."""
    return known[-min(lookahead, len(known))] if lookahead and known else hidden


def carrying_map(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[hidden, hidden]: its product with `seen` comes closest to wanted - seen (ridge)."""
    return ridge(seen.flatten(0, 1), (wanted - seen).flatten(0, 1))


def ridge(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[inputs, targets] of the least squares, from rows [n, inputs] to rows [n, targets]."""
    moments = inputs.t() @ inputs
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
    solved: torch.Tensor = torch.linalg.solve(moments, inputs.t() @ targets)
    return solved
