"""What a run staged and what the drive said it cost: plain sums, read by reports."""

from dataclasses import asdict, dataclass

from host_client.driver import Staged, Timing


@dataclass(slots=True)
class Tally:
    """Sums since the last `reset`. Times in ns are the drive's modelled ones."""

    commands: int = 0
    units_staged: int = 0
    units_from_dram: int = 0
    staged_bytes: int = 0
    nand_page_reads: int = 0
    units_from_copies: int = 0  # read from another copy than the first
    queue_ns: int = 0
    program_ns: int = 0
    nand_ns: int = 0
    nand_wait_ns: int = 0  # of that, what commands to the window took
    window_ns: int = 0  # how long commands to the window took, from submission to completion
    dram_ns: int = 0
    link_ns: int = 0
    predicted_units: int = 0
    recent_units: int = 0  # of those, held since recent tokens
    brought_units: int = 0  # from NAND into the drive's DRAM, ahead of their use
    corrections: int = 0  # of one layer each: what the units left out add, in the drive's low bits
    late_units: int = 0  # staged after the true input showed that they were missing
    wanted_units: int = 0  # audited: what the true input wanted
    wanted_in_time: int = 0  # audited: of those, what prediction had chosen
    wanted_computed: int = 0  # audited: of those, what was computed: chosen, or resident anyway
    wanted_experts: int = 0  # that the router chose, of those not all resident; if there is a gate
    foreseen_experts: int = 0  # of those, what the gate had foreseen
    wait_ns: int = 0  # host: compute waited for staged units

    def add_staged(self, staged: Staged) -> None:
        self.commands += 1
        for site in staged.sites:
            self.nand_page_reads += site.nand_page_reads
            self.units_from_copies += site.units_from_copies
            if site.to_dram:
                self.brought_units += site.unit_count - site.units_from_dram
                continue
            self.units_staged += site.unit_count
            self.units_from_dram += site.units_from_dram
            self.staged_bytes += site.length_bytes
            if site.predicted is not None:
                self.predicted_units += int(site.predicted.size)
        if not all(site.to_dram for site in staged.sites):
            self.nand_wait_ns += staged.timing.nand_ns
            self.window_ns += staged.timing.done_ns - staged.timing.submitted_ns
        self._add_timing(staged.timing)

    def add_run(self, timing: Timing) -> None:
        """A command that ran a program and staged nothing."""
        self.commands += 1
        self._add_timing(timing)

    def _add_timing(self, timing: Timing) -> None:
        self.queue_ns += timing.queue_ns
        self.program_ns += timing.program_ns
        self.nand_ns += timing.nand_ns
        self.dram_ns += timing.dram_ns
        self.link_ns += timing.link_ns

    @property
    def recall(self) -> float | None:
        """Of the units that the true FFN input wanted, the share chosen in time. None: no audit."""
        return self.wanted_in_time / self.wanted_units if self.wanted_units else None

    @property
    def covered(self) -> float | None:
        """The same of what was computed: chosen, or resident. None: no audit."""
        return self.wanted_computed / self.wanted_units if self.wanted_units else None

    @property
    def expert_recall(self) -> float | None:
        """Of the experts that the router chose, the share that a gate foresaw. None: no gate."""
        return self.foreseen_experts / self.wanted_experts if self.wanted_experts else None

    def snapshot(self) -> "Tally":
        return Tally(**asdict(self))

    def since(self, earlier: "Tally") -> "Tally":
        """What was added after `earlier` was taken."""
        before = asdict(earlier)
        return Tally(**{name: value - before[name] for name, value in asdict(self).items()})
