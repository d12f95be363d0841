"""Predictors: built from a packed model's own units, loaded as programs onto the drive."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Site
from csd_protocol.program_file import ShadowLayer, encode_frequency, encode_shadow
from host_client.calibrate.packed_units import norm_parts, site_values
from host_client.driver import Drive
from host_client.runtime.plain_reads import PlainReads

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

SHADOW_BITS = 4
_GROUPS = (64, 32, 16, 8)  # values that share a scale; the first that divides the hidden size
_PROGRAMS_MAX = 256

Progress = Callable[[int, int], None]  # layers done, layers in all


def build_shadow(
    drive: Drive, packed: PackedModel, progress: Progress, bits: int = SHADOW_BITS
) -> bytes:
    """A `shadow` program file: gate and up of every layer at `bits` bits, read off the drive."""
    ffns = packed.ffns()
    hidden = ffns[0].cols
    group = next(size for size in _GROUPS if hidden % size == 0)
    layers: dict[int, ShadowLayer] = {}
    reads = PlainReads(drive, packed)
    for number, site in enumerate(ffns):
        layers[packed.program_layer(site)] = _shadow_layer(reads, packed, site)
        progress(number + 1, len(ffns))
    return encode_shadow(
        packed.name, layers, bits=bits, group=group, rms_eps=float(packed.config["rms_norm_eps"])
    )


def build_frequency(packed: PackedModel, counts: U32) -> bytes:
    """A `frequency` program file from counts [FFNs, neurons]."""
    return encode_frequency(packed.name, dict(enumerate(counts)))


def read_down_norms(drive: Drive, packed: PackedModel) -> F32:
    """L2 norm of every down column, float32 [FFNs, neurons]."""
    reads = PlainReads(drive, packed)
    norms = [site_values(reads, packed, site)[:, 2].norm(dim=1).numpy() for site in packed.ffns()]
    return np.stack(norms)


def load_predictor(drive: Drive, packed: PackedModel, kind: str, data: bytes) -> int:
    """Load and activate a program in place of the model's earlier one of its kind; its number."""
    loaded = drive.programs()
    for entry in loaded:
        if entry["kind"] == kind and entry["model"] == packed.name:
            drive.unload_program(entry["program"])
    taken = {entry["program"] for entry in loaded if entry["model"] != packed.name}
    taken |= {entry["program"] for entry in loaded if entry["kind"] != kind}
    number = next(number for number in range(_PROGRAMS_MAX) if number not in taken)
    drive.load_program(number, data, activate=True)
    return number


def _shadow_layer(reads: PlainReads, packed: PackedModel, site: Site) -> ShadowLayer:
    neurons = site_values(reads, packed, site)  # [neurons, 3, hidden]
    norm = norm_parts(reads, packed, site.layer)["post_attention_norm"]
    return ShadowLayer(
        norm=norm.numpy(),
        gate=neurons[:, 0].numpy(),
        up=neurons[:, 1].numpy(),
        down_norm=neurons[:, 2].norm(dim=1).numpy(),
    )
