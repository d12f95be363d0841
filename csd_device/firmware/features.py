"""Features: the few settings that a host may read or change."""

from csd_device.config import Queues
from csd_device.errors import CommandError
from csd_protocol.opcodes import Feature
from csd_protocol.status import Status

KELVIN_70C = 343
EVENT_RELIABILITY = 1 << 2  # of ASYNC_EVENT_CONFIGURATION: report lost reliability
_VALUE_MAX = {
    Feature.TEMPERATURE_THRESHOLD: 0xFFFF,
    Feature.VOLATILE_WRITE_CACHE: 1,
    Feature.ASYNC_EVENT_CONFIGURATION: 0xFFFF_FFFF,
}


class Features:
    """Values by feature; they last until the drive is closed."""

    def __init__(self, queues: Queues) -> None:
        pairs = queues.max_queues - 1  # NVMe counts from zero: submission low, completion high
        self._values: dict[int, int] = {
            Feature.TEMPERATURE_THRESHOLD: KELVIN_70C,
            Feature.VOLATILE_WRITE_CACHE: 1,
            Feature.NUMBER_OF_QUEUES: pairs | pairs << 16,
            Feature.ASYNC_EVENT_CONFIGURATION: EVENT_RELIABILITY,
        }

    def get(self, feature: int) -> int:
        """Raises CommandError (Invalid Field) naming the features that there are."""
        value = self._values.get(feature)
        if value is None:
            known = ", ".join(f"{item:02X}h" for item in sorted(Feature))
            raise _invalid(f"feature {feature:02X}h; this drive has {known}")
        return value

    def set(self, feature: int, value: int) -> None:
        """Raises CommandError (Invalid Field) for one that is not there, fixed or out of range."""
        self.get(feature)
        limits = {int(item): limit for item, limit in _VALUE_MAX.items()}
        if feature not in limits:
            raise _invalid(f"feature {feature:02X}h cannot be changed")
        if not 0 <= value <= limits[feature]:
            raise _invalid(f"feature {feature:02X}h goes from 0 to {limits[feature]}, not {value}")
        self._values[feature] = value

    @property
    def writes_are_volatile(self) -> bool:
        """False: each write is flushed before it is answered."""
        return bool(self._values[Feature.VOLATILE_WRITE_CACHE])

    @property
    def reports_reliability(self) -> bool:
        return bool(self._values[Feature.ASYNC_EVENT_CONFIGURATION] & EVENT_RELIABILITY)


def _invalid(detail: str) -> CommandError:
    return CommandError(Status.INVALID_FIELD, detail)
