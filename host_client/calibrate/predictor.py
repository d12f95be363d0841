"""Predictors: built from a packed model's own units, loaded as programs onto the drive."""

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.program_file import encode_frequency
from host_client.driver import Drive
from host_client.runtime.plain_reads import PlainReads

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

_PROGRAMS_MAX = 256


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


def _values(reads: PlainReads, packed: PackedModel, site: Site) -> torch.Tensor:
    """All units of a site as float32 [count, rows, cols]."""
    dtype = torch.bfloat16 if packed.dtype == "bfloat16" else torch.float16
    patterns = reads.site_units(site)
    return torch.from_numpy(patterns.view(np.int16)).view(dtype).float()
