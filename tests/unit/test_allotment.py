"""Units dealt out to layers: the least loss for the sum, against every other way to deal."""

from itertools import product

import numpy as np
import pytest

from host_client.runtime.allotment import allot

LAYERS, UNITS = 3, 5


def losses(seed: int) -> np.ndarray:
    """What is lost with so many units kept, [layers, units + 1]: scores squared, summed."""
    scores = np.sort(np.random.default_rng(seed).exponential(size=(LAYERS, UNITS)), axis=1)
    dropped = np.concatenate([np.zeros((LAYERS, 1)), np.cumsum(scores**2, axis=1)], axis=1)
    return dropped[:, ::-1].astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [3, 7, 14])
def test_no_other_way_to_deal_loses_less(seed: int, kept: int) -> None:
    dropped, weights = losses(seed), np.array([1.0, 3.0, 0.2])
    counts = allot(dropped, weights, kept)
    assert sum(counts) == kept

    def loss(dealt) -> float:
        return sum(weights[layer] * dropped[layer, n] for layer, n in enumerate(dealt))

    ways = [way for way in product(range(1, UNITS + 1), repeat=LAYERS) if sum(way) == kept]
    assert loss(counts) == pytest.approx(min(loss(way) for way in ways), rel=1e-6)


def test_every_layer_keeps_what_it_must() -> None:
    counts = allot(losses(1), np.array([1e9, 1.0, 1e-9]), 9, least=2)
    assert counts == [5, 2, 2]


@pytest.mark.parametrize("kept", [2, 16])
def test_a_sum_that_the_layers_cannot_keep_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match=f"{kept} units for 3 layers of 5"):
        allot(losses(1), np.ones(LAYERS), kept)
