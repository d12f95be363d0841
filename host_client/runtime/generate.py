"""One generation, measured: the text, how fast it came, and what host and drive did for it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from host_client.runtime.causal_lm import runtime_of
from host_client.runtime.memory_limit import EnforcedReport
from host_client.runtime.tally import Tally
from host_client.runtime.timeline import COMPUTE, HostTimeline

NS_PER_S = 1e9


class DriveReport(BaseModel):
    """What the drive did from the first prompt token on; times are its modelled ones."""

    nand_page_reads: int
    nand_ns: int
    program_ns: int
    dram_ns: int
    link_ns: int
    queue_ns: int
    units_staged: int
    units_from_dram: int
    units_from_copies: int
    commands: int


class GenerationReport(BaseModel):
    """What `csd generate --json` prints. Sizes in bytes, times in seconds."""

    model: str
    quality: str
    predictor: str | None
    lookahead: int | None
    kept: float
    kept_heads: float
    heads_predictor: str | None
    corrections: int
    text: str
    token_ids: list[int]
    prompt_tokens: int
    tokens_per_s: float
    prefill_s: float
    dram_budget_bytes: int
    weights_bytes_16bit: int
    resident_bytes: int
    kv_cache_bytes_planned: int
    host_weights_peak_bytes: int
    host_peak_rss_bytes: int
    staged_bytes_per_token: float
    nand_page_reads_per_token: float
    late_units: int
    recovered_units: int
    host_wait_s: float
    recall: float | None
    expert_recall: float | None
    covered: float | None
    far_predictor: str | None  # brings units of later layers into the drive's DRAM
    far_lookahead: int | None  # what it is in the end, where it was learned
    far_refused: str | None  # why there is no far level, where one could be
    far_units: int  # brought from NAND
    far_units_used: int  # of those, found there by what was staged later
    recent_bytes: int  # of the budget, for neurons of the last tokens
    recent_units: int  # that were chosen and lay there, so that they were not staged
    window_ns_per_token: float  # in decode, what commands to the window took; modelled
    nand_wait_ns_per_token: float  # of that, waiting for NAND
    reader: str
    drive: DriveReport
    enforced: EnforcedReport | None = None  # with a limit that the kernel kept


class TokenClock(BaseStreamer):
    """Passes tokens on to another streamer, and notes when the first and the last one came."""

    def __init__(
        self, inner: BaseStreamer | None, now_ns: Callable[[], int], on_first: Callable[[], None]
    ) -> None:
        self._inner, self._now_ns, self._on_first = inner, now_ns, on_first
        self._prompt_seen = False
        self.times_ns: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times_ns.append(self._now_ns())
            if len(self.times_ns) == 1:
                self._on_first()
        self._prompt_seen = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> torch.Tensor:
    """The prompt as int64 [1, tokens]; through the model's chat template unless `raw`."""
    if raw or not tokenizer.chat_template:
        encoded: Any = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def random_ids(vocabulary: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """A prompt for models without a tokenizer: int64 [1, tokens], the same for the same seed."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, tokens), generator=dice)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: torch.Tensor,
    max_new_tokens: int,
    now_ns: Callable[[], int],
    streamer: BaseStreamer | None = None,
    timeline: HostTimeline | None = None,
) -> GenerationReport:
    """Generate greedily from `ids` int64 [1, tokens] and say what it took.

    Without a tokenizer there is no text, and no token ends it early. `timeline` is given the
    host's waits, reads, commands and tokens.
    """
    runtime = runtime_of(model)
    before, used_before = runtime.tally.snapshot(), runtime.brought_units_used()
    marks: list[Tally] = []
    clock = TokenClock(streamer, now_ns, lambda: marks.append(runtime.tally.snapshot()))
    runtime.engine.record(timeline)
    started_ns = now_ns()
    with torch.inference_mode():
        output = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
            **_ending(tokenizer, max_new_tokens),
        )
    if timeline is not None:
        _note_tokens(timeline, started_ns, clock.times_ns)
    new_ids = [int(token) for token in output[0, ids.shape[1] :]]
    decode = runtime.tally.since(marks[0])
    decoded = max(1, len(clock.times_ns) - 1)
    whole = runtime.tally.since(before)
    return GenerationReport(
        model=runtime.packed.name,
        quality=str(runtime.engine.quality),
        predictor=runtime.predictor,
        lookahead=runtime.lookahead,
        kept=runtime.engine.quality.kept,
        kept_heads=runtime.engine.quality.heads,
        heads_predictor=runtime.heads_predictor,
        corrections=whole.corrections,
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)) if tokenizer else "",
        token_ids=new_ids,
        prompt_tokens=ids.shape[1],
        tokens_per_s=_rate(decoded, clock.times_ns),
        prefill_s=(clock.times_ns[0] - started_ns) / NS_PER_S,
        dram_budget_bytes=runtime.plan.budget_bytes,
        weights_bytes_16bit=runtime.plan.weights_bytes,
        resident_bytes=runtime.plan.resident_bytes,
        kv_cache_bytes_planned=runtime.plan.kv_bytes,
        host_weights_peak_bytes=runtime.weights_bytes,
        host_peak_rss_bytes=peak_rss_bytes(),
        staged_bytes_per_token=decode.staged_bytes / decoded,
        nand_page_reads_per_token=decode.nand_page_reads / decoded,
        late_units=whole.late_units,
        recovered_units=runtime.copies.recovered_units,
        host_wait_s=whole.wait_ns / NS_PER_S,
        recall=whole.recall,
        expert_recall=whole.expert_recall,
        covered=whole.covered,
        far_predictor=runtime.far.kind if runtime.far is not None else None,
        far_lookahead=runtime.far_lookahead,
        far_refused=runtime.no_far,
        far_units=whole.brought_units,
        far_units_used=runtime.brought_units_used() - used_before,
        recent_bytes=runtime.plan.recent_bytes,
        recent_units=whole.recent_units,
        window_ns_per_token=decode.window_ns / decoded,
        nand_wait_ns_per_token=decode.nand_wait_ns / decoded,
        reader=runtime.reader.name,
        drive=_drive_report(whole),
    )


def _rate(tokens: int, times_ns: list[int]) -> float:
    """Tokens a second behind the first; 0 where there is none."""
    seconds = (times_ns[-1] - times_ns[0]) / NS_PER_S
    return tokens / seconds if seconds else 0.0


def _ending(tokenizer: PreTrainedTokenizerBase | None, max_new_tokens: int) -> dict[str, Any]:
    """What transformers' `generate` is told of the end of a text."""
    if tokenizer is None:
        return {"min_new_tokens": max_new_tokens, "pad_token_id": 0}
    return {"pad_token_id": tokenizer.eos_token_id}


def _note_tokens(timeline: HostTimeline, started_ns: int, times_ns: list[int]) -> None:
    for number, (start_ns, end_ns) in enumerate(pairwise([started_ns, *times_ns])):
        timeline.note(COMPUTE, f"token {number}", start_ns, end_ns)


def _drive_report(tally: Tally) -> DriveReport:
    fields = {name: getattr(tally, name) for name in DriveReport.model_fields}
    return DriveReport(**fields)


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most memory this process ever had resident, as the kernel counts it (VmHWM)."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{status} has no VmHWM line")
