"""The headline table as objects, for a terminal and for a document. Sizes are in GB of 10^9 bytes,
as memory is sold."""

from collections.abc import Iterator
from typing import Any

from csd_protocol.packed import Bits
from host_client.calibrate.headline import GB, Modelled, Outlook
from host_client.calibrate.headline_plot import Bars
from host_client.cli import reports
from host_client.cli.table_runs import Measured

MEASURED_COLUMNS = (
    *("model", "quality", "conventional", "budget", "limit", "peak", "process", "tokens/s"),
    *("prefill", "staged a token", "waited for the drive", "remark"),
)
_SHOWN_CLASSES = ("edge", "end")  # 14 and 7 GB/s


def planned_columns(active: float) -> list[str]:
    at = f"at {active:g}"
    return [
        *("model", "conventional", "on the drive", "budget", "resident"),
        *("staged a token, exact", at),
        *("tokens/s at 14 GB/s, exact", at, "at 7 GB/s, exact", at),
    ]


def planned_object(modelled: Modelled, bits: Bits, host_bytes_per_s: float) -> dict[str, Any]:
    """One row with stable keys; sizes in bytes."""
    return {
        "model": modelled.packed.name,
        "title": modelled.title,
        "bits": bits,
        "conventional_bytes": modelled.conventional_bytes,
        "plan": reports.plan_object(modelled.packed, modelled.plan),
        "modelled": [
            reports.times_object(outlook.times, outlook.quality, host_bytes_per_s)
            | {"staged_bytes_per_token": outlook.staged_bytes_per_token}
            for outlook in modelled.outlooks
        ],
    }


def planned_cells(modelled: Modelled) -> list[str]:
    plan, packed = modelled.plan, modelled.packed
    return [
        modelled.title,
        gigabytes(modelled.conventional_bytes),
        gigabytes(packed.weights_bytes),
        gigabytes(plan.budget_bytes),
        gigabytes(plan.resident_bytes),
        *(gigabytes(outlook.staged_bytes_per_token) for outlook in modelled.outlooks),
        *(_rate(outlook, name) for name in _SHOWN_CLASSES for outlook in modelled.outlooks),
    ]


def measured_rows(modelled: Modelled, runs: list[Measured]) -> Iterator[list[str]]:
    for run in runs:
        yield [
            modelled.title,
            run.quality,
            gigabytes(modelled.conventional_bytes),
            gigabytes(run.budget_bytes),
            *_measured_cells(run),
            _remark(modelled, run),
        ]


def _measured_cells(run: Measured) -> list[str]:
    report = run.report
    if report is None:
        return ["-"] * 7
    enforced = report.enforced
    return [
        gigabytes(enforced.limit_bytes) if enforced else "-",
        gigabytes(enforced.peak_bytes) if enforced else "-",
        gigabytes(report.host_peak_rss_bytes),
        f"{report.tokens_per_s:.2f}",
        f"{report.prefill_s:.1f} s",
        gigabytes(report.staged_bytes_per_token),
        f"{report.host_wait_s:.1f} s",
    ]


def _remark(modelled: Modelled, run: Measured) -> str:
    if run.failure is not None:
        return run.failure
    if run.budget_bytes < modelled.plan.budget_bytes:
        return f"this machine has no room for {gigabytes(modelled.plan.budget_bytes)}"
    if run.report is not None and run.report.enforced is None:
        return "no limit was kept: no control group"
    return ""


def _rate(outlook: Outlook, device_class: str) -> str:
    (time,) = (time for time in outlook.times if time.rates.name == device_class)
    return f"{time.tokens_per_s:.2f} ({time.bound})"


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / GB:.2f} GB" if size_bytes < 10 * GB else f"{size_bytes / GB:.1f} GB"


def bars_of(modelled: Modelled, runs: list[Measured]) -> Bars:
    enforced = [run.report.enforced for run in runs if run.report and run.report.enforced]
    return Bars(
        title=modelled.title,
        conventional_bytes=modelled.conventional_bytes,
        budget_bytes=runs[0].budget_bytes if runs else modelled.plan.budget_bytes,
        peak_bytes=max((of.peak_bytes for of in enforced), default=None),
    )
