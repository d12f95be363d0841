"""The drive's own compute: programs that score units, and what running them costs."""

from csd_device.compute.loading import load_program
from csd_device.compute.program import (
    Cost,
    CostModel,
    HeadsRun,
    Origin,
    Program,
    ProgramInput,
    Run,
)
from csd_device.compute.rehearsal import rehearse_kernels

__all__ = [
    "Cost",
    "CostModel",
    "HeadsRun",
    "Origin",
    "Program",
    "ProgramInput",
    "Run",
    "load_program",
    "rehearse_kernels",
]
