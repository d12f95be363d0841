"""Rows of the headline table, run: a synthetic model on a drive of its own, then `csd generate`."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from csd_protocol.opcodes import Cns
from csd_protocol.packed import Bits, PackedModel
from csd_protocol.units import format_size
from host_client.calibrate.headline import Modelled, Row, budget_within
from host_client.calibrate.planting import is_planted, load_router, plant
from host_client.cli.console import CSD, TimeMode, err, progress_bytes
from host_client.driver import Drive, DriveError
from host_client.model.errors import ModelError
from host_client.model.packer import DRAWN_SAVE_EVERY_BYTES, pack
from host_client.model.synthetic import SEED_DEFAULT
from host_client.runtime.generate import GenerationReport
from host_client.runtime.memory_limit import available_bytes
from host_client.runtime.quality import Quality

_START_TIMEOUT_S = 300.0  # on a busy machine a daemon that compiles first takes minutes


class Measured(BaseModel):
    """One run of a row. `report` is what `csd generate --json` said; `failure`, why it did not."""

    quality: str
    budget_bytes: int  # smaller than the row's where the machine has no room for that
    report: GenerationReport | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """What all rows have in common."""

    preset: str
    time: TimeMode
    bits: Bits
    active: float
    qualities: list[Quality]
    prompt_tokens: int
    new_tokens: int
    enforced: bool  # whether the kernel can hold a run to its limit here
    memory_bytes: int | None  # that a run may take; None: what is free


def run_row(modelled: Modelled, course: Course, folder: Path) -> list[Measured]:
    """One run a quality, on a drive whose media lies in `folder`. What fails says so."""
    planned = modelled.plan.budget_bytes
    try:
        with _drive(modelled.packed.name, course, folder) as drive:
            packed = _packed(drive, modelled.row, course)
            budget = budget_within(planned, _memory_bytes(drive, course))
            return [_run(drive, packed, course, quality, budget) for quality in course.qualities]
    except (DriveError, ModelError) as error:
        return [
            Measured(quality=str(quality), budget_bytes=planned, failure=str(error))
            for quality in course.qualities
        ]


def _drive(name: str, course: Course, folder: Path) -> Drive:
    media = folder / f"{name}-{course.bits}bit-{course.active:g}.csd"
    with err.status(f"{name}: starting a drive"):
        return Drive.embedded(
            media, drive=course.preset, time=course.time.value, start_timeout_s=_START_TIMEOUT_S
        )


def _packed(drive: Drive, row: Row, course: Course) -> PackedModel:
    """The row's model, packed and planted unless it is there."""
    with row.open() as checkpoint, progress_bytes(f"packing {checkpoint.name}") as update:
        packed = pack(
            checkpoint,
            drive,
            checkpoint.name,
            lambda done, total, what: update(done, total),
            bits=course.bits,
            save_every_bytes=DRAWN_SAVE_EVERY_BYTES,
        )
    if not is_planted(drive, packed):
        if packed.experts:
            load_router(drive, packed)
        packed = plant(drive, packed, course.active, SEED_DEFAULT)
    return packed


def _memory_bytes(drive: Drive, course: Course) -> int:
    """What a run may take. The drive's unit cache is memory that it does not have yet."""
    cache_bytes: int = drive.identify(Cns.CONTROLLER)["dram"]["unit_cache_bytes"]
    free = available_bytes() - cache_bytes
    return free if course.memory_bytes is None else min(free, course.memory_bytes)


def _run(
    drive: Drive, packed: PackedModel, course: Course, quality: Quality, budget_bytes: int
) -> Measured:
    """`csd generate` as a process of its own, in a control group of its own where it can be."""
    words = [
        *(sys.executable, *CSD, "generate", packed.name, "--drive", drive.address, "--json"),
        *("--dram", str(budget_bytes), "--quality", str(quality)),
        *("--prompt-tokens", str(course.prompt_tokens)),
        *("--max-new-tokens", str(course.new_tokens)),
        *(["--enforce"] if course.enforced else []),
    ]
    what = f"{packed.name}: generating within {format_size(budget_bytes)}, quality {quality}"
    with err.status(what):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    measured = Measured(quality=str(quality), budget_bytes=budget_bytes)
    if done.returncode == 0:
        measured.report = GenerationReport.model_validate_json(done.stdout)
    else:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        measured.failure = f"exit status {done.returncode}: {said[-1]}"
    return measured
