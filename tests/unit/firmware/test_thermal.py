"""The composite temperature against the closed form of a first-order step."""

from math import exp, log

import pytest

from csd_device.config import Thermal as ThermalConfig
from csd_device.firmware.thermal import Thermal

SECOND = 10**9
CONFIG = ThermalConfig()
FULL_WATTS = CONFIG.idle_watts + CONFIG.nand_watts + CONFIG.link_watts + CONFIG.compute_watts


def settled(watts: float, config: ThermalConfig = CONFIG) -> float:
    return config.ambient_celsius + config.celsius_per_watt * watts


def step_response(start: float, watts: float, seconds: float) -> float:
    target = settled(watts)
    return target + (start - target) * exp(-seconds / CONFIG.time_constant_s)


@pytest.mark.parametrize("seconds", [1, 60, 120, 600])
def test_full_load_is_a_first_order_step(seconds: int) -> None:
    thermal = Thermal(CONFIG)
    for second in range(1, seconds + 1):
        thermal.advance(second * SECOND, (SECOND, SECOND, SECOND))
    expected = step_response(CONFIG.ambient_celsius, FULL_WATTS, seconds)
    assert thermal.celsius == pytest.approx(expected, rel=1e-9)


def test_it_cools_to_what_idling_keeps_it_at() -> None:
    thermal = Thermal(CONFIG)
    thermal.advance(500 * SECOND, [500 * SECOND] * 3)
    warm = thermal.celsius
    thermal.advance(560 * SECOND, (0, 0, 0))
    assert thermal.celsius == pytest.approx(step_response(warm, CONFIG.idle_watts, 60))
    thermal.advance(100_000 * SECOND, (0, 0, 0))
    assert thermal.celsius == pytest.approx(settled(CONFIG.idle_watts))


def test_half_a_load_settles_half_way() -> None:
    thermal = Thermal(CONFIG)
    for second in range(1, 3000):
        thermal.advance(second * SECOND, (SECOND // 2, 0, 0))
    watts = CONFIG.idle_watts + CONFIG.nand_watts / 2
    assert thermal.celsius == pytest.approx(settled(watts), abs=0.05)


def test_work_booked_ahead_is_worked_off_later() -> None:
    ahead, behind = Thermal(CONFIG), Thermal(CONFIG)
    ahead.advance(SECOND, (10 * SECOND, 0, 0))
    ahead.advance(10 * SECOND, (0, 0, 0))
    behind.advance(10 * SECOND, (10 * SECOND, 0, 0))
    assert ahead.celsius == pytest.approx(behind.celsius, rel=1e-12)


def test_time_beyond_the_limits_is_when_the_curve_crosses_them() -> None:
    config = CONFIG.model_copy(update={"warning_celsius": 60.0, "critical_celsius": 70.0})
    thermal = Thermal(config)
    thermal.advance(600 * SECOND, [600 * SECOND] * 3)
    span = settled(FULL_WATTS) - config.ambient_celsius
    crossings = [
        config.time_constant_s * log(span / (settled(FULL_WATTS) - limit)) for limit in (60, 70)
    ]
    assert thermal.warning_ns == pytest.approx((crossings[1] - crossings[0]) * SECOND, abs=10)
    assert thermal.critical_ns == pytest.approx((600 - crossings[1]) * SECOND, abs=10)


def test_limits_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        ThermalConfig(warning_celsius=90.0)
