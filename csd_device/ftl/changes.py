"""What changed since the last commit, as the journal will hold it.

    rows     u32 [n, 2]: lpn, psa + 1 (0: unmapped); or RUN_MARK, count and then the first of a run
    events   i64 [m, 4]: kind, superblock, and two fields by kind (see `EventKind`)

A changed sector takes 8 bytes at most: a lone one is a row, a run of any length two.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from csd_device.ftl.two_way_map import RUN_MARK

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

_FIRST_ROWS = 1024


class EventKind(IntEnum):
    """What happened to a superblock, and the two fields of each kind."""

    OPEN = 1  # stream, sectors programmed by the drive until then; when: EventKind.WRITTEN
    WRITTEN = 2  # power-on time in ns at which it was opened, 0
    FREE = 3  # erased: 0, 0
    RETIRE = 4  # a program failed: 0, 0
    BAD = 5  # 0, 0
    READS = 6  # page reads since its last erase, 0


class Changes:
    """Grows as needed; a commit empties it."""

    def __init__(self) -> None:
        self._rows: U32 = np.empty((_FIRST_ROWS, 2), np.uint32)
        self._count = 0
        self._events: list[tuple[int, int, int, int]] = []

    @property
    def row_count(self) -> int:
        return self._count

    @property
    def is_empty(self) -> bool:
        return not self._count and not self._events

    def note_run(self, lpn: int, entry: int, count: int) -> None:
        """Sectors from `lpn` on have the table entries from `entry` on, or 0: none."""
        self._reserve(2)
        if count > 1:
            self._rows[self._count] = RUN_MARK, count
            self._count += 1
        self._rows[self._count] = lpn, entry
        self._count += 1

    def note_rows(self, rows: U32) -> None:
        self._reserve(len(rows))
        self._rows[self._count : self._count + len(rows)] = rows
        self._count += len(rows)

    def note_event(self, kind: EventKind, superblock: int, first: int = 0, second: int = 0) -> None:
        self._events.append((kind, superblock, first, second))

    def rows(self) -> U32:
        return self._rows[: self._count]

    def events(self) -> I64:
        return np.array(self._events, np.int64).reshape(-1, 4)

    def clear(self) -> None:
        self._rows = self._rows[:_FIRST_ROWS] if len(self._rows) > _FIRST_ROWS else self._rows
        self._count = 0
        self._events.clear()

    def _reserve(self, rows: int) -> None:
        needed = self._count + rows
        if needed > len(self._rows):
            grown = np.empty((max(needed, 2 * len(self._rows)), 2), np.uint32)
            grown[: self._count] = self.rows()
            self._rows = grown
