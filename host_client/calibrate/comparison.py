"""One row of a comparison of qualities: perplexity, staged bytes a token, recall."""

from collections.abc import Callable

import torch
from pydantic import BaseModel

from host_client.calibrate.quality import perplexity_in_windows, perplexity_token_by_token
from host_client.driver import Drive
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of


class QualityRow(BaseModel):
    quality: str
    predictor: str | None
    perplexity: float
    staged_bytes_per_token: float
    recall: float | None


def compare_qualities(
    drive: Drive,
    name: str,
    quality: str,
    windows: list[torch.Tensor],
    dram: str,
    lookahead: int,
    progress: Callable[[int, int], None],
) -> QualityRow:
    """Measure one setting of a packed model. windows: int64 [1, tokens].

    `exact` is measured in whole windows; its staged bytes are the plan's for one decoded token.
    """
    context = max(window.numel() for window in windows)
    model = CsdModelForCausalLM.from_pretrained(
        name, drive, dram, quality, context=context, lookahead=lookahead, audit=True
    )
    runtime = runtime_of(model)
    before = runtime.tally.snapshot()
    try:
        if runtime.engine.quality.exact:
            perplexity = perplexity_in_windows(model, windows, progress)
            staged = float(runtime.plan.staged_bytes_per_token)
        else:
            perplexity = perplexity_token_by_token(model, windows, progress)
            passes = sum(window.numel() - 1 for window in windows)
            staged = runtime.tally.since(before).staged_bytes / passes
    finally:
        runtime.close()
    return QualityRow(
        quality=quality,
        predictor=runtime.predictor,
        perplexity=perplexity,
        staged_bytes_per_token=staged,
        recall=runtime.tally.recall,
    )
