"""SMART / health, and the endurance group's page: JSON objects with NVMe's names.

NVM Express Base 2.1, Get Log Page: SMART / Health Information (02h), Endurance Group Information
(09h). docs/TELEMETRY.md says what moves each field.
"""

from dataclasses import asdict
from typing import Any

from csd_device.firmware import upkeep
from csd_device.firmware.controller import Controller
from csd_device.firmware.counters import Counters
from csd_device.firmware.flash_health import flash_health
from csd_protocol.units import NS_PER_S

_MINUTE_NS, _HOUR_NS = 60 * NS_PER_S, 3600 * NS_PER_S
_BILLION = 10**9


def smart_report(controller: Controller, now_ns: int) -> dict[str, Any]:
    """NVMe's fields in NVMe's units, then the same in ns and bytes; `flash` is the FTL's own.

    Temperature and warnings are brought up to `now_ns`.
    """
    upkeep.tick(controller, now_ns)
    counters = upkeep.counters_now(controller)
    health = flash_health(controller.ftl, controller.config)
    return {
        "critical_warning": controller.upkeep.warnings,
        "composite_temperature": controller.upkeep.thermal.kelvin,
        "available_spare": health.available_spare,
        "available_spare_threshold": controller.config.endurance.spare_threshold_percent,
        "percentage_used": health.percentage_used,
        "endurance_group_critical_warning_summary": _group_warning(controller),
        **_usage(controller, counters),
        **counters.as_object(),
        "flash": asdict(controller.ftl.counters()),
        "faults": asdict(controller.faults.counters),
    }


def endurance_report(controller: Controller) -> dict[str, Any]:
    """What the one endurance group has taken. Data is in billions of bytes, rounded up."""
    config, counters = controller.config, upkeep.counters_now(controller)
    health = flash_health(controller.ftl, config)
    estimate_bytes = config.geometry.raw_bytes * config.endurance.rated_cycles
    return {
        "critical_warning": _group_warning(controller),
        "available_spare": health.available_spare,
        "available_spare_threshold": config.endurance.spare_threshold_percent,
        "percentage_used": health.percentage_used,
        "endurance_estimate": -(-estimate_bytes // _BILLION),
        "data_units_read": -(-(counters.read_bytes + counters.staged_bytes) // _BILLION),
        "data_units_written": -(-counters.written_bytes // _BILLION),
        "media_units_written": -(-counters.nand_written_bytes // _BILLION),
        "host_read_commands": counters.host_read_commands,
        "host_write_commands": counters.host_write_commands,
        "media_errors": counters.media_errors,
        "num_err_log_entries": controller.errors.error_count,
        "total_endurance_group_capacity": config.capacity_bytes,
        "unallocated_endurance_group_capacity": 0,
        "media_written_bytes": counters.nand_written_bytes,
        "bad_superblocks": health.bad_superblocks,
    }


def _group_warning(controller: Controller) -> int:
    """The endurance group knows spare, reliability and read-only."""
    kept = upkeep.SPARE_LOW | upkeep.RELIABILITY | upkeep.READ_ONLY
    return controller.upkeep.warnings & kept


def _usage(controller: Controller, counters: Counters) -> dict[str, int]:
    return {
        "data_units_read": counters.data_units_read,
        "data_units_written": counters.data_units_written,
        "controller_busy_time": counters.busy_ns // _MINUTE_NS,
        "power_on_hours": counters.power_on_ns // _HOUR_NS,
        "warning_composite_temperature_time": counters.warning_temp_ns // _MINUTE_NS,
        "critical_composite_temperature_time": counters.critical_temp_ns // _MINUTE_NS,
        "num_err_log_entries": controller.errors.error_count,
    }
