"""In which order units lie: hot ones apart, and those together that tokens want together."""

import numpy as np

from host_client.calibrate.unit_order import TIERS, order_of

TOKENS, UNITS = 300, 64


def pages_touched(order: np.ndarray, wanted: np.ndarray, per_page: int) -> int:
    return int(wanted[:, order].reshape(wanted.shape[0], -1, per_page).any(2).sum())


def test_tiers_go_from_hot_to_cold() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.random((TOKENS, UNITS)) < rng.permutation(np.linspace(0.02, 0.98, UNITS))
    order = order_of(wanted)
    assert order.dtype == np.uint32
    assert np.sort(order).tolist() == list(range(UNITS))
    counts = wanted.sum(0)[order].reshape(TIERS, -1)
    assert (counts[:-1].min(1) >= counts[1:].max(1)).all()


def test_units_that_go_together_lie_together() -> None:
    """Groups of eight, each wanted as one, by as many tokens as every other."""
    groups = 8
    rng = np.random.default_rng(1)
    chosen = np.array([rng.permutation(groups) < groups // 4 for _ in range(TOKENS)])
    owners = rng.permutation(np.repeat(np.arange(groups), UNITS // groups))
    wanted = chosen[:, owners]
    order = order_of(wanted)
    least = int(chosen.sum())  # a page a group
    assert pages_touched(order, wanted, UNITS // groups) <= 1.3 * least
    assert pages_touched(np.arange(UNITS), wanted, UNITS // groups) > 2.5 * least


def test_text_of_any_length_will_do() -> None:
    for tokens in (1, 63, 64, 65):
        wanted = np.random.default_rng(tokens).random((tokens, 10)) < 0.4
        assert np.sort(order_of(wanted)).tolist() == list(range(10))
