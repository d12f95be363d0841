"""What a checker sees of a drive, and how it says that something is broken.

Checkers watch from outside: the bytes that go to the media, the pages that the FTL says it has
programmed, and the FTL's tables between two commands. They share no code with the FTL. What they
know belongs to the cells, so they outlive restarts and power losses.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from csd_device.config import Geometry
from csd_device.nand.superblocks import Superblocks

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
NOTHING = np.empty(0, np.int64)


class Broken(AssertionError):
    """A rule of the drive does not hold; `checker` says which."""

    def __init__(self, checker: str, detail: str) -> None:
        super().__init__(f"{checker}: {detail}")
        self.checker = checker


@dataclass(frozen=True)
class Tables:
    """The FTL's own tables, live."""

    table: U32  # PSA + 1 of each logical sector, 0: unmapped
    reverse: U32  # LPN + 1 of each physical sector, 0: none
    superblocks: Superblocks


class Checker(Protocol):
    """Each is told of all of this; most do nothing with most of it."""

    name: str

    def wrote(self, first_psa: int, sectors: int) -> None:
        """These sectors were programmed, or power went or the media failed while they were."""

    def erasing(self, superblock: int, tables: Tables | None) -> None:
        """Before an erase; no tables while the FTL opens."""

    def erased(self, superblock: int) -> None: ...

    def reported(self, ppns: I64) -> None:
        """A command of the FTL ended with these pages programmed."""

    def settled(self, tables: Tables) -> None:
        """Between two commands."""


class Watching:
    """A checker that is told and does nothing: what it overrides, it checks."""

    name = "nothing"

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def wrote(self, first_psa: int, sectors: int) -> None: ...

    def erasing(self, superblock: int, tables: Tables | None) -> None: ...

    def erased(self, superblock: int) -> None: ...

    def reported(self, ppns: I64) -> None: ...

    def settled(self, tables: Tables) -> None: ...

    def broken(self, detail: str) -> Broken:
        return Broken(self.name, detail)
