"""A text as it is decoded: what tests of the runtime compare."""

from typing import Any

import torch
from transformers import DynamicCache

PROMPT = 5  # tokens


def decode(model: Any, ids: torch.Tensor, prompt: int = PROMPT) -> torch.Tensor:
    """Logits of a pass over the prompt, then of one a token, a cache behind them."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    with torch.inference_mode():
        return torch.cat(
            [model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
        )
