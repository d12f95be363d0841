"""The SMART / health log page, as a JSON object with NVMe's names."""

from dataclasses import asdict
from typing import Any

from csd_device.firmware.controller import Controller

_RELIABILITY_DEGRADED = 1 << 2  # of the critical warning bits


def smart_report(controller: Controller, now_ns: int) -> dict[str, Any]:
    """Counters since the drive was opened; `flash` is the FTL's own account."""
    counters = controller.counters
    return {
        "critical_warning": _RELIABILITY_DEGRADED if counters.media_errors else 0,
        "data_units_read": counters.data_units_read,
        "data_units_written": counters.data_units_written,
        "num_err_log_entries": controller.errors.error_count,
        "power_on_ns": now_ns,
        **asdict(counters),
        "flash": asdict(controller.ftl.counters()),
        "faults": asdict(controller.faults.counters),
    }
