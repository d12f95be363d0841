"""The composite temperature: one thermal mass, warmed by work and cooled by its surroundings.

    dT/dt = (ambient + resistance * watts - T) / time constant

so at constant power T goes from where it is to `ambient + resistance * watts` as 1 - exp(-t / tau).
A thing that works takes its watts for as long as it was busy, from the time on that it is told of;
what was booked ahead is worked off later. Power is thereby constant in pieces, and each piece is
the closed form. In modelled time, so the same commands give the same temperatures.
"""

from collections.abc import Sequence
from math import exp, log

from csd_device.config import Thermal as ThermalConfig
from csd_protocol.units import NS_PER_S

KELVIN_0C = 273


class Thermal:
    """Temperature so far, and how long it was beyond the limits."""

    def __init__(self, config: ThermalConfig) -> None:
        self.celsius = config.ambient_celsius
        self.warning_ns = 0  # at or above the warning and below the critical temperature
        self.critical_ns = 0
        self._config = config
        self._watts = (config.nand_watts, config.link_watts, config.compute_watts)
        self._owed_ns = [0] * len(self._watts)
        self._now_ns = 0

    @property
    def kelvin(self) -> int:
        """As SMART states it."""
        return round(self.celsius) + KELVIN_0C

    def advance(self, now_ns: int, work_ns: Sequence[int]) -> None:
        """Time passes until `now_ns`; since the last call NAND, link and compute worked so long."""
        owed = self._owed_ns
        for index, work in enumerate(work_ns):
            owed[index] += work
        while self._now_ns < now_ns:
            busy = [index for index, left_ns in enumerate(owed) if left_ns > 0]
            step_ns = min([now_ns - self._now_ns, *(owed[index] for index in busy)])
            watts = self._config.idle_watts + sum(self._watts[index] for index in busy)
            self._relax(step_ns, watts)
            self._now_ns += step_ns
            for index in busy:
                owed[index] -= step_ns

    def _relax(self, step_ns: int, watts: float) -> None:
        """A piece of constant power."""
        config, before = self._config, self.celsius
        target = config.ambient_celsius + config.celsius_per_watt * watts
        self.celsius = target + (before - target) * exp(-step_ns / self._tau_ns)
        critical_ns = self._above_ns(config.critical_celsius, before, target, step_ns)
        self.critical_ns += critical_ns
        warning_ns = self._above_ns(config.warning_celsius, before, target, step_ns)
        self.warning_ns += warning_ns - critical_ns

    def _above_ns(self, limit: float, before: float, target: float, step_ns: int) -> int:
        """How much of a piece that ended at the present temperature was at `limit` or above."""
        was, is_now = before >= limit, self.celsius >= limit
        if was == is_now:
            return step_ns if was else 0
        crossed_ns = round(self._tau_ns * log((target - before) / (target - limit)))
        crossed_ns = min(crossed_ns, step_ns)
        return crossed_ns if was else step_ns - crossed_ns

    @property
    def _tau_ns(self) -> float:
        return self._config.time_constant_s * NS_PER_S
