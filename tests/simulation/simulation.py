"""Thousands of random commands on one drive from one seed, checked at each step.

    CSD_SEED=7 CSD_STEPS=100000 pytest tests/simulation -k seeded

The weights say how often each command comes. What matters more is where: most commands hit a hot
eighth of the sectors, so that superblocks hold live and stale data and have to be collected.
"""

from collections.abc import Callable

import numpy as np
from world import World

COUNT_MAX = 48  # sectors of a command
_POWER = 0.02  # of steps: power goes soon
_OPERATIONS_MAX = 30  # until then


class Simulation:
    """Random steps on a world."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world = world
        self._rng = rng
        self._steps: dict[Callable[[], None], int] = {
            self._write: 40,
            self._read: 15,
            self._deallocate: 5,
            self._write_zeroes: 3,
            self._copy: 5,
            self._compare: 4,
            world.flush: 10,
            self._idle: 4,
            world.lose_power: 1,
            world.restart: 1,
        }

    def run(self, steps: int) -> None:
        choices = list(self._steps)
        weights = np.array(list(self._steps.values()), float)
        for chosen in self._rng.choice(len(choices), steps, p=weights / weights.sum()):
            if self._rng.random() < _POWER:
                self._world.lose_power_within(int(self._rng.integers(0, _OPERATIONS_MAX)))
            choices[chosen]()
        self._world.read_all()

    def _write(self) -> None:
        lpn, count = self._range()
        self._world.write(lpn, count, fua=bool(self._rng.random() < 0.2))

    def _read(self) -> None:
        self._world.read(*self._range())

    def _deallocate(self) -> None:
        self._world.deallocate(*self._range())

    def _write_zeroes(self) -> None:
        self._world.write_zeroes(*self._range())

    def _copy(self) -> None:
        target, count = self._range()
        source = int(self._rng.integers(0, self._world.sectors - count))
        if source + count <= target or target + count <= source:
            self._world.copy(target, source, count)

    def _compare(self) -> None:
        lpn, count = self._range()
        self._world.compare(lpn, count, is_equal=bool(self._rng.random() < 0.5))

    def _idle(self) -> None:
        self._world.idle(int(self._rng.integers(1, 64)))

    def _range(self) -> tuple[int, int]:
        sectors = self._world.sectors
        end = sectors // 8 if self._rng.random() < 0.8 else sectors
        lpn = int(self._rng.integers(0, end))
        return lpn, int(self._rng.integers(1, min(COUNT_MAX, sectors - lpn) + 1))
