"""Rounding that looks at the inputs: a smaller error on them, in the same bytes."""

import numpy as np
import pytest

from csd_protocol.low_bit import LowBitRows, dequantise_rows, quantise_rows
from host_client.calibrate.rounding import round_inputs_in_order, round_units_in_order

HIDDEN, UNITS, GROUP = 64, 96, 32


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Inputs [rows, width] that lie near a few directions, as hidden states do."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((width // 6, width))
    near = rng.standard_normal((rows, width // 6)) @ directions
    return near + 0.3 * rng.standard_normal((rows, width))


def values(rows: LowBitRows, bits: int) -> np.ndarray:
    return dequantise_rows(rows.packed, rows.scales, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_in_order_err_less_on_their_inputs_than_the_nearest_levels(bits: int) -> None:
    weights = np.random.default_rng(1).standard_normal((UNITS, HIDDEN)).astype(np.float32)
    seen, fresh = np.split(correlated(2000, HIDDEN), 2)
    fitted = values(round_inputs_in_order(weights, seen.T @ seen, bits, GROUP), bits)
    nearest = dequantise_rows(*quantise_rows(weights, bits, GROUP), bits)
    assert fitted.shape == weights.shape
    error = np.linalg.norm(fresh @ (fitted - weights).T)
    assert error < 0.7 * np.linalg.norm(fresh @ (nearest - weights).T)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_units_in_order_err_less_in_their_sum(bits: int) -> None:
    down = np.random.default_rng(2).standard_normal((UNITS, HIDDEN)).astype(np.float32)
    seen, fresh = np.split(correlated(2000, UNITS), 2)
    fitted = values(round_units_in_order(down, seen.T @ seen, bits, GROUP), bits)
    nearest = dequantise_rows(*quantise_rows(down, bits, GROUP), bits)
    error = np.linalg.norm(fresh @ (fitted - down))
    assert error < 0.7 * np.linalg.norm(fresh @ (nearest - down))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_inputs_that_know_nothing_of_each_other_take_the_nearest_levels(scale: float) -> None:
    weights = scale * np.random.default_rng(3).standard_normal((8, HIDDEN)).astype(np.float32)
    for rounding, moments in (
        (round_inputs_in_order, np.eye(HIDDEN)),
        (round_units_in_order, np.eye(8)),
    ):
        rows = rounding(weights, moments, 4, GROUP)
        packed, scales = quantise_rows(weights, 4, GROUP)
        assert np.abs(rows.scales.astype(np.float32) / scales - 1).max() < 0.002
        close = np.isclose(values(rows, 4), dequantise_rows(packed, scales, 4), rtol=0.002)
        assert close.mean() > 0.99  # a value half-way between two levels may fall either way


def test_rows_of_nothing_stay_nothing() -> None:
    rows = round_inputs_in_order(np.zeros((2, HIDDEN), np.float32), np.eye(HIDDEN), 4, GROUP)
    assert not values(rows, 4).any()


def test_what_cannot_be_rounded_is_refused() -> None:
    weights = np.ones((4, HIDDEN), np.float32)
    with pytest.raises(ValueError, match="groups of 48"):
        round_inputs_in_order(weights, np.eye(HIDDEN), 4, 48)
    with pytest.raises(ValueError, match="not positive definite"):
        round_inputs_in_order(weights, -np.eye(HIDDEN), 4, GROUP)
    weights[1, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        round_inputs_in_order(weights, np.eye(HIDDEN), 4, GROUP)
