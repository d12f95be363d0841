"""The drive's clock, passed in. This is the only file of the device that reads time.

Clock.now_ns() -> int         nanoseconds since the drive was opened
Clock.advance_to(ns) -> None  a virtual clock jumps there (never back); a wall clock ignores it
TimeMode.WALL | VIRTUAL | OFF
"""

import time
from enum import StrEnum
from typing import Protocol


class TimeMode(StrEnum):
    """What happens to a completion that the model says is due later."""

    WALL = "wall"  # held until it is due
    VIRTUAL = "virtual"  # posted at once, carrying its modelled times
    OFF = "off"  # posted at once; no time is modelled


class Clock(Protocol):
    """Nanoseconds that never go back."""

    def now_ns(self) -> int: ...

    def advance_to(self, ns: int) -> None: ...


class WallClock:
    """Monotonic time since the clock was made."""

    def __init__(self) -> None:
        self._start_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        return time.monotonic_ns() - self._start_ns

    def advance_to(self, ns: int) -> None:
        """Real time passes by itself."""


class VirtualClock:
    """Starts at 0 and moves only when told to."""

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def advance_to(self, ns: int) -> None:
        self._now_ns = max(self._now_ns, ns)
