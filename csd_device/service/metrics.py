"""Prometheus metrics of a drive, over HTTP on the daemon's event loop.

A scrape is answered between two commands, on the one thread that carries them out, so what it
shows is of one moment and needs no lock; it takes a few milliseconds. One request a connection:
GET /metrics, anything else is refused.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from csd_device.drive import Drive
from csd_device.errors import DriveRefused
from csd_protocol.address import TcpAddress
from csd_protocol.units import NS_PER_S

PATH = "/metrics"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_S = 5.0
_REQUEST_BYTES_MAX = 8192
_SCRAPES_MAX = 16  # at once; the loop is select(2), whose descriptors are few

_COUNTERS = {
    "host_read_commands": "Read and Compare commands",
    "host_write_commands": "Write commands",
    "compute_commands": "Commands of the compute command set, staging among them",
    "admin_commands": "Admin commands",
    "failed_commands": "Commands that ended with an error",
    "aborted_commands": "Commands aborted by hosts",
    "read_bytes": "Read by Read, Compare and Verify",
    "written_bytes": "Written by hosts",
    "staged_bytes": "Staged into the window",
    "nand_page_reads": "NAND pages read",
    "nand_written_bytes": "Programmed into NAND",
    "media_errors": "Media and data integrity errors",
    "power_cycles": "Times the drive was opened",
    "unsafe_shutdowns": "Times it was not closed before that",
}
_SMART_GAUGES = {
    "critical_warning": "Critical warning bits of SMART",
    "available_spare": "Percent of spare superblocks left",
    "percentage_used": "Percent of the rated erase cycles used; may pass 100",
}
_QUEUE_GAUGES = {"depth": "Entries of a queue pair", "in_flight": "Commands in flight"}
_CACHE_COUNTERS = ("hits", "misses", "brought", "brought_used")
_LANES = ("firmware", "compute", "dram", "link_to_host", "link_from_host")


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """A server that answers, and where."""

    server: asyncio.Server
    address: TcpAddress


async def serve_metrics(drive: Drive, address: TcpAddress) -> MetricsServer:
    """Answers scrapes until it is closed. Raises DriveRefused when nothing can listen there."""
    registry = CollectorRegistry()
    registry.register(DriveCollector(drive))
    asking: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(asking) >= _SCRAPES_MAX:
            writer.close()
            return
        asking.add(writer)
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head, registry))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone away, or never asked
        except asyncio.LimitOverrunError:
            writer.write(_http("431 Request Header Fields Too Large", b""))
        finally:
            asking.discard(writer)
            writer.close()

    try:
        server = await asyncio.start_server(
            answer, address.host, address.port, limit=_REQUEST_BYTES_MAX
        )
    except OSError as error:
        raise DriveRefused(f"cannot serve metrics at {address}: {error}") from error
    port: int = server.sockets[0].getsockname()[1]
    return MetricsServer(server, TcpAddress(address.host, port))


def _response(head: bytes, registry: CollectorRegistry) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return _http("405 Method Not Allowed", b"")
    if path.decode("latin-1") != PATH:
        return _http("404 Not Found", f"metrics are at {PATH}\n".encode())
    body = generate_latest(registry)
    return _http("200 OK", body, is_head=method == b"HEAD")


def _http(status: str, body: bytes, is_head: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {_CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if is_head else body)


class DriveCollector(Collector):
    """Makes metrics of the drive's telemetry page."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: families come with their values."""
        return ()

    def collect(self) -> Iterator[Metric]:
        page = self._drive.telemetry()
        about = {name: page[name] for name in ("drive", "serial", "time")}
        yield InfoMetricFamily("csd_drive", "What the drive is", value=about)
        yield from _of_smart(page)
        yield from _of_memory(page)
        yield from _of_queues(page["queues"])
        yield from _of_lanes(page["busy_ns"])
        yield from _of_staging(page["stage"])
        yield _latencies(page["latency"])


def _of_smart(page: dict[str, Any]) -> Iterator[Metric]:
    smart = page["smart"]
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"csd_{name}", text, value=smart[name])
    for name, text in _SMART_GAUGES.items():
        yield GaugeMetricFamily(f"csd_{name}", text, value=smart[name])
    yield GaugeMetricFamily(
        "csd_temperature_celsius", "Composite temperature, modelled", value=page["celsius"]
    )
    for name, text in (("power_on", "Drive clock, all power cycles"), ("busy", "Commands ran")):
        seconds = smart[f"{name}_ns"] / NS_PER_S
        yield CounterMetricFamily(f"csd_{name}_seconds", text, value=seconds)
    for name, figure in smart["flash"].items():
        yield GaugeMetricFamily(f"csd_ftl_{name}", "The FTL's own figure", value=float(figure))


def _of_memory(page: dict[str, Any]) -> Iterator[Metric]:
    dram = GaugeMetricFamily("csd_dram_bytes", "Allotments of on-drive DRAM", labels=["name"])
    for name, size in page["dram"].items():
        dram.add_metric([name], size)
    yield dram
    for room in ("window", "unit_cache"):
        for name, figure in page[room].items():
            text = f"{name.replace('_', ' ')} of the {room.replace('_', ' ')}"
            if name in _CACHE_COUNTERS:
                yield CounterMetricFamily(f"csd_{room}_{name}", text, value=figure)
            else:
                yield GaugeMetricFamily(f"csd_{room}_{name}", text, value=figure)


def _of_queues(queues: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["queue", "host"]
    completed = CounterMetricFamily("csd_queue_completed", "Completions posted", labels=labels)
    gauges = {
        name: GaugeMetricFamily(f"csd_queue_{name}", text, labels=labels)
        for name, text in _QUEUE_GAUGES.items()
    }
    for queue in queues:
        whose = [str(queue["queue"]), queue["host"]]
        completed.add_metric(whose, queue["completed"])
        for name, gauge in gauges.items():
            gauge.add_metric(whose, queue[name])
    yield completed
    yield from gauges.values()


def _of_lanes(busy_ns: dict[str, Any]) -> Iterator[Metric]:
    """Modelled seconds of work; a rate of it is utilisation. Nothing with time off."""
    if not busy_ns:
        return
    lanes = CounterMetricFamily("csd_lane_busy_seconds", "Work of one lane", labels=["lane"])
    for name in _LANES:
        lanes.add_metric([name], busy_ns[name] / NS_PER_S)
    yield lanes
    for one, many in (("channel", "channels"), ("die", "dies")):
        family = CounterMetricFamily(f"csd_{one}_busy_seconds", f"Work of one {one}", labels=[one])
        for index, worked_ns in enumerate(busy_ns[many]):
            family.add_metric([str(index)], worked_ns / NS_PER_S)
        yield family


def _of_staging(stage: dict[str, int]) -> Iterator[Metric]:
    units = CounterMetricFamily("csd_units_staged", "Units staged", labels=["source"])
    units.add_metric(["dram"], stage["units_from_dram"])
    units.add_metric(["nand"], stage["units_staged"] - stage["units_from_dram"])
    yield units
    ahead = CounterMetricFamily(
        "csd_units_to_dram", "Units of targets to DRAM, by what came of them", labels=["result"]
    )
    for result in ("to_dram", "no_room", "lost"):
        ahead.add_metric([result.replace("to_dram", "brought")], stage[f"units_{result}"])
    yield ahead
    chosen = stage["units_predicted"]
    yield CounterMetricFamily("csd_units_predicted", "Units that programs chose", value=chosen)


def _latencies(page: dict[str, Any]) -> Metric:
    family = HistogramMetricFamily(
        "csd_command_seconds", "Modelled time from submission to completion", labels=["command"]
    )
    bounds = [str(bound_ns / NS_PER_S) for bound_ns in page["bounds_ns"]] + ["+Inf"]
    for kind, found in page["kinds"].items():
        sums, total = [], 0
        for count in found["counts"]:
            total += count
            sums.append(float(total))
        buckets = list(zip(bounds, sums, strict=True))
        family.add_metric([kind], buckets, sum_value=found["sum_ns"] / NS_PER_S)
    return family
