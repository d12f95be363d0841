"""`csd overlap`: from a timeline of host and drive, how much of each is hidden by the other."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from host_client.calibrate.overlap import NotATimeline, Overlap, read_overlap
from host_client.cli.console import err, out
from host_client.cli.options import Json


def overlap(
    trace: Annotated[Path, typer.Argument(help="Of csd generate --time wall --trace.")],
    plot: Annotated[Path | None, typer.Option(help="Draw some tokens here, as a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Say how much of the drive's work hides behind compute, or the reverse.

    csd generate MODEL --prompt TEXT --time wall --trace t.json; csd overlap t.json --plot t.png
    """
    try:
        page = json.loads(trace.read_text())
    except ValueError as error:
        raise NotATimeline(f"{trace} is no trace: {error}") from error
    found = read_overlap(page)
    if plot:
        from host_client.calibrate.overlap_plot import write_overlap_plot

        write_overlap_plot(found, plot)
        err.print(f"wrote {plot}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(_figures(found)))
    else:
        out.print(_table(found))


def _figures(found: Overlap) -> dict[str, float | int | str]:
    per_token_ms = {
        "token_ms": found.whole_us,
        "computing_ms": found.computing_us,
        "drive_ms": found.drive_us,
        "both_ms": found.both_us,
    }
    return {
        "tokens": found.tokens,
        **{name: us / 1000 / found.tokens for name, us in per_token_ms.items()},
        "longer": "drive" if found.is_drive_longer else "compute",
        "hidden": found.hidden,
    }


def _table(found: Overlap) -> Table:
    figures = _figures(found)
    table = Table("of a token", "ms", show_header=True)
    table.add_row("in all", f"{figures['token_ms']:.2f}")
    table.add_row("the host computes", f"{figures['computing_ms']:.2f}")
    table.add_row("the drive works", f"{figures['drive_ms']:.2f}")
    table.add_row("both at once", f"{figures['both_ms']:.2f}")
    shorter = "compute" if found.is_drive_longer else "the drive's work"
    table.add_row(f"share of {shorter} that is hidden", f"{100 * found.hidden:.1f} %")
    return table
