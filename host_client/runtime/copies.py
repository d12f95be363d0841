"""Which copy each unit is read from, and staging again when one cannot be read.

A model may lie on its drive in several copies. Units are staged from the first. When the drive
names units that it cannot read, those are read from the next copy from then on, and the command is
sent again: nobody further up notices, and the values are the same. A unit that no copy has is lost,
and with it the run. The reading thread and the compute thread share one `Copies`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Site
from csd_protocol.unit_table import UnitTable
from host_client.driver import CommandFailed, Drive, PendingCommand, Staged, StageTarget
from host_client.driver.commands import NOTHING_TOLD, Told
from host_client.model.catalog import read_unit_table
from host_client.model.errors import DamagedRecord

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

RETRIES_MAX = 8  # of one command: each moves units on that were readable when it was sent
_NAMED_MAX = 8  # units of a site that a message lists

Send = Callable[[Sequence[StageTarget], Sequence[int]], PendingCommand[Staged]]


class UnitsLost(CommandFailed):
    """A command failed for good: no copy of the model has these units. By site, ascending."""

    def __init__(
        self, model: PackedModel, units: Mapping[Site, U32], failed: CommandFailed
    ) -> None:
        super().__init__(
            failed.what, failed.sct, failed.sc, failed.detail, failed.retryable, failed.lost
        )
        self.model = model.name
        self.units = dict(units)
        where = "; ".join(_named(site, numbers) for site, numbers in units.items())
        copies = "its only copy" if model.copies == 1 else f"all of its {model.copies} copies"
        more = " --copies 2" if model.copies == 1 else ""
        text = (
            f"{model.name} has lost {where}: unreadable in {copies} on the drive. What the drive "
            f"said: {failed}. Pack it again with --replace{more}; `csd verify {model.name}` lists "
            f"all damage"
        )
        self.args = (text,)


def _named(site: Site, units: U32) -> str:
    numbers = ", ".join(str(unit) for unit in units[:_NAMED_MAX])
    rest = f" and {units.size - _NAMED_MAX} more" if units.size > _NAMED_MAX else ""
    return f"{'unit' if units.size == 1 else 'units'} {numbers}{rest} of {site.name}"


class Copies:
    """Stages units of one packed model, each from a copy that can be read. Thread-safe."""

    def __init__(self, drive: Drive, model_id: int, model: PackedModel) -> None:
        self._drive, self._model_id, self._model = drive, model_id, model
        self._copy_of: dict[int, U8] = {}  # by site: of each unit; sites not here have lost none
        self._guard = threading.Lock()

    @property
    def recovered_units(self) -> int:
        """How many units are read from another copy, as an earlier one has lost them."""
        with self._guard:
            return sum(int(np.count_nonzero(copies)) for copies in self._copy_of.values())

    def stage(self, targets: Sequence[StageTarget], release: Sequence[int] = ()) -> "PendingUnits":
        """As `Drive.stage`."""

        def send(aimed: Sequence[StageTarget], back: Sequence[int]) -> PendingCommand[Staged]:
            return self._drive.stage(self._model_id, aimed, back)

        return PendingUnits(self, send, targets, release)

    def predict_and_stage(
        self,
        program: int,
        token: int,
        hidden: F32,
        targets: Sequence[StageTarget],
        release: Sequence[int] = (),
        told: Told = NOTHING_TOLD,
    ) -> "PendingUnits":
        """As `Drive.predict_and_stage`."""

        def send(aimed: Sequence[StageTarget], back: Sequence[int]) -> PendingCommand[Staged]:
            return self._drive.predict_and_stage(
                self._model_id, program, token, hidden, aimed, back, told
            )

        return PendingUnits(self, send, targets, release)

    def aimed(self, targets: Sequence[StageTarget]) -> Sequence[StageTarget]:
        """These targets, units that were lost in a copy taken from another."""
        with self._guard:
            if not self._copy_of:
                return targets
            return [self._aim(target) for target in targets]

    def move_on(self, failed: CommandFailed) -> None:
        """Units that the drive could not read come from the next copy. Raises UnitsLost."""
        gone: dict[Site, U32] = {}
        with self._guard:
            for lost in failed.lost:
                site = self._model.sites[lost.site]
                copies = self._copy_of.setdefault(lost.site, np.zeros(site.count, np.uint8))
                units = lost.units[copies[lost.units] == lost.copy]  # others moved on meanwhile
                copies[units] = lost.copy + 1
                if lost.copy + 1 == self._model.copies and units.size:
                    copies[units] = 0  # nothing is left to try: whoever asks again starts over
                    gone[site] = units
        if gone:
            raise UnitsLost(self._model, gone, failed)

    def _aim(self, target: StageTarget) -> StageTarget:
        copies = self._copy_of.get(target.site)
        if copies is None:
            return target
        moved = np.flatnonzero(copies).astype(np.uint32)
        if target.units is not None:
            moved = np.intersect1d(moved, target.units, assume_unique=True)
        of = copies[moved]
        elsewhere = tuple((int(copy), moved[of == copy]) for copy in np.unique(of))
        return replace(target, elsewhere=elsewhere)


class PendingUnits:
    """A staging command in flight, and its further attempts."""

    def __init__(
        self, copies: Copies, send: Send, targets: Sequence[StageTarget], release: Sequence[int]
    ) -> None:
        self._copies, self._send, self._targets = copies, send, targets
        self._pending = send(copies.aimed(targets), release)

    @property
    def is_done(self) -> bool:
        """Whether the drive has answered the latest attempt."""
        return self._pending.done()

    def result(self, timeout_s: float | None = None) -> Staged:
        """What was staged; each attempt may take `timeout_s` (None: the queue pair's own).

        Raises UnitsLost, and what `PendingCommand.result` raises.
        """
        for _ in range(RETRIES_MAX):
            try:
                return self._pending.result(timeout_s)
            except CommandFailed as failed:
                if not failed.lost:
                    raise
                self._copies.move_on(failed)
            self._pending = self._send(self._copies.aimed(self._targets), ())
        return self._pending.result(timeout_s)


def read_any_unit_table(drive: Drive, model: PackedModel) -> UnitTable:
    """The model's CRC table, beside the first copy that has it.

    Raises DamagedRecord or CommandFailed when none has.
    """
    for copy in range(model.copies - 1):
        try:
            return read_unit_table(drive, model, copy)
        except DamagedRecord:
            continue
        except CommandFailed as failed:
            if not failed.is_media_error:
                raise
    return read_unit_table(drive, model, model.copies - 1)
