"""Predictors: built from a packed model's own units, loaded as programs onto the drive."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.program_file import ShadowLayer, encode_frequency, encode_shadow
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
    hidden = packed.find(Role.FFN, 0).cols
    group = next(size for size in _GROUPS if hidden % size == 0)
    layers: dict[int, ShadowLayer] = {}
    reads = PlainReads(drive, packed)
    for layer in range(packed.layer_count):
        layers[layer] = _shadow_layer(reads, packed, layer)
        progress(layer + 1, packed.layer_count)
    return encode_shadow(
        packed.name, layers, bits=bits, group=group, rms_eps=float(packed.config["rms_norm_eps"])
    )


def build_frequency(packed: PackedModel, counts: U32) -> bytes:
    """A `frequency` program file from counts [layers, neurons]."""
    return encode_frequency(packed.name, dict(enumerate(counts)))


def read_down_norms(drive: Drive, packed: PackedModel) -> F32:
    """L2 norm of every down column, float32 [layers, neurons]."""
    reads = PlainReads(drive, packed)
    norms = [
        _values(reads, packed, packed.find(Role.FFN, layer))[:, 2].norm(dim=1).numpy()
        for layer in range(packed.layer_count)
    ]
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


def _shadow_layer(reads: PlainReads, packed: PackedModel, layer: int) -> ShadowLayer:
    neurons = _values(reads, packed, packed.find(Role.FFN, layer))  # [neurons, 3, hidden]
    norm = dict(_norm_parts(reads, packed, layer))["post_attention_norm"]
    return ShadowLayer(
        norm=norm.numpy(),
        gate=neurons[:, 0].numpy(),
        up=neurons[:, 1].numpy(),
        down_norm=neurons[:, 2].norm(dim=1).numpy(),
    )


def _norm_parts(
    reads: PlainReads, packed: PackedModel, layer: int
) -> Iterator[tuple[str, torch.Tensor]]:
    site = packed.find(Role.NORMS, layer)
    values = _values(reads, packed, site).reshape(-1)
    sizes = [int(np.prod(part.shape)) for part in site.parts]
    for part, piece in zip(site.parts, values.split(sizes), strict=True):
        yield part.name, piece


def _values(reads: PlainReads, packed: PackedModel, site: Site) -> torch.Tensor:
    """All units of a site as float32 [count, rows, cols]."""
    dtype = torch.bfloat16 if packed.dtype == "bfloat16" else torch.float16
    patterns = reads.site_units(site)
    return torch.from_numpy(patterns.view(np.int16)).view(dtype).float()
