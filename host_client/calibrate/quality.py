"""A model's losses on text: the dense model's in whole windows, a kept fraction's as it is used,
token by token through the drive, its own KV cache behind it."""

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from host_client.calibrate.losses import Losses, Truth

Progress = Callable[[int, int], None]  # tokens done, tokens in all


def dense_truths(
    model: PreTrainedModel, windows: Sequence[torch.Tensor], progress: Progress
) -> list[Truth]:
    """Each window in one pass: every unit is used. windows: int64 [1, tokens].

    A truth holds a float32 a token and word of the vocabulary.
    """
    truths, done = [], 0
    total = sum(window.numel() for window in windows)
    with torch.inference_mode():
        for window in windows:
            logits = model(window, use_cache=False).logits[0, :-1]
            truths.append(Truth.of(logits.float(), window[0, 1:]))
            done += window.numel()
            progress(done, total)
    return truths


def decoded_losses(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    truths: Sequence[Truth],
    progress: Progress,
) -> Losses:
    """Each token in a pass of its own, as in decoding: the kept fraction applies."""
    losses, done = Losses(), 0
    total = sum(window.numel() for window in windows)
    with torch.inference_mode():
        for window, truth in zip(windows, truths, strict=True):
            losses += truth.losses_of(_decoded_logits(model, window))
            done += window.numel()
            progress(done, total)
    return losses


def _decoded_logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """float32 [tokens - 1, vocabulary]."""
    cache = DynamicCache(config=model.config)
    logits = [
        model(token, past_key_values=cache, use_cache=True).logits[0, -1:].float()
        for token in window[:, :-1].split(1, dim=1)
    ]
    return torch.cat(logits)
