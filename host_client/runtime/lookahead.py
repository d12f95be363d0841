"""How many layers ahead a program is asked: what the user said, or learned from two durations.

What is asked for k layers ahead is there in time when the host computes for k layers at least as
long as the drive takes to bring it. So k is the drive's time over the host's time for one layer,
rounded up. Either is a median of the latest samples: a thread that waited for a core, or one
command behind a garbage collection, says nothing of the next. Nothing here reads a clock, and the
same samples give the same answer.

A *steady* lookahead is what was said. One that *settles* moves once, after the first passes: what
the near-sighted program sees decides what is left out, so the output would change with every move.
One that *follows* moves a layer a pass for as long as it lives: the far-sighted program decides
when a unit is in on-drive DRAM and nothing else.
"""

from collections import deque
from collections.abc import Callable
from enum import Enum
from statistics import median

from host_client.runtime.refusals import RequestRefused

LAYERS_MAX = 8
SAMPLES = 64  # of each duration, the latest
SETTLED_AFTER = 2  # passes
AUTO = "auto"


class Moves(Enum):
    NEVER = "never"
    ONCE = "once"
    ALWAYS = "always"


class Lookahead:
    """Layers ahead. Once it moves it is 1 to LAYERS_MAX, or so many more than another one."""

    def __init__(
        self, layers: int, moves: Moves = Moves.NEVER, beyond: "Lookahead | None" = None
    ) -> None:
        self.layers = layers
        self.moves = moves
        self._beyond = beyond
        self._most = LAYERS_MAX  # as far as there was room for
        self._passes = 0
        self._host_ns: deque[int] = deque(maxlen=SAMPLES)
        self._drive_ns: deque[int] = deque(maxlen=SAMPLES)

    @classmethod
    def parse(cls, text: str | int, start: int) -> "Lookahead":
        """Layers, or `auto` for one that starts somewhere and settles. Raises RequestRefused."""
        return cls(start, Moves.ONCE) if text == AUTO else cls.steady(text)

    @classmethod
    def steady(cls, text: str | int) -> "Lookahead":
        """So many layers. Raises RequestRefused."""
        try:
            layers = int(text)
        except ValueError:
            layers = -1
        if layers < 0:
            raise RequestRefused(f"a lookahead of {text}: it is 0 or more layers, or {AUTO!r}")
        return cls(layers)

    @property
    def lead(self) -> int:
        """Layers beyond the other one, one at least."""
        return max(1, self.layers - self._base)

    def note_host(self, layer_ns: int) -> None:
        """How long the host computed for one layer, its waits left out."""
        self._host_ns.append(layer_ns)

    def note_drive(self, ns: int) -> None:
        """How long the drive took from a command to its units being there."""
        self._drive_ns.append(ns)

    def note_room(self, was_enough: bool) -> None:
        """Whether all that was asked for had room on the drive: if not, less is asked for."""
        self._most = min(LAYERS_MAX, self._most + 1) if was_enough else max(1, self.lead - 1)

    def end_pass(self) -> None:
        """A pass is over: this is when it moves."""
        if self.moves is Moves.NEVER or not self._host_ns or not self._drive_ns:
            return
        self._passes += 1
        if self.moves is Moves.ALWAYS:
            self.layers += max(-1, min(1, self._wanted - self.layers))
        elif self._passes == SETTLED_AFTER:
            self.layers, self.moves = self._wanted, Moves.NEVER

    @property
    def _base(self) -> int:
        return self._beyond.layers if self._beyond is not None else 0

    @property
    def _wanted(self) -> int:
        """What the samples ask for, as far as it may go."""
        layers = -(-int(median(self._drive_ns)) // max(1, int(median(self._host_ns))))
        return self._base + max(1, min(self._most, layers))


class Pace:
    """How long the host computes for one layer, by its own clock."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._last: tuple[int, int] | None = None  # when, and how long it had waited by then

    def begin(self) -> None:
        """A pass begins."""
        self._last = None

    def layer_ns(self, waited_ns: int) -> int | None:
        """Since the layer before, less what was waited meanwhile; None in the first layer."""
        last, now = self._last, (self._now_ns(), waited_ns)
        self._last = now
        return None if last is None else max(0, now[0] - last[0] - (now[1] - last[1]))
