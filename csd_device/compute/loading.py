"""From the bytes of a program file to a program that runs: one entry a kind."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from csd_device.compute.farsight import FarsightProgram
from csd_device.compute.frequency import FrequencyProgram
from csd_device.compute.gate import GateProgram
from csd_device.compute.lowrank import LowRankProgram
from csd_device.compute.mlp import MlpProgram
from csd_device.compute.oracle import OracleProgram
from csd_device.compute.planted import PlantedProgram
from csd_device.compute.program import Program
from csd_device.compute.rollout import RolloutProgram
from csd_device.compute.shadow import ShadowProgram
from csd_device.compute.svd import SvdProgram
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.compute.window import WindowProgram
from csd_device.errors import CommandError
from csd_protocol.program_file import PROGRAM_VERSION, Key, ProgramKind
from csd_protocol.status import Status

_KINDS: dict[str, Callable[[TensorFile], Program]] = {
    ProgramKind.FREQUENCY: FrequencyProgram,
    ProgramKind.WINDOW: WindowProgram,
    ProgramKind.LOWRANK: LowRankProgram,
    ProgramKind.MLP: MlpProgram,
    ProgramKind.SVD: SvdProgram,
    ProgramKind.SHADOW: ShadowProgram,
    ProgramKind.ROLLOUT: RolloutProgram,
    ProgramKind.FARSIGHT: FarsightProgram,
    ProgramKind.GATE: GateProgram,
    ProgramKind.ORACLE: OracleProgram,
    ProgramKind.PLANTED: PlantedProgram,
}


def load_program(data: npt.NDArray[np.uint8]) -> Program:
    """The program in a file's bytes uint8 [size], which it keeps and must not change any more.

    Raises CommandError: Invalid Program Type for a kind or version that this drive does not run,
    Invalid Program Data for anything else that is wrong with the file.
    """
    file = TensorFile(data)
    kind = file.metadata.get(Key.KIND)
    version = file.metadata.get(Key.VERSION)
    if kind not in _KINDS or version != PROGRAM_VERSION:
        raise CommandError(
            Status.INVALID_PROGRAM_TYPE,
            f"program of kind {str(kind)[:40]!r}, version {str(version)[:40]!r}; this drive runs "
            f"{', '.join(sorted(_KINDS))}, version {PROGRAM_VERSION}",
        )
    if not file.metadata.get(Key.MODEL):
        raise invalid(f"metadata {Key.MODEL} is missing")
    program = _KINDS[kind](file)
    file.check_all_read()
    return program
