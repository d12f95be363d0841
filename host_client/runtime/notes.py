"""Notes: programs that remember a text are told of every token of it, the prompt's too.

A decoded token comes with the command that asks for units. A prompt goes through the model in a
sweep that asks for nothing; so the state that enters each layer is sent beside it, in commands that
choose no unit: Execute Program with a kept fraction of 0. They overlap the sweep.

What a program remembers belongs to this host and follows from positions alone, so the positions
must be those of one text. `Text` sees to that: it goes on while the same KV cache does, also one
that was cropped, and else begins anew, at position 0.
"""

import contextlib
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from host_client.driver import Drive, DriveError, PendingCommand
from host_client.driver.commands import Origin, Told
from host_client.runtime.guidance import Guide
from host_client.runtime.tally import Tally

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

IN_FLIGHT_MAX = 4  # commands: a queue has other work


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pass stands in its text, or texts."""

    cache: object | None = None  # the KV cache; None: this pass is the whole text
    position: int = 0  # of the first token
    tokens: int = 0  # of one text
    texts: int = 1
    padding: int = 0  # rows before the first token
    cached_tokens: int = 0  # in all rows of the KV cache behind this pass


class Text:
    """Which positions a program knows of the running text, and under which numbers."""

    def __init__(self) -> None:
        self._cache: weakref.ref[Any] | None = None  # the KV cache that goes with the text
        self._first = 0  # position of the program's position 0
        self._end = 0  # the first one that it was not told of

    def forget(self) -> None:
        """Another text was told to the program meanwhile."""
        self._cache = None

    def go_on(self, place: Place) -> int:
        """The program's position of the first token of a pass."""
        cache = place.cache
        is_same = cache is not None and self._cache is not None and self._cache() is cache
        if not is_same or not self._first < place.position <= self._end:
            self._first = place.position
        self._cache = weakref.ref(cache) if cache is not None else None
        self._end = place.position + place.tokens
        return place.position - self._first


class Notes:
    """Commands that tell one program of hidden states, a few in flight."""

    def __init__(self, drive: Drive, model_id: int, guide: Guide, tally: Tally) -> None:
        self._drive, self._model_id, self._guide = drive, model_id, guide
        self._tally = tally
        self._pending: deque[PendingCommand[U32]] = deque()

    def send(self, layer: int, token: int, hidden: F32) -> None:
        """States [rows, hidden] that enter a layer, row 0 at position `token`, if it hears those.

        Raises CommandFailed, also for what was sent before.
        """
        if not self._guide.hears(layer):
            return
        rows = max(1, self._drive.transfer_bytes_max // hidden[0].nbytes)
        for start in range(0, hidden.shape[0], rows):
            if len(self._pending) == IN_FLIGHT_MAX:
                self._settle_one()
            part = hidden[start : start + rows]
            told = Told(Origin(layer))
            self._pending.append(
                self._drive.execute_program(
                    self._guide.program, self._model_id, layer, part, 0.0, told, token + start
                )
            )

    def settle(self) -> None:
        """Waits for all that was sent, whatever it raises: CommandFailed, DriveLost."""
        try:
            while self._pending:
                self._settle_one()
        except DriveError:
            self.drop()
            raise

    def drop(self) -> None:
        """Waits for all that was sent, whatever became of it."""
        while self._pending:
            with contextlib.suppress(DriveError):
                self._settle_one()

    def _settle_one(self) -> None:
        pending = self._pending.popleft()
        pending.result()
        self._tally.add_run(pending.timing)
