"""The seeded simulation, of the FTL and of the whole controller."""

import os

import numpy as np
import pytest
from bad_blocks import BadBlocks
from pattern_world import PatternWorld
from simulated_drive import SimulatedController, SimulatedFtl
from simulation import Simulation
from world import World, any_drive, small_drive

from csd_protocol.status import Status

SEED = int(os.environ.get("CSD_SEED", "1"))
STEPS = int(os.environ.get("CSD_STEPS", "1000"))
pytestmark = pytest.mark.timeout(0 if "CSD_STEPS" in os.environ else 300)
SHAPES = 40 if "CSD_FULL" in os.environ else 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Shown when a test fails."""
    print(f"replay with CSD_SEED={SEED} CSD_STEPS={STEPS}")  # noqa: T201


@pytest.mark.parametrize("make", [SimulatedFtl, SimulatedController])
def test_a_seeded_run_holds(make: type) -> None:
    rng = np.random.default_rng(SEED)
    with World(rng, make) as world:
        Simulation(world, rng).run(STEPS)
        assert world.power_losses > STEPS // 200
        assert not world.refusals


@pytest.mark.parametrize("make", [SimulatedFtl, SimulatedController])
def test_a_run_with_sectors_that_are_made_holds(make: type) -> None:
    rng = np.random.default_rng(SEED)
    blocks = BadBlocks(small_drive().geometry, rng, rate=0.01, limit=1)
    with PatternWorld(rng, make, faults=blocks.around) as world:
        Simulation(world, rng).run(STEPS // 2)
        assert world.power_losses
        assert world.subject.ftl.counters().sectors_moved
        assert not world.refusals


@pytest.mark.parametrize("seed", range(SEED, SEED + SHAPES))
def test_drives_of_many_shapes_hold(seed: int) -> None:
    """Superblocks of one to sixteen pages, all policies, no spares or a few that go bad."""
    rng = np.random.default_rng(seed)
    config = any_drive(rng)
    blocks = BadBlocks(config.geometry, rng, rate=0.01, limit=config.spare_superblocks)
    with World(rng, config=config, faults=blocks.around) as world:
        Simulation(world, rng).run(STEPS // 2)
        assert not world.refusals


def test_power_may_go_within_each_operation_of_a_run() -> None:
    """The same commands again and again; with CSD_FULL each operation is cut, else every eighth."""
    losses = 0
    for operation in range(0, 200, 1 if "CSD_FULL" in os.environ else 8):
        rng = np.random.default_rng(SEED)
        with World(np.random.default_rng(operation)) as world:
            world.lose_power_within(operation)
            Simulation(world, rng, power=0.0).run(60)
            losses += world.power_losses > 0
    assert losses > 0


@pytest.mark.parametrize("make", [SimulatedFtl, SimulatedController])
def test_a_run_with_bad_blocks_holds(make: type) -> None:
    """As many superblocks go bad as are spare; nobody notices."""
    rng = np.random.default_rng(SEED)
    spares = small_drive().spare_superblocks
    blocks = BadBlocks(small_drive().geometry, rng, rate=0.01, limit=spares)
    with World(rng, make, faults=blocks.around) as world:
        Simulation(world, rng).run(STEPS)
        assert not world.refusals
    assert len(blocks.failed) == spares


def test_a_worn_out_drive_is_read_only_and_keeps_what_it_has() -> None:
    rng = np.random.default_rng(SEED)
    geometry = small_drive().geometry
    blocks = BadBlocks(geometry, rng, rate=0.02, limit=geometry.blocks_per_plane)
    with World(rng, faults=blocks.around) as world:
        Simulation(world, rng).run(STEPS)
        assert world.subject.ftl.is_read_only
        assert Status.WRITE_PROTECTED in world.refusals
        world.restart()
        world.lose_power()
        world.read_all()


@pytest.mark.parametrize("make", [SimulatedFtl, SimulatedController])
def test_a_full_disk_fails_commands_and_nothing_else(make: type) -> None:
    rng = np.random.default_rng(SEED)
    with World(rng, make) as world:
        Simulation(world, rng, full=0.1).run(STEPS)
