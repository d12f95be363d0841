"""What a program says of one command's hidden states: which units a layer will need."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute import Program
from csd_device.errors import CommandError
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.models import SiteRecord
from csd_device.firmware.programs import ProgramStore
from csd_device.firmware.selection import kept_count, select_top
from csd_protocol.status import Status

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A program by its number, and the input that it is to score; it runs only when asked."""

    programs: ProgramStore
    program: int
    hidden: F32  # [rows, hidden]

    def top_units(self, site: SiteRecord, keep: float, time: CommandTime) -> U32:
        """The site's top fraction, ascending.

        Raises CommandError: No Program, Program Not Activated, Invalid Field for a site that the
        program does not score or hidden states that are not finite.
        """
        program = self.programs.active(self.program)
        self._check(program, site)
        scores = program.score(site.layer, self.hidden)
        time.run_program(program.cost(site.layer, self.hidden.shape[0]))
        return select_top(scores, kept_count(keep, site.count))

    def _check(self, program: Program, site: SiteRecord) -> None:
        if not site.is_ffn or program.unit_count(site.layer) != site.count:
            raise CommandError(
                Status.INVALID_FIELD,
                f"program {self.program} ({program.kind}, of {program.model}) does not score the "
                f"{site.count} units of {site.name}",
            )
        if not np.isfinite(self.hidden).all():
            raise CommandError(Status.INVALID_FIELD, "hidden states are not finite")
