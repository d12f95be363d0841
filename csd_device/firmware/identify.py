"""Identify: the JSON objects that tell a host what it is connected to."""

from collections.abc import Callable
from typing import Any

from csd_device.config import SECTOR_BYTES
from csd_device.errors import CommandError
from csd_device.firmware.controller import Controller
from csd_protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from csd_protocol.opcodes import Cns
from csd_protocol.program_file import ProgramKind
from csd_protocol.status import Status

FIRMWARE_REVISION = "1.0"
NAMESPACE = 1


def identify(controller: Controller, cns: int) -> dict[str, Any]:
    """Raises CommandError (Invalid Field) for a CNS that this drive does not answer."""
    describe = _BY_CNS.get(cns)
    if describe is None:
        known = ", ".join(f"{item:02X}h" for item in sorted(_BY_CNS))
        raise CommandError(Status.INVALID_FIELD, f"CNS {cns:02X}h; this drive answers {known}")
    return describe(controller)


def _controller(controller: Controller) -> dict[str, Any]:
    config = controller.config
    return {
        "model": config.name,
        "description": config.description,
        "serial": controller.serial,
        "firmware": FIRMWARE_REVISION,
        "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
        "time": controller.time_mode.value,
        "queues": {
            "max_depth": config.queues.max_depth,
            "max_queues": config.queues.max_queues,
            "open": controller.hosts.queue_count,
        },
        "mdts_bytes": config.queues.mdts_bytes,
        "compute": {
            "ops_per_s": config.compute.ops_per_s,
            "program_kinds": [kind.value for kind in ProgramKind],
        },
        "link": {
            "bytes_per_s": config.link.bytes_per_s,
            "payload_bytes_per_s": config.link.payload_bytes_per_s,
            "firmware_ns": config.link.firmware_ns,
        },
        "nand": {"bytes_per_s": config.nand_bytes_per_s, "read_ns": config.timing.mean_read_ns},
        "dram": {
            "bytes_per_s": config.dram.bandwidth_bytes_per_s,
            "unit_cache_bytes": controller.stager.cache.capacity_bytes,
        },
        "namespaces": [NAMESPACE],
    }


def _namespace(controller: Controller) -> dict[str, Any]:
    ftl = controller.ftl
    return {
        "nsid": NAMESPACE,
        "blocks": ftl.capacity_sectors,
        "block_bytes": SECTOR_BYTES,
        "used_blocks": ftl.used_sectors,
        "capacity_bytes": ftl.capacity_sectors * SECTOR_BYTES,
    }


def _window(controller: Controller) -> dict[str, Any]:
    window, cache = controller.stager.window, controller.stager.cache
    return {
        "path": str(window.path),
        "bytes": window.size_bytes,
        "free_bytes": window.free_bytes,
        "largest_free_bytes": window.largest_free_bytes,
        "leases": window.lease_count,
        "dram": controller.arena.report(),
        "unit_cache": {
            "capacity_bytes": cache.capacity_bytes,
            "used_bytes": cache.used_bytes,
            "hits": cache.hits,
            "misses": cache.misses,
            "brought": cache.brought,
            "brought_used": cache.brought_used,
        },
    }


def _programs(controller: Controller) -> dict[str, Any]:
    return {
        "programs": [
            {
                "program": number,
                "kind": stored.program.kind.value,
                "model": stored.program.model,
                "role": stored.program.role.value,
                "kv_groups": stored.program.kv_groups,
                "bytes": stored.program.dram_bytes,
                "active": stored.active,
                "layers": list(stored.program.layers),
            }
            for number, stored in controller.programs.loaded().items()
        ]
    }


_BY_CNS: dict[int, Callable[[Controller], dict[str, Any]]] = {
    Cns.NAMESPACE: _namespace,
    Cns.CONTROLLER: _controller,
    Cns.WINDOW: _window,
    Cns.PROGRAMS: _programs,
}
