"""What a run came to: figures with stable names, for people and as JSON.

Utilisation is the busy time of each channel and die over the run, the programs that writes left
behind included. Write amplification is bytes programmed over bytes written; None without writes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from csd_device.config import SECTOR_BYTES
from csd_device.drive import Drive
from csd_device.workload.runner import Direction, Outcome
from csd_protocol.units import NS_PER_S, format_ns, format_size

F64 = npt.NDArray[np.float64]

_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99_9": 99.9}


class Meter:
    """Reads a drive's own counters before and after a run."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._started_ns = drive.clock.now_ns()
        self._busy = drive.busy_times()
        self._counters = drive.ftl_counters()

    def read(self) -> "Usage":
        """What the drive did since this was made."""
        busy, counters = self._drive.busy_times(), self._drive.ftl_counters()
        last_ns = max(self._drive.clock.now_ns(), self._drive.idle_ns())
        passed_ns = max(last_ns - self._started_ns, 1)
        before = self._counters
        written = (counters.sectors_written - before.sectors_written) * SECTOR_BYTES
        page_bytes = self._drive.config.geometry.page_bytes
        programmed = (counters.pages_programmed - before.pages_programmed) * page_bytes
        return Usage(
            (busy.channel_ns - self._busy.channel_ns) / passed_ns,
            (busy.die_ns - self._busy.die_ns) / passed_ns,
            programmed / written if written else None,
            counters.superblocks_erased - before.superblocks_erased,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """How much of the drive a run used."""

    channels: F64  # [channels] share of time
    dies: F64  # [dies] share of time
    write_amplification: float | None
    superblocks_erased: int

    def as_json(self) -> dict[str, Any]:
        return {
            "channel_utilisation": _spread(self.channels),
            "die_utilisation": _spread(self.dies),
            "write_amplification": self.write_amplification,
            "superblocks_erased": self.superblocks_erased,
        }


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """One job or trace."""
    passed_ns = max(outcome.ended_ns - outcome.started_ns, 1)
    size_bytes = outcome.reads.bytes + outcome.writes.bytes
    return {
        "name": outcome.name,
        "elapsed_ns": passed_ns,
        "requests": outcome.requests,
        "iops": outcome.requests * NS_PER_S / passed_ns,
        "bandwidth_bytes_per_s": size_bytes * NS_PER_S / passed_ns,
        "reads": _direction(outcome.reads, passed_ns),
        "writes": _direction(outcome.writes, passed_ns),
    }


def total_of(outcomes: list[Outcome]) -> Outcome:
    """All of them as one."""
    total = Outcome(
        "all",
        min(outcome.started_ns for outcome in outcomes),
        max(outcome.ended_ns for outcome in outcomes),
    )
    for outcome in outcomes:
        total.reads.merge(outcome.reads)
        total.writes.merge(outcome.writes)
    return total


def outcome_table(outcomes: list[Outcome]) -> Table:
    """A column for the reads and one for the writes of each."""
    table = Table()
    table.add_column("")
    columns = []
    for outcome in outcomes:
        row = outcome_json(outcome)
        for name in ("reads", "writes"):
            if row[name] is not None:
                table.add_column(f"{outcome.name}\n{name}", justify="right")
                columns.append(_figures(row[name]))
    for name in columns[0] if columns else ():
        table.add_row(name, *(column[name] for column in columns))
    return table


def _figures(part: dict[str, Any]) -> dict[str, str]:
    latencies = {
        f"latency, {name.replace('_', '.')}": format_ns(figure)
        for name, figure in part["latency_ns"].items()
    }
    return {
        "requests": f"{part['requests']:,}",
        "IOPS": f"{part['iops']:,.0f}",
        "bandwidth": f"{format_size(part['bandwidth_bytes_per_s'])}/s",
        **latencies,
    }


def usage_lines(usage: Usage) -> list[str]:
    """Utilisation and write amplification in words."""
    lines = [
        f"{name} busy: {shares.mean():.1%} on average, {shares.min():.1%} to {shares.max():.1%}"
        for name, shares in (("channels", usage.channels), ("dies", usage.dies))
    ]
    if usage.write_amplification is not None:
        lines.append(
            f"write amplification: {usage.write_amplification:.3f}, "
            f"{usage.superblocks_erased:,} superblocks erased"
        )
    return lines


def _direction(direction: Direction, passed_ns: int) -> dict[str, Any] | None:
    """None when there was no such request."""
    latencies = direction.latencies
    if not latencies.count:
        return None
    return {
        "requests": latencies.count,
        "bytes": direction.bytes,
        "iops": latencies.count * NS_PER_S / passed_ns,
        "bandwidth_bytes_per_s": direction.bytes * NS_PER_S / passed_ns,
        "latency_ns": {
            "mean": latencies.mean_ns,
            **{name: latencies.percentile_ns(share) for name, share in _PERCENTILES.items()},
            "max": latencies.max_ns,
        },
    }


def _spread(shares: F64) -> dict[str, float]:
    return {
        "mean": float(shares.mean()),
        "min": float(shares.min()),
        "max": float(shares.max()),
    }
