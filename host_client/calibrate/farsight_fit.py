"""A `farsight` program fitted to text: what every layer will want, from the embedding alone.

It begins in closed form. The ridge regression of all layers' wanted units at once, cut to the
width of the transformer, is the best that any linear map through so few values can say; its two
thin factors are the transformer's input and its heads, and the blocks between add nothing yet.
Then everything is trained by gradient: each unit of each layer a yes or no. A step sees a few
layers only, dealt out anew each time, so that its memory does not grow with the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from csd_protocol.program_file import AttentionShape, Tensor
from host_client.calibrate.dense_model import best_device, rms_norm
from host_client.calibrate.farsight import Farsight
from host_client.calibrate.labels import Labels
from host_client.calibrate.reduced_rank import Whitened, as_log_odds, leading_directions
from host_client.calibrate.training import (
    HELD_BACK,
    Schedule,
    Weights,
    found_share,
    train,
)
from host_client.runtime.refusals import RequestRefused

Progress = Callable[[int, int], None]

EPOCHS_DEFAULT = 6
_SHARE_DEFAULT = 0.04  # of the model's parameters
_RATE, _BATCH = 1e-3, 2  # windows a step
_LAYERS_AT_ONCE = 10
_BLOCKS, _HEAD_DIM, _ROPE_THETA = 2, 16, 1e4


@dataclass(frozen=True, slots=True)
class SightText:
    """What a farsight is fitted to."""

    hidden: torch.Tensor  # float32 [windows, tokens, hidden], the embedding
    wanted: Sequence[Labels]  # by layer, window after window

    @property
    def held_back(self) -> int:
        """Windows at the end that decide which epoch is kept."""
        return max(1, len(self.hidden) // HELD_BACK)


def width_for(of_model: int, share: float | None, hidden: int, outputs: int) -> int:
    """The widest transformer with such a share of a model's parameters; `outputs`: all its units.

    Without a share 4 %, or more if the narrowest needs it. Raises RequestRefused when not even the
    narrowest has as few as were asked for.
    """
    width = _HEAD_DIM
    parameters = int((_SHARE_DEFAULT if share is None else share) * of_model)
    if share is None and _parameters(width, hidden, outputs) > parameters:
        return width
    if _parameters(width, hidden, outputs) > parameters:
        raise RequestRefused(
            f"a farsight of {parameters:,} parameters: the narrowest for this model has "
            f"{_parameters(width, hidden, outputs):,}. Give it a larger share"
        )
    while _parameters(width + _HEAD_DIM, hidden, outputs) <= parameters:
        width += _HEAD_DIM
    return width


def _parameters(width: int, hidden: int, outputs: int) -> int:
    """Of matrices; vectors are few."""
    return width * (hidden + outputs + _BLOCKS * (4 * width + 3 * _inner(width)))


def _inner(width: int) -> int:
    return 8 * width // 3


def fit_farsight(
    text: SightText, width: int, rms_eps: float, epochs: int, progress: Progress
) -> Farsight:
    """Weights on the CPU, wherever they were trained.

    The last eighth of the windows is held back and decides which epoch is kept. Raises
    RequestRefused for a text of one window.
    """
    known, device = len(text.hidden) - text.held_back, best_device()
    if known == 0:
        raise RequestRefused("a farsight is judged by text that it was not fitted to: give it more")
    tokens = text.hidden.shape[1]
    hidden = text.hidden.to(device)
    weights = _closed_form(hidden[:known], text.wanted, width, rms_eps)
    shape = AttentionShape(
        heads=width // _HEAD_DIM,
        kv_heads=width // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        rope_theta=_ROPE_THETA,
        context=tokens,  # farther apart than this, positions were never seen in training
    )
    layers = tuple(range(len(text.wanted)))
    sight = Farsight(shape, rms_eps, _BLOCKS, layers, weights)
    dice = torch.Generator().manual_seed(0)

    def add_gradients(ids: torch.Tensor) -> None:
        rows = (ids[:, None] * tokens + torch.arange(tokens)).flatten()
        features = sight.features(hidden[ids.to(device)]).flatten(0, 1)
        apart = features.detach().requires_grad_()
        dealt = torch.randperm(len(layers), generator=dice)[:_LAYERS_AT_ONCE].tolist()
        for layer in dealt:  # one after the other: their logits are what takes memory
            logits = sight.scores(layer, apart)
            wanted = text.wanted[layer].rows(rows, device)
            (F.binary_cross_entropy_with_logits(logits, wanted) / len(dealt)).backward()
        features.backward(apart.grad)

    def recall() -> float:
        features = sight.features(hidden[known:]).flatten(0, 1)
        return _mean_recall(sight, features, text.wanted, slice(known * tokens, None), device)

    train(weights, known, add_gradients, recall, Schedule(epochs, _RATE, _BATCH), progress)
    return replace(sight, weights={name: values.cpu() for name, values in weights.items()})


def _mean_recall(
    sight: Farsight,
    features: torch.Tensor,
    wanted: Sequence[Labels],
    rows: slice,
    device: torch.device,
) -> float:
    shares = [
        found_share(sight.scores(layer, features), of_layer.rows(rows, device), of_layer.wanted)
        for layer, of_layer in enumerate(wanted)
    ]
    return sum(shares) / len(shares)


def _closed_form(
    hidden: torch.Tensor, wanted: Sequence[Labels], width: int, rms_eps: float
) -> Weights:
    """All weights, before any training; `hidden` [windows, tokens, hidden]."""
    norm = torch.ones(hidden.shape[-1], device=hidden.device)
    x = rms_norm(hidden, norm, rms_eps).flatten(0, 1)
    whitened = Whitened(x)

    def correlations(of_layer: Labels) -> tuple[torch.Tensor, torch.Tensor]:
        """With wanted units [hidden, units], and each unit's share [units]."""
        labels = of_layer.rows(slice(0, len(x)), hidden.device)
        share = labels.mean(0)
        return whitened.correlations(labels, share), share

    squares = torch.zeros(len(norm), len(norm), device=hidden.device)
    for of_layer in wanted:  # twice over: all layers' correlations together are too much to keep
        found, _ = correlations(of_layer)
        squares.addmm_(found, found.t())
    directions = leading_directions(squares, width)
    weights = {
        Tensor.INPUT_NORM.value: norm,
        Tensor.INPUT.value: whitened.inner(directions),
        Tensor.OUTPUT_NORM.value: torch.ones(width, device=hidden.device),
    }
    for layer, of_layer in enumerate(wanted):
        found, share = correlations(of_layer)
        head, bias = as_log_odds(found.t() @ directions, share)
        weights |= {Tensor.HEAD.of(layer): head, Tensor.HEAD_BIAS.of(layer): bias}
    return weights | _blocks(width, hidden.device)


def _blocks(width: int, device: torch.device) -> Weights:
    """Blocks that add nothing yet: what leads out of them is zero."""
    dice = torch.Generator().manual_seed(0)
    inner = _inner(width)
    shapes = {
        Tensor.BLOCK_Q: (width, width),
        Tensor.BLOCK_K: (width, width),
        Tensor.BLOCK_V: (width, width),
        Tensor.BLOCK_GATE: (inner, width),
        Tensor.BLOCK_UP: (inner, width),
    }
    weights: Weights = {}
    for block in range(_BLOCKS):
        for name, (rows, columns) in shapes.items():
            drawn = torch.randn(rows, columns, generator=dice) / columns**0.5
            weights[name.of(block)] = drawn.to(device)
        weights[Tensor.BLOCK_O.of(block)] = torch.zeros(width, width, device=device)
        weights[Tensor.BLOCK_DOWN.of(block)] = torch.zeros(width, inner, device=device)
        for norm in (Tensor.BLOCK_ATTN_NORM, Tensor.BLOCK_FFN_NORM):
            weights[norm.of(block)] = torch.ones(width, device=device)
    return weights
