"""The drive's own compute: programs that score units, and what running them costs."""

from csd_device.compute.loading import load_program
from csd_device.compute.program import Cost, CostModel, Program

__all__ = ["Cost", "CostModel", "Program", "load_program"]
