"""What a far level takes off the near program's commands, in modelled time.

Drives of two classes whose unit cache holds an eighth of the model, in this process and on a
virtual clock, which also moves on by what a host is assumed to compute for a layer. SmolLM2-135M
decodes tokens at a kept fraction, one rollout guiding, with the far level and without. The outputs
must be the same, to the bit. Times depend on nothing but the model and the drives' figures.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import save_random_llama
from benchmarks.ratio import Ratio
from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive as DeviceDrive
from csd_device.service.endpoint import Endpoint
from csd_protocol.units import MIB
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import Kind, build_predictor
from host_client.driver import Drive
from host_client.driver.link import InProcessLink
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source
from host_client.runtime.causal_lm import CsdModelForCausalLM, runtime_of
from host_client.runtime.tally import Tally

FLOOR = 1.5
PRESETS = ("edge-gen5", "end-gen4")
CACHE_BYTES = 32 * MIB
LAYER_NS = 1_000_000  # what a host is assumed to compute for a layer
QUALITIES = ("0.5", "0.33+correct")
FAR = "rollout@2"
PROMPT_TOKENS = 16
NS_PER_MS = 1e6
_TINY = {
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@dataclass(frozen=True, slots=True)
class Bench:
    """A drive on a virtual clock, and a model on it."""

    clock: VirtualClock
    drive: Drive
    preset: str
    name: str
    dram: str | int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One run. Logits float32 [tokens, vocabulary]; the drive's clock over the tokens."""

    tokens: int
    logits: torch.Tensor
    tally: Tally
    clock_ns: int
    found: int  # units that the far level had brought

    def ms(self, ns: int) -> float:
        """A token."""
        return ns / NS_PER_MS / self.tokens


def run(tiny: bool) -> list[Ratio]:
    ratios = []
    for preset in PRESETS:
        with (
            tempfile.TemporaryDirectory(prefix="csd-bench-") as name,
            open_bench(Path(name), preset, tiny) as bench,
        ):
            ratios += [compare(bench, quality, 3 if tiny else 16) for quality in QUALITIES]
    return ratios


@contextmanager
def open_bench(folder: Path, preset: str, tiny: bool) -> Iterator[Bench]:
    """Packs the model unless the folder has it."""
    config = load_config(preset)
    cache_bytes = MIB if tiny else CACHE_BYTES
    dram = config.dram.model_copy(update={"unit_cache_bytes": cache_bytes})
    clock = VirtualClock()
    device = DeviceDrive.open(
        config.model_copy(update={"dram": dram}),
        folder / "drive.csd",
        clock=clock,
        time_mode=TimeMode.VIRTUAL,
        window_path=folder / "window",
    )
    with Drive(InProcessLink(Endpoint(device))) as drive:
        source = (
            save_random_llama(folder / "tiny", **_TINY) if tiny else resolve_source("smollm2-135m")
        )
        if not drive.programs():
            with open_checkpoint(source) as checkpoint:
                packed = pack(checkpoint, drive, source.name)
            file = build_predictor(drive, packed, Kind.ROLLOUT, lambda done, total: None)
            load_predictor(drive, packed, Kind.ROLLOUT, file)
        yield Bench(clock, drive, preset, source.name, 3 * MIB if tiny else "45%")
    device.close()


def compare(bench: Bench, quality: str, tokens: int) -> Ratio:
    alone = decode(bench, quality, "none", tokens)
    far = decode(bench, quality, FAR, tokens)
    assert torch.equal(alone.logits, far.logits), "a far level may change speed alone"
    return Ratio(
        name=f"waiting for NAND at {quality} on {bench.preset}, {FAR} bringing ahead",
        ours=1 / far.ms(far.tally.nand_wait_ns),
        reference=1 / alone.ms(alone.tally.nand_wait_ns),
        unit="tokens a modelled ms waited",
        floor=FLOOR,
        against="the same without a far level",
        notes=(
            f"a token's near commands wait {far.ms(far.tally.nand_wait_ns):.2f} ms for NAND, "
            f"without {alone.ms(alone.tally.nand_wait_ns):.2f}, and take "
            f"{far.ms(far.tally.window_ns):.2f} and {alone.ms(alone.tally.window_ns):.2f} ms; "
            f"with {LAYER_NS / NS_PER_MS:g} ms of compute a layer and nothing overlapped, a token "
            f"{far.ms(far.clock_ns):.1f} and {alone.ms(alone.clock_ns):.1f} ms; of "
            f"{far.tally.brought_units / tokens:,.0f} units brought a token "
            f"{far.found / far.tally.brought_units:.0%} were used"
        ),
    )


def decode(bench: Bench, quality: str, far: str, tokens: int, layer_ns: int = LAYER_NS) -> Decoded:
    model: Any = CsdModelForCausalLM.from_pretrained(
        bench.name, bench.drive, bench.dram, quality, context=PROMPT_TOKENS + tokens, far=far
    )
    runtime, clock = runtime_of(model), bench.clock
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: clock.advance_to(clock.now_ns() + layer_ns))
    ids = (torch.arange(PROMPT_TOKENS + tokens) * 7 % 200 + 1).unsqueeze(0)
    try:
        with torch.inference_mode():
            cache = model(ids[:, :PROMPT_TOKENS], use_cache=True).past_key_values
            runtime.engine.abandon()  # nothing of the prompt is under way any more
            before, found = runtime.tally.snapshot(), runtime.brought_units_used()
            started_ns = clock.now_ns()
            logits = [
                model(part, past_key_values=cache, use_cache=True).logits[0]
                for part in ids[:, PROMPT_TOKENS:].split(1, dim=1)
            ]
            clock_ns = clock.now_ns() - started_ns
            found = runtime.brought_units_used() - found
            spent = runtime.tally.since(before)
        return Decoded(tokens, torch.cat(logits), spent, clock_ns, found)
    finally:
        runtime.close()
