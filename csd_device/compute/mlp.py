"""The `mlp` program: two layers with a ReLU between, as LLM in a flash (Alizadeh et al., 2023)."""

import numpy as np

from csd_device.compute.lowrank import LowRankProgram
from csd_device.compute.program import F32
from csd_protocol.program_file import ProgramKind


class MlpProgram(LowRankProgram):
    """Scores are outer . relu(inner . x + inner_bias) + outer_bias; see `Program`."""

    kind = ProgramKind.MLP

    def _between(self, inner: F32) -> F32:
        return np.maximum(inner, np.float32(0), out=inner)
