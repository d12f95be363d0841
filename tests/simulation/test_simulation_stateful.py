"""Hypothesis looks for the shortest row of commands, restarts and power losses that breaks it."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from simulated_drive import SimulatedController, SimulatedFtl
from world import World

SECTORS = 160  # of 512: commands meet each other
LPN = st.integers(0, SECTORS - 1)
COUNT = st.integers(1, 48)


class DriveAgainstDictionary(RuleBasedStateMachine):
    """The world compares after each command; here is only what may happen."""

    make: ClassVar[type] = SimulatedFtl

    @initialize(seed=st.integers(0, 1 << 16), is_full=st.booleans())
    def switch_on(self, seed: int, is_full: bool) -> None:
        self.world = World(np.random.default_rng(seed), self.make)
        if is_full:  # whatever is written now needs room that has to be made
            for lpn in range(0, self.world.sectors, 64):
                self.world.write(lpn, 64)

    @rule(lpn=LPN, count=COUNT, fua=st.booleans())
    def write(self, lpn: int, count: int, fua: bool) -> None:
        self.world.write(lpn, min(count, SECTORS - lpn), fua)

    @rule(times=st.integers(1, 8), fua=st.booleans())
    def overwrite(self, times: int, fua: bool) -> None:
        """Scattered single sectors: superblocks keep live data and have to be collected."""
        for time in range(times):
            for lpn in range(time, SECTORS, 29):
                self.world.write(lpn, 1, fua)

    @rule(lpn=LPN, count=COUNT)
    def deallocate(self, lpn: int, count: int) -> None:
        self.world.deallocate(lpn, min(count, SECTORS - lpn))

    @rule(lpn=LPN, count=COUNT)
    def write_zeroes(self, lpn: int, count: int) -> None:
        self.world.write_zeroes(lpn, min(count, SECTORS - lpn))

    @rule(source=LPN, to=LPN, count=COUNT)
    def copy(self, source: int, to: int, count: int) -> None:
        count = min(count, SECTORS - max(source, to), abs(source - to))
        if count:
            self.world.copy(to, source, count)

    @rule(lpn=LPN, count=COUNT, is_equal=st.booleans())
    def compare(self, lpn: int, count: int, is_equal: bool) -> None:
        self.world.compare(lpn, min(count, SECTORS - lpn), is_equal)

    @rule()
    def read_all(self) -> None:
        self.world.read_all()

    @rule()
    def flush(self) -> None:
        self.world.flush()

    @rule(sectors=st.integers(1, 64))
    def idle(self, sectors: int) -> None:
        self.world.idle(sectors)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def lose_power(self) -> None:
        self.world.lose_power()

    @rule(operations=st.integers(0, 20))
    def lose_power_within(self, operations: int) -> None:
        self.world.lose_power_within(operations)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.read_all()
            finally:
                self.world.close()


class ControllerAgainstDictionary(DriveAgainstDictionary):
    make = SimulatedController


BOUNDED = settings(max_examples=20, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [DriveAgainstDictionary, ControllerAgainstDictionary])
def test_nothing_acknowledged_is_lost(machine: type[RuleBasedStateMachine]) -> None:
    case = machine.TestCase
    case.settings = BOUNDED
    case("runTest").runTest()
