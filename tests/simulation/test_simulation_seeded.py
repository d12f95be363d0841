"""The seeded simulation, of the FTL and of the whole controller."""

import os

import numpy as np
import pytest
from bad_blocks import BadBlocks
from simulated_drive import SimulatedController, SimulatedFtl
from simulation import Simulation
from world import World, small_drive

from csd_protocol.status import Status

SEED = int(os.environ.get("CSD_SEED", "1"))
STEPS = int(os.environ.get("CSD_STEPS", "2000"))


@pytest.mark.timeout(0 if "CSD_STEPS" in os.environ else 300)
@pytest.mark.parametrize("make", [SimulatedFtl, SimulatedController])
def test_a_seeded_run_holds(make: type) -> None:
    print(f"replay with CSD_SEED={SEED} CSD_STEPS={STEPS}")  # noqa: T201 (shown when it fails)
    rng = np.random.default_rng(SEED)
    with World(rng, make) as world:
        Simulation(world, rng).run(STEPS)
        assert world.power_losses > STEPS // 200
        assert not world.refusals


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
        Simulation(world, rng).run(STEPS // 2)
        assert world.subject.ftl.is_read_only
        assert Status.WRITE_PROTECTED in world.refusals
        world.restart()
        world.lose_power()
        world.read_all()
