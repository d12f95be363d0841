"""The write buffer: on-drive DRAM that a write goes to before its cells are programmed.

Only its room is modelled; the bytes lie on the media at once. What was admitted leaves when the
page that it went to is programmed: pages take the oldest bytes first. A page of which only part was
filled keeps waiting, as do its bytes here.
"""

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class WriteBuffer:
    """Room for `capacity_bytes`; times are the drive clock's, in nanoseconds."""

    def __init__(self, capacity_bytes: int, page_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._page_bytes = page_bytes
        self._held_bytes = 0
        self._open_bytes = 0  # of those held: in no program yet
        self._leaving: list[tuple[int, int]] = []  # heap: done_ns, bytes
        self._drained_ns = 0

    def admit(self, now_ns: int, length_bytes: int) -> int:
        """When this much room is free, from now on; it is taken then."""
        while self._leaving and self._leaving[0][0] <= now_ns:
            self._held_bytes -= heappop(self._leaving)[1]
        while self._leaving and self._held_bytes + length_bytes > self.capacity_bytes:
            now_ns, left_bytes = heappop(self._leaving)
            self._held_bytes -= left_bytes
        self._held_bytes += length_bytes
        self._open_bytes += length_bytes
        return now_ns

    def drain(self, done_ns: I64) -> None:
        """Pages whose programs are done at these times take the oldest bytes along."""
        for done in done_ns.tolist():
            self._drained_ns = max(self._drained_ns, done)
            left_bytes = min(self._page_bytes, self._open_bytes)
            if left_bytes:
                self._open_bytes -= left_bytes
                heappush(self._leaving, (done, left_bytes))

    def drained_ns(self) -> int:
        """When all programs so far are done."""
        return self._drained_ns
