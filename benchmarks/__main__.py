"""`python -m benchmarks [--json PATH] [--tiny] [NAME ...]`: run them and print ratios.

Exit status 1 when a ratio is below its floor (never with --tiny, which is too short to judge).
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.ratio import Ratio

BENCHMARKS = (
    "window_reads",
    "timeline",
    "random_reads",
    "stage_rate",
    "made_reads",
    "recovery",
    "program_rows",
    "unit_rows",
    "stage_latency",
    "generate",
    "expert_recall",
    "two_levels",
)


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    console = Console()
    ratios: list[Ratio] = []
    for name in options.names or BENCHMARKS:
        with console.status(f"running {name}"):
            ratios += import_module(f"benchmarks.{name}").run(options.tiny)
    console.print(_table(ratios))
    if options.json:
        rows = [ratio.as_json() for ratio in ratios]
        options.json.write_text(json.dumps({"tiny": options.tiny, "ratios": rows}, indent=2))
    return 0 if options.tiny or all(ratio.met for ratio in ratios) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the ratios there as well")
    parser.add_argument("--tiny", action="store_true", help="seconds in all; figures mean nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {BENCHMARKS}")
    return options


def _table(ratios: list[Ratio]) -> Table:
    table = Table(title="ours over the reference; more is better", show_lines=True)
    table.add_column("what")
    for column in ("ours", "reference", "ratio", "floor"):
        table.add_column(column, justify="right")
    for ratio in ratios:
        table.add_row(
            f"{ratio.name}\n[dim]against {ratio.against}\n{ratio.notes}",
            f"{_figure(ratio.ours)}\n[dim]{ratio.unit}",
            f"{_figure(ratio.reference)}\n[dim]{ratio.unit}",
            f"[{'green' if ratio.met else 'red'}]{ratio.ratio:.2f}",
            f"{ratio.floor:.2f}",
        )
    return table


def _figure(value: float) -> str:
    """Three digits or so: `3.21`, `12.3`, `1,741,000`."""
    if value >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
