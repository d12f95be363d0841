"""The seeded simulation, of the FTL and of the whole controller."""

import os

import numpy as np
import pytest
from simulated_drive import SimulatedController, SimulatedFtl
from simulation import Simulation
from world import World

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
