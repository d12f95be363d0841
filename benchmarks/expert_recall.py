"""Experts that a gate foresees one layer ahead, over chance: a small mixture, trained on the spot.

No trained mixture is at hand here, and in a random one the next router has little to do with this
layer's state. So a Mixtral of four layers and eight experts learns Python's language reference byte
by byte for some seconds, seeded, with transformers' own auxiliary loss that keeps experts in use;
then it decodes text that it never saw, from the drive, with its gate there and without.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.ratio import Ratio
from host_client.calibrate.gate_builder import build_gate
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.text import Split, default_text
from host_client.driver import Drive
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of
from host_client.runtime.tally import Tally

FLOOR = 2.0
EXPERTS, CHOSEN = 8, 2
PROMPT_TOKENS, WINDOW, BATCH = 16, 96, 8
VOCABULARY = 128  # bytes of ASCII


def run(tiny: bool) -> list[Ratio]:
    steps, tokens = (2, 4) if tiny else (400, 256)
    with tempfile.TemporaryDirectory(prefix="csd-bench-") as name:
        folder = Path(name)
        _trained(steps).half().save_pretrained(folder / "mixture")
        source = resolve_source(folder / "mixture")
        with Drive.embedded(folder / "drive.csd", drive="tiny", time="off") as drive:
            with open_checkpoint(source) as checkpoint:
                packed = pack(checkpoint, drive, source.name)
            without = _decode(drive, source.name, tokens)
            gate = build_gate(drive, packed, lambda done, total: None)
            load_predictor(drive, packed, "gate", gate)
            foreseen = _decode(drive, source.name, tokens)
            experts_bytes = sum(site.length_bytes for site in packed.ffns())
    return [_ratio(foreseen, without, tokens, experts_bytes)]


def _ratio(foreseen: Tally, without: Tally, tokens: int, experts_bytes: int) -> Ratio:
    kib = [tally.staged_bytes / tokens / 1024 for tally in (foreseen, without)]
    return Ratio(
        name="experts foreseen a layer ahead",
        ours=foreseen.expert_recall or 0.0,
        reference=CHOSEN / EXPERTS,
        unit="share",
        floor=FLOOR,
        against=f"chance: {CHOSEN} of {EXPERTS}",
        notes=(
            f"{kib[0]:.0f} KiB staged a token, {kib[1]:.0f} with every expert late, "
            f"{experts_bytes / 1024:.0f} in all experts"
        ),
    )


def _text(split: Split) -> torch.Tensor:
    """ASCII of the language reference, int64 [bytes]."""
    return torch.tensor(list(default_text(split).encode("ascii", "ignore")))


def _trained(steps: int) -> MixtralForCausalLM:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    text, dice = _text(Split.CALIBRATION), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        starts = torch.randint(0, text.numel() - WINDOW, (BATCH,), generator=dice)
        batch = torch.stack([text[start : start + WINDOW] for start in starts.tolist()])
        loss: Any = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _decode(drive: Drive, name: str, tokens: int) -> Tally:
    """What decoding held-out text takes, byte by byte, in 60 % of the weights' memory."""
    model = CsdModelForCausalLM.from_pretrained(name, drive, "60%", context=PROMPT_TOKENS + tokens)
    text = _text(Split.HELD_OUT)[: PROMPT_TOKENS + tokens].unsqueeze(0)
    try:
        with torch.inference_mode():
            cache = model(text[:, :PROMPT_TOKENS], use_cache=True).past_key_values
            before = runtime_of(model).tally.snapshot()
            for part in text[:, PROMPT_TOKENS:].split(1, dim=1):
                model(part, past_key_values=cache, use_cache=True)
            return runtime_of(model).tally.since(before)
    finally:
        runtime_of(model).close()
