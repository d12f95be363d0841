"""Perplexity of a quality setting beside the dense model's, on the same positions of the same text.

The dense figure is the exact runtime's over whole windows; a kept fraction is measured as it is
used, token by token through the drive, its own KV cache behind it.
"""

import math
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

Progress = Callable[[int, int], None]  # tokens done, tokens in all


def perplexity_in_windows(
    model: PreTrainedModel, windows: list[torch.Tensor], progress: Progress
) -> float:
    """Each window in one pass: every unit is used. windows: int64 [1, tokens]."""
    return _perplexity(model, windows, progress, _window_losses)


def perplexity_token_by_token(
    model: PreTrainedModel, windows: list[torch.Tensor], progress: Progress
) -> float:
    """Each token in a pass of its own, as in decoding: the kept fraction applies."""
    return _perplexity(model, windows, progress, _decoded_losses)


def _perplexity(
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    progress: Progress,
    losses_of: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor],
) -> float:
    losses, done = [], 0
    total = sum(window.numel() for window in windows)
    with torch.inference_mode():
        for window in windows:
            losses.append(losses_of(model, window))
            done += window.numel()
            progress(done, total)
    return math.exp(float(torch.cat(losses).double().mean()))


def _window_losses(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    logits = model(window, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")


def _decoded_losses(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    losses = []
    for position in range(window.shape[1] - 1):
        token = window[:, position : position + 1]
        logits = model(token, past_key_values=cache, use_cache=True).logits[0, -1:]
        target = window[0, position + 1 : position + 2]
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses)
