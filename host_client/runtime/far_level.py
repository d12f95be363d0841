"""The far level: units of layers further ahead, brought from NAND into on-drive DRAM.

What is known far ahead is known badly, but moving a unit from NAND to the drive's DRAM costs the
host neither memory nor link. The near program's command finds there what was guessed right, and
NAND's time leaves it. Nothing here decides what is computed, so nothing here may fail a pass: a
drive that refuses is not asked again, and the report says why.

Each layer is asked for when it is `lead` layers from being asked for by the near program: a layer a
command, so that NAND is never busy with a burst of guesses when the near program misses something.
They go in the near program's own command where one program serves both levels, at no round trip;
else in a command of their own, of which a few are in flight, and none is waited for.

What a layer needs in any case (projections that are not resident) is brought with its guesses.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import Role
from host_client.driver import CommandFailed, DriveError, Staged
from host_client.driver.commands import Origin
from host_client.runtime.copies import Copies, PendingUnits
from host_client.runtime.guidance import Asker, Guide
from host_client.runtime.notes import Notes
from host_client.runtime.schedule import Step, Wanted
from host_client.runtime.tally import Tally

F32 = npt.NDArray[np.float32]

IN_FLIGHT_MAX = 4  # commands of its own: a drive that is behind with them is not asked for more


class FarLevel:
    """One far program's requests. Every method is the compute thread's."""

    def __init__(
        self,
        guide: Guide,
        layers: Sequence[Step],
        asker: Asker,
        notes: Notes | None,
        copies: Copies,
        tally: Tally,
    ) -> None:
        """layers: what a guided pass needs of each.

        asker: the near program's where that is the same one. notes: None where it hears of no
        prompts, or the near program's notes tell it.
        """
        self.guide, self.asker = guide, asker
        self.is_shared = asker.guide is not guide  # it goes with the near program's commands
        self.stopped = ""  # why it does not ask any more
        self._wanted = [tuple(filter(_can_ask, step.wanted)) for step in layers]
        self._copies, self._notes, self._tally = copies, notes, tally
        self._pending: deque[PendingUnits] = deque()
        self._next = 0  # the first layer that was not asked for

    def begin(self) -> None:
        """A guided pass begins."""
        self._next = 0
        self.guide.ahead.end_pass()

    def due(self, near_next: int) -> list[Wanted]:
        """What to ask for now that the near program was asked for all layers before this one."""
        first, end = max(self._next, near_next), near_next + self.guide.ahead.lead
        if self.stopped or len(self._pending) == IN_FLIGHT_MAX:
            return []
        self._next = max(first, end)
        return [wanted for layer in self._wanted[first:end] for wanted in layer]

    def send(self, wanted: Sequence[Wanted], token: int, hidden: F32, origin: Origin) -> None:
        """Asks in a command of its own."""
        ask = self.asker.ask(token, hidden, origin)
        targets = [entry.target(to_dram=True) for entry in wanted]
        self._pending.append(
            self._copies.predict_and_stage(
                ask.program, ask.token, ask.hidden, targets, (), ask.told
            )
        )

    def settle(self) -> None:
        """Takes the answers that are there."""
        while self._pending and self._pending[0].is_done:
            self._settle_one()

    def learn(self, staged: Staged) -> None:
        """What became of it, from the answer to its command."""
        brought = [site for site in staged.sites if site.to_dram]
        if brought:
            ready_ns = max(site.ready_ns for site in brought)
            self.guide.ahead.note_drive(ready_ns - staged.timing.submitted_ns)
            self.guide.ahead.note_room(not any(site.units_no_room for site in brought))

    # ---- prompts -----------------------------------------------------------------------------

    @property
    def hears(self) -> bool:
        """Whether it is told of prompts."""
        return self._notes is not None and not self.stopped

    def note(self, layer: int, token: int, hidden: F32) -> None:
        """The state [rows, hidden] of a prompt enters a layer, row 0 at position `token`."""
        if self._notes is not None and not self.stopped:
            try:
                self._notes.send(layer, token, hidden)
            except CommandFailed as failed:
                self._stop(failed)

    def end_prompt(self) -> None:
        """All of a prompt was told."""
        if self._notes is not None:
            try:
                self._notes.settle()
            except CommandFailed as failed:
                self._stop(failed)

    def drop(self) -> None:
        """Waits for all that was sent, whatever became of it."""
        while self._pending:
            self._settle_one()
        if self._notes is not None:
            self._notes.drop()

    def _settle_one(self) -> None:
        try:
            staged = self._pending.popleft().result()
        except DriveError as failed:
            self._stop(failed)
        else:
            self._tally.add_staged(staged)
            self.learn(staged)

    def _stop(self, failed: DriveError) -> None:
        self.stopped = self.stopped or str(failed)


def _can_ask(wanted: Wanted) -> bool:
    """Whether a program that speaks for FFNs may bring these units."""
    return wanted.keep >= 1.0 or wanted.site.role is Role.FFN
