"""Programs trained by gradient: AdamW, the rate on a cosine, and the best epoch by recall.

What is trained is a table of weights under the names that the program file has. The epoch that
finds most of what rows held back wanted is kept, the untrained weights among them: training never
makes a program worse than where it began.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Weights = dict[str, torch.Tensor]
Progress = Callable[[int, int], None]  # steps done, steps in all

_SEED = 0
_WARM_UP = 0.1  # of the steps, until the rate is there
_WEIGHT_DECAY = 0.1
_GRADIENT_MAX = 1.0  # norm of all gradients together
HELD_BACK = 8  # one of so many rows is kept out of training, to choose the epoch by


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    epochs: int
    rate: float  # the highest
    batch: int  # examples a step


def train(
    weights: Mapping[str, torch.Tensor],
    examples: int,
    add_gradients: Callable[[torch.Tensor], None],
    recall: Callable[[], float],
    schedule: Schedule,
    progress: Progress = lambda done, total: None,
) -> float:
    """Trains `weights` in place; returns the recall of what they end as.

    `add_gradients` is given the numbers of a step's examples and adds to the weights' gradients;
    `recall` is of rows that are no examples.
    """
    best, kept = recall(), _copies(weights)
    steps = schedule.epochs * -(-examples // schedule.batch)
    if steps == 0:
        return best
    dice = torch.Generator().manual_seed(_SEED)
    leaves = [values.requires_grad_() for values in weights.values()]
    optimizer = torch.optim.AdamW(leaves, lr=schedule.rate, weight_decay=_WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=steps + 1, pct_start=_WARM_UP, cycle_momentum=False
    )
    for _ in range(schedule.epochs):
        for ids in torch.randperm(examples, generator=dice).split(schedule.batch):
            with torch.enable_grad():
                add_gradients(ids)
            torch.nn.utils.clip_grad_norm_(leaves, _GRADIENT_MAX)
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
            progress(cosine.last_epoch, steps)
        with torch.no_grad():
            found = recall()
        if found > best:
            best, kept = found, _copies(weights)
    for name, values in weights.items():
        values.requires_grad_(False).copy_(kept[name])
    return best


def _copies(weights: Mapping[str, torch.Tensor]) -> Weights:
    return {name: values.detach().clone() for name, values in weights.items()}


def found_share(scores: torch.Tensor, wanted: torch.Tensor, count: int) -> float:
    """Of the wanted units (1; others 0), `count` a row, the share among the best scores.

    Of soft labels, the mean of those that the best scores have.
    """
    best = scores.topk(count, dim=-1, sorted=False).indices
    return float(wanted.gather(-1, best).mean())
