"""Predictors: built from a packed model's own units, loaded as programs onto the drive."""

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel
from csd_protocol.program_file import encode_frequency, role_of
from host_client.calibrate.packed_units import site_values
from host_client.driver import Drive
from host_client.runtime.plain_reads import PlainReads

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

_PROGRAMS_MAX = 256


def build_frequency(packed: PackedModel, counts: U32) -> bytes:
    """A `frequency` program file from counts [FFNs, neurons]."""
    return encode_frequency(packed.name, dict(enumerate(counts)))


def read_down_norms(drive: Drive, packed: PackedModel) -> F32:
    """L2 norm of every down column, float32 [FFNs, neurons]."""
    reads = PlainReads(drive, packed)
    norms = [site_values(reads, packed, site)[:, 2].norm(dim=1).numpy() for site in packed.ffns()]
    return np.stack(norms)


def load_predictor(drive: Drive, packed: PackedModel, kind: str, data: bytes) -> int:
    """Load and activate a program in place of the model's earlier one of its kind and role.

    Returns its number.
    """
    like_it = (kind, packed.name, role_of(data))
    for entry in drive.programs():
        if (entry["kind"], entry["model"], entry["role"]) == like_it:
            drive.unload_program(entry["program"])
    number = free_program_number(drive)
    drive.load_program(number, data, activate=True)
    return number


def free_program_number(drive: Drive) -> int:
    """The lowest that nothing is loaded under."""
    taken = {entry["program"] for entry in drive.programs()}
    return next(number for number in range(_PROGRAMS_MAX) if number not in taken)
