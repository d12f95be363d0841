"""`csd pack` and `csd generate`: the commands that bring torch and transformers in."""

import time as host_time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase, TextStreamer

from csd_protocol.opcodes import LogPage
from csd_protocol.packed import COPIES_MAX, PackedModel
from csd_protocol.units import format_size
from host_client.calibrate.planting import load_router, plant
from host_client.calibrate.preparation import (
    CALIBRATION_TOKENS,
    Loaded,
    calibrate,
    load_predictors,
)
from host_client.cli import reports
from host_client.cli.console import TimeMode, err, open_drive, out, progress_bytes, progress_count
from host_client.cli.log_commands import write_trace
from host_client.cli.options import (
    Active,
    Dram,
    DriveAddress,
    Enforce,
    FarKind,
    Json,
    LookaheadText,
    Model,
    OptionalModel,
    PredictorKind,
    PromptTokens,
    QualityText,
    Recent,
    Seed,
    Synthetic,
    Time,
    UnitBits,
)
from host_client.cli.tokenizers import load_tokenizer
from host_client.driver import Drive
from host_client.io.opening import Kind as ReaderKind
from host_client.model.catalog import open_model
from host_client.model.checkpoint import Checkpoint, Dtype
from host_client.model.formats import open_checkpoint
from host_client.model.packer import DRAWN_SAVE_EVERY_BYTES, SAVE_EVERY_BYTES
from host_client.model.packer import pack as pack_checkpoint
from host_client.model.source import Source, name_on_drive, resolve_source
from host_client.model.synthetic import open_synthetic
from host_client.runtime.causal_lm import (
    LOOKAHEAD_DEFAULT,
    CsdModelForCausalLM,
    runtime_of,
)
from host_client.runtime.generate import generate as run_generation
from host_client.runtime.generate import prompt_ids, random_ids
from host_client.runtime.lookahead import AUTO
from host_client.runtime.memory_limit import MemoryLimit
from host_client.runtime.plan import parse_budget
from host_client.runtime.quality import Quality
from host_client.runtime.recent_room import AUTO as AUTO_RECENT
from host_client.runtime.timeline import HostTimeline


def pack(
    model: OptionalModel = None,
    synthetic: Synthetic = None,
    seed: Seed = 0,
    active: Active = None,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    dtype: Annotated[
        Dtype | None, typer.Option(help="16-bit type on the drive; default: the checkpoint's own.")
    ] = None,
    bits: Annotated[
        UnitBits,
        typer.Option(
            help="Of a unit's values; 12: bfloat16 without loss; 8 and 4: levels in groups of 32, "
            "with scales."
        ),
    ] = UnitBits.SIXTEEN,
    copies: Annotated[
        int,
        typer.Option(
            help="How often every unit lies on the drive: what one copy loses, another still has.",
            min=1,
            max=COPIES_MAX,
        ),
    ] = 1,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take a model of the same name off the drive first.")
    ] = False,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Count on real text which neurons are wanted, and build the predictors.",
        ),
    ] = True,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens of text that the neurons are counted on.", min=2)
    ] = CALIBRATION_TOKENS,
    dram: Dram = "100%",
) -> None:
    """Pack a model onto the drive: units, checksums, frequencies, predictors."""
    if (model is None) == (synthetic is None) or (active is not None and synthetic is None):
        raise typer.BadParameter("give a MODEL, or --synthetic SHAPE, with which --active may go")
    source = None if model is None else resolve_source(model)
    with open_drive(drive, time) as opened:
        name, made = _checkpoint(source, synthetic or "", seed)
        with made as checkpoint, progress_bytes("packing") as update:
            packed = pack_checkpoint(
                checkpoint,
                opened,
                name,
                lambda done, total, what: update(done, total),
                dtype=dtype,
                bits=bits.number,
                copies=copies,
                replace=replace,
                save_every_bytes=SAVE_EVERY_BYTES if source else DRAWN_SAVE_EVERY_BYTES,
            )
        stored = format_size(packed.weights_bytes * packed.copies)
        out.print(
            f"packed {packed.name}: {packed.unit_count:,} units, "
            f"{format_size(packed.weights_bytes)} as {_described(packed, bits)}"
            + (f", in {packed.copies} copies: {stored}" if packed.copies > 1 else "")
        )
        if source is None:
            _plant(opened, packed, active, seed)
        elif calibration:
            _prepare(opened, packed, source, dram, calibration_tokens)


def _described(packed: PackedModel, bits: UnitBits) -> str:
    if bits is UnitBits.TWELVE:
        return f"{packed.dtype} in 12 bits, without loss"
    return packed.dtype if bits is UnitBits.SIXTEEN else f"levels of {bits.value} bits"


def _checkpoint(source: Source | None, synthetic: str, seed: int) -> tuple[str, Checkpoint]:
    """What is to be packed, and its name on the drive."""
    if source is not None:
        return source.name, open_checkpoint(source)
    made = open_synthetic(synthetic, seed)
    return made.name, made


def _plant(drive: Drive, packed: PackedModel, active: float | None, seed: int) -> None:
    """What a synthetic model has in place of calibration and predictors."""
    if packed.experts:
        load_router(drive, packed)
        out.print("loaded predictors: gate")
    if active is not None:
        plant(drive, packed, active, seed)
        out.print(f"planted: {active:.0%} of the FFN neurons are active. Try --quality {active:g}")


def _prepare(drive: Drive, packed: PackedModel, source: Source, dram: str, tokens: int) -> None:
    """Frequencies and predictors, as far as the drive does not have them yet."""
    if packed.frequencies is None:
        with progress_count("calibrating, tokens") as update:
            packed = calibrate(drive, packed, load_tokenizer(source), dram, update, tokens)
    loaded = {entry["kind"] for entry in drive.programs() if entry["model"] == packed.name}
    if loaded & {"rollout", "shadow"} and "frequency" in loaded:
        out.print(f"predictors on the drive: {', '.join(sorted(loaded))}")
        return
    with progress_count("building predictors, layers") as update:
        predictors = load_predictors(drive, packed, update)
    print_loaded(predictors)


def print_loaded(predictors: Loaded) -> None:
    """Which predictors were loaded, and why others were not."""
    for reason in predictors.skipped:
        out.print(f"skipped {reason}", soft_wrap=True, markup=False)
    out.print(f"loaded predictors: {', '.join(predictors.kinds) or 'none'}")


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What to say to the model.")] = None,
    prompt_tokens: PromptTokens = None,
    dram: Dram = "45%",
    quality: QualityText = "exact",
    predictor: PredictorKind = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="The prompt as it is, no chat template.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens the KV cache has room for. Default: prompt and answer.", min=1),
    ] = None,
    lookahead: LookaheadText = str(LOOKAHEAD_DEFAULT),
    far: FarKind = AUTO,
    recent: Recent = AUTO_RECENT,
    reader: Annotated[ReaderKind, typer.Option(help="How the window is read.")] = "auto",
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a timeline of host and drive here, for ui.perfetto.dev."),
    ] = None,
    enforce: Enforce = False,
    as_json: Json = False,
) -> None:
    """Generate text, the weights staged by the drive as they are needed."""
    name, kept = _name(model, prompt, prompt_tokens), Quality.parse(quality)
    with open_drive(drive, time) as opened:
        limit = _limit(opened, name, dram) if enforce else None
        tokenizer, ids = _prompt(opened, model, prompt or "", prompt_tokens, raw)
        with progress_bytes("loading resident weights") as update:
            made = CsdModelForCausalLM.from_pretrained(
                name,
                opened,
                dram,
                kept,
                context=context or ids.shape[1] + max_new_tokens,
                lookahead=lookahead,
                predictor=predictor,
                far=far,
                recent=recent,
                reader=reader,
                audit=tokenizer is not None,
                progress=update,
            )
        timeline = HostTimeline(host_time.perf_counter_ns) if trace else None
        try:
            with opened.traced() if trace else nullcontext():
                report = run_generation(
                    made,
                    tokenizer,
                    ids,
                    max_new_tokens,
                    host_time.perf_counter_ns,
                    None if as_json or tokenizer is None else _text_streamer(tokenizer),
                    timeline,
                )
        finally:
            runtime_of(made).close()
        if limit:
            report.enforced = limit.report()
        if trace and timeline:
            write_trace(trace, timeline.combined(opened.log_page(LogPage.TRACE)))
        if as_json:
            typer.echo(report.model_dump_json())
            return
        err.print()
        err.print(reports.generation_table(report, runtime_of(made).plan))


def _name(model: str, prompt: str | None, prompt_tokens: int | None) -> str:
    """On the drive. A prompt in words takes a tokenizer, so the source itself."""
    if (prompt is None) == (prompt_tokens is None):
        raise typer.BadParameter("give either --prompt or --prompt-tokens")
    return resolve_source(model).name if prompt_tokens is None else name_on_drive(model)


def _limit(drive: Drive, name: str, dram: str) -> MemoryLimit:
    _, packed = open_model(drive, name)
    return MemoryLimit.begin(parse_budget(dram, packed))


def _prompt(
    drive: Drive, model: str, prompt: str, tokens: int | None, raw: bool
) -> tuple[PreTrainedTokenizerBase | None, torch.Tensor]:
    """The tokenizer, if it takes one, and the prompt as int64 [1, tokens]."""
    if tokens is not None:
        _, packed = open_model(drive, name_on_drive(model))
        return None, random_ids(packed.config["vocab_size"], tokens)
    tokenizer = load_tokenizer(resolve_source(model))
    return tokenizer, prompt_ids(tokenizer, prompt, raw)


def _text_streamer(tokenizer: Any) -> TextStreamer:
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
