"""Settings measured as they are used: token by token through a drive, beside its exact output.

What the lab computes on whole windows happens here in truth, so thousands of times slower; the
figures mean the same. Recall is the audit's: one layer a token, in turn.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from host_client.calibrate.choosers import AT_FFN
from host_client.calibrate.losses import Losses, Truth
from host_client.calibrate.outcome import LayerFigures, Outcome, QualityReport
from host_client.calibrate.quality import decoded_losses, dense_truths
from host_client.calibrate.sweep import TAKE_LOOKAHEAD, Asked, Rows
from host_client.driver import Drive
from host_client.runtime.audit import Audited
from host_client.runtime.causal_lm import (
    LOOKAHEAD_DEFAULT,
    CsdModelForCausalLM,
    CsdRuntime,
    runtime_of,
)
from host_client.runtime.quality import Quality

Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # progress of a setting


def check_askable(settings: Sequence[Asked]) -> None:
    """Raises ValueError for what the lab alone can measure."""
    for asked in settings:
        if asked.rows not in (None, Rows()):
            raise ValueError(
                f"{asked.name}: a drive computes with the rows of the program it has. Build that "
                "with `csd predictor build --bits --fit`, and leave bits and fit out here"
            )
        if asked.program in TAKE_LOOKAHEAD and asked.lookahead == AT_FFN:
            raise ValueError(
                f"{asked.name}: a drive is asked ahead of the FFN. Write {asked.program}@0 or more"
            )


def measure_through_drive(
    drive: Drive,
    name: str,
    settings: Sequence[Asked],
    windows: Sequence[torch.Tensor],
    dram: str | int,
    watch: Watch,
) -> QualityReport:
    """Settings of a packed model whose programs are active. windows: int64 [1, tokens].

    Raises ValueError as `check_askable` does, RequestRefused where a program is not there.
    """
    check_askable(settings)
    context = max(window.numel() for window in windows)
    exact = CsdModelForCausalLM.from_pretrained(name, drive, dram, context=context)
    try:
        with watch("exact") as progress:
            truths = dense_truths(exact, windows, progress)
        staged = float(runtime_of(exact).plan.staged_bytes_per_token)
    finally:
        runtime_of(exact).close()
    dense = sum((truth.losses for truth in truths), Losses())
    outcomes = []
    for asked in settings:
        with watch(asked.name) as progress:
            outcome = _measure(drive, name, asked, windows, truths, dense, dram, progress)
        outcomes.append(outcome)
    return QualityReport(
        tokens=sum(window.numel() for window in windows),
        scored=dense.scored,
        window=context,
        dense_perplexity=dense.perplexity,
        dense_bytes_per_token=staged,
        dense_heads_bytes_per_token=None,
        outcomes=outcomes,
    )


def _is_uniform(asked: Asked) -> bool:
    return asked.kept < 1 and not asked.allotted


def _measure(
    drive: Drive,
    name: str,
    asked: Asked,
    windows: Sequence[torch.Tensor],
    truths: Sequence[Truth],
    dense: Losses,
    dram: str | int,
    progress: Callable[[int, int], None],
) -> Outcome:
    model = CsdModelForCausalLM.from_pretrained(
        name,
        drive,
        dram,
        Quality(asked.kept, asked.corrected, asked.heads, _is_uniform(asked)),
        context=max(window.numel() for window in windows),
        lookahead=LOOKAHEAD_DEFAULT if asked.lookahead == AT_FFN else asked.lookahead,
        predictor=asked.program,
        audit=True,
    )
    runtime = runtime_of(model)
    try:
        losses = decoded_losses(model, windows, truths, progress)
    finally:
        runtime.close()
    audited = runtime.audited
    units = runtime.packed.ffns()[0].count
    return Outcome.of(
        asked.name,
        asked.curve,
        losses,
        dense,
        [_figures(number, layer) for number, layer in enumerate(audited)],
        staged_bytes_per_token=_staged_bytes(runtime) / losses.scored,
        correction="the drive's" if asked.corrected else None,
        computed_share=sum(of.computed for of in audited)
        / max(1, sum(of.audits for of in audited) * units),
    )


def _staged_bytes(runtime: CsdRuntime) -> int:
    """What crossed, less what the audit alone asked for."""
    audit_units = runtime.tally.late_units
    return runtime.tally.staged_bytes - audit_units * runtime.packed.ffns()[0].unit_bytes


def _figures(number: int, layer: Audited) -> LayerFigures:
    """A layer that no token was audited at has no recall."""
    audits = max(1, layer.audits)
    return LayerFigures(
        layer=number,
        kept=layer.wanted // audits,
        recall=layer.found / layer.wanted if layer.audits else None,
        precision=layer.found / layer.computed if layer.audits else None,
        recall_third=None,
        staged_units=None,
        kept_groups=None,
        groups_recall=None,
    )
