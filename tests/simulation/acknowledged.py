"""The dictionary that a drive is held against, and what a power loss may have left of it.

A sector's content is one 64-bit value, written over and over, so that a torn sector shows. Each
change that no flush has covered is a candidate for what the sector holds after a power loss; what
was there before is another. So an acknowledged write that a flush, a FUA or a restart covered has
to be there, one that none has covered may be, and so may the one that power loss interrupted.

A write is all or nothing: when some of its sectors have it, none is older.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from checker import Broken

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
NAME = "acknowledged"


@dataclass(frozen=True)
class Change:
    """New values of the sectors from `lpn` on."""

    lpn: int
    values: U64
    is_whole: bool  # all or nothing
    is_open: npt.NDArray[np.bool_]  # by sector: nothing durable has been written over it

    @property
    def part(self) -> slice:
        return slice(self.lpn, self.lpn + self.values.size)


@dataclass
class Acknowledged:
    """`now` [sectors] is what reads give while the power is on."""

    sectors: int
    now: U64 = field(init=False)

    def __post_init__(self) -> None:
        self.now = np.zeros(self.sectors, np.uint64)
        self._durable = self.now.copy()
        self._changes: list[Change] = []  # since they were durable, oldest first

    def propose(self, lpn: int, values: U64, is_whole: bool = True) -> Change:
        """A change is asked for; until it is acknowledged or withdrawn it may have happened."""
        change = Change(lpn, values, is_whole, np.ones(values.size, np.bool_))
        self._changes.append(change)
        return change

    def acknowledge(self, change: Change, is_durable: bool = False) -> None:
        self.now[change.part] = change.values
        if is_durable:
            self._make_durable(change)

    def withdraw(self, change: Change) -> None:
        """It was refused, and nothing changed."""
        self._changes = [other for other in self._changes if other is not change]

    def flushed(self) -> None:
        self._durable = self.now.copy()
        self._changes.clear()

    def check_reads(self, lpn: int, found: U64) -> None:
        wrong = np.flatnonzero(found != self.now[lpn : lpn + found.size])
        if wrong.size:
            at = lpn + int(wrong[0])
            raise Broken(
                NAME,
                f"sector {at} reads {int(found[wrong[0]]):x}, {int(self.now[at]):x} was written "
                f"({wrong.size} of {found.size} sectors differ)",
            )

    def power_lost(self, found: U64) -> None:
        """What is found [sectors] has to be allowed; from now on it is what was written."""
        first, last = self._explanations(found)
        for index, change in enumerate(self._changes):
            has = change.is_open & (first[change.part] == index) & (last[change.part] == index)
            older = change.is_open & (last[change.part] < index)
            if change.is_whole and has.any() and older.any():
                raise Broken(
                    NAME,
                    f"a write of {change.values.size} sectors at {change.lpn} is torn: "
                    f"{change.lpn + np.flatnonzero(older)[:8]} are older",
                )
        self.now = found.copy()
        self.flushed()

    def _explanations(self, found: U64) -> tuple[I64, I64]:
        """The first and the last change that explain each sector; -1: what was durable does."""
        none = len(self._changes)
        first = np.where(found == self._durable, -1, none)
        last = np.where(found == self._durable, -1, -2)
        for index, change in enumerate(self._changes):
            equal = change.is_open & (found[change.part] == change.values)
            last[change.part][equal] = index
            first[change.part][equal & (first[change.part] == none)] = index
        wrong = np.flatnonzero(last == -2)
        if wrong.size:
            raise Broken(NAME, self._unexplained(int(wrong[0]), int(found[wrong[0]])))
        return first, last

    def _unexplained(self, lpn: int, found: int) -> str:
        since = [
            f"{int(change.values[lpn - change.lpn]):x}"
            for change in self._changes
            if change.part.start <= lpn < change.part.stop and change.is_open[lpn - change.lpn]
        ]
        return (
            f"sector {lpn} reads {found:x} after a power loss; durable was "
            f"{int(self._durable[lpn]):x}, written since: {', '.join(since) or 'nothing'}"
        )

    def _make_durable(self, durable: Change) -> None:
        """What is older can no longer come back in these sectors."""
        self._changes = [change for change in self._changes if change is not durable]
        for change in self._changes:
            start = max(change.part.start, durable.part.start) - change.lpn
            stop = max(start, min(change.part.stop, durable.part.stop) - change.lpn)
            change.is_open[max(start, 0) : max(stop, 0)] = False
        self._durable[durable.part] = durable.values
