"""PREDICT_AND_STAGE of one layer, time off, over a bare gRPC echo of messages of the same size.

The layer is SmolLM2-135M's FFN with random weights (1536 neurons, hidden 576), packed onto a drive
whose daemon is a process of its own; its 4-bit shadow program keeps half of the neurons and the
host holds half, so about a quarter crosses. A command is timed from the call to its completion:
program, selection and copy of each unit included, reading the window not. Leases go back with the
next command, as the runtime gives them back.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.echo_client import echo
from benchmarks.random_model import save_random_llama
from benchmarks.ratio import Ratio
from benchmarks.stopwatch import median_s, seconds_of
from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.program_file import ShadowLayer, encode_shadow
from host_client.driver import Drive, Staged, StagedSite, StageTarget
from host_client.model.catalog import open_model
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack

F32 = npt.NDArray[np.float32]

FLOOR = 1 / 3
HIDDEN, NEURONS = 576, 1536
KEEP = 0.5
PROGRAM = 1
WARM_UP = 10  # commands that do not count: they fill the unit cache
ENTRY_BYTES = 64  # what an entry carries besides its arrays, about


def run(tiny: bool) -> list[Ratio]:
    repeats = 20 if tiny else 400
    with tempfile.TemporaryDirectory(prefix="csd-bench-") as name:
        folder = Path(name)
        with Drive.embedded(folder / "drive.csd", drive="tiny", time="off") as drive:
            model_id, model = _pack_one_layer(drive, folder)
            site = model.find(Role.FFN, 0)
            drive.load_program(PROGRAM, _shadow_program(model.name))
            held = np.arange(NEURONS) % 2 == 0
            drive.set_residency(model_id, {site.site: held})
            stage_s, staged = _measure_staging(drive, model_id, site, repeats)
        request_bytes = ENTRY_BYTES + 4 * HIDDEN
        answer_bytes = ENTRY_BYTES + 4 * _named(staged)
        with echo(folder, request_bytes, answer_bytes) as exchange:
            echo_s = median_s(exchange, repeats)
    return [
        Ratio(
            name="PREDICT_AND_STAGE of one layer",
            ours=1 / stage_s,
            reference=1 / echo_s,
            unit="commands/s",
            floor=FLOOR,
            against=f"bare gRPC stream echo, {request_bytes} B there, {answer_bytes} B back",
            notes=f"{staged.unit_count} units, {staged.length_bytes} B staged; time off",
        )
    ]


def _measure_staging(
    drive: Drive, model_id: int, site: Site, repeats: int
) -> tuple[float, StagedSite]:
    """Median seconds of a command, and what the last one staged."""
    rng = np.random.default_rng(2)
    target = StageTarget(site.site, keep=KEEP)
    durations: list[float] = []
    staged: list[Staged] = []

    def stage(token: int, hidden: F32) -> None:
        release = staged[-1].leases if staged else ()
        pending = drive.predict_and_stage(model_id, PROGRAM, token, hidden, [target], release)
        staged.append(pending.result())

    for token in range(repeats + WARM_UP):
        hidden = rng.standard_normal((1, HIDDEN), np.float32)
        durations.append(seconds_of(partial(stage, token, hidden)))
    return median(durations[WARM_UP:]), staged[-1].sites[0]


def _named(staged: StagedSite) -> int:
    """How many units the completion lists."""
    return sum(part.size for part in (staged.predicted, staged.units) if part is not None)


def _pack_one_layer(drive: Drive, folder: Path) -> tuple[int, PackedModel]:
    source = save_random_llama(
        folder / "layer",
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    with open_checkpoint(source) as checkpoint:
        pack(checkpoint, drive, "layer")
    return open_model(drive, "layer")


def _shadow_program(model: str) -> bytes:
    rng = np.random.default_rng(1)
    gate, up = rng.standard_normal((2, NEURONS, HIDDEN), np.float32)
    ones = np.ones(NEURONS, np.float32)
    layer = ShadowLayer(np.ones(HIDDEN, np.float32), gate, up, ones)
    return encode_shadow(model, {0: layer}, bits=4, group=64, rms_eps=1e-5)
