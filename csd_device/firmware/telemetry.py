"""Telemetry, host-initiated (07h): the drive's state at this moment, as a JSON object.

NVMe leaves a telemetry log's data to the vendor; this is ours. The Prometheus endpoint shows the
same figures.
"""

from dataclasses import asdict
from typing import Any

from csd_device.firmware.controller import Controller
from csd_device.firmware.latency import BUCKET_BOUNDS_NS
from csd_device.firmware.smart import smart_report

EVENTS_SHOWN = 16


def telemetry_report(controller: Controller, now_ns: int) -> dict[str, Any]:
    """Queues, lanes, DRAM, window, cache, FTL, latencies and the last events."""
    return {
        "drive": controller.config.name,
        "serial": controller.serial,
        "time": controller.time_mode.value,
        "clock_ns": now_ns,
        "smart": smart_report(controller, now_ns),
        "celsius": round(controller.upkeep.thermal.celsius, 3),
        "queues": _queues(controller),
        "utilisation": _utilisation(controller, now_ns),
        "busy_ns": _busy(controller),
        "dram": controller.arena.report(),
        "window": _window(controller),
        "unit_cache": _unit_cache(controller),
        "stage": asdict(controller.stages.totals),
        "latency": _latencies(controller),
        "logs": {
            "damage": controller.folder.damage,
            "write_error": controller.folder.write_error,
        },
        "events": controller.history.report()["events"][:EVENTS_SHOWN],
    }


def _queues(controller: Controller) -> list[dict[str, Any]]:
    return [
        {
            "queue": number,
            "host": queue.host_id,
            "depth": queue.depth,
            "in_flight": queue.in_flight,
            "completed": queue.completed,
        }
        for number, queue in controller.queues.items()
    ]


def _busy(controller: Controller) -> dict[str, Any]:
    """Modelled ns of work since power-on; lists by channel and by die. Empty with time off."""
    time = controller.time
    if time is None:
        return {}
    cells = time.nand.busy_times()
    return {
        "firmware": time.processor.busy_ns,
        "compute": time.engine.busy_ns,
        "dram": time.dram.busy_ns,
        "link_to_host": time.link_down.busy_ns,
        "link_from_host": time.link_up.busy_ns,
        "channels": cells.channel_ns.tolist(),
        "dies": cells.die_ns.tolist(),
    }


def _utilisation(controller: Controller, now_ns: int) -> dict[str, float]:
    """The same as a share of the time since power-on, a mean over channels and over dies."""
    if not now_ns:
        return {}
    shares = {}
    for name, busy_ns in _busy(controller).items():
        total_ns = busy_ns
        if isinstance(busy_ns, list):
            total_ns = sum(busy_ns) / len(busy_ns)
        elif name == "firmware":
            total_ns = busy_ns / controller.config.link.firmware_cores
        shares[name] = round(total_ns / now_ns, 6)
    return shares


def _window(controller: Controller) -> dict[str, int]:
    window = controller.stager.window
    return {
        "bytes": window.size_bytes,
        "leased_bytes": window.leased_bytes,
        "largest_free_bytes": window.largest_free_bytes,
        "leases": window.lease_count,
    }


def _unit_cache(controller: Controller) -> dict[str, int]:
    cache = controller.stager.cache
    return {
        "capacity_bytes": cache.capacity_bytes,
        "used_bytes": cache.used_bytes,
        "hits": cache.hits,
        "misses": cache.misses,
        "brought": cache.brought,
        "brought_used": cache.brought_used,
    }


def _latencies(controller: Controller) -> dict[str, Any]:
    """By kind of command; `counts` goes with `bounds_ns`, and one more beyond the last."""
    kinds = {
        kind: {"count": found.count, "sum_ns": found.sum_ns, "counts": found.counts}
        for kind, found in controller.upkeep.latencies.by_kind.items()
    }
    return {"bounds_ns": list(BUCKET_BOUNDS_NS), "kinds": kinds}
