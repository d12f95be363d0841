"""Power loss: the drive goes off between two operations, or within one of them.

A `PowerSupply` counts operations of whatever is plugged into it and goes off at the n-th. What that
operation had done by then is a random prefix of its bytes, and what was done since the last sync is
still in nobody's safe keeping: of each sector any number of the newest changes is gone. From then
on everything raises PowerCut; whoever turns the power on again opens the media anew.

`PowerLoss` remembers what each change since the last sync replaced, so it takes as much memory as
is written and erased between two syncs. It is for simulations, not for drives that serve.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES
from csd_device.nand.media import Media, Pieces, Retries

U8 = npt.NDArray[np.uint8]


class PowerCut(Exception):
    """The drive is off: no answer to any command, and none will come."""


class PowerSupply:
    """On until `go_off`, or until as many operations have begun as `go_off_at` was told."""

    name = "power loss"

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: int | None = None  # operations that still begin; None: any number
        self._losers: list[Callable[[float], None]] = []
        self.is_on = True
        self.operations = 0  # begun so far

    def plug(self, lose: Callable[[float], None]) -> None:
        """`lose(rate)` is called when the power goes: each unsynced change is lost at this rate."""
        self._losers.append(lose)

    def go_off_at(self, operation: int) -> None:
        """The power goes within the n-th operation from now; 0: the next."""
        self._left = operation

    def begin(self) -> bool:
        """An operation begins; False: power goes within it. Raises PowerCut when it is off."""
        if not self.is_on:
            raise PowerCut(f"off since operation {self.operations}")
        self.operations += 1
        if self._left is None:
            return True
        self._left -= 1
        return self._left >= 0

    def part_of(self, whole: int) -> int:
        """How much of an operation is done when power goes: 0 to all of it."""
        return int(self._rng.integers(0, whole + 1))

    def losses(self, count: int, rate: float) -> npt.NDArray[np.bool_]:
        """Which of so many unsynced changes are lost [count]."""
        return self._rng.random(count) < rate

    def go_off(self) -> None:
        """Power goes now. Raises PowerCut."""
        self.is_on = False
        rate = float(self._rng.choice([0.0, self._rng.random(), 1.0]))
        for lose in self._losers:
            lose(rate)
        raise PowerCut(f"power lost in operation {self.operations}")


class PowerLoss:
    """Media on a supply. `lost` when it goes; see the head of this file."""

    name = "power loss"

    def __init__(self, inner: Media, supply: PowerSupply) -> None:
        self.inner = inner
        self._supply = supply
        self._replaced: list[tuple[int, U8]] = []  # start, bytes before; since the last sync
        supply.plug(self._lose)

    @property
    def size_bytes(self) -> int:
        return self.inner.size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        if not self._supply.is_on:
            raise PowerCut("read")
        return self.inner.gather(pieces, out)

    def write(self, start: int, data: U8) -> None:
        whole = self._supply.begin()
        done = data if whole else data[: self._supply.part_of(data.size)]
        self._remember(start, done.size)
        self.inner.write(start, done)
        if not whole:
            self._supply.go_off()

    def erase(self, start: int, length: int) -> None:
        whole = self._supply.begin()
        done = length if whole else self._supply.part_of(length // SECTOR_BYTES) * SECTOR_BYTES
        if done:
            self._remember(start, done)
            self.inner.erase(start, done)
        if not whole:
            self._supply.go_off()

    def sync(self) -> None:
        if not self._supply.begin():
            self._supply.go_off()
        self.inner.sync()
        self._replaced.clear()

    def close(self) -> None:
        self.inner.close()

    def _remember(self, start: int, length: int) -> None:
        """What lies there now, in whole sectors."""
        first = start // SECTOR_BYTES * SECTOR_BYTES
        end = -(-(start + length) // SECTOR_BYTES) * SECTOR_BYTES
        before = np.empty(end - first, np.uint8)
        whole = Pieces(np.array([first]), np.array([before.size]), np.array([0]))
        self.inner.gather(whole, before)
        self._replaced.append((first, before))

    def _lose(self, rate: float) -> None:
        """Undoes changes from the newest on; of each sector, up to the first that is kept."""
        kept = np.zeros(self.size_bytes // SECTOR_BYTES, np.bool_)
        for start, before in reversed(self._replaced):
            first, count = start // SECTOR_BYTES, before.size // SECTOR_BYTES
            kept[first : first + count] |= ~self._supply.losses(count, rate)
            for sector in np.flatnonzero(~kept[first : first + count]).tolist():
                at = sector * SECTOR_BYTES
                self.inner.write(start + at, before[at : at + SECTOR_BYTES])
        self._replaced.clear()
