"""Greedy generation by a transformers model; shared by the drivers of peers that build on it."""

from typing import Any

import torch
from token_times import TokenTimes


def generate(model: Any, tokens: int, prompt: list[int], version: str) -> str:
    """The report of `TokenTimes`."""
    times = TokenTimes()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            streamer=times,
        )
    return times.report(output[0, len(prompt) :].tolist(), version)
