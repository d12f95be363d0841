"""`csd table`: the headline table by one command, planned or measured."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.units import parse_size
from host_client.calibrate.headline import ROWS, Modelled, model_row, rows_of
from host_client.calibrate.headline_plot import write_headline_plot
from host_client.cli.catalog_commands import HostRate, parse_host_rate
from host_client.cli.console import EXIT_REQUEST, TimeMode, err, out
from host_client.cli.headline_tables import (
    MEASURED_COLUMNS,
    bars_of,
    measured_rows,
    planned_cells,
    planned_columns,
    planned_object,
)
from host_client.cli.options import Json, Time, UnitBits
from host_client.cli.outputs import Markdown, Plot, To, check_outputs, markdown_table
from host_client.cli.table_runs import Course, Measured, run_row
from host_client.driver.drive import cache_folder
from host_client.runtime.cgroup import Cgroup, Hierarchy, NoCgroup
from host_client.runtime.quality import Quality

_ALL = ",".join(row.shape for row in ROWS)
_Rows = Annotated[
    str,
    typer.Option(
        metavar="SHAPE,...",
        help="Which models: names as of pack --synthetic, or config.json files, which get 5/16 of "
        "their weights as their budget.",
    ),
]
_Active = Annotated[
    float, typer.Option(help="Share of the FFN neurons that a token keeps.", min=1e-6, max=0.99)
]
_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Run each row: packed as a synthetic model onto a drive of its own, generated from in "
        "a process that the kernel holds to the budget and the stated allowance.",
    ),
]
_Exact = Annotated[bool, typer.Option("--exact", help="Measure at exact quality as well.")]
_Media = Annotated[
    Path | None,
    typer.Option(
        help="Keep the rows' drives in this folder, and use what is there. Default: a folder that "
        "is removed."
    ),
]
_Preset = Annotated[str, typer.Option(help="Which drive, as csd-device drives lists them.")]
_Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What this machine may give a run; rows that take more run at a smaller budget. "
        "Default: what is free, less what the drive may still take.",
    ),
]


def table(
    rows: _Rows = _ALL,
    bits: Annotated[UnitBits, typer.Option(help="Of a unit's values.")] = UnitBits.SIXTEEN,
    active: _Active = 0.1,
    prompt_tokens: Annotated[int, typer.Option(help="Random ones.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="How many are generated.", min=2)] = 8,
    host_rate: HostRate = None,
    measure: _Measure = False,
    exact: _Exact = False,
    media: _Media = None,
    preset: _Preset = "edge-gen5-large",
    time: Time = TimeMode.VIRTUAL,
    memory: _Memory = None,
    plot: Plot = None,
    to: To = None,
    markdown: Markdown = False,
    as_json: Json = False,
) -> None:
    """The headline table: models of full size within a fraction of their memory.

    Without --measure, what the plan says of each model, from its config alone.
    """
    check_outputs(plot, to)
    course = Course(
        preset=preset,
        time=time,
        bits=bits.number,
        active=active,
        qualities=[*([Quality()] if exact else []), Quality.parse(active)],
        prompt_tokens=prompt_tokens,
        new_tokens=tokens,
        enforced=measure and _can_enforce(),
        memory_bytes=_memory_bytes(memory),
    )
    host_bytes_per_s = parse_host_rate(host_rate)
    modelled = [
        model_row(row, bits.number, active, prompt_tokens + tokens, host_bytes_per_s)
        for row in rows_of([shape.strip() for shape in rows.split(",")])
    ]
    runs = _measured(modelled, course, media) if measure else [[] for _ in modelled]
    told = [
        planned_object(row, bits.number, host_bytes_per_s)
        | {"measured": [run.model_dump() for run in of_row]}
        for row, of_row in zip(modelled, runs, strict=True)
    ]
    if to is not None:
        to.write_text(json.dumps(told, indent=1) + "\n")
    if plot is not None:
        write_headline_plot(list(map(bars_of, modelled, runs)), plot)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        _print(modelled, runs, active, markdown)
    if any(run.failure for of_row in runs for run in of_row):
        raise typer.Exit(EXIT_REQUEST)


def _measured(modelled: list[Modelled], course: Course, media: Path | None) -> list[list[Measured]]:
    with _folder(media) as folder:
        return [run_row(row, course, folder) for row in modelled]


def _print(
    modelled: list[Modelled], runs: list[list[Measured]], active: float, markdown: bool
) -> None:
    show = _show_markdown if markdown else _show
    show("modelled", planned_columns(active), map(planned_cells, modelled))
    if any(runs):
        cells = [line for row in map(measured_rows, modelled, runs) for line in row]
        show("measured", MEASURED_COLUMNS, cells)


def _show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    shown = Table(*columns, title=title, title_justify="left")
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def _show_markdown(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    typer.echo(f"{title}:\n\n{markdown_table(columns, rows)}\n")


def _can_enforce() -> bool:
    """Whether the kernel can hold a process to a limit here; says so where it cannot."""
    try:
        with Cgroup.made(Hierarchy.find(), "-probe"):
            return True
    except NoCgroup as error:
        err.print(f"no limit is kept, processes are measured alone: {error}", soft_wrap=True)
        return False


def _memory_bytes(text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """Where media lie: the folder that was named, else one that is removed."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="table-", dir=cache_folder()) as folder:
        yield Path(folder)
