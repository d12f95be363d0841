"""Log pages as tables for people."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from csd_protocol.units import format_ns, format_size

Page = dict[str, Any]

_KELVIN_0C = 273
_DATA_UNIT_BYTES = 512_000
_BILLION = 10**9
_WARNINGS = (
    "available spare below its threshold",
    "temperature at the threshold",
    "reliability degraded",
    "read-only",
)
_STAGE_ENTRIES_SHOWN = 8


def smart_tables(page: Page) -> list[Table]:
    warning, kelvin = page["critical_warning"], page["composite_temperature"]
    warnings = [text for bit, text in enumerate(_WARNINGS) if warning >> bit & 1]
    table = _fields("SMART / health")
    rows = [
        ("critical warning", ", ".join(warnings) or "none"),
        ("composite temperature", f"{kelvin - _KELVIN_0C} °C ({kelvin} K)"),
        (
            "available spare",
            f"{page['available_spare']} % (threshold {page['available_spare_threshold']} %)",
        ),
        ("percentage used", f"{page['percentage_used']} %"),
        ("data units read", _data_units(page["data_units_read"])),
        ("data units written", _data_units(page["data_units_written"])),
        ("host read commands", f"{page['host_read_commands']:,}"),
        ("host write commands", f"{page['host_write_commands']:,}"),
        ("compute commands", f"{page['compute_commands']:,}"),
        (
            "controller busy time",
            f"{page['controller_busy_time']:,} min ({format_ns(page['busy_ns'])})",
        ),
        ("power cycles", f"{page['power_cycles']:,}"),
        ("power-on hours", f"{page['power_on_hours']:,} ({format_ns(page['power_on_ns'])})"),
        ("unsafe shutdowns", f"{page['unsafe_shutdowns']:,}"),
        ("media errors", f"{page['media_errors']:,}"),
        ("error log entries", f"{page['num_err_log_entries']:,}"),
        ("time above warning", f"{page['warning_composite_temperature_time']:,} min"),
        ("time above critical", f"{page['critical_composite_temperature_time']:,} min"),
        *((f"flash: {name.replace('_', ' ')}", _figure(v)) for name, v in page["flash"].items()),
    ]
    for row in rows:
        table.add_row(*row)
    return [table]


def error_tables(page: Page) -> list[Table]:
    title = f"errors, newest first; {page['error_count']:,} in the drive's life"
    table = _table(title, "number", "when", "command", "status and why")
    for entry in page["entries"]:
        table.add_row(
            str(entry["error_count"]),
            _when(entry),
            f"{entry['command']}\nqueue {entry['queue']}, CID {entry['cid']}",
            f"{entry['status']}: {entry['detail']}",
        )
    return [table]


def event_tables(page: Page) -> list[Table]:
    title = f"events, newest first; {page['total_number_of_events']:,} in the drive's life"
    table = _table(title, "number", "when", "event", "")
    for entry in page["events"]:
        table.add_row(
            str(entry["event_number"]),
            _when(entry),
            entry["event"].replace("_", " "),
            ", ".join(f"{name} {value}" for name, value in entry["detail"].items()),
        )
    return [table]


def endurance_tables(page: Page) -> list[Table]:
    table = _fields("endurance group")
    for name, value in page.items():
        text = _figure(value)
        if name in ("endurance_estimate", "media_units_written") or name.startswith("data_units"):
            text = f"{value:,} ({format_size(value * _BILLION)})"
        table.add_row(name.replace("_", " "), text)
    return [table]


def stage_tables(page: Page) -> list[Table]:
    totals = _fields("staging since power-on")
    for name, value in page["totals"].items():
        totals.add_row(name.replace("_", " "), _amount(name, value))
    newest = _table(
        "newest staging commands", "host", "model", "token", "sites", "bytes", "submitted", "took"
    )
    for entry in page["entries"][:_STAGE_ENTRIES_SHOWN]:
        timing = entry["timing"]
        newest.add_row(
            entry["host"][:8],
            str(entry["model"]),
            "-" if entry["token"] is None else str(entry["token"]),
            str(len(entry["sites"])),
            format_size(sum(site["length_bytes"] for site in entry["sites"])),
            format_ns(timing["submitted_ns"]),
            format_ns(timing["done_ns"] - timing["submitted_ns"]),
        )
    return [totals, newest]


def telemetry_tables(page: Page) -> list[Table]:
    head = _fields(f"telemetry of {page['drive']} ({page['serial']})")
    head.add_row("time", f"{page['time']}, {format_ns(page['clock_ns'])} since power-on")
    head.add_row("temperature", f"{page['celsius']:.1f} °C")
    for room in ("dram", "window", "unit_cache"):
        for name, value in page[room].items():
            whole = room == "dram" or name.endswith("bytes")
            text = format_size(value) if whole else f"{value:,}"
            head.add_row(f"{room.replace('_', ' ')}: {name.replace('_', ' ')}", text)
    for name, share in page["utilisation"].items():
        head.add_row(f"utilisation: {name.replace('_', ' ')}", f"{share:.2%}")
    return [head, _queue_table(page), _latency_table(page["latency"])]


def _queue_table(page: Page) -> Table:
    table = _table("queue pairs", "queue", "host", "depth", "in flight", "completed")
    for queue in page["queues"]:
        table.add_row(
            *(str(queue[name]) for name in ("queue", "host", "depth", "in_flight", "completed"))
        )
    return table


def _latency_table(latency: Page) -> Table:
    table = _table("modelled latency since power-on", "command", "count", "mean", "p50", "p99")
    for kind, found in latency["kinds"].items():
        count = found["count"]
        table.add_row(
            kind,
            f"{count:,}",
            format_ns(found["sum_ns"] // count if count else 0),
            *(_quantile(latency["bounds_ns"], found["counts"], share) for share in (0.5, 0.99)),
        )
    return table


def _quantile(bounds_ns: list[int], counts: list[int], share: float) -> str:
    """The bound of the bucket that it lies in."""
    left = share * sum(counts)
    for bound_ns, count in zip(bounds_ns, counts, strict=False):
        left -= count
        if left <= 0:
            return f"≤ {format_ns(bound_ns)}"
    return f"> {format_ns(bounds_ns[-1])}"


def _when(entry: Page) -> str:
    return f"power cycle {entry['power_cycle']},\n{format_ns(entry['at_ns'])}"


def _data_units(units: int) -> str:
    return f"{units:,} ({format_size(units * _DATA_UNIT_BYTES)})"


def _amount(name: str, value: int) -> str:
    if name.endswith("_ns"):
        return format_ns(value)
    return format_size(value) if name.endswith("_bytes") else f"{value:,}"


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _fields(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("field", style="bold")
    table.add_column("value")
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


TABLES: dict[str, Callable[[Page], list[Table]]] = {
    "smart": smart_tables,
    "error": error_tables,
    "stage": stage_tables,
    "events": event_tables,
    "telemetry": telemetry_tables,
    "endurance": endurance_tables,
}
