"""How often each FFN neuron is among the ones a token needs most, measured on text."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from host_client.runtime.layers import StagedFfn
from host_client.runtime.staged_experts import StagedExperts

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

WANTED_SHARE = 1 / 3  # a neuron counts when its score is in the top third of its layer


class ActivityCounter:
    """Observes FFNs in passes that use every neuron; counts the top share a token by score.

    The score of a neuron is |silu(gate) * up| * ||down||. `counts`: uint32 [FFNs, neurons].
    A mixture's expert sees the rows that are sent to it, so counts say how often it is chosen, too.
    """

    def __init__(self, down_norms: F32, share: float = WANTED_SHARE) -> None:
        """down_norms: float32 [FFNs, neurons]."""
        self.counts: U32 = np.zeros(down_norms.shape, np.uint32)
        self._down_norms = down_norms
        self._wanted = max(1, round(share * down_norms.shape[1]))
        self._scores: dict[int, F32] = {}
        self._seen: dict[int, int] = {}

    def __call__(self, layer: int, units: U32, activity: F32) -> None:
        """One part of a layer; parts of one pass together cover its neurons once."""
        neurons = self.counts.shape[1]
        scores = self._scores.setdefault(layer, np.empty((activity.shape[0], neurons), np.float32))
        scores[:, units] = activity * self._down_norms[layer, units]
        self._seen[layer] = self._seen.get(layer, 0) + units.size
        if self._seen[layer] == neurons:
            self._count(layer, scores)
            del self._scores[layer], self._seen[layer]

    def _count(self, layer: int, scores: F32) -> None:
        top = np.argpartition(-scores, self._wanted - 1, axis=1)[:, : self._wanted]
        self.counts[layer] += np.bincount(top.reshape(-1), minlength=self.counts.shape[1]).astype(
            np.uint32
        )


def measure_frequencies(
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    down_norms: F32,
    progress: Callable[[int, int], None],
) -> U32:
    """Run `model` (exact quality) over the windows; counts uint32 [FFNs, neurons].

    progress: tokens done, tokens in all.
    """
    counter = ActivityCounter(down_norms)
    ffns = [module for module in model.modules() if isinstance(module, StagedFfn | StagedExperts)]
    total = sum(window.numel() for window in windows)
    done = 0
    for ffn in ffns:
        ffn.observer = counter
    try:
        with torch.inference_mode():
            for window in windows:
                model(window, use_cache=False, logits_to_keep=1)
                done += window.numel()
                progress(done, total)
    finally:
        for ffn in ffns:
            ffn.observer = None
    return counter.counts
