"""Exact generation from the drive, in 45 % of the weights' memory, over the dense model in memory.

SmolLM2-135M, greedy, float32 arithmetic on both sides, the drive's time off. Both sides decode the
same tokens from the same prompt, in turns; the faster of the turns counts for each.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_model import save_random_llama
from benchmarks.ratio import Ratio
from host_client.driver import Drive
from host_client.model.checkpoint import Checkpoint
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of
from host_client.runtime.tally import Tally

FLOOR = 1 / 3
BUDGET = "45%"
PROMPT_TOKENS = 16
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
MS_PER_S, NS_PER_MS, BYTES_PER_MB = 1e3, 1e6, 1e6


def run(tiny: bool) -> list[Ratio]:
    with tempfile.TemporaryDirectory(prefix="csd-bench-") as name:
        folder = Path(name)
        source = (
            save_random_llama(folder / "tiny", **_TINY) if tiny else resolve_source("smollm2-135m")
        )
        tokens, turns = (4, 1) if tiny else (64, 3)
        kind = "tiny" if tiny else "edge-gen5"
        with Drive.embedded(folder / "drive.csd", drive=kind, time="off") as drive:
            with open_checkpoint(source) as checkpoint:
                dense = _dense(checkpoint)
                pack(checkpoint, drive, source.name)
            budget = 1 << 20 if tiny else BUDGET
            context = PROMPT_TOKENS + tokens
            staged = CsdModelForCausalLM.from_pretrained(
                source.name, drive, budget, context=context
            )
            try:
                return [_compare(dense, staged, tokens, turns)]
            finally:
                runtime_of(staged).close()


def _compare(dense: Any, staged: Any, tokens: int, turns: int) -> Ratio:
    prompt = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0)
    runtime = runtime_of(staged)
    dense_s, ours_s, spent = [], [], Tally()
    threads = torch.get_num_threads()
    for _ in range(turns):
        torch.set_num_threads(threads)
        dense_s.append(_seconds_a_token(dense, prompt, tokens))
        before = runtime.tally.snapshot()
        ours_s.append(_seconds_a_token(staged, prompt, tokens))
        spent = runtime.tally.since(before)
    waited_ms = spent.wait_ns / NS_PER_MS / tokens
    return Ratio(
        name=f"exact generation at a {BUDGET} budget",
        ours=1 / min(ours_s),
        reference=1 / min(dense_s),
        unit="tokens/s",
        floor=FLOOR,
        against="transformers, the dense model in memory, float32",
        notes=(
            f"{min(ours_s) * MS_PER_S:.0f} ms a token, of which {waited_ms:.0f} ms waiting for "
            f"staged units; {spent.staged_bytes / tokens / BYTES_PER_MB:.0f} MB staged a token"
        ),
    )


def _seconds_a_token(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return (time.perf_counter() - started) / tokens


def _dense(checkpoint: Checkpoint) -> Any:
    """The checkpoint as a transformers model with its weights rounded to 16 bits, in float32."""
    settings = dict(checkpoint.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    values = {
        name: checkpoint.read_rows(name, 0, checkpoint.shape(name)[0]).half().float()
        for name in checkpoint.names()
    }
    model.load_state_dict(values, strict=False)
    return model.eval()
