"""Two linear layers that say which units a state will want: `lowrank`, and `mlp` with a ReLU.

Begun in closed form, by reduced-rank regression of the wanted units, then trained by gradient as
Deja Vu (Liu et al., 2023) and LLM in a flash (Alizadeh et al., 2023) train theirs: each unit a yes
or no, or a share, binary cross entropy. Of what the units are, nothing is known here.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from csd_protocol.program_file import ProgramKind, TwoLayers
from host_client.calibrate.dense_model import best_device
from host_client.calibrate.labels import Labels, SoftLabels
from host_client.calibrate.reduced_rank import Whitened, as_log_odds, leading_directions
from host_client.calibrate.training import (
    HELD_BACK,
    Schedule,
    found_share,
    train,
)

EPOCHS_DEFAULT = 8
_RATE, _BATCH = 5e-4, 256


@dataclass(frozen=True, slots=True)
class Rows:
    """What one layer's program is fitted to."""

    inputs: torch.Tensor  # float32 [rows, hidden], normed as the program does
    wanted: Labels | SoftLabels  # of the same rows


def fit_two_layers(
    kind: ProgramKind, rows: Rows, norm: torch.Tensor, rank: int, epochs: int
) -> TwoLayers:
    """A layer of a `lowrank` or `mlp` program; `norm` is the RMSNorm's weight, [hidden].

    The last eighth of the rows is held back and decides which epoch is kept.
    """
    device = best_device()
    count, held_back = len(rows.inputs), max(1, len(rows.inputs) // HELD_BACK)
    inputs, labels = rows.inputs.to(device), rows.wanted
    known, judged = slice(0, count - held_back), slice(count - held_back, count)
    begin = _lowrank if kind is ProgramKind.LOWRANK else _mlp
    weights = begin(inputs[known], labels.rows(known, device), rank)
    wanted = labels.rows(judged, device)

    def scores(x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, weights["inner"], weights["inner_bias"])
        return F.linear(
            inner.relu() if kind is ProgramKind.MLP else inner,
            weights["outer"],
            weights["outer_bias"],
        )

    def add_gradients(ids: torch.Tensor) -> None:
        logits = scores(inputs[ids.to(device)])
        F.binary_cross_entropy_with_logits(logits, labels.rows(ids, device)).backward()

    def recall() -> float:
        return found_share(scores(inputs[judged]), wanted, labels.wanted)

    train(weights, count - held_back, add_gradients, recall, Schedule(epochs, _RATE, _BATCH))
    made = {name: values.cpu().numpy() for name, values in weights.items()}
    return TwoLayers(norm=norm.numpy(), **made)


def _lowrank(x: torch.Tensor, wanted: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """The reduced-rank regression of the wanted units."""
    return _weights(*_reduced(x, wanted, rank), wanted.mean(0))


def _mlp(x: torch.Tensor, wanted: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """The same of half the rank: z is relu(z) - relu(-z). Training then bends it."""
    inner, outer = _reduced(x, wanted, -(-rank // 2))
    both_inner, both_outer = torch.cat([inner, -inner]), torch.cat([outer, -outer], 1)
    return _weights(both_inner[:rank], both_outer[:, :rank], wanted.mean(0))


def _reduced(x: torch.Tensor, wanted: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduced-rank regression of shares: [rank, hidden] and [units, rank]."""
    whitened = Whitened(x)
    found = whitened.correlations(wanted, wanted.mean(0))
    directions = leading_directions(found @ found.t(), rank)
    return whitened.inner(directions), found.t() @ directions


def _weights(
    inner: torch.Tensor, outer: torch.Tensor, share: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of log odds, from outer rows [units, rank] of shares."""
    rows, bias = as_log_odds(outer, share)
    zeros = torch.zeros(len(inner), device=inner.device)
    return {"inner": inner, "inner_bias": zeros, "outer": rows, "outer_bias": bias}
