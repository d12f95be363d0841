"""What a program says of one command's hidden states: which units a layer will need."""

import numpy as np
import numpy.typing as npt

from csd_device.compute import HeadsRun, Program, ProgramInput, Run
from csd_device.errors import CommandError
from csd_device.firmware.hosts import Host, HostTable
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.models import LoadedModel, SiteRecord
from csd_device.firmware.programs import ProgramStore
from csd_device.firmware.selection import kept_count, select_top
from csd_protocol.packed import Role
from csd_protocol.status import Status

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]


class Prediction:
    """A program by its number and the input that it is to score; it runs only when asked.

    One run serves all of a command's targets.
    """

    def __init__(
        self,
        programs: ProgramStore,
        hosts: HostTable,
        host: Host,
        model: LoadedModel,
        number: int,
        given: ProgramInput,
    ) -> None:
        self._programs, self._hosts, self._host = programs, hosts, host
        self._model, self._number, self._given = model, number, given
        self._run: Run | None = None
        self._experts: dict[int, U32] | None = None
        self._heads: Prediction | None = None

    def admit(self, experts: dict[int, U32]) -> None:
        """Of targets of experts only these are staged, by layer."""
        self._experts = experts

    def admits(self, site: SiteRecord) -> bool:
        """Whether a target of this site is staged at all."""
        if self._experts is None or site.expert < 0:
            return True
        return bool((self._experts[site.layer] == site.expert).any())

    def leave_heads_to(self, other: "Prediction") -> None:
        """KV groups are scored by another program."""
        self._heads = other

    @property
    def role(self) -> Role:
        """The sites that Execute Program asks it for. Raises CommandError as `top_units` does."""
        return self._program().role

    def top_units(self, site: SiteRecord, keep: float, time: CommandTime) -> U32:
        """The site's top fraction, ascending; of a fraction 0 the program only takes note.

        Raises as `scores`.
        """
        count = kept_count(keep, site.count)
        if count == 0:
            self._check_site(site)
            time.run_program(self._begun().remember(site.layer))
            return np.empty(0, np.uint32)
        return select_top(self.scores(site, time), count)

    def scores(self, site: SiteRecord, time: CommandTime) -> F32:
        """Of each unit of the site [count].

        Raises CommandError: No Program, Program Not Activated, On-Drive DRAM Exceeded for what it
        remembers, Invalid Field for a model or a site that the program does not score or hidden
        states that are not finite.
        """
        if self._heads is not None and site.role is Role.HEADS:
            return self._heads.scores(site, time)
        program, run = self._check_site(site), self._begun()
        if site.role is program.role:
            scores, cost = run.score(site.program_layer)
        else:
            assert isinstance(run, HeadsRun), f"{program.kind} says that it scores KV groups"
            scores, cost = run.score_heads(site.program_layer)
        time.run_program(cost)
        return scores

    def correction(self, site: SiteRecord, computed: U32, time: CommandTime) -> F32:
        """What the site's other units add for the FFN's own input, float32 [rows, hidden].

        Raises CommandError as `top_units`, and Invalid Field for a program that cannot correct or
        units that are not ascending; Invalid Program Data for a sum that is not finite.
        """
        program = self._check_site(site)
        check_ascending(site, computed)
        self._check_finite()
        values, cost = program.correct(site.program_layer, self._given.hidden, computed)
        time.run_program(cost)
        if not np.isfinite(values).all():
            raise CommandError(
                Status.INVALID_PROGRAM_DATA,
                f"program {self._number}: its correction of {site.name} is not finite",
            )
        return values

    def observe(self, site: SiteRecord, units: U32) -> None:
        """Tells the program which units of a site were active; raises as `top_units`."""
        program = self._check_site(site)
        check_ascending(site, units)
        program.observe(
            site.program_layer, units, self._hosts.memory(self._host, self._number, program)
        )

    def _begun(self) -> Run:
        if self._run is None:
            self._check_finite()
            program = self._program()
            memory = self._hosts.memory(self._host, self._number, program)
            self._run = program.begin(self._given, memory)
        return self._run

    def _program(self) -> Program:
        program = self._programs.active(self._number)
        if program.model != self._model.name:
            raise CommandError(
                Status.INVALID_FIELD,
                f"program {self._number} ({program.kind}) was fitted to {program.model}, and the "
                f"command names {self._model.name}. Build one for this model",
            )
        return program

    def _check_site(self, site: SiteRecord) -> Program:
        program = self._program()
        if _units_scored(program, site) != site.count:
            raise CommandError(
                Status.INVALID_FIELD,
                f"program {self._number} ({program.kind}, of {program.model}) does not score the "
                f"{site.count} units of {site.name}",
            )
        return program

    def _check_finite(self) -> None:
        if not np.isfinite(self._given.hidden).all():
            raise CommandError(Status.INVALID_FIELD, "hidden states are not finite")


def _units_scored(program: Program, site: SiteRecord) -> int:
    """How many units the program takes the site to have; 0: it does not speak for such sites."""
    if site.role is program.role:
        return program.unit_count(site.program_layer)
    return program.kv_groups if site.role is Role.HEADS else 0


def check_ascending(site: SiteRecord, units: U32) -> None:
    """Raises CommandError (Invalid Field) unless units ascend and the site has them."""
    if units.size and not (units[-1] < site.count and (units[1:] > units[:-1]).all()):
        raise CommandError(
            Status.INVALID_FIELD,
            f"{site.name} has {site.count} units; those named must be ascending and below that",
        )
